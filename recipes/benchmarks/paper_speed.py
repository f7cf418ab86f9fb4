"""Time of a training step of the paper's deep networks: measured on two ranks, predicted for more.

    python recipes/benchmarks/paper_speed.py [NETWORK ...] [--rounds 5]

Measured: forward and backward of the whole model (`paper_networks.py`) on two gloo processes of one thread each, all
sides in alternation, over the stock model in one. Predicted: the simulator's step on up to 64 ranks, from what layers
and messages cost in these processes, and the same with data parallel ranks beside the layer-parallel ones for one
global batch. Written to recipes/benchmarks/results/paper/speed.json and .png. Run it with nothing else on the machine.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that a checkout runs without being installed

import torch
import torch.distributed as dist
from torch import Tensor

from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.ode.convert import convert_to_ode, ode_view
from hf_layerpar.ode.stack import RecordedCall
from hf_layerpar.plan.costs import Costs
from hf_layerpar.plan.planner import predict_step
from hf_layerpar.run.calibrate import calibrate
from recipes.benchmarks.alternate import measure
from recipes.benchmarks.ends import our_side, stock_side
from recipes.benchmarks.launch import RESULTS, launch
from recipes.benchmarks.paper_networks import NETWORKS, SIZES, Batch, Network
from recipes.benchmarks.paper_speed_picture import draw
from recipes.benchmarks.sides import Entry, Place, Setting, init_ranks, local_transport, owner_of
from recipes.results import print_table, versions, write_json

RANKS = (1, 2, 4, 8, 16, 32, 64)
DEVICES = (16, 32, 64)
SERIAL = "stock, 1 process"


def settings_of(network: Network) -> dict[str, LayerParallelConfig]:
    """The settings to time, by name: exact pipelines, the paper's with two and three levels, a larger c, identity."""

    def mgrit(**changes: Any) -> LayerParallelConfig:
        settings = {"coarse_operator": "rediscretize", "coarsening": network.coarsening}
        settings |= {"forward_iterations": network.forward, "backward_iterations": network.backward}
        return LayerParallelConfig(strategy="mgrit", **(settings | changes))

    c, iterations = network.coarsening, f"{network.forward}/{network.backward}"
    return {
        "pipeline M=1": LayerParallelConfig(),
        "pipeline M=4": LayerParallelConfig(micro_batches=4),
        f"rediscretize {iterations} c={c}, 2 levels": mgrit(),
        f"rediscretize {iterations} c={c}, 3 levels": mgrit(coarsening=(c, c)),
        f"rediscretize {iterations} c={2 * c}, 2 levels": mgrit(coarsening=2 * c),
        f"identity 1/1 c={c}": mgrit(coarse_operator="identity", forward_iterations=1, backward_iterations=1),
    }


def measured_costs(converted: Any, batch: Batch) -> dict[str, Costs]:
    """What a layer of each stack, and a message between the ranks, takes here; by the stack's path. Collective.

    The converted model serves nothing else afterwards.
    """
    found: dict[str, Costs] = {}

    def solver(path: str, calls: Sequence[RecordedCall], x: Tensor) -> Tensor:
        found[path] = calibrate(calls, x, local_transport(), seconds=4.0)
        return x

    for stack in ode_view(converted).stacks:
        stack.solver = partial(solver, stack.path)
    with torch.no_grad():
        converted(**batch)
    return found


def run_rank(options: argparse.Namespace) -> None:
    """What each started process does: one network."""
    init_ranks()
    (name,) = options.networks
    network, place = NETWORKS[name], Place.here()
    torch.manual_seed(0)
    model, batch = network.build(network.measured)
    model(**batch).loss.backward()
    exact = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    converted = convert_to_ode(copy.deepcopy(model))
    entries = [Entry(SERIAL, {}, partial(stock_side, place, model, batch))]
    entries += [
        Entry(side, config.to_dict(), partial(our_side, converted, batch, Setting(side, config)))
        for side, config in settings_of(network).items()
    ]
    sides = measure(entries, exact, options.rounds)
    costs = {path: dataclasses.asdict(found) for path, found in measured_costs(converted, batch).items()}
    if place.rank == 0:
        layers = sum(p.numel() for name, p in model.named_parameters() if name.startswith(tuple(costs)))
        sizes = {"layers": layers, "ends": sum(p.numel() for p in model.parameters()) - layers}
        write_json(options.rank_output, {"sides": sides, "costs": costs, "parameters": sizes})
    dist.barrier()
    dist.destroy_process_group()


