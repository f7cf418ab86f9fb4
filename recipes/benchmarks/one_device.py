"""Time of one forward and backward on one device: torch alone, eagerly and as a CUDA graph, and ours, layers one at a
time and stacked, each beside its gradient.

    python recipes/benchmarks/one_device.py [--rounds 10] [--device cuda] [--only TEXT ...]

Two kinds of tables: bare stacks (`stack.py`), where a CUDA graph of a whole step is what the fastest can be; and whole
GPT-2 models of random weights, through `parallelize` as anybody would, against the stock model. Meant for a GPU that
waits for launches. Without one it runs on the CPU, where stacking has nothing to gain, with small sizes, and the result
says so. All sides of a table are alive at once and make their steps in alternation; ratios are to the median of the
first. A side that can't run has its error in the place of its time. Written to
recipes/benchmarks/results/one_device.json.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that a checkout runs without being installed

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from hf_layerpar import convert_to_ode, parallelize
from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.plan.part import RankPart
from hf_layerpar.plan.step import Anatomy, build_step
from hf_layerpar.plan.tasks import Plan
from hf_layerpar.run.layers import Common, Layers
from hf_layerpar.run.stackable import OneDevice
from hf_layerpar.run.transport import LocalTransport, fact
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
)
from recipes.benchmarks.speed import machine, print_sides
from recipes.benchmarks.stack import SHAPE, Shape, make_stack, make_state
from recipes.results import versions, write_json


@dataclass(frozen=True)
class BareTable:
    layers: int
    shape: Shape
    dtype: torch.dtype
    coarsening: int

    @property
    def name(self) -> str:
        sizes = f"D={self.shape.dim} B={self.shape.batch} T={self.shape.tokens}"
        return f"{self.layers} layers, {sizes}, {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class ModelTable:
    """A GPT-2 with sdpa attention and without dropout; in bfloat16 on a GPU."""

    dim: int
    heads: int
    layers: int
    batch: int
    tokens: int

    @property
    def name(self) -> str:
        return f"GPT-2 of {self.layers} layers, D={self.dim} B={self.batch} T={self.tokens}"


BARE = {
    "cuda": [
        BareTable(64, SHAPE, torch.float32, 8),
        BareTable(48, Shape(768, 12, 3072, 1, 128), torch.bfloat16, 6),
    ],
    "cpu": [BareTable(6, SHAPE, torch.float32, 3)],
}
MODELS = {
    "cuda": [
        ModelTable(256, 4, 64, 4, 128),
        ModelTable(768, 12, 48, 1, 256),
        ModelTable(768, 12, 48, 8, 512),
        ModelTable(1024, 16, 48, 4, 1024),
    ],
    "cpu": [ModelTable(32, 2, 6, 2, 16)],
}
ROUNDS = {"cuda": 10, "cpu": 3}
MODEL_COARSENING = 8
VOCABULARY = 2000


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU: {machine()['processor']}"


# ---- bare stacks
def bare_sides(table: BareTable, device: torch.device) -> tuple[list[Entry], dict[str, Tensor]]:
    """All sides on one device, serial first, and the exact gradients by parameter name."""
    place = Place.here()
    stack = make_stack(table.layers, table.shape).to(device, table.dtype)
    upstream = make_state(2, table.shape.state).to(device, table.dtype)
    reference = serial_side(place, stack, upstream, threads=1)
    reference.step()
    exact = reference.gradients()
    reference.clear()

    def serial() -> Side:
        return serial_side(place, stack, upstream, threads=1)

    def ours(config: LayerParallelConfig) -> Side:
        own = copy.deepcopy(stack).eval()
        if config.stacked:
            return stacked_side(own, upstream, config)
        return our_side(place, own, upstream, Setting("", config))

    configs = {"ours exact": LayerParallelConfig()}
    for operator in OPERATORS:
        config = LayerParallelConfig(strategy="mgrit", coarsening=table.coarsening, coarse_operator=operator)
        configs[f"mgrit {operator} 1/1, one at a time"] = config
        configs[f"mgrit {operator} 1/1, stacked"] = dataclasses.replace(config, stacked=True)
    entries = [Entry("serial", {"method": "serial"}, serial)]
    entries += [Entry(name, c.to_dict() | {"method": "ours"}, partial(ours, c)) for name, c in configs.items()]
    if device.type == "cuda":
        captured = [e for e in entries if e.name in ("serial", "ours exact") or e.name.endswith("stacked")]
        entries += [
            Entry(f"{e.name}, CUDA graph", e.settings | {"cuda_graph": True}, partial(as_graph, e.make))
            for e in captured
        ]
    return entries, exact


def stacked_side(stack: nn.Sequential, upstream: Tensor, config: LayerParallelConfig) -> Side:
    """As a step of a whole model goes on one device: whether layers can be stacked is looked at in each."""
    x = make_state(1, upstream.shape).to(upstream).requires_grad_()
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


# ---- whole models
def model_sides(table: ModelTable, device: torch.device) -> tuple[list[Entry], dict[str, Tensor]]:
    """The stock model first, and its gradients by parameter name."""
    config = GPT2Config(
        n_embd=table.dim,
        n_head=table.heads,
        n_layer=table.layers,
        n_positions=table.tokens,
        vocab_size=VOCABULARY,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        stock = GPT2LMHeadModel(config).to(dtype)
    stock.loss_type = "ForCausalLM"
    ids = torch.randint(VOCABULARY, (table.batch, table.tokens)).to(device)

    batch = {"input_ids": ids, "labels": ids}

    def called(model: nn.Module) -> Side:
        def step() -> None:
            model(**batch).loss.backward()

        return Side(step, list(model.parameters()), dict(model.named_parameters()))

    def ours(config: LayerParallelConfig) -> Side:
        model = convert_to_ode(copy.deepcopy(stock))
        handle = parallelize(model, config)
        return dataclasses.replace(called(model), step=lambda: handle.train_step(batch))

    reference = called(stock)
    reference.step()
    exact = reference.gradients()
    reference.clear()
    configs = {"ours exact": LayerParallelConfig()}
    for operator in ("identity", "aggregate"):
        configs[f"mgrit {operator} 1/1, stacked"] = LayerParallelConfig(
            strategy="mgrit",
            coarsening=min(MODEL_COARSENING, table.layers // 2),
            coarse_operator=operator,
            stacked=True,
        )
    if device.type == "cuda":  # stacked as it is meant to be used: at once
        graphs = {f"{name}, CUDA graphs": dataclasses.replace(c, cuda_graphs=True) for name, c in configs.items()}
        configs = {"ours exact": configs["ours exact"]} | graphs
    entries = [Entry("stock", {"method": "stock"}, lambda: reference)]
    entries += [Entry(name, c.to_dict() | {"method": "ours"}, partial(ours, c)) for name, c in configs.items()]
    return entries, exact


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=tuple(ROUNDS))
    parser.add_argument("--rounds", type=int, help="timed steps of each side (default: 10 on a GPU, 3 on the CPU)")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="sides whose name contains one of these")
    parser.add_argument("--output", type=Path, default=RESULTS / "one_device.json")
    options = parser.parse_args()
    device = torch.device(options.device)
    rounds = options.rounds or ROUNDS[device.type]
    init_ranks()
    # what runs one layer at a time after all may not stand in the table as stacked: its error does
    warnings.filterwarnings("error", message="(stacked|cuda_graphs)=True, but")

    result: dict[str, Any] = {
        "command": [Path(sys.argv[0]).name, "--device", device.type, "--rounds", str(rounds), *options.only],
        "device": device_name(device),
        "machine": machine(),
        "tables": [],
    }
    began = time.perf_counter()
    tables: list[tuple[Any, Any]] = [(table, bare_sides) for table in BARE[device.type]]
    tables += [(table, model_sides) for table in MODELS[device.type]]
    for table, make in tables:
        entries, exact = make(table, device)
        kept = [e for e in entries[1:] if not options.only or any(text in e.name for text in options.only)]
        sides = measure([entries[0], *kept], exact, rounds)
        result["tables"].append(
            {"name": table.name, "sizes": fact(dataclasses.asdict(table)), "rounds": rounds, "sides": sides}
        )
        print_sides(f"{table.name} on {result['device']}, {rounds} rounds", sides)
        result |= {"seconds": time.perf_counter() - began, "versions": versions()}
        write_json(options.output, result)
        del entries, exact, kept
        gc.collect()


if __name__ == "__main__":
    main()
