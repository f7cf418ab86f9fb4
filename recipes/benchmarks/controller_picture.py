"""Draws what `controller.py` found: losses against serial, settings in force, gradient cosines over training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_layerpar.report.drawing import matplotlib_classes


def draw(result: dict[str, Any], path: Path) -> None:
    """One row a step size: validation loss minus serial's, convergence factors of the policies, gradient cosines."""
    figure_class, _ = matplotlib_classes()
    labels = list(result["summary"])
    figure = figure_class(figsize=(15, 4.2 * len(labels)), layout="constrained")
    grid = figure.subplots(len(labels), 3, squeeze=False)
    for row, label in zip(grid, labels, strict=True):
        runs = [run for run in result["runs"] if run["h"] == label]
        usual = min(run["steps"] for run in runs)
        runs = [run for run in runs if run["steps"] == usual]
        _losses(row[0], runs, label)
        _factors(row[1], runs, label)
        _cosines(row[2], runs, label)
    figure.savefig(path, dpi=100)


def _losses(axes: Any, runs: list[dict[str, Any]], label: str) -> None:
    serial = {run["seed"]: dict(map(tuple, run["evaluation"])) for run in runs if run["side"] == "serial"}
    sides = list(dict.fromkeys(run["side"] for run in runs if run["side"] != "serial" and "penalty" not in run["side"]))
    for i, side in enumerate(sides):
        of_side = [run for run in runs if run["side"] == side and run["seed"] in serial]
        for j, run in enumerate(of_side):
            points = [(step, loss - serial[run["seed"]][step]) for step, loss in run["evaluation"]]
            axes.plot(
                *zip(*points, strict=True), color=f"C{i % 10}", ls="-" if i < 10 else ":", label=None if j else side
            )
    axes.axhline(0, color="k", lw=0.8)
    axes.set(title=f"{label}: validation loss minus serial", xlabel="step", ylim=(-0.1, 0.6))
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
    rows = [row for run in runs if run["side"] == "serial" for row in run["gradients"] if "1/1 c=4" in row["settings"]]
    for name in dict.fromkeys(row["settings"] for row in rows):
        points = [(row["step"], row["cosine"]) for row in rows if row["settings"] == name]
        axes.plot(*zip(*points, strict=True), marker=".", label=name.removeprefix("mgrit "))
    axes.set(title=f"{label}: gradient cosine on the serial run", xlabel="step", ylim=(-0.1, 1.02))
    axes.legend(fontsize=7)