def stack_seconds(config: LayerParallelConfig, depth: int, ranks: int, costs: Costs) -> float:
    """The simulated step of one stack."""
    return predict_step(config, owner_of(config, depth, ranks), costs, num_ranks=ranks).makespan


def predictions(network: Network, found: dict[str, Any]) -> dict[str, Any]:
    """Times over the serial one, by depth and setting for every number of ranks; and for data-parallel copies."""
    costs = [Costs(**values) for values in found["costs"].values()]
    serial_layers = sum(cost.serial(network.measured) for cost in costs)
    ends = max(0.0, found["sides"][SERIAL]["seconds"]["median"] - serial_layers)
    table: dict[str, Any] = {}
    for depth in network.depths:
        serial = ends + sum(cost.serial(depth) for cost in costs)
        for name, config in settings_of(network).items():
            shares = [
                (ends + sum(stack_seconds(config, depth, ranks, cost) for cost in costs)) / serial
                for ranks in RANKS
                if ranks <= depth // 2
            ]
            table.setdefault(str(depth), {})[name] = [1 / share for share in shares]
    return {
        "ends_seconds": ends,
        "ranks": RANKS,
        "speedup": table,
        "with_data_parallel": both_axes(network, found, ends),
    }


def both_axes(network: Network, found: dict[str, Any], ends: float) -> list[dict[str, float]]:
    """Seconds of a step of one global batch on `devices` ranks: `dp` copies of `lp` layer-parallel ranks each.

    A copy's rows cost what `Costs.fixed_share` says of micro-batches. The gradients of a rank's layers and ends are
    summed over the copies by a ring, in pieces of 1/dp.
    """
    costs = [Costs(**values) for values in found["costs"].values()]
    config = settings_of(network)[f"rediscretize {network.forward}/{network.backward} c={network.coarsening}, 2 levels"]
    link = costs[0]
    rows = []
    for devices in DEVICES:
        for dp in (2**k for k in range(int(math.log2(min(devices, SIZES["rows"]))) + 1)):
            lp = devices // dp
            if lp > network.measured // 2:
                continue
            layers = sum(stack_seconds(config, network.measured, lp, cost.cut(dp)) for cost in costs)
            share = costs[0].cut(dp).step / costs[0].step
            size = 4 * (found["parameters"]["layers"] / lp + found["parameters"]["ends"])
            reduce = 2 * (dp - 1) * (link.latency + size / dp / link.bandwidth)
            rows.append({"devices": devices, "dp": dp, "lp": lp, "seconds": layers + share * ends + reduce})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(NETWORKS)}; default: all")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each side")
    parser.add_argument("--output", type=Path, default=RESULTS / "paper" / "speed.json")
    parser.add_argument("--rank_output", type=Path, help=argparse.SUPPRESS)  # given to the ranks this script starts
    options = parser.parse_args()
    unknown = sorted(set(options.networks) - set(NETWORKS))
    if unknown:
        parser.error(f"no network is called {', '.join(unknown)}; there are {', '.join(NETWORKS)}")
    if options.rank_output is not None:
        run_rank(options)
        return
    result: dict[str, Any] = {"sizes": SIZES, "rounds": options.rounds, "networks": {}}
    for name in options.networks or NETWORKS:
        network = NETWORKS[name]
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "found.json"
            launch(2, Path(__file__), [name, "--rounds", str(options.rounds), "--rank_output", str(output)])
            found = json.loads(output.read_text(encoding="utf-8"))
        about = {"paper": network.figure, "measured_depth": network.measured, "stacks": network.stacks}
        result["networks"][name] = about | {"measured_on_2_ranks": found} | {"predicted": predictions(network, found)}
        rows = [(side, f"{v['ratio']:.2f}" if "ratio" in v else v["error"]) for side, v in found["sides"].items()]
        print_table([(f"{name}, {network.stacks} x {network.measured} layers", "time over stock's"), *rows])
    write_json(options.output, result | {"versions": versions()})
    draw(json.loads(options.output.read_text(encoding="utf-8")), options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
