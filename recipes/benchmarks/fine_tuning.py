"""Fine-tuning a BERT pretrained layer-parallel against one pretrained serially (the paper's Table 1).

    python recipes/benchmarks/fine_tuning.py [--tasks movies ...] [--seeds 0 1] [--processes 2]

Networks are those of `paper.py bert`, two seeds of each side (they are trained first where runs/paper/bert doesn't have
them), and the same networks as they were before any pretraining ("new"). They are fine-tuned exactly by
`recipes/glue_bert.py` on its offline sentences with every seed, which also draws the split. Accuracy is that of the
validation and test rows together, as nothing is chosen by either. Written to
recipes/benchmarks/results/paper/fine_tuning.json after every run; a command that is started again goes on with the runs
that are missing there, `--fresh` forgets them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that a checkout runs without being installed

from recipes.benchmarks.launch import RESULTS
from recipes.benchmarks.paper import folder_of, run_job
from recipes.benchmarks.pool import Run, run_missing, worker_pool
from recipes.benchmarks.systems import EXACT, SYSTEMS, words
from recipes.results import print_table

TASKS = ("movies", "products", "tweets", "news")
NEW = "new"
SIDES = ("serial", "switched", "adaptive", NEW)
PRETRAINING_SEEDS = (0, 1)
TRAINING = words("--max_length 48 --max_steps 300 --per_device_train_batch_size 32 --learning_rate 1e-3")
UNTRAINED = words("--max_steps 1 --learning_rate 0")


def network_of(side: str, seed: int) -> Run:
    """The pretraining run."""
    return {"run": f"{side}, seed {seed}", "system": "bert", "side": side, "seed": seed}


def jobs(tasks: Sequence[str], seeds: Sequence[int]) -> list[Run]:
    """Every network on every task with every seed; all sides of a seed before the next."""
    return [
        {
            "run": f"{task}, {side} of seed {pretrained}, seed {seed}",
            "task": task,
            "side": side,
            "pretraining_seed": pretrained,
            "seed": seed,
        }
        for seed in seeds
        for pretrained in PRETRAINING_SEEDS
        for task in tasks
        for side in SIDES
    ]


def fine_tune(job: Run) -> Run:
    """One fine-tuning run, in this process."""
    import torch

    torch.set_num_threads(1)
    from recipes import glue_bert

    began = time.perf_counter()
    model = folder_of(network_of(job["side"], job["pretraining_seed"])) / "model"
    with tempfile.TemporaryDirectory() as folder:
        command = [*TRAINING, *EXACT, "--model_name", str(model), "--source", job["task"], "--seed", str(job["seed"])]
        result = glue_bert.main([*command, "--micro_batches", "1", "--output_dir", folder])
    kept = {key: result[key] for key in ("rows", "metrics")}
    return job | kept | {"seconds": time.perf_counter() - began}


def held_out_share(run: Run, metric: str) -> float:
    """A share of the validation and test rows together."""
    rows = {split: run["rows"][split] for split in ("validation", "test")}
    return sum(run["metrics"][split][metric] * count for split, count in rows.items()) / sum(rows.values())


def summarise(runs: Sequence[Run]) -> dict[str, Any]:
    """By task: the mean accuracy of each side, its distance from serial's over the same seeds with the standard error
    of that, the mean share of the most frequent label, and the standard deviation of serial's runs."""
    table: dict[str, Any] = {}
    for task in dict.fromkeys(run["task"] for run in runs):
        found = {(run["side"], run["pretraining_seed"], run["seed"]): run for run in runs if run["task"] == task}
        accuracies = {key: held_out_share(run, "accuracy") for key, run in found.items()}
        serial = {key[1:]: value for key, value in accuracies.items() if key[0] == "serial"}
        row: dict[str, Any] = {"majority": statistics.mean(held_out_share(run, "majority") for run in found.values())}
        row["serial_deviation"] = statistics.stdev(serial.values()) if len(serial) > 1 else None
        row["sides"] = {}
        for side in SIDES:
            of_side = {key[1:]: value for key, value in accuracies.items() if key[0] == side and key[1:] in serial}
            if not of_side:
                continue
            differences = [value - serial[key] for key, value in of_side.items()]
            row["sides"][side] = {
                "runs": len(of_side),
                "accuracy": statistics.mean(of_side.values()),
                "minus_serial": statistics.mean(differences),
                "standard_error": statistics.stdev(differences) / len(differences) ** 0.5 if differences[1:] else None,
            }
        table[task] = row
    return {"summary": table}


def make_network(job: Run) -> Run:
    """One pretraining run, in this process."""
    if job["side"] != NEW:
        return run_job(job)
    system = SYSTEMS[job["system"]]
    command = [*system.options, *EXACT, *UNTRAINED, "--micro_batches", "1", "--seed", str(job["seed"])]
    system.module.main([*command, "--output_dir", str(folder_of(job))])
    return job


def pretrain(processes: int) -> None:
    """Make the networks that are not there."""
    missing = [
        job
        for job in (network_of(side, seed) for seed in PRETRAINING_SEEDS for side in SIDES)
        if not (folder_of(job) / "model" / "config.json").exists()
    ]
    with worker_pool(processes) as pool:
        for run in pool.imap_unordered(make_network, missing):
            print(f"pretrained {run['run']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--processes", type=int, default=2, help="runs at the same time, one thread each")
    parser.add_argument("--fresh", action="store_true", help="run again what the output has")
    options = parser.parse_args()
    pretrain(options.processes)
    found = run_missing(
        jobs(options.tasks, options.seeds),
        fine_tune,
        summarise,
        RESULTS / "paper" / "fine_tuning.json",
        processes=options.processes,
        fresh=options.fresh,
    )
    rows = [
        (f"{task} {side}", f"{values['accuracy']:.4f} ({100 * values['minus_serial']:+.2f} points)")
        for task, row in found["summary"].items()
        for side, values in row["sides"].items()
    ]
    print_table([("accuracy on held-out rows", "mean"), *rows])


if __name__ == "__main__":
    main()
