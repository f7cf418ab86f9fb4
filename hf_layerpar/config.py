"""Settings: how a model is read as an ODE, and how its layers are solved. Plain data, no torch."""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, get_args

from hf_layerpar.errors import ConfigurationError

CONFIG_KEY = "hf_layerpar"
"""Key of a model's config.json that holds its `OdeSettings`."""

Form = Literal["euler", "split"]
Interpolation = Literal["constant", "linear"]
Strategy = Literal["pipeline", "mgrit"]
Relaxation = Literal["F", "FCF"]
Ends = Literal["first_last", "spread"]
Acceleration = Literal["none", "krylov"]
Buffers = tuple[int, ...]
"""(open, close), or (open, places of single layers between, ascending, close): see `buffer_places`."""

MOST = 10**9
"""Largest whole number that a setting may be, where it has no limit of its own."""

MOST_ITERATIONS = 1000
"""Of a sweep: each is written out as tasks, and far fewer make it exact."""

MOST_STEPS = 100_000
"""Inner steps of a stack, each a layer in memory."""

MOST_LEVELS = 30
"""Coarse levels: each has half the steps of the one before or fewer."""

# ---- what a setting may be
Check = Callable[[str, Any], Any]
"""(name of a setting, value given) -> the value to keep, of a plain type. Raises ConfigurationError that names the
value, the limit and the remedy."""

_SHORT = reprlib.Repr()
_SHORT.maxlist = _SHORT.maxtuple = 20
_SHORT.maxstring = _SHORT.maxother = 80


def shown(value: Any) -> str:
    """The repr of any value, in one short line."""
    try:
        return " ".join(_SHORT.repr(value).split())
    except ValueError:  # a number of more digits than Python writes
        return f"a number of type {type(value).__name__} with thousands of digits"


def one_of(choices: Any) -> Check:
    """choices: a Literal of strings."""
    names = get_args(choices)

    def check(name: str, value: Any) -> Any:
        if not isinstance(value, str) or value not in names:
            raise ConfigurationError(f"{name}={shown(value)} is unknown; use one of {', '.join(names)}")
        return value

    return check


def whole(low: int, high: int = MOST, remedy: str = "") -> Check:
    """An integer from `low` to `high`; True and 2.0 are none."""

    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < low:
            raise ConfigurationError(f"{name}={shown(value)} must be an integer of at least {low}{remedy}")
        if int(value) > high:
            raise ConfigurationError(f"{name}={shown(value)} must be at most {high}{remedy}")
        return int(value)

    return check


def real(allowed: Callable[[float], bool], limit: str) -> Check:
    """A number, true of `allowed`. limit: says which."""

    def check(name: str, value: Any) -> float:
        number = math.nan
        if isinstance(value, Real) and not isinstance(value, bool):
            try:
                number = float(value)
            except OverflowError:
                number = math.inf
        if not allowed(number):
            raise ConfigurationError(f"{name}={shown(value)} must be {limit}")
        return number

    return check


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigurationError(f"{name}={shown(value)} must be True or False")
    return value


def text(name: str, value: Any) -> str:
    if not isinstance(value, str) or len(value) > 100:
        raise ConfigurationError(f"{name}={shown(value)} must be a name, of at most 100 characters")
    return value


def optional(check: Check) -> Check:
    return lambda name, value: None if value is None else check(name, value)


def buffer_layers(name: str, value: Any) -> Buffers:
    if not isinstance(value, list | tuple) or len(value) < 2:
        raise ConfigurationError(
            f"{name}={shown(value)} must be two integers (open, close), or more: (open, places between, close)"
        )
    opening, *between, closing = (whole(0)(f"{name}[{i}]", count) for i, count in enumerate(value))
    for before, place in zip([opening - 1, *between], between, strict=False):
        if place <= before:
            raise ConfigurationError(
                f"{name}={shown(value)}: place {place} comes after {before}; give the places between the first "
                f"{opening} and the last {closing} layers in ascending order"
            )
    return opening, *between, closing


def buffer_places(buffers: Buffers, num_layers: int) -> frozenset[int]:
    """The places of the buffer layers in a stack of `num_layers`: the first and the last ones, and those in between.

    Raises ConfigurationError for a place that isn't between them, and when no layer is left.
    """
    opening, *between, closing = buffers
    rest = num_layers - opening - closing - len(between)
    if rest < 1:
        raise ConfigurationError(
            f"buffers={buffers} leave {max(0, rest)} of {num_layers} layers between them; use fewer buffer layers"
        )
    if between and between[-1] >= num_layers - closing:
        raise ConfigurationError(
            f"buffers={buffers} of {num_layers} layers: layer {between[-1]} is not between the first {opening} and the "
            f"last {closing}; use places from {opening} to {num_layers - closing - 1}"
        )
    return frozenset((*range(opening), *between, *range(num_layers - closing, num_layers)))


