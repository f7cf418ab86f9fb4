"""Time of a step where the head costs as much as eight layers: ends on the first and last rank, and spread over all.

    python recipes/benchmarks/heavy_head.py [--layers 32] [--vocabulary 12288] [--rounds 9]

A GPT-2 around the stack of `stack.py`, whose head has as many weights as eight layers, on two gloo processes of one
thread each; what head and loss really take, in layers, is measured there. MGRIT with one micro-batch (and the exact
step beside it) with both placements of the ends, all sides alive at once and in alternation, over the stock model in
one process. Beside every time the gradient's relative error, and how far the gradient with spread ends is from that of
the same setting with ends on the first and last rank. Written to recipes/benchmarks/results/heavy_head.json.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that a checkout runs without being installed

import torch.distributed as dist
from torch import Tensor

from hf_layerpar.config import LayerParallelConfig
from recipes.benchmarks.alternate import accuracy, measure
from recipes.benchmarks.ends import ENDS, Networks, make_networks, our_side, stock_side
from recipes.benchmarks.launch import RESULTS, launch
from recipes.benchmarks.prediction import model_prices
from recipes.benchmarks.sides import Entry, Place, Setting, init_ranks
from recipes.benchmarks.speed import machine, print_sides
from recipes.benchmarks.stack import SIZES
from recipes.results import print_table, versions, write_json

RANKS = 2
CONFIGS = {
    "identity 1/1": LayerParallelConfig(strategy="mgrit", coarse_operator="identity"),
    "rediscretize 1/1": LayerParallelConfig(strategy="mgrit", coarse_operator="rediscretize"),
    "exact": LayerParallelConfig(),
}
PLACEMENTS = ("first_last", "spread")


def setting(name: str, ends: str) -> Setting:
    return Setting(f"{name}, ends {ends}", dataclasses.replace(CONFIGS[name], ends=ends))  # type: ignore[arg-type]


def distance(made: Networks, name: str) -> float:
    """Of the gradient with spread ends from that with the others, relative. Collective."""
    found: list[dict[str, Tensor]] = []
    for ends in PLACEMENTS:
        side = our_side(made.converted, made.batch, setting(name, ends))
        side.step()
        found.append(side.gradients())
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, found[0])
    return accuracy(found[1], {k: v for part in parts for k, v in part.items()})["relative_error"]


def run_rank(options: argparse.Namespace) -> None:
    """What each started process does."""
    init_ranks()
    place, made = Place.here(), make_networks(options.layers, options.vocabulary)
    prices = model_prices(copy.deepcopy(made.converted), made.batch, seconds=2.0)
    settings = [setting(name, ends) for name in CONFIGS for ends in PLACEMENTS]
    entries = [Entry("stock, 1 process", {}, partial(stock_side, place, made.stock, made.batch, made.scale))]
    entries += [Entry(s.name, s.facts, partial(our_side, made.converted, made.batch, s, prices)) for s in settings]
    sides = measure(entries, made.exact, options.rounds)
    distances = {name: distance(made, name) for name in CONFIGS}
    if place.rank == 0:
        costs = prices.layers
        content = {"sides": sides, "gradient_distance_of_spread_ends": distances, "costs": dataclasses.asdict(prices)}
        write_json(options.rank_output, content | {"head_in_layers": costs.tail / (costs.graph_step + costs.final_vjp)})
    dist.barrier()
    dist.destroy_process_group()


def spread_over_first_last(sides: dict[str, Any], name: str) -> dict[str, Any]:
    """Times of the two placements: the ratio of their medians, and quartiles of the ratios round by round."""
    first_last, spread = (sides[setting(name, ends).name]["seconds"]["all"] for ends in PLACEMENTS)
    ratios = sorted(b / a for a, b in zip(first_last, spread, strict=True))
    quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return {
        "ratio": statistics.median(spread) / statistics.median(first_last),
        "ratio_quartiles": [quartiles[0], quartiles[2]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=12288, help="words; 12288: as many weights as eight layers")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each side")
    parser.add_argument("--output", type=Path, default=RESULTS / "heavy_head.json")
    parser.add_argument("--rank_output", type=Path, help=argparse.SUPPRESS)  # given to the ranks this script starts
    options = parser.parse_args()
    if options.rank_output is not None:
        run_rank(options)
        return

    result: dict[str, Any] = {"command": [Path(sys.argv[0]).name, *sys.argv[1:]], "machine": machine()}
    result |= {"layers": options.layers, "ranks": RANKS, "rounds": options.rounds}
    result |= {"sizes": SIZES, "ends": ENDS | {"vocabulary": options.vocabulary}}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "found.json"
        sizes = [f"--{name}={getattr(options, name)}" for name in ("layers", "vocabulary", "rounds")]
        launch(RANKS, Path(__file__), [*sizes, "--rank_output", str(output)])
        result |= json.loads(output.read_text(encoding="utf-8"))
    result["spread_over_first_last"] = {name: spread_over_first_last(result["sides"], name) for name in CONFIGS}
    write_json(options.output, result | {"versions": versions()})
    print_sides(
        f"{options.layers} layers and a head of {result['head_in_layers']:.1f} on {RANKS} ranks", result["sides"]
    )
    rows = [
        (f"{name}: spread over first_last", f"{found['ratio']:.3f}, gradients {distance:.1e} apart")
        for (name, found), distance in zip(
            result["spread_over_first_last"].items(), result["gradient_distance_of_spread_ends"].values(), strict=True
        )
    ]
    print_table(rows)


if __name__ == "__main__":
    main()
