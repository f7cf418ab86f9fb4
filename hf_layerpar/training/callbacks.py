"""What the solver measured, as entries of the Trainer's logs."""

from __future__ import annotations

from collections.abc import Iterator

from hf_layerpar.run.step_report import StepReport, SweepReport


def solver_log(report: StepReport | None) -> tuple[dict[str, float], dict[str, str]]:
    """(numbers, modes) of the last training step, from `LayerParallel.report()`.

    numbers: lp_seconds and lp_waited (the part spent waiting for other ranks); where a sweep was inexact also
        lp_forward_residual (after its last iteration) and lp_forward_factor (the largest convergence factor), the worst
        over the stacks; the same for backward. Where increments are penalised also lp_penalty, which the logged loss
        doesn't contain, summed over the stacks.
    modes: lp_forward_mode and lp_backward_mode, "exact" or "mgrit". Apart, because trackers take numbers only.
    """
    if report is None:
        return {}, {}
    numbers = {"lp_seconds": report.seconds, "lp_waited": report.waited}
    modes: dict[str, str] = {}
    if report.penalty is not None:
        numbers["lp_penalty"] = report.penalty
    for direction in ("forward", "backward"):
        sweeps = [stack[direction] for stack in report.sweeps.values()]
        modes[f"lp_{direction}_mode"] = "mgrit" if any(sweep.mode == "mgrit" for sweep in sweeps) else "exact"
        numbers |= {f"lp_{direction}_{name}": value for name, value in _numbers(sweeps)}
    return numbers, modes


def _numbers(sweeps: list[SweepReport]) -> Iterator[tuple[str, float]]:
    if residuals := [sweep.residuals[-1] for sweep in sweeps if sweep.residuals]:
        yield "residual", max(residuals)
    if factors := [factor for sweep in sweeps for factor in sweep.convergence_factors]:
        yield "factor", max(factors)
