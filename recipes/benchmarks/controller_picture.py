"""Draws what `controller.py` found: losses against serial, settings in force, gradient cosines over training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_layerpar.plan.operators import OPERATORS
from hf_layerpar.report.drawing import matplotlib_classes

COLOURS = {
    "adaptive": "#2f855a",
    "raise": "#805ad5",
    "paper": "#c05621",
    "pure aggregate c=4 1/1": "#2b6cb0",
    "pure rediscretize c=4 1/1": "#d69e2e",
    "pure identity c=4 1/1": "#e53e3e",
}
"""Of the sides that are drawn; the others stand in the table."""


def draw(result: dict[str, Any], path: Path) -> None:
    """One row a step size: validation loss minus serial's, convergence factors of the policies, gradient cosines."""
    figure_class, _ = matplotlib_classes()
    labels = list(result["summary"])
    figure = figure_class(figsize=(15, 4.2 * len(labels) + 0.4), layout="constrained")
    grid = figure.subplots(len(labels), 3, squeeze=False)
    for row, label in zip(grid, labels, strict=True):
        runs = [run for run in result["runs"] if run["h"] == label]
        usual = min(run["steps"] for run in runs)
        runs = [run for run in runs if run["steps"] == usual]
        _losses(row[0], runs, label)
        _factors(row[1], runs, label)
        _cosines(row[2], runs, label)
    figure.suptitle(_headline(result["summary"]), fontsize=12, fontweight="bold")
    figure.savefig(path, dpi=100)


def _headline(summary: dict[str, Any]) -> str:
    """What the adaptive controller came to at each step size, beside the paper's policy."""
    found = []
    for label, table in summary.items():
        worst = {
            side: max(table["sides"][side]["minus_serial"].values())
            for side in ("adaptive", "paper")
            if side in table["sides"]
        }
        found.append(f"{label}: " + ", ".join(f"{side} at most {loss:+.3f}" for side, loss in worst.items()))
    return "Last validation loss minus serial's. " + "; ".join(found)


def _losses(axes: Any, runs: list[dict[str, Any]], label: str) -> None:
    serial = {run["seed"]: dict(map(tuple, run["evaluation"])) for run in runs if run["side"] == "serial"}
    for side, colour in COLOURS.items():
        of_side = [run for run in runs if run["side"] == side and run["seed"] in serial]
        for j, run in enumerate(of_side):
            points = [(step, loss - serial[run["seed"]][step]) for step, loss in run["evaluation"]]
            axes.plot(*zip(*points, strict=True), color=colour, lw=1.3, label=None if j else side)
    axes.axhline(0, color="k", lw=0.8)
    axes.set(title=f"{label}: validation loss minus serial's, a line a seed", xlabel="step", ylim=(-0.05, 0.6))
    axes.legend(fontsize=7)


def _factors(axes: Any, runs: list[dict[str, Any]], label: str) -> None:
    for side, style in (("paper", "-"), ("raise", "--"), ("adaptive", ":")):
        for run in [r for r in runs if r["side"] == side][:1]:
            for direction, color in (("forward", "C0"), ("backward", "C3")):
                key = f"lp_check_rho_{direction}"
                points = [(e["step"], e[key]) for e in run["checks"] if key in e]
                if points:
                    axes.plot(*zip(*points, strict=True), color=color, ls=style, label=f"{side} {direction}")
            for entry in run["checks"]:
                if "lp_check_reason" in entry:
                    axes.axvline(entry["step"], color="0.7", ls=style, lw=0.8)
    axes.axhline(1, color="k", lw=0.8)
    axes.set(title=f"{label}: convergence factor; switches in grey", xlabel="step")
    axes.legend(fontsize=7)


def _cosines(axes: Any, runs: list[dict[str, Any]], label: str) -> None:
    rows = [row for run in runs if run["side"] == "serial" for row in run["gradients"]]
    for operator in OPERATORS:
        points = [(row["step"], row["cosine"]) for row in rows if row["settings"] == f"mgrit {operator} 1/1 c=4"]
        colour = COLOURS[f"pure {operator} c=4 1/1"]
        axes.plot(*zip(*points, strict=True), marker=".", color=colour, label=f"{operator} 1/1 c=4")
    axes.set(title=f"{label}: gradient cosine on the serial run", xlabel="step", ylim=(-0.1, 1.02))
    axes.legend(fontsize=7)