def gathered(buffers: Buffers, num_layers: int) -> Buffers:
    """The same layers, those next to the first and the last ones counted among these."""
    places = buffer_places(buffers, num_layers)
    inner = [n for n in range(num_layers) if n not in places]
    first, last = inner[0], inner[-1]
    return first, *(n for n in sorted(places) if first < n < last), num_layers - 1 - last


def num_buffers(buffers: Buffers) -> int:
    return buffers[0] + len(buffers) - 2 + buffers[-1]


def names(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not value or not all(isinstance(item, str) for item in value):
        raise ConfigurationError(f"{name}={shown(value)} must be a list of names")
    return tuple(value)


def coarsening_factors(name: str, value: Any) -> int | tuple[int, ...]:
    """One number as such, several as a tuple: one spelling of one setting."""
    given = value if isinstance(value, list | tuple) else (value,)
    if not given:
        raise ConfigurationError(f"{name}={shown(value)} gives no coarse level; give at least one number")
    if len(given) > MOST_LEVELS:
        raise ConfigurationError(
            f"{name}={shown(value)} gives {len(given)} coarse levels; give at most {MOST_LEVELS} numbers"
        )
    factors = tuple(whole(2)(name, c) for c in given)
    return factors[0] if len(factors) == 1 else factors


def checked(settings: object, checks: Mapping[str, Check]) -> None:
    """Puts every setting through its check."""
    for name, check in checks.items():
        object.__setattr__(settings, name, check(name, getattr(settings, name)))  # frozen ones too


ODE_CHECKS: dict[str, Check] = {
    "step_size": real(lambda h: 0 < h <= 1, "in (0, 1]; 1 is the model as it is"),
    "form": one_of(Form),
    "interpolation": one_of(Interpolation),
    "buffers": buffer_layers,
    "folded": flag,
    "stacks": optional(names),
}
_ITERATIONS = whole(0, MOST_ITERATIONS, "; 0 makes the sweep exact")
_SOLVER: dict[str, Check] = {
    "strategy": one_of(Strategy),
    "micro_batches": whole(1),
    "schedule": text,
    "ends": one_of(Ends),
    "coarse_operator": text,
    "coarsening": coarsening_factors,
    "relaxation": one_of(Relaxation),
    "forward_iterations": _ITERATIONS,
    "backward_iterations": _ITERATIONS,
    "acceleration": one_of(Acceleration),
    "increment_penalty": real(lambda alpha: 0 <= alpha < math.inf, "finite and at least 0; 0 is no penalty"),
    "stacked": flag,
}


@dataclass(frozen=True, kw_only=True)
class OdeSettings:
    """How a model's layer stacks are read as Euler steps; stored in config.json under `CONFIG_KEY`.

    step_size: h of the inner steps (buffer layers always have h = 1).
    form: "euler" x + h (layer(x) - x), or "split" (h scales every residual branch inside the layer).
    interpolation: how the weights of a refined stack were made from the original layers.
    buffers: layers of every stack that keep h = 1 and are always computed exactly: (open, close), the first and the
        last ones, or (open, places of layers between, close), as in (2, 11, 2).
    folded: the stored weights already contain h (split form only), so a stock load computes the same function.
    stacks: names of the layer lists that are read so; None for all that are found.
    """

    step_size: float = 1.0
    form: Form = "euler"
    interpolation: Interpolation = "constant"
    buffers: Buffers = (0, 0)
    folded: bool = False
    stacks: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        checked(self, ODE_CHECKS)
        if self.folded and self.form != "split":
            raise ConfigurationError(f"folded=True needs form='split', not {self.form!r}: only that form folds exactly")

    def to_dict(self) -> dict[str, Any]:
        stacks = None if self.stacks is None else list(self.stacks)
        return dataclasses.asdict(self) | {"buffers": list(self.buffers), "stacks": stacks}

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
    acceleration: of the backward sweep, from two iterations on. "krylov": the combination of all iterates that has the
        smallest residual, for each row of the batch by itself; it takes one relaxation and one small all-reduce more.
        For hard networks, where the iterations diverge.
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
    acceleration: Acceleration = "none"
    increment_penalty: float = 0.0
    stacked: bool = False

    def __post_init__(self) -> None:
        checked(self, _SOLVER)
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


def _known_fields(cls: type, values: Any) -> dict[str, Any]:
    names = [f.name for f in dataclasses.fields(cls)]
    if not isinstance(values, Mapping):
        raise ConfigurationError(f"{shown(values)} is no {cls.__name__}; give a dict with keys of {names}")
    unknown = sorted(map(shown, set(values) - set(names)))
    if unknown:
        raise ConfigurationError(f"unknown {cls.__name__} keys [{', '.join(unknown)}]; known keys are {names}")
    return dict(values)
