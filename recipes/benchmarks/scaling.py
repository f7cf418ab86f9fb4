"""What the simulator predicts for 128 layers on 2 to 128 ranks: MGRIT against pipelines with micro-batches.

    python recipes/benchmarks/scaling.py

Nothing is measured here: all times are predictions in units of one layer forward of the whole batch, in which an
input-vjp and a weight-vjp take one each and messages are free. Written to recipes/benchmarks/results: scaling.json (all
cases, and how each kind of MGRIT compares with the best pipeline), scaling.png, and timeline.png (one step of 32 layers
on 4 ranks, rank by rank).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that a checkout runs without being installed

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.plan.costs import Costs
from hf_layerpar.plan.ownership import INTERLEAVED, V, contiguous_owner, interleaved_owner, two_blocks_owner
from hf_layerpar.plan.planner import predict_step
from hf_layerpar.plan.simulate import Timeline
from hf_layerpar.report.timeline import draw
from recipes.benchmarks.launch import RESULTS
from recipes.results import print_table, write_json

LAYERS = 128
RANKS = (2, 4, 8, 16, 32, 64, 128)
MICRO_BATCHES = (1, 2, 4, 8, 16)
OPERATORS = ("rediscretize", "identity", "aggregate")
ITERATIONS = ((1, 1), (2, 1))
GPIPE, ONE_F_ONE_B, PIPELINE = "GPipe", "1F1B", "pipeline"  # the first two by their formulas, ours as planned
PIPELINES = (GPIPE, ONE_F_ONE_B, PIPELINE)


@dataclass(frozen=True)
class Reference:
    """A textbook schedule: its time for one step, and the kept graphs of its fullest rank in those of a whole batch."""

    time: float
    graphs: float


def gpipe(num_layers: int, num_ranks: int, micro_batches: int) -> Reference:
    """All forwards, then all backwards (arXiv 1811.06965): (M + P - 1)/M of the ideal 3N/P, in layer forwards."""
    ideal = 3 * num_layers / num_ranks
    return Reference((micro_batches + num_ranks - 1) / micro_batches * ideal, num_layers / num_ranks)


def one_forward_one_backward(num_layers: int, num_ranks: int, micro_batches: int) -> Reference:
    """1F1B (arXiv 1806.03377): GPipe's bubble, with at most P micro-batches in flight on the first rank."""
    same = gpipe(num_layers, num_ranks, micro_batches)
    return Reference(same.time, same.graphs * min(num_ranks, micro_batches) / micro_batches)


def mgrit(operator: str, coarsening: int, iterations: tuple[int, int], micro_batches: int) -> LayerParallelConfig:
    return LayerParallelConfig(
        strategy="mgrit",
        coarse_operator=operator,
        coarsening=coarsening,
        forward_iterations=iterations[0],
        backward_iterations=iterations[1],
        micro_batches=micro_batches,
    )


def dealt(num_layers: int, num_ranks: int) -> tuple[int, ...]:
    """Intervals of P layers dealt out, one layer of each to every rank."""
    return interleaved_owner(num_layers, num_ranks, range(0, num_layers + 1, num_ranks))


def predicted_step(config: LayerParallelConfig, owner: Sequence[int], num_ranks: int) -> Timeline:
    """Scheduled by the prices that it is timed with."""
    return predict_step(config, owner, Costs(), num_ranks=num_ranks)


