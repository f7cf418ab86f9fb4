"""What a transformer layer costs on this device, and what that makes of a step on many of them.

    python recipes/benchmarks/layer_costs.py [--device cuda] [--output FILE]

Measured here: forward, input-vjp and weight gradients of one pre-LN layer (bf16 and eager on a GPU), and forward and
backward of the P-th part of one, as tensor parallelism of P devices has it. Simulated from these, for stacks of 64 and
128 layers on 8, 32 and 128 devices and 1 to 16 micro-batches (at most one a row), as shares of one device's step: the
best exact schedule (with zero bubbles where the planner finds them shorter), tensor parallelism (its four all-reduces a
layer by the formula of a ring), and MGRIT with `aggregate` (dealt out, coarsened by the number of devices, at most 16)
and `identity`, one iteration each. Links are given, not measured: NVLink 300 GB/s and 12 us a message, InfiniBand
40 GB/s and 15 us; up to 8 devices talk over NVLink, more over InfiniBand. How good the inexact gradients are is not
part of this (`recipes/benchmarks/controller.py`). Written to recipes/benchmarks/results/layer_costs.json, by whose
costs of an H200 other benchmarks simulate.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that a checkout runs without being installed

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.plan.costs import Costs
from hf_layerpar.plan.ownership import contiguous_owner, interleaved_owner, two_blocks_owner
from hf_layerpar.plan.planner import predict_step
from hf_layerpar.run.calibrate import calibrate
from hf_layerpar.run.clock import seconds_of
from recipes.benchmarks.launch import RESULTS
from recipes.benchmarks.one_device import device_name
from recipes.benchmarks.sides import Call
from recipes.results import print_table, versions, write_json

SIZES = {"cuda": [(1024, 1, 512), (1024, 8, 1024), (2048, 8, 1024)], "cpu": [(64, 8, 32)]}  # (D, B, T)
PLACES = {"cuda": [(64, 8), (128, 32), (128, 128)], "cpu": [(64, 8)]}  # (layers, devices)
MICRO_BATCHES = (1, 2, 4, 8, 16)
LINKS = {"NVLink": {"bandwidth": 300e9, "latency": 12e-6}, "InfiniBand": {"bandwidth": 40e9, "latency": 15e-6}}
HEAD = 64
MEASURED = RESULTS / "layer_costs.json"
"""Of an H200."""


class Block(nn.Module):
    """x `[B, T, D]` -> x + attention(norm(x)), then x + mlp(norm(x)). parts: only one of so many of each product."""

    def __init__(self, dim: int, parts: int = 1) -> None:
        super().__init__()
        self.head = min(HEAD, dim // parts)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim // parts), nn.Linear(dim // parts, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim // parts), nn.Linear(4 * dim // parts, dim)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm1(x)).view(*x.shape[:2], 3, -1, self.head)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(gelu(self.up(self.norm2(x))))


def measured(dim: int, batch: int, tokens: int, device: torch.device) -> Costs:
    """Of one layer, messages apart."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    calls = [Call(Block(dim).to(device, dtype)) for _ in range(2)]
    x = torch.randn(batch, tokens, dim, device=device, dtype=dtype)
    part = None if batch == 1 else (calls, x[: batch // 2])
    return calibrate(calls, x, part=part, seconds=2.0)


def part_of_a_layer(dim: int, batch: int, tokens: int, parts: int, device: torch.device) -> float:
    """Seconds of forward and backward of the P-th part of a layer."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    block = Block(dim, parts).to(device, dtype)
    x = torch.randn(batch, tokens, dim, device=device, dtype=dtype, requires_grad=True)
    lam = torch.ones_like(x)
    times = [seconds_of(lambda: block(x).backward(lam), device) for _ in range(20)]
    return statistics.median(times[5:])


def simulated(costs: Costs, batch: int, layers: int, devices: int, tensor_part: float | None) -> dict[str, Any]:
    """Shares of one device's step, by method and number of micro-batches. batch: rows."""
    link = "NVLink" if devices <= 8 else "InfiniBand"
    costs = dataclasses.replace(costs, **LINKS[link])
    serial = costs.serial(layers)
    found: dict[str, Any] = {"layers": layers, "devices": devices, "link": link, "serial_seconds": serial, "shares": {}}

    def best(name: str, m: int, owners: list[tuple[int, ...]], config: LayerParallelConfig) -> None:
        steps = [predict_step(config, owner, costs, num_ranks=devices) for owner in owners]
        found["shares"].setdefault(name, {})[m] = min(step.makespan for step in steps) / serial

    blocks = contiguous_owner(layers, devices)
    two = [two_blocks_owner(layers, devices, how) for how in ("interleaved", "v")] if layers >= 2 * devices else []
    c = min(devices, 16)
    points = range(0, layers + 1, c)
    mgrit = LayerParallelConfig(strategy="mgrit", coarsening=c)
    for m in (m for m in MICRO_BATCHES if m <= batch):
        best("exact", m, [blocks, *two], LayerParallelConfig(micro_batches=m))
        aggregate = dataclasses.replace(mgrit, coarse_operator="aggregate", micro_batches=m)
        dealt = [interleaved_owner(layers, devices, points)] if devices <= c else []
        best("aggregate 1/1", m, [*dealt, blocks], aggregate)
        best("identity 1/1", m, [blocks], dataclasses.replace(mgrit, coarse_operator="identity", micro_batches=m))
    if tensor_part is not None:
        reduce = 2 * (devices - 1) / devices * costs.state_bytes / costs.bandwidth
        reduce += math.ceil(math.log2(devices)) * costs.latency
        found["shares"]["tensor parallel"] = {1: layers * (tensor_part + 4 * reduce) / serial}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=tuple(SIZES))
    parser.add_argument("--output", type=Path, default=MEASURED)
    options = parser.parse_args()
    device, began = torch.device(options.device), time.perf_counter()
    tables = []
    for dim, batch, tokens in SIZES[device.type]:
        costs = measured(dim, batch, tokens, device)
        table: dict[str, Any] = {"dim": dim, "batch": batch, "tokens": tokens, "costs": dataclasses.asdict(costs)}
        table["simulated"] = []
        for layers, devices in PLACES[device.type]:
            cuts = dim // devices >= HEAD or device.type == "cpu"  # a head is not cut
            part = part_of_a_layer(dim, batch, tokens, devices, device) if cuts else None
            table["simulated"].append(simulated(costs, batch, layers, devices, part))
        tables.append(table)
        for case in table["simulated"]:
            print(f"\nD={dim} B={batch} T={tokens}: {case['layers']} layers on {case['devices']}, {case['link']}")
            print_table(
                [(name, "  ".join(f"{m}: {s:.3f}" for m, s in of.items())) for name, of in case["shares"].items()]
            )
    result = {"command": [Path(sys.argv[0]).name, "--device", device.type], "device": device_name(device)}
    result |= {"links": LINKS}
    result |= {"simulated": "all shares are simulated from measured costs of layers and given links", "tables": tables}
    write_json(options.output, result | {"seconds": time.perf_counter() - began, "versions": versions()})


if __name__ == "__main__":
    main()
