"""What the solver measured, as entries of the Trainer's logs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from hf_layerpar.run.engine import SweepReport


def solver_log(report: Mapping[str, Mapping[str, SweepReport]]) -> tuple[dict[str, float], dict[str, str]]:
    """(numbers, modes) of the last forward and backward, from `LayerParallel.report()`.

    numbers: lp_forward_seconds and lp_forward_waited (the part spent waiting for other ranks), summed over the stacks;
        where the sweep was inexact also lp_forward_residual (after its last iteration) and lp_forward_factor (the
        largest convergence factor), the worst over the stacks; the same for backward. Where increments are penalised
        also lp_penalty, which the logged loss doesn't contain, summed over the stacks.
    modes: lp_forward_mode and lp_backward_mode, "exact" or "mgrit". Apart, because trackers take numbers only.
    """
    numbers: dict[str, float] = {}
    modes: dict[str, str] = {}
    penalties = [s["forward"].penalty for s in report.values() if "forward" in s]
    if any(penalty is not None for penalty in penalties):
        numbers["lp_penalty"] = sum(penalty for penalty in penalties if penalty is not None)
    for direction in ("forward", "backward"):
        sweeps = [stack[direction] for stack in report.values() if direction in stack]
        if sweeps:
            modes[f"lp_{direction}_mode"] = "mgrit" if any(sweep.mode == "mgrit" for sweep in sweeps) else "exact"
            numbers |= {f"lp_{direction}_{name}": value for name, value in _numbers(sweeps)}
    return numbers, modes


def _numbers(sweeps: list[SweepReport]) -> Iterator[tuple[str, float]]:
    yield "seconds", sum(sweep.seconds for sweep in sweeps)
    yield "waited", sum(sweep.waited for sweep in sweeps)
    if residuals := [sweep.residuals[-1] for sweep in sweeps if sweep.residuals]:
        yield "residual", max(residuals)
    if factors := [factor for sweep in sweeps for factor in sweep.convergence_factors]:
        yield "factor", max(factors)
