"""Draws what `paper.py` found of a system: loss or accuracy while training, the indicator, and the final figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_layerpar.report.drawing import matplotlib_classes


def draw(found: dict[str, Any], path: Path) -> None:
    """Three panels: the metric on the validation split while training, the convergence factors of the "paper" runs with
    the cosine of their gradients, and the metric after training minus serial's."""
    figure_class, _ = matplotlib_classes()
    figure = figure_class(figsize=(15, 4.2), layout="constrained")
    curves, indicator, finals = figure.subplots(1, 3)
    summary = found["summary"]
    colours = {side: f"C{i}" for i, side in enumerate(summary["sides"])}
    _curves(curves, found["runs"], _curve_metric(found), colours)
    _indicator(indicator, [run for run in found["runs"] if run["side"] == "paper"])
    _finals(finals, summary, colours)
    figure.savefig(path, dpi=100)


def _curve_metric(found: dict[str, Any]) -> str:
    """The system's metric, or the loss where that is measured after training only."""
    metric = found["summary"]["metric"]
    return metric if all(metric in entry for run in found["runs"] for entry in run["evaluation"]) else "loss"


def _curves(axes: Any, runs: list[dict[str, Any]], metric: str, colours: dict[str, str]) -> None:
    named = set()
    for run in runs:
        points = [(entry["step"], entry[metric]) for entry in run["evaluation"]]
        label = None if run["side"] in named else run["side"]
        named.add(run["side"])
        style = "-" if run["seed"] == runs[0]["seed"] else "--"
        axes.plot(*zip(*points, strict=True), color=colours[run["side"]], ls=style, lw=1.2, label=label)
    axes.set(title=f"validation {metric}; dashed: other seeds", xlabel="step")
    axes.legend(fontsize=8)


def _indicator(axes: Any, runs: list[dict[str, Any]]) -> None:
    quantities = (
        ("lp_check_rho_forward", "convergence factor, forward", "C0"),
        ("lp_check_rho_backward", "convergence factor, backward", "C3"),
        ("lp_check_cosine", "gradient cosine", "C2"),
    )
    for i, run in enumerate(runs):
        for key, label, colour in quantities:
            points = [(entry["step"], entry[key]) for entry in run["checks"] if key in entry]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, ls="--" if i else "-", label=None if i else label)
        for entry in run["checks"]:
            if "lp_check_reason" in entry:
                axes.axvline(entry["step"], color="0.6", lw=0.8, ls="--" if i else "-")
    axes.axhline(1, color="k", lw=0.8)
    axes.set(title="the paper's settings: indicator; switches in grey", xlabel="step")
    if any(key in entry for run in runs for entry in run["checks"] for key, *_ in quantities[:2]):
        axes.set_ylim(-0.05, 1.3)
    else:  # exact sweeps, and those of one iteration, have no factor: the cosine alone, near 1
        axes.set_title("the paper's settings: gradient cosine (no convergence factor)")
    axes.legend(fontsize=8)


def _finals(axes: Any, summary: dict[str, Any], colours: dict[str, str]) -> None:
    sides = [side for side, row in summary["sides"].items() if not side.startswith("serial") and row["minus_serial"]]
    for place, side in enumerate(sides):
        values = list(summary["sides"][side]["minus_serial"].values())
        axes.plot([place] * len(values), values, "o", color=colours[side])
    spread = summary["serial_spread"]
    axes.axhspan(-spread, spread, color="0.9", label="spread of serial's seeds")
    axes.axhline(0, color="k", lw=0.8)
    axes.set_xticks(range(len(sides)), [side.replace(", ", ",\n") for side in sides], fontsize=8)
    better = "more" if summary["more_is_better"] else "less"
    axes.set(title=f"{summary['metric']} after training minus serial's ({better} is better)")
    axes.legend(fontsize=8)
