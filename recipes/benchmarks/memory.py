"""Memory of one rank when the layers of a BERT are spread over 1 and over 2 processes.

    python recipes/benchmarks/memory.py

Each rank counts the bytes of its layers, of their gradients and of their Adam state, and those of its ends (embeddings
on the first rank, head on the last), and reads its peak resident memory over a few training steps from the kernel.
Written to recipes/benchmarks/results/memory.json with the ratio of the largest rank of two to the one rank.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that a checkout runs without being installed

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.ode.convert import convert_to_ode
from hf_layerpar.sharding import parallelize
from recipes.benchmarks.launch import RESULTS, launch
from recipes.benchmarks.resident import bytes_of, restart_peak, status_bytes
from recipes.results import print_table, versions, write_json

MODEL: dict[str, Any] = {
    "num_hidden_layers": 8,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
}
ENDS: dict[str, Any] = {"vocab_size": 4096, "max_position_embeddings": 128}
BATCH, TOKENS, STEPS = 8, 64, 3


def measure() -> dict[str, Any]:
    """Trains a few steps on this rank's share of the model and returns what it takes."""
    torch.set_num_threads(1)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")
    warm = torch.randn(64, 64, requires_grad=True)  # loads the libraries that any training needs
    (warm @ warm).sum().backward()
    gc.collect()
    baseline = status_bytes("VmRSS")

    torch.manual_seed(0)
    model = convert_to_ode(BertForSequenceClassification(BertConfig(**MODEL, **ENDS)))
    handle = parallelize(model, LayerParallelConfig(strategy="pipeline", micro_batches=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batch = {
        "input_ids": torch.randint(0, ENDS["vocab_size"], (BATCH, TOKENS)),
        "attention_mask": torch.ones(BATCH, TOKENS, dtype=torch.long),
        "labels": torch.randint(0, 2, (BATCH,)),
    }
    before_steps = restart_peak()
    for _ in range(STEPS):
        optimizer.zero_grad(set_to_none=False)
        handle.train_step(batch)
        optimizer.step()
    peak = status_bytes("VmHWM")

    layers = [p for name, p in model.named_parameters() if name.startswith("bert.encoder.layer.")]
    ends = [p for name, p in model.named_parameters() if not name.startswith("bert.encoder.layer.")]

    def taken(parameters: list[Tensor]) -> dict[str, int]:
        states = [v for p in parameters for v in optimizer.state[p].values() if isinstance(v, Tensor)]
        grads = [p.grad for p in parameters if p.grad is not None]
        sizes = {"weights": bytes_of(parameters), "gradients": bytes_of(grads), "adam": bytes_of(states)}
        return sizes | {"sum": sum(sizes.values())}

    return {
        "lp_rank": handle.lp_rank,
        "layers": taken(layers),  # type: ignore[arg-type]
        "ends": taken(ends),  # type: ignore[arg-type]
        "resident": {
            "baseline": baseline,
            "before_steps": before_steps - baseline,
            "peak": peak - baseline,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "memory.json")
    parser.add_argument("--rank_folder", type=Path, help=argparse.SUPPRESS)  # given to the ranks this script starts
    options = parser.parse_args()
    if options.rank_folder is not None:
        found = measure()
        write_json(options.rank_folder / f"{found['lp_rank']}.json", found)
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
        return

    ranks: dict[int, list[dict[str, Any]]] = {}
    for processes in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            launch(processes, Path(__file__), ["--rank_folder", folder])
            ranks[processes] = [json.loads((Path(folder) / f"{r}.json").read_text()) for r in range(processes)]

    def ratio(part: str, key: str) -> float:
        one, two = (max(r[part][key] for r in ranks[n]) for n in (1, 2))
        return two / one

    result = {
        "settings": {"model": MODEL | ENDS, "batch": BATCH, "tokens": TOKENS, "steps": STEPS, "dtype": "float32"},
        "ranks": {str(n): found for n, found in ranks.items()},
        "ratio_2_to_1": {
            "layers_gradients_adam": ratio("layers", "sum"),
            "peak_resident": ratio("resident", "peak"),
        },
        "versions": versions(),
    }
    write_json(options.output, result)
    megabytes = {f"{n} rank(s), rank {r['lp_rank']}": r for n, found in ranks.items() for r in found}
    rows = [
        (
            name,
            f"layers {r['layers']['sum'] / 2**20:.0f} MiB, ends {r['ends']['sum'] / 2**20:.0f} MiB, "
            f"peak {r['resident']['peak'] / 2**20:.0f} MiB",
        )
        for name, r in megabytes.items()
    ]
    print_table(rows + [(f"ratio {k}", f"{v:.3f}") for k, v in result["ratio_2_to_1"].items()])


if __name__ == "__main__":
    main()