def cases(num_ranks: int, micro_batches: int) -> list[dict[str, Any]]:
    """The predictions for so many ranks and micro-batches. Graphs and states are those of one micro-batch."""
    found: list[dict[str, Any]] = []

    def textbook(name: str, schedule: Any) -> None:
        reference = schedule(LAYERS, num_ranks, micro_batches)
        share = reference.time / (3 * LAYERS)
        found.append({"schedule": name, "share": share, "peak_graphs": round(reference.graphs * micro_batches)})

    def predicted(name: str, config: LayerParallelConfig, owner: Sequence[int], **more: Any) -> None:
        step = predicted_step(config, owner, num_ranks)
        most = {f"peak_{k}": max(getattr(p, k) for p in step.peaks) for k in ("graphs", "states")}
        figures = {"share": step.share, "idle_share": step.idle_share, "messages": len(step.plan.messages)}
        found.append({"schedule": name, **more, **figures, **most})

    textbook(GPIPE, gpipe)
    textbook(ONE_F_ONE_B, one_forward_one_backward)
    blocks = contiguous_owner(LAYERS, num_ranks)
    exact = LayerParallelConfig(micro_batches=micro_batches)
    predicted(PIPELINE, exact, blocks, layers="blocks")
    for placement in (INTERLEAVED, V) if 2 * num_ranks <= LAYERS else ():
        predicted(PIPELINE, exact, two_blocks_owner(LAYERS, num_ranks, placement), layers=placement)
    # of c = P at least two intervals
    factors = sorted({4, 8} | ({num_ranks} if num_ranks <= LAYERS // 2 else set()))
    for operator in OPERATORS:
        for c in factors:
            for iterations in ITERATIONS:
                config = mgrit(operator, c, iterations, micro_batches)
                more = {"operator": operator, "coarsening": c, "iterations": "/".join(map(str, iterations))}
                predicted("mgrit", config, blocks, **more, layers="blocks")
                if operator == "aggregate" and c == num_ranks:
                    predicted("mgrit", config, dealt(LAYERS, num_ranks), **more, layers="interleaved")
    place = {"ranks": num_ranks, "micro_batches": micro_batches}
    return [place | {k: round(v, 5) if isinstance(v, float) else v for k, v in case.items()} for case in found]


def name_of(case: dict[str, Any]) -> str:
    if case["schedule"] != "mgrit":
        return case["schedule"]
    interleaved = " interleaved" if case["layers"] == "interleaved" else ""
    return f"{case['operator']} {case['iterations']}{interleaved}"


def comparisons(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each number of ranks and micro-batches, the best of each kind of MGRIT against the best pipeline there (ours
    included), and against the best pipeline of any number of micro-batches. Above 1 MGRIT is faster."""
    result = []
    for num_ranks in RANKS:
        here = [case for case in table if case["ranks"] == num_ranks]
        best_of_any = min(case["share"] for case in here if case["schedule"] in PIPELINES)
        for micro_batches in MICRO_BATCHES:
            row = [case for case in here if case["micro_batches"] == micro_batches]
            pipeline = min((case for case in row if case["schedule"] in PIPELINES), key=lambda case: case["share"])
            for name in sorted({name_of(case) for case in row if case["schedule"] == "mgrit"}):
                best = min((case for case in row if name_of(case) == name), key=lambda case: case["share"])
                entry = {"ranks": num_ranks, "micro_batches": micro_batches, "mgrit": name}
                entry |= {"coarsening": best["coarsening"], "mgrit_share": best["share"]}
                entry |= {"pipeline": pipeline["schedule"], "pipeline_share": pipeline["share"]}
                entry |= {"times_faster": round(pipeline["share"] / best["share"], 3)}
                entry |= {"times_faster_than_pipeline_of_any_micro_batches": round(best_of_any / best["share"], 3)}
                result.append(entry)
    return result


STYLES: dict[str, tuple[str, str]] = {
    GPIPE: ("#718096", "--"),
    PIPELINE: ("#1a202c", "-"),
    "rediscretize 1/1": ("#2b6cb0", "-"),
    "rediscretize 2/1": ("#2b6cb0", ":"),
    "identity 1/1": ("#c05621", "-"),
    "identity 2/1": ("#c05621", ":"),
    "aggregate 1/1": ("#6b8e4e", "-"),
    "aggregate 1/1 interleaved": ("#805ad5", "-"),
    "aggregate 2/1 interleaved": ("#805ad5", ":"),
}
LABELS = {GPIPE: "GPipe, 1F1B (formula)", PIPELINE: "our pipeline (exact)"}


def draw_scaling(table: list[dict[str, Any]], path: Path) -> None:
    """Speed-up over serial against the number of ranks, one panel for each of three numbers of micro-batches."""
    figure = Figure(figsize=(11.0, 4.6), dpi=150, layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, 3, sharey=True)
    for axes, micro_batches in zip(panels, (1, 4, 16), strict=True):
        axes.plot(RANKS, RANKS, color="#cbd5e0", linewidth=1, label="one speed-up per rank")
        for name, (colour, style) in STYLES.items():
            points = []
            for num_ranks in RANKS:
                row = [c for c in table if (c["ranks"], c["micro_batches"]) == (num_ranks, micro_batches)]
                shares = [case["share"] for case in row if name_of(case) == name]
                if shares:
                    points.append((num_ranks, 1 / min(shares)))
            label = LABELS.get(name, f"MGRIT {name}")
            axes.plot(*zip(*points, strict=True), color=colour, linestyle=style, marker="o", markersize=3, label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(RANKS, map(str, RANKS))
        axes.set_yticks([1, *RANKS], map(str, [1, *RANKS]))
        axes.minorticks_off()
        axes.grid(color="#edf2f7")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.set_xlabel("ranks", fontsize=9)
        title = f"{micro_batches} micro-batch" + ("es" if micro_batches > 1 else "")
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    panels[0].set_ylabel("predicted speed-up over serial", fontsize=9)
    figure.suptitle(f"{LAYERS} layers, best interval length of each kind, free messages (simulated)", fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path)


def draw_timeline(path: Path) -> None:
    """One step of 32 layers on 4 ranks, five ways."""
    layers, ranks = 32, 4
    blocks = contiguous_owner(layers, ranks)
    steps = {
        "Exact, 1 micro-batch": (LayerParallelConfig(), blocks),
        "Exact, 4 micro-batches": (LayerParallelConfig(micro_batches=4), blocks),
        "MGRIT aggregate 1/1, intervals of 4, interleaved": (mgrit("aggregate", 4, (1, 1), 1), dealt(layers, ranks)),
        "MGRIT rediscretize 1/1, intervals of 4": (mgrit("rediscretize", 4, (1, 1), 1), blocks),
        "MGRIT identity 1/1, intervals of 4": (mgrit("identity", 4, (1, 1), 1), blocks),
    }
    draw({name: predicted_step(config, owner, ranks) for name, (config, owner) in steps.items()}, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder")
    output: Path = parser.parse_args().output
    table = [case for ranks in RANKS for micro_batches in MICRO_BATCHES for case in cases(ranks, micro_batches)]
    compared = comparisons(table)
    content = {
        "kind": "predicted by the simulator, not measured",
        "unit": "share: time of a step over that of serial, 3 * layers; layer forward = input-vjp = weight-vjp = 1",
        "layers": LAYERS,
        "cases": table,
        "mgrit_against_the_best_pipeline": compared,
    }
    write_json(output / "scaling.json", content)
    draw_scaling(table, output / "scaling.png")
    draw_timeline(output / "timeline.png")
    wins = [entry for entry in compared if entry["times_faster"] > 1]
    print(f"{len(table)} predictions; MGRIT beats the best pipeline in {len(wins)} of {len(compared)} comparisons")
    rows = [
        (
            f"P={e['ranks']:<3} M={e['micro_batches']:<2} {e['mgrit']} c={e['coarsening']}",
            f"{e['mgrit_share']:.4f} of serial, {e['pipeline']} {e['pipeline_share']:.4f}: {e['times_faster']:.2f}x",
        )
        for e in compared
        if e["ranks"] in (4, 32, 128) and e["micro_batches"] in (1, 16)
    ]
    print_table(rows)


if __name__ == "__main__":
    main()
