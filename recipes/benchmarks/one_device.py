"""Time of one forward and backward on one device: serial torch, plain, compiled and as a CUDA graph, and ours, layers
one at a time and stacked, each beside its gradient.

    python recipes/benchmarks/one_device.py [--layers 64 128] [--rounds 20] [--device cuda] [--only TEXT ...]

Meant for a GPU that waits for launches: the stack of `stack.py` is small. Without one it runs on the CPU, where
stacking has nothing to gain, with fewer layers, and the result says so. All sides are alive at once and make their
steps in alternation; ratios are to the median of plain serial torch. A side that can't run has its error in the place
of its time. Written to recipes/benchmarks/results/one_device.json.
"""

from __future__ import annotations

import argparse
import copy
import gc
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that a checkout runs without being installed

import torch
from torch import Tensor, nn

from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.plan.part import RankPart
from hf_layerpar.plan.step import Anatomy, build_step
from hf_layerpar.plan.tasks import Plan
from hf_layerpar.run.layers import Common, Layers
from hf_layerpar.run.stackable import OneDevice
from hf_layerpar.run.transport import LocalTransport
from recipes.benchmarks.alternate import measure
from recipes.benchmarks.bare import BareStack
from recipes.benchmarks.launch import RESULTS
from recipes.benchmarks.sides import (
    OPERATORS,
    Call,
    Entry,
    Place,
    Setting,
    Side,
    init_ranks,
    inner_product_with,
    our_side,
    serial_side,
    with_compiled_layers,
)
from recipes.benchmarks.speed import machine, print_sides
from recipes.benchmarks.stack import SIZES, make_stack, make_state
from recipes.results import versions, write_json

DEFAULTS = {"cuda": {"layers": [64, 128], "rounds": 20}, "cpu": {"layers": [8, 16], "rounds": 3}}
COARSENING = 8
ITERATIONS = ((1, 1), (2, 1))


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU: {machine()['processor']}"


def device_sides(num_layers: int, device: torch.device) -> tuple[list[Entry], dict[str, Tensor]]:
    """All sides on one device, serial first, and the exact gradients by parameter name."""
    place = Place.here()
    stack, upstream = make_stack(num_layers).to(device), make_state(seed=2).to(device)
    reference = serial_side(place, stack, upstream, threads=1)
    reference.step()
    exact = reference.gradients()
    reference.clear()

    def serial(stack: nn.Sequential) -> Side:
        return serial_side(place, stack, upstream, threads=1)

    def ours(config: LayerParallelConfig) -> Side:
        own = copy.deepcopy(stack).eval()
        return (
            stacked_side(own, upstream, config)
            if config.stacked
            else our_side(place, own, upstream, Setting("", config))
        )

    settings: dict[str, Any] = {"method": "serial"}
    entries = [
        Entry("serial", settings, partial(serial, stack)),
        Entry("serial, compiled layers", settings | {"compiled": True}, lambda: serial(with_compiled_layers(stack))),
    ]
    configs: list[tuple[str, LayerParallelConfig]] = []
    for operator in OPERATORS:
        for forward, backward in ITERATIONS:
            config = LayerParallelConfig(
                strategy="mgrit",
                coarsening=min(COARSENING, num_layers // 2),
                coarse_operator=operator,
                forward_iterations=forward,
                backward_iterations=backward,
            )
            name = f"mgrit {operator} {forward}/{backward}"
            stacked = LayerParallelConfig(**config.to_dict() | {"stacked": True})
            configs += [(f"{name}, one at a time", config), (f"{name}, stacked", stacked)]
    configs.insert(0, ("ours exact", LayerParallelConfig()))
    for name, config in configs:
        entries.append(Entry(name, config.to_dict() | {"method": "ours"}, partial(ours, config)))
    if device.type == "cuda":
        captured = {"cuda_graph": True}
        graphs = [("serial, CUDA graph", settings | captured, partial(serial, stack))]
        for name, config in configs:
            if config.stacked and config.forward_iterations == 1:
                values = config.to_dict() | {"method": "ours"} | captured
                graphs.append((f"{name}, CUDA graph", values, partial(ours, config)))
        entries += [Entry(name, values, partial(as_graph, make)) for name, values, make in graphs]
    return entries, exact


def stacked_side(stack: nn.Sequential, upstream: Tensor, config: LayerParallelConfig) -> Side:
    """As a step of a whole model goes on one device: whether layers can be stacked is looked at in each."""
    x = make_state(seed=1).to(upstream.device).requires_grad_()
    bare = BareStack([Call(layer) for layer in stack], x, inner_product_with(upstream))
    anatomy, device = Anatomy.of_stack((0,) * len(stack)), OneDevice()
    part: RankPart | None = None

    def build(config: LayerParallelConfig, **more: Any) -> Plan:
        return build_step(config, anatomy, 1, **more)

    def step() -> None:
        nonlocal part
        found = device.plan(config, build, [Layers(bare.enter(0, 0, [], real=False), Common(), 0, 0)])
        assert found is not None, "the layers can't be stacked"
        plan, make_layers = found
        if part is None or part.plan is not plan:
            part = RankPart.of(plan, 0)
        bare.step(plan, LocalTransport(), part=part, make_layers=make_layers)

    answers = dict(stack.named_parameters())
    return Side(step, [x, *answers.values()], answers)


def as_graph(make: Callable[[], Side]) -> Side:
    """The side's step, captured once and replayed: nothing but the device's work is left of it."""
    side = make()
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):  # libraries set themselves up before the capture
        for _ in range(3):
            side.clear()
            side.step()
    torch.cuda.current_stream().wait_stream(beside)
    side.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        side.step()
    made = [tensor.grad for tensor in side.trained]

    def step() -> None:
        graph.replay()
        for tensor, gradient in zip(side.trained, made, strict=True):
            tensor.grad = gradient

    return Side(step, side.trained, side.answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=tuple(DEFAULTS))
    parser.add_argument("--layers", type=int, nargs="+", help="default: 64 and 128 on a GPU, 8 and 16 on the CPU")
    parser.add_argument("--rounds", type=int, help="timed steps of each side (default: 20 on a GPU, 3 on the CPU)")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="sides whose name contains one of these")
    parser.add_argument("--output", type=Path, default=RESULTS / "one_device.json")
    options = parser.parse_args()
    device = torch.device(options.device)
    rounds = options.rounds or DEFAULTS[device.type]["rounds"]
    init_ranks()
    # what runs one layer at a time after all may not stand in the table as stacked: its error does
    warnings.filterwarnings("error", message="stacked=True, but")

    result: dict[str, Any] = {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "device": device_name(device),
        "machine": machine(),
        "sizes": SIZES | {"coarsening": COARSENING},
        "tables": [],
    }
    began = time.perf_counter()
    for num_layers in options.layers or DEFAULTS[device.type]["layers"]:
        entries, exact = device_sides(num_layers, device)
        kept = [e for e in entries[1:] if not options.only or any(text in e.name for text in options.only)]
        sides = measure([entries[0], *kept], exact, rounds)
        result["tables"].append({"layers": num_layers, "rounds": rounds, "sides": sides})
        print_sides(f"{num_layers} layers on {result['device']}, {rounds} rounds", sides)
        del entries, exact, kept
        gc.collect()
    result |= {"seconds": time.perf_counter() - began, "versions": versions()}
    write_json(options.output, result)


if __name__ == "__main__":
    main()
