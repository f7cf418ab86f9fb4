"""Draws what `paper_speed.py` found: speed-up over ranks, predicted and measured, and layers against data parallel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_layerpar.report.drawing import matplotlib_classes


def draw(found: dict[str, Any], path: Path) -> None:
    """One row a network: speed-up of each setting at the measured depth (lines: predicted; dots: measured on two
    ranks), of the paper's settings at every depth, and seconds of a step by the number of data-parallel copies."""
    figure_class, _ = matplotlib_classes()
    figure = figure_class(figsize=(15, 4.2 * len(found["networks"])), layout="constrained")
    grid = figure.subplots(len(found["networks"]), 3, squeeze=False)
    for row, (name, network) in zip(grid, found["networks"].items(), strict=True):
        _settings(row[0], name, network)
        _depths(row[1], name, network)
        _both_axes(row[2], name, network)
    figure.savefig(path, dpi=100)


def _speedups(axes: Any, network: dict[str, Any], curves: dict[str, list[float]], title: str) -> None:
    ranks = network["predicted"]["ranks"]
    for i, (label, values) in enumerate(curves.items()):
        axes.plot(ranks[: len(values)], values, marker=".", color=f"C{i}", label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, map(str, ranks))
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_title(title, fontsize=10)
    axes.set(xlabel="layer-parallel ranks (lines: simulated)", ylabel="speed-up over one rank")
    axes.grid(color="0.92")
    axes.legend(fontsize=7, loc="upper left")


def _settings(axes: Any, name: str, network: dict[str, Any]) -> None:
    depth = network["measured_depth"]
    curves = network["predicted"]["speedup"][str(depth)]
    _speedups(axes, network, curves, f"{name}, {network['stacks']} x {depth} layers; dots: measured")
    for i, side in enumerate(curves):
        measured = network["measured_on_2_ranks"]["sides"][side]
        if "ratio" in measured:
            axes.plot([2], [1 / measured["ratio"]], "o", color=f"C{i}", ms=7, mec="k")


def _depths(axes: Any, name: str, network: dict[str, Any]) -> None:
    speedup = network["predicted"]["speedup"]
    chosen = [side for side in next(iter(speedup.values())) if side.startswith("rediscretize") and "levels" in side]
    curves = {f"{depth} layers, {side}": values[side] for depth, values in speedup.items() for side in chosen[:2]}
    _speedups(axes, network, curves, f"{name}: the paper's settings by depth")
    axes.annotate(f"paper: {network['paper']}", (0.02, 0.02), xycoords="axes fraction", fontsize=7)


def _both_axes(axes: Any, name: str, network: dict[str, Any]) -> None:
    rows = network["predicted"]["with_data_parallel"]
    for devices in dict.fromkeys(row["devices"] for row in rows):
        points = [(row["dp"], row["seconds"]) for row in rows if row["devices"] == devices]
        axes.plot(*zip(*points, strict=True), marker="o", label=f"{devices} devices")
    axes.set_xscale("log", base=2)
    degrees = sorted({row["dp"] for row in rows})
    axes.set_xticks(degrees, map(str, degrees))
    axes.set_title(f"{name}: one global batch, layers x data (simulated)", fontsize=10)
    axes.set(xlabel="data-parallel copies", ylabel="seconds a step")
    axes.legend(fontsize=8)
