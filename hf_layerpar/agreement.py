"""Gradients of one batch under several settings, compared with the exact one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.errors import ConfigurationError
from hf_layerpar.plan.ladder import exact_settings
from hf_layerpar.run.data_shards import group_along, local
from hf_layerpar.run.layers import kept_streams
from hf_layerpar.sharding import layer_parallel


class GradientProbe:
    """The gradients of one batch, with the same dropout masks under all settings. `.grad` and the caller's random
    stream are left alone. Every method is collective over the lp ranks.

    inputs: the batch, the same on all lp ranks. loss: what is differentiated, a mean over the batch; the model's own
        loss by default.
    The exact gradient and that of half the batch are computed once, when first needed, and kept: with the one compared,
    three times the memory of the own gradients.
    """

    def __init__(
        self, model: nn.Module, inputs: Mapping[str, Any], loss: Callable[[Mapping[str, Any]], Tensor] | None = None
    ) -> None:
        self.handle = layer_parallel(model)
        self.inputs = inputs
        self._loss = loss
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._params = [p for _, p in named]
        # what several ranks hold counts once
        self._counted = [self.handle.owner_of[name] == self.handle.lp_rank for name, _ in named]
        self._exact: tuple[list[Tensor], float] | None = None
        self._noise: float | None = None

    def gradient(
        self, config: LayerParallelConfig, inputs: Mapping[str, Any] | None = None
    ) -> tuple[list[Tensor], float]:
        """(gradients of the trainable parameters on this rank, loss) under `config`."""
        device = self._params[0].device
        before = [p.grad for p in self._params]
        # every gradient sees the same masks
        with kept_streams(device), self.handle.using(config):
            try:
                for p in self._params:
                    p.grad = None
                value = self.handle.train_step(self.inputs if inputs is None else inputs, self._loss)
                grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._params]
            finally:
                for p, grad in zip(self._params, before, strict=True):
                    p.grad = grad
        loss = value[0] if isinstance(value, tuple) else value
        return grads, float(loss)

    @property
    def exact(self) -> tuple[list[Tensor], float]:
        """The exact gradient and loss, by the pipeline."""
        if self._exact is None:
            self._exact = self.gradient(exact_settings(self.handle.config))
        return self._exact

    def compare(self, config: LayerParallelConfig) -> dict[str, float]:
        """cosine and norm_ratio (of this gradient over the exact one), bias (norm of their difference), exact_norm,
        loss and loss_exact."""
        exact, loss_exact = self.exact
        inexact, loss = self.gradient(config)
        dot, square, exact_square, bias = self._sums(
            lambda a, b: torch.stack([a @ b, a @ a, b @ b, (a - b) @ (a - b)]), inexact, exact
        )
        return {
            "cosine": dot / (square * exact_square) ** 0.5 if square * exact_square else 0.0,
            "norm_ratio": (square / exact_square) ** 0.5 if exact_square else float("inf"),
            "bias": bias**0.5,
            "exact_norm": exact_square**0.5,
            "loss": loss,
            "loss_exact": loss_exact,
        }

    @property
    def noise(self) -> float:
        """Standard deviation of the exact gradient that comes from the choice of the batch, as a norm.

        From the batch's two halves: with means g_a and g_b, ||g_a - g_b|| / 2 estimates that of their mean.
        Raises ConfigurationError for a batch of one.
        """
        noise = self._noise
        if noise is None:
            rows = batch_rows(self.inputs)
            if rows < 2:
                raise ConfigurationError(f"a batch of {rows} has no halves to compare; use at least 2 rows")
            half = {
                k: v[: rows // 2] if isinstance(v, Tensor) and v.ndim and len(v) == rows else v
                for k, v in self.inputs.items()
            }
            part, _ = self.gradient(exact_settings(self.handle.config), half)
            (square,) = self._sums(lambda a, b: ((a - b) @ (a - b))[None], part, self.exact[0])
            # g_a = g + (1 - share) (g_a - g_b), whatever share of the batch the first half is
            self._noise = noise = square**0.5 / (2 * (1 - rows // 2 / rows))
        return noise

    def _sums(self, of: Callable[[Tensor, Tensor], Tensor], left: list[Tensor], right: list[Tensor]) -> list[float]:
        """of(a, b) `[n]` summed over all parameters of all lp ranks, in float64."""
        parts: list[Tensor] = []
        cut: list[Tensor] = []  # tp ranks have other parts
        group = None
        for a, b, counted in zip(left, right, self._counted, strict=True):
            if counted:
                sums = of(local(a).double().flatten(), local(b).double().flatten())
                along = group_along(a, "tp")
                group = along or group
                (parts if along is None else cut).append(sums)
        if cut:
            parts.append(torch.stack(cut).sum(0))
            dist.all_reduce(parts[-1], group=group)
        probe = self._params[0].new_zeros(1, dtype=torch.float64)
        total = torch.stack(parts).sum(0) if parts else torch.zeros_like(of(probe, probe))
        self.handle.all_reduce(total)
        return total.tolist()


def batch_rows(inputs: Mapping[str, Any]) -> int:
    """Rows of a batch: the first dimension of its tensors; 0 where it has none."""
    return max((len(v) for v in inputs.values() if isinstance(v, Tensor) and v.ndim), default=0)


def gradient_agreement(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, float]:
    """The current settings' gradient against the exact one, for one batch with the same dropout masks.

    Returns cosine and norm ratio (inexact over exact) of the gradient of all trainable parameters, the norm of their
    difference (bias) and of the exact one, and both losses. `.grad` is left alone. Collective over the lp ranks.
    """
    probe = GradientProbe(model, inputs)
    return probe.compare(probe.handle.next_config)
