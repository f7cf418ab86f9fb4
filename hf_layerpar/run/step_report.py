"""What a step measured, put together from what its ranks did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch

from hf_layerpar.plan.tasks import Direction, Plan
from hf_layerpar.run.step import Outcome
from hf_layerpar.run.transport import Transport


@dataclass(frozen=True)
class SweepReport:
    """What one sweep measured.

    residuals: C-point residual norm ||r|| after each iteration, over all lp ranks and micro-batches (empty for an exact
        sweep).
    convergence_factors: ||r^(k+1)|| / ||r^(k)|| (arXiv 2601.09026, section 4); above 1 the sweep diverges.
    """

    mode: Literal["exact", "mgrit"]
    iterations: int = 0
    residuals: tuple[float, ...] = ()

    @property
    def convergence_factors(self) -> tuple[float, ...]:
        return tuple(b / a if a else 0.0 for a, b in pairwise(self.residuals))


@dataclass(frozen=True)
class StepReport:
    """What the last training step measured.

    sweeps: by stack path and direction. seconds, waited: wall time of the step on this rank, and the part of it spent
    waiting for messages. penalty: the increment penalty that the step adds to the loss, alpha included; None where it
    is off. stacked: independent layers were evaluated together.
    """

    sweeps: Mapping[str, Mapping[Direction, SweepReport]]
    seconds: float
    waited: float
    penalty: float | None = None
    stacked: bool = False


def report_of(
    outcome: Outcome, plan: Plan, paths: Sequence[str], transport: Transport, device: torch.device
) -> StepReport:
    """paths: of each pass, that of its stack. Collective when the step was inexact or penalised increments."""
    sweeps: dict[str, dict[Direction, SweepReport]] = {}
    residuals = outcome.residuals
    for k, path in enumerate(paths):
        for direction in ("forward", "backward"):
            iterations = plan.iterations.get((k, direction))
            if iterations is None:
                sweeps.setdefault(path, {})[direction] = SweepReport("exact")
                continue
            mine = residuals.get((k, direction))
            total = torch.zeros(iterations, dtype=torch.float64) if mine is None else mine.double()
            total = total.to(device).clone()
            transport.all_reduce(total)
            sweeps.setdefault(path, {})[direction] = SweepReport("mgrit", iterations, tuple(total.sqrt().tolist()))
    penalty = None
    if outcome.penalties:
        total = torch.stack(list(outcome.penalties.values())).sum()
        transport.all_reduce(total)
        penalty = float(total)
    return StepReport(
        sweeps,
        outcome.working.seconds,
        outcome.waiting.seconds,
        penalty,
        any(task.wave >= 0 for task in plan.tasks),
    )
