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
from hf_layerpar.run.gradients import Agreement, batch_noise, first_half, gradients_aside, products
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
        # every gradient sees the same masks
        with kept_streams(device), self.handle.using(config), gradients_aside(self._params):
            value = self.handle.train_step(self.inputs if inputs is None else inputs, self._loss)
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._params]
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
        found = self._against(inexact, exact)
        return {key: getattr(found, key) for key in ("cosine", "norm_ratio", "bias", "exact_norm")} | {
            "loss": loss,
            "loss_exact": loss_exact,
        }

    @property
    def noise(self) -> float:
        """`batch_noise` of the exact gradient. Raises ConfigurationError for a batch of one."""
        noise = self._noise
        if noise is None:
            rows = batch_rows(self.inputs)
            if rows < 2:
                raise ConfigurationError(f"a batch of {rows} has no halves to compare; use at least 2 rows")
            part, _ = self.gradient(exact_settings(self.handle.config), first_half(self.inputs, rows))
            self._noise = noise = batch_noise(self._against(part, self.exact[0]), rows)
        return noise

    def _against(self, gradient: list[Tensor], exact: list[Tensor]) -> Agreement:
        """Over all parameters of all lp ranks."""
        parts: list[Tensor] = []
        cut: list[Tensor] = []  # tp ranks have other parts
        group = None
        for a, b, counted in zip(gradient, exact, self._counted, strict=True):
            if counted:
                along = group_along(a, "tp")
                group = along or group
                (parts if along is None else cut).append(products(local(a), local(b)))
        if cut:
            parts.append(torch.stack(cut).sum(0))
            dist.all_reduce(parts[-1], group=group)
        total = torch.stack(parts).sum(0) if parts else self._params[0].new_zeros(4, dtype=torch.float64)
        self.handle.all_reduce(total)
        return Agreement(*total.tolist())


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
