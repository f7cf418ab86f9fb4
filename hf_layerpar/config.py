"""Settings: how a model is read as an ODE, and how its layers are solved. Plain data, no torch."""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

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


# ---- a setting: a field of a dataclass, its check beside its type
Default = TypeVar("Default")


def setting(default: Default, help: str) -> Default:
    """A field with its one-line help, which commands and HfArgumentParser print."""
    return dataclasses.field(default=default, metadata={"help": help})


def help_of(kind: type, name: str) -> str:
    return kind.__dataclass_fields__[name].metadata["help"]


@cache
def checks_of(kind: type) -> dict[str, Check]:
    """Of the fields of a dataclass that have one, as in `Annotated[int, whole(1)]`."""
    hints = get_type_hints(kind, include_extras=True)
    checks = {f.name: getattr(hints[f.name], "__metadata__", None) for f in dataclasses.fields(kind)}
    return {name: found[0] for name, found in checks.items() if found}


def checked(settings: object, kind: type | None = None) -> None:
    """Puts every setting through its check. kind: whose fields, if not those of the object's own class."""
    for name, check in checks_of(kind or type(settings)).items():
        object.__setattr__(settings, name, check(name, getattr(settings, name)))  # frozen ones too


Count = Annotated[int, whole(1)]
Flag = Annotated[bool, flag]
Name = Annotated[str, text]
Iterations = Annotated[int, whole(0, MOST_ITERATIONS, "; 0 makes the sweep exact")]
StepSize = Annotated[float, real(lambda h: 0 < h <= 1, "in (0, 1]; 1 is the model as it is")]
Penalty = Annotated[float, real(lambda alpha: 0 <= alpha < math.inf, "finite and at least 0; 0 is no penalty")]


@dataclass(frozen=True, kw_only=True)
class OdeSettings:
    """How a model's layer stacks are read as Euler steps; stored in config.json under `CONFIG_KEY`."""

    step_size: StepSize = setting(1.0, "h of the inner steps, in (0, 1]; 1 is the model as it is.")
    form: Annotated[Form, one_of(Form)] = setting(
        "euler", "euler: x + h (layer(x) - x); split: h scales every residual branch inside the layer."
    )
    interpolation: Annotated[Interpolation, one_of(Interpolation)] = setting(
        "constant", "How weights of new layers are made: constant copies a layer, linear blends neighbours."
    )
    buffers: Annotated[Buffers, buffer_layers] = setting(
        (0, 0),
        "Layers of every stack that keep h = 1 and are always exact: the numbers of first and last ones, places of "
        "others between them, as in 2 11 2.",
    )
    folded: Flag = setting(False, "The stored weights contain h (split form only): a stock load computes the same.")
    stacks: Annotated[tuple[str, ...] | None, optional(names)] = setting(
        None, "Names of the layer lists that are read so; default: all that are found."
    )

    def __post_init__(self) -> None:
        checked(self)
        if self.folded and self.form != "split":
            raise ConfigurationError(f"folded=True needs form='split', not {self.form!r}: only that form folds exactly")

    def to_dict(self) -> dict[str, Any]:
        stacks = None if self.stacks is None else list(self.stacks)
        return dataclasses.asdict(self) | {"buffers": list(self.buffers), "stacks": stacks}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> OdeSettings:
        return cls(**_known_fields(cls, values))


@dataclass(kw_only=True)
class SolverSettings:
    """The fields that `LayerParallelConfig` and the Trainer's arguments share."""

    strategy: Annotated[Strategy, one_of(Strategy)] = setting(
        "pipeline",
        "pipeline: exact, micro-batches flow through the ranks' blocks of layers; mgrit: all intervals at once, "
        "inexact for few iterations.",
    )
    micro_batches: Count = setting(1, "Pieces that a step cuts its batch into (fewer where the batch is smaller).")
    schedule: Name = setting(
        "list", "Order of an exact step: gpipe, 1f1b, interleaved_1f1b, zb_h1, zb_v, or list (the shortest found)."
    )
    ends: Annotated[Ends, one_of(Ends)] = setting(
        "first_last", "Who computes head and loss: first_last (the last layers' rank), or spread (all, by rows)."
    )
    coarse_operator: Name = setting(
        "aggregate", "MGRIT: what stands in for an interval of layers: aggregate, rediscretize or identity."
    )
    coarsening: Annotated[int | tuple[int, ...], coarsening_factors] = setting(
        4, "MGRIT: fine steps per coarse step; one number, or one per coarse level, finest first."
    )
    relaxation: Annotated[Relaxation, one_of(Relaxation)] = setting(
        "F", "MGRIT: F, or FCF (one more relaxation before every correction)."
    )
    forward_iterations: Iterations = setting(
        1, "MGRIT, forward sweep: 1 is the nested start and a relaxation, each one more a correction; 0 is exact."
    )
    backward_iterations: Iterations = setting(1, "MGRIT: the same, of the backward sweep.")
    acceleration: Annotated[Acceleration, one_of(Acceleration)] = setting(
        "none", "MGRIT: krylov combines two or more backward iterations, row by row, to the smallest residual."
    )
    increment_penalty: Penalty = setting(
        0.0, "Weight of a penalty on what layers between the buffers add to the state, relative to it."
    )
    stacked: Flag = setting(
        False, "MGRIT on one device: evaluate layers that don't depend on each other as one, with stacked weights."
    )
    cuda_graphs: Flag = setting(
        False, "One GPU: capture what the layers do in a step as CUDA graphs, and replay these in later steps."
    )


@dataclass(kw_only=True, unsafe_hash=True)
class LayerParallelConfig(SolverSettings):
    """How the layers of a converted model are solved over the lp ranks; its fields are those of `SolverSettings`.

    It can't be changed: `dataclasses.replace` makes another.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        # a frozen dataclass shares no fields with one that isn't, as the Trainer's arguments must not be
        if name in vars(self):
            raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")
        super().__setattr__(name, value)

    def __post_init__(self) -> None:
        checked(self)
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


def sweeps(forward: int, backward: int) -> str:
    """Iterations of both ways, as in "2/1"; none make a sweep exact, as in "exact/1"."""
    return f"{forward or 'exact'}/{backward or 'exact'}"


def describe(config: LayerParallelConfig, *, pieces: bool = False) -> str:
    """A short name, such as "mgrit aggregate exact/1 c=4 FCF krylov". pieces: schedule, micro-batches and ends too."""
    words = [config.strategy]
    if config.strategy == "mgrit":
        words += [config.coarse_operator, sweeps(config.forward_iterations, config.backward_iterations)]
        words += [f"c={','.join(map(str, config.factors))}", *(["FCF"] if config.relaxation == "FCF" else [])]
        words += [config.acceleration] if config.acceleration != "none" else []
    elif pieces and config.schedule != SolverSettings.schedule:
        words.append(config.schedule)
    name = " ".join(words)
    if not pieces:
        return name
    name += f", {config.micro_batches} micro-batch{'es' if config.micro_batches > 1 else ''}"
    return f"{name}, spread ends" if config.ends == "spread" else name


def _known_fields(cls: type, values: Any) -> dict[str, Any]:
    names = [f.name for f in dataclasses.fields(cls)]
    if not isinstance(values, Mapping):
        raise ConfigurationError(f"{shown(values)} is no {cls.__name__}; give a dict with keys of {names}")
    unknown = sorted(map(shown, set(values) - set(names)))
    if unknown:
        raise ConfigurationError(f"unknown {cls.__name__} keys [{', '.join(unknown)}]; known keys are {names}")
    return dict(values)
