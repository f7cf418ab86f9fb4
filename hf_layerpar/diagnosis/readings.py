"""What a diagnosis holds: plain data, without torch, so that it can be judged, stored and drawn anywhere."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from hf_layerpar.config import Buffers, LayerParallelConfig, describe
from hf_layerpar.plan.costs import Costs

FORMAT = 1
"""Version of `Diagnosis.to_dict`."""


@dataclass(frozen=True, kw_only=True)
class LayerReading:
    """One step S of a stack, read at the exact state x that enters it; its increment is S(x) - x, that is h F(x).

    increment: ||S(x) - x|| / ||x||.
    lipschitz: largest singular value of the increment's Jacobian at x, over the rows of the batch (a lower bound that
        power iteration approaches).
    growth: ||S(x)|| / ||x||.
    outlier: largest norm of a token of S(x), over the median token's.
    adjoint: growth of the loss's exact gradient through the step, ||dL/dx|| / ||dL/dS(x)||.
    """

    stack: str
    index: int
    step_size: float
    increment: float
    lipschitz: float
    growth: float
    outlier: float
    adjoint: float


@dataclass(frozen=True, kw_only=True)
class BufferTrial:
    """What buffers do for the gradient of one setting on the first batch: its cosine with the exact one."""

    buffers: Buffers
    cosine: float


@dataclass(frozen=True, kw_only=True)
class SettingReading:
    """One setting against the exact solve of the same batches, with the same dropout masks; the worst over `batches`.

    config: the setting, with one micro-batch (their number changes no gradient).
    state_error: of the state behind the stack, relative (of two stacks the worse).
    loss_error: relative.
    cosine, norm_ratio: of the gradient of all parameters in the layers, inexact over exact. The ends are left out: a
        large vocabulary would hide what happens in the layers.
    bias_to_noise: ||g - g_exact|| over the batch noise of g_exact (see `Diagnosis.noise`); None for one row.
    forward_factor, backward_factor: ||r2|| / ||r1||, how much a second iteration shrinks the residual of that sweep
        (arXiv 2601.09026, section 4; above 1 it diverges); None for an exact sweep.
    """

    config: LayerParallelConfig
    state_error: float
    loss_error: float
    cosine: float
    norm_ratio: float
    bias_to_noise: float | None
    forward_factor: float | None
    backward_factor: float | None
    batches: int = 1

    @property
    def name(self) -> str:
        return describe(self.config).removeprefix("mgrit ")


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A setting's step over the lp ranks by the simulator, in seconds of this machine; `share` is that over serial.

    config: with the number of micro-batches that makes it fastest. split: for `parallelize`. bytes: that the fullest
    rank holds at most, parameters, gradients and AdamW's states included.
    """

    config: LayerParallelConfig
    split: Literal["interleaved"] | None
    seconds: float
    share: float
    bytes: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """What to train with, and why in one sentence.

    config, split: for `parallelize`. buffers: for `convert_to_ode` of a model at step size 1.
    best: the setting that the verdict speaks of: the suggested one, or the best of those turned down (None: no setting
        could be measured).
    """

    friendly: bool
    config: LayerParallelConfig
    split: Literal["interleaved"] | None
    buffers: Buffers
    best: SettingReading | None
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What `diagnose` found.

    rows, tokens: B and T of the first batch's state. loss: exact, of the first batch.
    noise: batch noise of the exact gradient, ||g_a - g_b|| / 2 for the halves a and b of a batch, over ||g||; None for
        one row. It is that of a batch of this size: four times the rows have half of it.
    trials: of buffers, where they were to be found.
    predictions: the fastest of each setting, in the order of `settings`. pipeline: the fastest exact one.
    seconds: that the diagnosis took.
    """

    model: str
    training: bool
    rows: int
    tokens: int
    batches: int
    ranks: int
    buffers: Buffers
    loss: float
    noise: float | None
    layers: tuple[LayerReading, ...]
    trials: tuple[BufferTrial, ...]
    settings: tuple[SettingReading, ...]
    predictions: tuple[Prediction, ...]
    pipeline: Prediction
    costs: dict[str, Costs]
    suggestion: Suggestion
    seconds: float

    @property
    def verdict(self) -> str:
        return self.suggestion.verdict

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values; numbers that are not finite become None."""
        values = {"format": FORMAT, **dataclasses.asdict(self)}
        for setting, prediction in zip(values["settings"], values.pop("predictions"), strict=True):
            setting["predicted"] = prediction
        return _as_json(values)


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
