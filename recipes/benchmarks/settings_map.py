"""Which setting wins where, among those whose gradient holds: over ranks, micro-batches and step size.

    python recipes/benchmarks/settings_map.py

Gradients are measured and times are simulated. The cosines are those that `at_size.py`'s serial runs found (2 + 32 + 2
layers, at_size.json): a setting counts at a step size where each of its cosines with the exact gradient, at every
moment of every such run, is at least `GOOD`. The times are the simulator's from the costs of a GPT-2 block on an H200
(`layer_costs.json`: 8 rows of 1,024 tokens at D=1024 and D=2048, NVLink), the batch cut into at most M micro-batches.
Against the best of these settings stands the best exact schedule, with one or two blocks of layers on a rank. Written
to recipes/benchmarks/results/settings_map.json and .png.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that a checkout runs without being installed

from hf_layerpar.config import LayerParallelConfig, describe
from hf_layerpar.plan.costs import Costs
from hf_layerpar.report.drawing import matplotlib_classes
from recipes.benchmarks.at_size import PROBED, STEP_SIZES, share
from recipes.benchmarks.launch import RESULTS
from recipes.benchmarks.layer_costs import LINKS, MEASURED
from recipes.benchmarks.probing import setting
from recipes.results import print_table, versions, write_json

GOOD = 0.99
RANKS = (2, 4, 8, 16)
MICRO_BATCHES = (1, 2, 4, 8)
CONFIGS = {describe(config): config for config in (LayerParallelConfig(**setting(*values)) for values in PROBED)}


def least_cosines(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Step size -> setting -> the least cosine on a serial run without penalty."""
    found: dict[str, dict[str, float]] = {}
    for run in runs:
        if run["side"] != "serial":  # of any length; those with a penalty have another name
            continue
        for row in run["gradients"]:
            of_size = found.setdefault(run["h"], {})
            of_size[row["settings"]] = min(row["cosine"], of_size.get(row["settings"], 1.0))
    return {h: found[h] for h in STEP_SIZES if h in found}


def best_shares(costs: Costs) -> dict[tuple[str, int, int], float]:
    """(setting, ranks, M) -> its best share with at most M micro-batches; the exact schedule's name is "exact"."""
    found: dict[tuple[str, int, int], float] = {}
    for ranks in RANKS:
        for name, config in {"exact": LayerParallelConfig(), **CONFIGS}.items():
            best = float("inf")
            for count in MICRO_BATCHES:
                best = min(best, share(dataclasses.replace(config, micro_batches=count), ranks, costs))
                found[name, ranks, count] = best
    return found


def cells(
    cosines: dict[str, dict[str, float]], shares: dict[tuple[str, int, int], float], dim: int
) -> list[dict[str, Any]]:
    """For each step size, number of ranks and of micro-batches: the exact share, and the best of the good settings."""
    found = []
    for h, of_size in cosines.items():
        good = [name for name, cosine in of_size.items() if cosine >= GOOD]
        for ranks in RANKS:
            for count in MICRO_BATCHES:
                exact = shares["exact", ranks, count]
                cell = {"dim": dim, "h": h, "ranks": ranks, "micro_batches": count, "exact": exact, "winner": "exact"}
                if good:
                    best = min(good, key=lambda name: shares[name, ranks, count])
                    cell |= {"mgrit": best, "mgrit_share": shares[best, ranks, count]}
                    cell |= {"winner": best} if cell["mgrit_share"] < exact else {}
                found.append(cell)
    return found


def draw(content: dict[str, Any], path: Path) -> None:
    """A panel for each width and step size: exact's time over that of the best good setting; above 1 MGRIT wins."""
    figure_class, _ = matplotlib_classes()
    sizes, dims = list(content["least_cosines"]), list(dict.fromkeys(cell["dim"] for cell in content["cells"]))
    figure = figure_class(figsize=(4.2 * len(sizes), 3.6 * len(dims)), layout="constrained")
    grid = figure.subplots(len(dims), len(sizes), squeeze=False)
    for row, dim in zip(grid, dims, strict=True):
        for axes, h in zip(row, sizes, strict=True):
            _panel(axes, [cell for cell in content["cells"] if (cell["dim"], cell["h"]) == (dim, h)])
            axes.set_title(f"{h}, D={dim}", fontsize=10)
    figure.suptitle(
        "Best exact schedule's time over that of the fastest MGRIT setting\n"
        f"whose gradient has a cosine of at least {GOOD} "
        "(green: MGRIT wins; times are simulated)",
        fontsize=10,
    )
    figure.savefig(path, dpi=100)


def _panel(axes: Any, here: list[dict[str, Any]]) -> None:
    for cell in here:
        x, y = RANKS.index(cell["ranks"]), MICRO_BATCHES.index(cell["micro_batches"])
        axes.add_patch(_square(x, y, "#e2e8f0" if cell["winner"] == "exact" else "#b7d7a8"))
        text = "no setting\nis good"
        if "mgrit" in cell:
            name = cell["mgrit"].removeprefix("mgrit ").replace(" ", "\n", 1)
            text = f"{cell['exact'] / cell['mgrit_share']:.2f}x\n{name}"
        axes.text(x, y, text, ha="center", va="center", fontsize=7)
    axes.set(xlim=(-0.5, len(RANKS) - 0.5), ylim=(-0.5, len(MICRO_BATCHES) - 0.5), xlabel="GPUs")
    axes.set_xticks(range(len(RANKS)), map(str, RANKS))
    axes.set_yticks(range(len(MICRO_BATCHES)), map(str, MICRO_BATCHES))
    axes.set_ylabel("micro-batches at most")


def _square(x: int, y: int, colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, edgecolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gradients", type=Path, default=RESULTS / "at_size.json", help="what at_size.py wrote")
    parser.add_argument("--output", type=Path, default=RESULTS / "settings_map.json")
    options = parser.parse_args()

    runs = json.loads(options.gradients.read_text(encoding="utf-8"))["runs"]
    tables = json.loads(MEASURED.read_text(encoding="utf-8"))["tables"]
    cosines = least_cosines(runs)
    content: dict[str, Any] = {
        "kind": "cosines measured, times predicted by the simulator",
        "good": GOOD,
        "least_cosines": cosines,
        "shares": [],
        "cells": [],
        "versions": versions(),
    }
    for table in (table for table in tables if (table["batch"], table["tokens"]) == (8, 1024)):
        shares = best_shares(dataclasses.replace(Costs(**table["costs"]), **LINKS["NVLink"]))
        for (name, ranks, count), value in shares.items():
            entry = {"dim": table["dim"], "setting": name, "ranks": ranks, "micro_batches": count, "share": value}
            content["shares"].append(entry)
        content["cells"] += cells(cosines, shares, table["dim"])
    write_json(options.output, content)
    draw(content, options.output.with_suffix(".png"))
    print_table(
        [
            (
                f"{cell['h']} P={cell['ranks']} M={cell['micro_batches']}",
                f"{cell['winner']} (exact {cell['exact']:.2f})",
            )
            for cell in content["cells"]
        ]
    )


if __name__ == "__main__":
    main()
