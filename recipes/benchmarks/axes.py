"""Step times of the Trainer on 4 processes that share one global batch by dp, by lp, and by both.

    python recipes/benchmarks/axes.py

A GPT-2 of random weights on random tokens. In every round each side trains some steps with a trainer of its own, in an
order drawn anew; of its steps the first is left out. Where the machine has fewer cores than processes, idle time of a
schedule is filled by other processes, so that what is compared is work and messages. Written to
recipes/benchmarks/results/axes.json.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that a checkout runs without being installed

import torch
import torch.distributed as dist
import transformers as hf
from torch.utils.data import TensorDataset

from hf_layerpar import LayerParallelTrainer, LayerParallelTrainingArguments
from recipes.benchmarks.launch import RESULTS, found_by_rank
from recipes.results import print_table, versions, write_json

MODEL: dict[str, Any] = {"n_layer": 16, "n_embd": 256, "n_head": 4, "n_positions": 128, "vocab_size": 512}
ROWS, STEPS = 16, 5
SIDES: dict[str, dict[str, Any]] = {  # as many rows of a micro-batch in every one
    "dp 4": {"micro_batches": 1},
    "lp 4": {"lp_size": 4, "micro_batches": 4},
    "dp 2 x lp 2": {"lp_size": 2, "micro_batches": 2},
    "dp 2 x lp 2, fsdp": {"lp_size": 2, "micro_batches": 2, "fsdp": True},
}


class Times(hf.TrainerCallback):
    """Seconds of every step, from its begin on all processes to its end on the last."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        dist.barrier()
        self._began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        slowest = torch.tensor(time.perf_counter() - self._began, dtype=torch.float64)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        self.seconds.append(float(slowest))


def train(settings: dict[str, Any], folder: str) -> list[float]:
    """The times of the steps of a short run, without the first."""
    torch.manual_seed(0)
    model = hf.GPT2LMHeadModel(hf.GPT2Config(**MODEL))
    rows = torch.randint(MODEL["vocab_size"], (ROWS * (STEPS + 1), MODEL["n_positions"]))

    def collate(samples: list[Any]) -> dict[str, torch.Tensor]:
        ids = torch.stack([sample[0] for sample in samples])
        return {"input_ids": ids, "labels": ids}

    dp_size = dist.get_world_size() // settings.get("lp_size", 1)
    plain = {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True}
    args = LayerParallelTrainingArguments(
        folder, max_steps=STEPS + 1, per_device_train_batch_size=ROWS // dp_size, **plain, **settings
    )
    times = Times()
    LayerParallelTrainer(
        model, args, data_collator=collate, train_dataset=TensorDataset(rows), callbacks=[times]
    ).train()
    return times.seconds[1:]


def run_rank(options: argparse.Namespace) -> None:
    """What each started process does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found: dict[str, list[float]] = {name: [] for name in SIDES}
    order, draw = list(SIDES), random.Random(0)  # the same order on every rank
    for _ in range(options.rounds):
        draw.shuffle(order)
        for name in order:
            found[name] += train(SIDES[name], str(options.rank_folder))
    write_json(options.rank_folder / f"{dist.get_rank()}.json", found)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "axes.json")
    parser.add_argument("--rank_folder", type=Path, help=argparse.SUPPRESS)  # given to the ranks this script starts
    options = parser.parse_args()
    if options.rank_folder is not None:
        run_rank(options)
        return

    times, *_ = found_by_rank(4, Path(__file__), ["--rounds", str(options.rounds)])  # the same on every rank
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    best = min(medians["dp 4"], medians["lp 4"])
    rows = {
        name: {"seconds": medians[name], "over_better_of_dp_and_lp": medians[name] / best, "all": seconds}
        for name, seconds in times.items()
    }
    settings = {"model": MODEL, "rows": ROWS, "steps": STEPS, "rounds": options.rounds, "sides": SIDES}
    settings |= {"processes": 4, "cores": os.cpu_count()}
    write_json(options.output, {"settings": settings, "rows": rows, "versions": versions()})
    print_table(
        [
            (name, f"{1e3 * row['seconds']:.0f} ms, {row['over_better_of_dp_and_lp']:.2f} of the better of dp and lp")
            for name, row in rows.items()
        ]
    )


if __name__ == "__main__":
    main()
