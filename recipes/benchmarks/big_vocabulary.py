"""Memory of each of four ranks that train a GPT-2 with a vocabulary of 128 thousand words.

    python recipes/benchmarks/big_vocabulary.py [--vocabulary 131072] [--width 256] [--layers 8]

The embedding is tied to the head, so the first and the last rank have it; those between hold no row of it. Each rank
counts the rows and the bytes of its parameters and gradients, and reads from the kernel how much of its memory is
resident once the others' parameters are gone and how far that grows in a training step. Written to
recipes/benchmarks/results/big_vocabulary.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that a checkout runs without being installed

import torch
import torch.distributed as dist
from transformers import GPT2Config, GPT2LMHeadModel

from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.ode.convert import convert_to_ode
from hf_layerpar.sharding import parallelize
from recipes.benchmarks.launch import RESULTS, found_by_rank
from recipes.benchmarks.resident import bytes_of, resident_growth, restart_peak
from recipes.benchmarks.sides import init_ranks
from recipes.results import print_table, versions, write_json

RANKS, ROWS, TOKENS = 4, 4, 32
CONFIG = LayerParallelConfig(micro_batches=4)


def measure(vocabulary: int, width: int, layers: int) -> dict[str, Any]:
    """What this rank holds, and how its memory grows in a step. Collective."""
    torch.manual_seed(0)
    baseline = restart_peak()
    model: Any = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary,
            n_embd=width,
            n_layer=layers,
            n_head=width // 32,
            n_positions=TOKENS,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    handle = parallelize(convert_to_ode(model), CONFIG)
    ids = torch.randint(0, vocabulary, (ROWS, TOKENS))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        handle.train_step({"input_ids": ids, "labels": ids})

    model.zero_grad(set_to_none=True)
    resident = restart_peak() - baseline
    step()  # the first one sets things up
    model.zero_grad(set_to_none=True)
    growth = resident_growth(step)
    held = dict(model.named_parameters())
    embedding = {id(p): p for p in (model.transformer.wte.weight, model.lm_head.weight) if p is not None}
    return {
        "lp_rank": handle.lp_rank,
        "layers": sorted({int(name.split(".")[2]) for name in held if name.startswith("transformer.h.")}),
        "embedding_rows": sum(len(p) for p in embedding.values()),
        "parameter_bytes": bytes_of(held.values()),
        "embedding_bytes": bytes_of(embedding.values()),
        "gradient_bytes": bytes_of(p.grad for p in held.values() if p.grad is not None),
        "resident_bytes": resident,
        "step_growth_bytes": growth,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=131072)
    parser.add_argument("--width", type=int, default=256, help="a multiple of 32")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--output", type=Path, default=RESULTS / "big_vocabulary.json")
    parser.add_argument("--rank_folder", type=Path, help=argparse.SUPPRESS)  # given to the ranks this script starts
    options = parser.parse_args()
    sizes = {name: getattr(options, name) for name in ("vocabulary", "width", "layers")}
    if options.rank_folder is not None:
        init_ranks()
        found = measure(**sizes)
        write_json(options.rank_folder / f"{found['lp_rank']}.json", found)
        dist.barrier()
        dist.destroy_process_group()
        return

    ranks = found_by_rank(RANKS, Path(__file__), [f"--{k}={v}" for k, v in sizes.items()])
    settings = sizes | {"rows": ROWS, "tokens": TOKENS, "tied": True, "layer_parallel": CONFIG.to_dict()}
    command = [Path(sys.argv[0]).name, *sys.argv[1:]]
    write_json(options.output, {"command": command, "settings": settings, "ranks": ranks, "versions": versions()})
    rows = [
        (
            f"rank {rank['lp_rank']}",
            f"{rank['embedding_rows']} rows, {rank['parameter_bytes'] / 2**20:.0f} MiB of parameters, "
            f"{rank['resident_bytes'] / 2**20:.0f} MiB resident, "
            f"{rank['step_growth_bytes'] / 2**20:.0f} MiB more in a step",
        )
        for rank in ranks
    ]
    print_table(rows)


if __name__ == "__main__":
    main()
