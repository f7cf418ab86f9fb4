"""Measures settings of the solver against the exact solve, on a model's own loss.

Shapes: B batch, T tokens, D hidden; a state is `[B, T, D]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.diagnosis.readings import SettingReading
from hf_layerpar.errors import ConfigurationError
from hf_layerpar.plan.plan import Direction
from hf_layerpar.ode.stack import LayerStack
from hf_layerpar.run.transport import LocalTransport
from hf_layerpar.run.engine import StackEngine
from hf_layerpar.run.executor import RankPart
from hf_layerpar.run.program import LayerCall

Gradient = list[Tensor | None]
"""Of the layers' trainable parameters, in the order of `Bench.params`; None where the loss doesn't depend on one."""

EXACT = LayerParallelConfig(strategy="pipeline")


@dataclass
class _Settings:
    next_config: LayerParallelConfig = EXACT
    loss_scale: float = 1.0


class _MeasuringEngine(StackEngine):
    """An engine whose backward may be run with other settings than its forward, so that one forward serves many.

    end: the last state it returned.
    """

    end: Tensor

    def __call__(self, calls: Sequence[LayerCall], x: Tensor) -> Tensor:
        y = super().__call__(calls, x)
        self.end = y.detach()
        return y

    def _parts(self, config: LayerParallelConfig, micro_batches: int, **how: Any) -> Mapping[Direction, RankPart]:
        # not joined: a backward of other settings may need the graph of any single layer
        return _PartsOfTheMoment(lambda: super(_MeasuringEngine, self)._parts(self.settings.next_config, micro_batches))


class _PartsOfTheMoment(Mapping[Direction, RankPart]):
    """Parts that are looked up when a sweep begins."""

    def __init__(self, parts: Callable[[], Mapping[Direction, RankPart]]) -> None:
        self._parts = parts

    def __getitem__(self, direction: Direction) -> RankPart:
        return self._parts()[direction]

    def __iter__(self) -> Iterator[Direction]:
        return iter(self._parts())

    def __len__(self) -> int:
        return len(self._parts())


@dataclass(frozen=True)
class Forward:
    """One forward of the model, whose backward can be run any number of times.

    loss: with its graph. ends: the last state of every stack.
    """

    bench: Bench
    loss: Tensor
    ends: tuple[Tensor, ...]

    def gradient(self, config: LayerParallelConfig) -> Gradient:
        """By the backward of `config`, linearised at the states of this forward."""
        self.bench.settings.next_config = config
        return list(torch.autograd.grad(self.loss, self.bench.params, retain_graph=True, allow_unused=True))


class Bench:
    """A model's stacks on engines of this process, with `buffers` open and close layers solved exactly.

    Raises ConfigurationError when no parameter of any layer is trainable.
    """

    def __init__(self, model: nn.Module, stacks: Sequence[LayerStack], buffers: tuple[int, int]) -> None:
        self.model, self.stacks = model, tuple(stacks)
        self.settings = _Settings()
        self.engines = [
            _MeasuringEngine(LocalTransport(), (0,) * len(stack.layers), buffers, self.settings, stack)
            for stack in stacks
        ]
        layers = [layer for stack in stacks for layer in stack.layers]
        self.params = list(dict.fromkeys(p for layer in layers for p in layer.parameters() if p.requires_grad))
        if not self.params:
            raise ConfigurationError(
                f"0 of the parameters in the {len(layers)} layers of {type(model).__name__} require a gradient, so "
                "there is no gradient to compare; unfreeze some (or add adapters) first"
            )

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Forwards of the model inside run on the engines."""
        before = [stack.solver for stack in self.stacks]
        for stack, engine in zip(self.stacks, self.engines, strict=True):
            stack.solver = engine
        try:
            yield
        finally:
            for stack, solver in zip(self.stacks, before, strict=True):
                stack.solver = solver

    def forward(self, inputs: Mapping[str, Any], config: LayerParallelConfig) -> Forward:
        """The model's loss by the forward of `config`. Every forward of the same inputs sees the same dropout masks.

        Raises ConfigurationError when the model returns no loss for these inputs.
        """
        self.settings.next_config = config
        with torch.enable_grad(), preserved_random_stream(self.params[0].device):
            output = self.model(**inputs)
        loss = getattr(output, "loss", None)
        if not isinstance(loss, Tensor):
            raise ConfigurationError(
                f"{type(self.model).__name__} returned no loss for a batch of {sorted(inputs)}; add labels to the "
                "batch, or use the model class with the head that is to be trained"
            )
        return Forward(self, loss, tuple(engine.end for engine in self.engines))

    def factors(self, direction: Direction) -> float | None:
        """||r2|| / ||r1|| of the last sweep of this direction, the largest over the stacks; None with less than two
        iterations."""
        found = []
        for engine in self.engines:
            report = engine.report(direction)
            if report is not None and report.convergence_factors:
                found.append(report.convergence_factors[0])
        return max(found, default=None)


