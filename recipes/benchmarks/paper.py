"""The paper's five systems in small: serial, layer-parallel, switched and adaptive training from the same seeds.

    python recipes/benchmarks/paper.py [SYSTEM ...] [--seeds 0 1] [--processes 2]

Every run is a recipe in one process of one thread, as the number of ranks doesn't change what it learns. Written to
recipes/benchmarks/results/paper/SYSTEM.json and .png after every run; a command that is started again goes on with the
runs that are missing there, `--fresh` forgets them. Models stay in runs/paper/SYSTEM.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that a checkout runs without being installed

from transformers import TrainerCallback

from hf_layerpar.plan.ladder import exact_settings
from hf_layerpar.sharding import layer_parallel
from recipes.benchmarks.launch import RESULTS, ROOT
from recipes.benchmarks.paper_picture import draw
from recipes.benchmarks.pool import Run, run_missing
from recipes.benchmarks.systems import SWITCHED_AFTER, SYSTEMS, UNBUFFERED, System
from recipes.results import print_table

MODELS = ROOT / "runs" / "paper"


class ExactFrom(TrainerCallback):
    """From a step on, training is exact."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step:
            handle = layer_parallel(model)
            handle.config = exact_settings(handle.config)


def jobs(name: str, seeds: Sequence[int]) -> list[Run]:
    """The runs of a system, seed by seed."""
    return [
        {"run": f"{side}, seed {seed}", "system": name, "side": side, "seed": seed}
        for seed in seeds
        for side in SYSTEMS[name].sides
    ]


def folder_of(job: Run) -> Path:
    """Where a run leaves its model and logs."""
    return MODELS / job["system"] / f"{job['side'].replace(', ', '_').replace(' ', '_')}-{job['seed']}"


def run_job(job: Run) -> Run:
    """One training run, in this process."""
    import torch

    torch.set_num_threads(1)
    began = time.perf_counter()
    system = SYSTEMS[job["system"]]
    switch = [ExactFrom(round(SWITCHED_AFTER * system.steps))] if job["side"] == "switched" else []
    command = system.command(job["side"], job["seed"], str(folder_of(job)))
    result = system.module.main(command, callbacks=switch)
    kept = {key: result[key] for key in ("settings", "rows", "metrics", "evaluation", "checks")}
    kept["losses"] = [(entry["step"], entry["loss"]) for entry in result["steps"]]
    return job | kept | {"training_seconds": result["seconds"]["training"], "seconds": time.perf_counter() - began}


def summarise(system: System, runs: Sequence[Run]) -> dict[str, Any]:
    """By side: the metric after training by seed, its distance from serial's of the same seed, and the steps at which a
    controller went to other settings."""
    finals = {(run["side"], run["seed"]): run["metrics"]["validation"][system.metric] for run in runs}
    serial = {seed: value for (side, seed), value in finals.items() if side == "serial"}
    sides: dict[str, Any] = {}
    for run in runs:
        row = sides.setdefault(run["side"], {"final": {}, "minus_serial": {}, "switches": {}})
        seed, value = run["seed"], finals[run["side"], run["seed"]]
        row["final"][seed] = value
        base = f"serial{UNBUFFERED}" if run["side"].endswith(UNBUFFERED) else "serial"
        if (base, seed) in finals:
            row["minus_serial"][seed] = value - finals[base, seed]
        row["switches"][seed] = [
            (entry["step"], entry["lp_check_name"]) for entry in run["checks"] if "lp_check_reason" in entry
        ]
    return {
        "figure": system.figure,
        "metric": system.metric,
        "more_is_better": system.more_is_better,
        "serial_spread": max(serial.values()) - min(serial.values()) if serial else None,
        "sides": sides,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs="*", metavar="SYSTEM", help=f"of {', '.join(SYSTEMS)}; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--processes", type=int, default=2, help="runs at the same time, one thread each")
    parser.add_argument("--fresh", action="store_true", help="run again what the output has")
    options = parser.parse_args()
    unknown = sorted(set(options.systems) - set(SYSTEMS))
    if unknown:
        parser.error(f"no system is called {', '.join(unknown)}; there are {', '.join(SYSTEMS)}")
    for name in options.systems or SYSTEMS:
        system, output = SYSTEMS[name], RESULTS / "paper" / f"{name}.json"
        found = run_missing(
            jobs(name, options.seeds),
            run_job,
            lambda runs, system=system: {"summary": summarise(system, runs)},
            output,
            processes=options.processes,
            fresh=options.fresh,
        )
        draw(found, output.with_suffix(".png"))
        rows = [
            (f"{name} {side}", ", ".join(f"{v:.4f}" for v in row["final"].values()))
            for side, row in found["summary"]["sides"].items()
        ]
        print_table([(f"{system.metric} after training", "by seed"), *rows])


if __name__ == "__main__":
    main()
