"""Settings: how a model is read as an ODE, and how its layers are solved. Plain data, no torch."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from hf_layerpar.errors import ConfigurationError

CONFIG_KEY = "hf_layerpar"
"""Key of a model's config.json that holds its `OdeSettings`."""

Form = Literal["euler", "split"]
Interpolation = Literal["constant", "linear"]
Strategy = Literal["pipeline", "mgrit"]
Relaxation = Literal["F", "FCF"]
Ends = Literal["first_last", "spread"]


def _one_of(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise ConfigurationError(f"{name}={value!r} is unknown; use one of {', '.join(get_args(choices))}")


def _at_least(name: str, value: int, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigurationError(f"{name}={value!r} must be an integer of at least {low}")


@dataclass(frozen=True, kw_only=True)
class OdeSettings:
    """How a model's layer stacks are read as Euler steps; stored in config.json under `CONFIG_KEY`.

    step_size: h of the inner steps (buffer layers always have h = 1).
    form: "euler" x + h (layer(x) - x), or "split" (h scales every residual branch inside the layer).
    interpolation: how the weights of a refined stack were made from the original layers.
    buffers: open and close layers of every stack that keep h = 1 and are always computed exactly.
    folded: the stored weights already contain h (split form only), so a stock load computes the same function.
    """

    step_size: float = 1.0
    form: Form = "euler"
    interpolation: Interpolation = "constant"
    buffers: tuple[int, int] = (0, 0)
    folded: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "buffers", tuple(self.buffers))
        if not 0 < self.step_size <= 1:
            raise ConfigurationError(f"step_size={self.step_size!r} must be in (0, 1]; 1 is the model as it is")
        _one_of("form", self.form, Form)
        _one_of("interpolation", self.interpolation, Interpolation)
        if len(self.buffers) != 2:
            raise ConfigurationError(f"buffers={self.buffers!r} must be two integers (open, close)")
        for name, value in zip(("buffers[0]", "buffers[1]"), self.buffers, strict=True):
            _at_least(name, value, 0)
        if self.folded and self.form != "split":
            raise ConfigurationError(f"folded=True needs form='split', not {self.form!r}: only that form folds exactly")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"buffers": list(self.buffers)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> OdeSettings:
        return cls(**_known_fields(cls, values))


@dataclass(frozen=True, kw_only=True)
class LayerParallelConfig:
    """How the layers of a converted model are solved over the lp ranks.

    strategy: "pipeline" (exact: micro-batches flow through the ranks' blocks of layers) or "mgrit" (all intervals at
        once; inexact for few iterations).
    micro_batches: pieces the batch is cut into (fewer when the batch is smaller).
    schedule: the order of an exact step, see `hf_layerpar.plan.schedules`; "list" searches for the shortest.
    ends: which ranks compute embeddings, head and loss: "first_last" (those of the first and the last layers), or
        "spread" (every rank has a copy of head and loss and computes them for its rows of each micro-batch).
    coarse_operator: see `hf_layerpar.plan.operators`.
    coarsening: fine steps per coarse step: one number, or one for each coarse level, finest first.
    relaxation: "F" or "FCF".
    forward_iterations, backward_iterations: MGRIT iterations of each sweep; 1 is the nested start and one relaxation,
        each one more adds a coarse-grid correction. 0 makes that sweep exact.
    increment_penalty: alpha >= 0; adds alpha/2 sum_n mean |x_{n+1} - x_n|^2 / |x_n|^2, over the steps between buffers
        and over tokens, to the loss whose gradient is computed, exactly or not (`hf_layerpar.run.increments`).
    stacked: evaluate layers that don't depend on each other together, as one layer with stacked weights: for one GPU
        that spends its time on launches. Of "mgrit" on one lp rank; layers that can't be stacked are evaluated one at
        a time, with a warning that says why.
    """

    strategy: Strategy = "pipeline"
    micro_batches: int = 1
    schedule: str = "list"
    ends: Ends = "first_last"
    coarse_operator: str = "aggregate"
    coarsening: int | tuple[int, ...] = 4
    relaxation: Relaxation = "F"
    forward_iterations: int = 1
    backward_iterations: int = 1
    increment_penalty: float = 0.0
    stacked: bool = False

    def __post_init__(self) -> None:
        _one_of("strategy", self.strategy, Strategy)
        _one_of("ends", self.ends, Ends)
        _one_of("relaxation", self.relaxation, Relaxation)
        for name in ("schedule", "coarse_operator"):
            if not isinstance(getattr(self, name), str):
                raise ConfigurationError(f"{name}={getattr(self, name)!r} must be a name")
        _at_least("forward_iterations", self.forward_iterations, 0)
        _at_least("backward_iterations", self.backward_iterations, 0)
        _at_least("micro_batches", self.micro_batches, 1)
        penalty = self.increment_penalty
        if isinstance(penalty, bool) or not isinstance(penalty, int | float) or not 0 <= penalty < math.inf:
            raise ConfigurationError(f"increment_penalty={penalty!r} must be finite and at least 0; 0 is no penalty")
        if isinstance(self.coarsening, list):  # YAML and JSON have no tuples
            object.__setattr__(self, "coarsening", tuple(self.coarsening))
        if not self.factors:
            raise ConfigurationError("coarsening=() gives no coarse level; give at least one number")
        if len(self.factors) == 1:  # one spelling of one setting
            object.__setattr__(self, "coarsening", self.factors[0])
        for c in self.factors:
            _at_least("coarsening", c, 2)
        if not isinstance(self.stacked, bool):
            raise ConfigurationError(f"stacked={self.stacked!r} must be True or False")
        if self.stacked and self.increment_penalty:
            raise ConfigurationError(
                f"stacked=True with increment_penalty={self.increment_penalty}: the penalty looks at every layer by "
                "itself; use one of them"
            )
        if self.stacked and self.strategy != "mgrit":
            raise ConfigurationError(
                f"stacked=True with strategy={self.strategy!r}: an exact chain has no layers that don't depend on each "
                f"other; use strategy='mgrit' or stacked=False"
            )

    @property
    def factors(self) -> tuple[int, ...]:
        """The coarsening factor of each level but the coarsest, finest first."""
        return self.coarsening if isinstance(self.coarsening, tuple) else (self.coarsening,)

    @property
    def levels(self) -> int:
        return len(self.factors) + 1

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LayerParallelConfig:
        return cls(**_known_fields(cls, values))


def _known_fields(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    names = [f.name for f in dataclasses.fields(cls)]
    unknown = sorted(set(values) - set(names))
    if unknown:
        raise ConfigurationError(f"unknown {cls.__name__} keys {unknown}; known keys are {names}")
    return values