@dataclass(frozen=True)
class Reference:
    """The exact solve of one batch. noise: batch noise of its gradient, None for one row."""

    forward: Forward
    gradient: Gradient
    noise: float | None

    @property
    def norm(self) -> float:
        return _norm(self.gradient)


def exact_reference(bench: Bench, inputs: Mapping[str, Any]) -> Reference:
    """The exact gradient of a batch, and how far those of its two halves lie apart."""
    noise = None
    rows = batch_rows(inputs)
    if rows > 1:
        parts = [{k: v[s] if _has_rows(v, rows) else v for k, v in inputs.items()} for s in _halves(rows)]
        first, second = (bench.forward(part, EXACT).gradient(EXACT) for part in parts)
        noise = _norm(_difference(first, second)) / 2
    forward = bench.forward(inputs, EXACT)
    return Reference(forward, forward.gradient(EXACT), noise)


def read_settings(
    bench: Bench, inputs: Mapping[str, Any], reference: Reference, configs: Sequence[LayerParallelConfig]
) -> Iterator[SettingReading]:
    """One reading for each config, for one batch, in another order: settings with the same forward follow each other.

    The convergence factors are None but where a sweep makes two iterations.
    """
    by_forward: dict[tuple, list[LayerParallelConfig]] = {}
    for config in configs:
        iterations = config.forward_iterations
        same = (iterations, config.coarse_operator, config.coarsening) if iterations else ()
        by_forward.setdefault(same, []).append(config)
    for same, group in by_forward.items():
        forward = bench.forward(inputs, group[0]) if same else reference.forward
        forward_factor = bench.factors("forward") if same else None
        pairs = zip(forward.ends, reference.forward.ends, strict=True)
        state_error = max(float((a - b).float().norm() / b.float().norm()) for a, b in pairs)
        exact_loss = float(reference.forward.loss.detach())
        for config in group:
            gradient = forward.gradient(config)
            norm, exact_norm = _norm(gradient), reference.norm
            bias = _norm(_difference(gradient, reference.gradient))
            yield SettingReading(
                config=config,
                state_error=state_error,
                loss_error=abs(float(forward.loss.detach()) - exact_loss) / abs(exact_loss),
                cosine=_cosine(norm, exact_norm, bias),
                norm_ratio=norm / exact_norm,
                bias_to_noise=bias / reference.noise if reference.noise else None,
                forward_factor=forward_factor,
                backward_factor=bench.factors("backward"),
            )


def batch_rows(inputs: Mapping[str, Any]) -> int:
    """B of a batch: the first dimension of its first tensor."""
    for value in inputs.values():
        if isinstance(value, Tensor) and value.ndim > 0:
            return value.shape[0]
    raise ConfigurationError(f"a batch of {sorted(inputs)} holds no tensor; give what the model's forward takes")


@contextmanager
def preserved_random_stream(device: torch.device) -> Iterator[None]:
    """What is drawn inside leaves the main stream where it was."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        yield


def _has_rows(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == rows


def _halves(rows: int) -> tuple[slice, slice]:
    return slice(0, rows // 2), slice(rows // 2, rows // 2 * 2)


def _difference(first: Gradient, second: Gradient) -> Gradient:
    return [b if a is None else a if b is None else a - b for a, b in zip(first, second, strict=True)]


def _norm(gradient: Gradient) -> float:
    return sum(float(g.float().norm()) ** 2 for g in gradient if g is not None) ** 0.5


def _cosine(norm: float, exact_norm: float, bias: float) -> float:
    """From the three sides of the triangle, which are at hand."""
    product = norm * exact_norm
    if not (math.isfinite(product) and math.isfinite(bias)):
        return math.nan
    return max(-1.0, min(1.0, (norm**2 + exact_norm**2 - bias**2) / (2 * product))) if product else 0.0
