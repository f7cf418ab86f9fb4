"""Time of a training step with compiled layers beside eager ones, in one process.

    python recipes/benchmarks/compiled.py

A GPT-2 from random weights, exactly and by MGRIT; medians of alternating steps after the code is made, one thread.
Written to recipes/benchmarks/results/compiled.json with the time that the first step took, code included.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that a checkout runs without being installed

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hf_layerpar import LayerParallelConfig, convert_to_ode, parallelize
from recipes.benchmarks.launch import RESULTS
from recipes.results import print_table, versions, write_json

MODEL: dict[str, Any] = {"n_embd": 256, "n_head": 4, "n_positions": 128, "vocab_size": 512}
SETTINGS: dict[str, dict[str, Any]] = {
    "exact": {},
    "mgrit aggregate 1/1": {"strategy": "mgrit", "coarsening": 4, "coarse_operator": "aggregate"},
}


def measure(settings: dict[str, Any], layers: int, batch: int, backend: str, rounds: int) -> dict[str, float]:
    """Seconds of a step, and how far the compiled layers' gradient is from the eager ones', relative."""
    sides, grads = {}, {}
    seeded = torch.Generator().manual_seed(0)
    rows = torch.randint(0, MODEL["vocab_size"], (batch, MODEL["n_positions"]), generator=seeded)
    data = {"input_ids": rows, "labels": rows}
    found: dict[str, float] = {}
    for name in ("eager", "compiled"):
        torch.manual_seed(0)
        model = convert_to_ode(GPT2LMHeadModel(GPT2Config(n_layer=layers, **MODEL)).eval())
        handle = parallelize(model, LayerParallelConfig(**settings))
        if name == "compiled":
            handle.compile_layers(backend)
        began = time.perf_counter()
        handle.train_step(data)
        found[f"{name}_first_seconds"] = time.perf_counter() - began
        grads[name] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        sides[name] = (model, handle)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, (model, handle) in sides.items():
            model.zero_grad()
            began = time.perf_counter()
            handle.train_step(data)
            times[name].append(time.perf_counter() - began)
    found |= {f"{name}_seconds": statistics.median(values) for name, values in times.items()}
    found["share"] = found["compiled_seconds"] / found["eager_seconds"]
    found["gradient_error"] = float((grads["compiled"] - grads["eager"]).norm() / grads["eager"].norm())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=RESULTS / "compiled.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = {
        name: measure(settings, options.layers, options.batch, options.backend, options.rounds)
        for name, settings in SETTINGS.items()
    }
    sizes = {name: getattr(options, name) for name in ("layers", "batch", "backend", "rounds")}
    write_json(options.output, {"settings": {"model": MODEL, **sizes}, "rows": rows, "versions": versions()})
    print_table(
        [
            (
                name,
                f"eager {1e3 * row['eager_seconds']:.0f} ms, compiled {1e3 * row['compiled_seconds']:.0f} ms, share "
                f"{row['share']:.2f}, first step {row['compiled_first_seconds']:.0f} s, "
                f"error {row['gradient_error']:.1e}",
            )
            for name, row in rows.items()
        ]
    )


if __name__ == "__main__":
    main()
