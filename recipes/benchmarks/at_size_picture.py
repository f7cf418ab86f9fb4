"""Draws what `at_size.py` found: losses against serial's, and gradient cosines as the exact run trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_layerpar.report.drawing import matplotlib_classes


def draw(result: dict[str, Any], path: Path) -> None:
    """A column for each step size: validation loss minus serial's above, cosines on the serial run below."""
    figure_class, _ = matplotlib_classes()
    labels = list(result["summary"])
    figure = figure_class(figsize=(5 * len(labels), 7), layout="constrained")
    grid = figure.subplots(2, len(labels), squeeze=False)
    long = max(run["steps"] for run in result["runs"])
    for column, label in enumerate(labels):
        runs = [run for run in result["runs"] if run["h"] == label and run["steps"] == long]
        _losses(grid[0][column], runs, label)
        _cosines(grid[1][column], runs)
    figure.savefig(path, dpi=100)


def _losses(axes: Any, runs: list[dict[str, Any]], label: str) -> None:
    serial = {run["seed"]: dict(map(tuple, run["evaluation"])) for run in runs if run["side"] == "serial"}
    for i, side in enumerate(dict.fromkeys(run["side"] for run in runs if run["side"] != "serial")):
        for j, run in enumerate(r for r in runs if r["side"] == side and r["seed"] in serial):
            points = [(step, loss - serial[run["seed"]][step]) for step, loss in run["evaluation"]]
            axes.plot(*zip(*points, strict=True), color=f"C{i}", label=None if j else side)
    if len(serial) > 1:  # two of the same gradient
        first, second, *_ = serial.values()
        points = [(step, abs(loss - second[step])) for step, loss in first.items() if step in second]
        axes.plot(*zip(*points, strict=True), color="0.6", ls="--", label="between serial's seeds")
    axes.axhline(0, color="k", lw=0.8)
    axes.set(title=f"{label}: validation loss minus serial's", xlabel="step", ylim=(-0.1, 0.3))
    if axes.get_legend_handles_labels()[0]:  # there may be serial runs alone so far
        axes.legend(fontsize=7)


def _cosines(axes: Any, runs: list[dict[str, Any]]) -> None:
    rows = [row for run in runs if run["side"] == "serial" for row in run["gradients"]]
    for name in dict.fromkeys(row["settings"] for row in rows):
        points = [(row["step"], row["cosine"]) for row in rows if row["settings"] == name]
        axes.plot(*zip(*points, strict=True), marker=".", label=name.removeprefix("mgrit "))
    axes.set(title="gradient cosine as the exact run trains", xlabel="step", ylim=(-0.1, 1.02))
    axes.legend(fontsize=7)
