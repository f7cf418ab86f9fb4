"""Training with inexact gradients: pure MGRIT, each policy of the controller, and serial, from the same seeds.

    python recipes/benchmarks/controller.py [--seeds 0 1 2] [--steps 2000] [--processes 2] [--only TEXT ...]

The network is `recipes/pretrain_gpt2.py`'s, 2 open layers, 16 Euler steps and 2 close layers on English text, at
h = 1/16 and at h = 1, 64 wide so that a run takes minutes. Every run is one process of one thread: which settings
train doesn't depend on the number of ranks, and the share of serial time that they would take on 4, 8 and 16 ranks is
the simulator's. The serial runs of the first seed also compare the gradients of every operator, coarsening and
iteration count with the exact one as training goes on.

Written to recipes/benchmarks/results/controller.json and .png after every run; a command that is started again goes on
with the runs that are missing there. `--fresh` forgets them.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that a checkout runs without being installed

from hf_layerpar.config import LayerParallelConfig, describe
from hf_layerpar.plan.ladder import StackShape, cheapest_first, escalation, predicted_share
from recipes.benchmarks.controller_picture import draw
from recipes.benchmarks.launch import RESULTS
from recipes.benchmarks.pool import run_missing
from recipes.benchmarks.systems import EXACT, mgrit
from recipes.results import print_table

NETWORK = ("--width", "64", "--heads", "4", "--block_size", "32", "--max_eval_blocks", "128")
TRAINING = ("--per_device_train_batch_size", "8", "--micro_batches", "1", "--agreement_batches", "0")
STEP_SIZES = {"h=1/16": 1 / 16, "h=1": 1.0}
RANKS = (4, 8, 16)
SHAPE = StackShape(20, (2, 2))
LADDER_RANKS = 8
PROBE_EVERY = 200
LONG = 5000
FITTED = ("mean", "linear")
"""Coarse operators of older runs in the result: the identity with a fitted increment, for little more than its cost."""

WATCH = ("--check_every", "100", "--check_gradient", "true", "--controller_ranks", str(LADDER_RANKS))
SIDES: dict[str, tuple[str, ...]] = {
    "serial": EXACT,
    **{f"pure {operator} c=4 1/1": mgrit(operator) for operator in ("rediscretize", "aggregate", "identity")},
    "pure identity c=8 1/1": mgrit("identity", 8),
    "pure aggregate c=8 1/1": mgrit("aggregate", 8),
    "paper": (*mgrit("rediscretize"), *WATCH, "--controller", "paper"),
    "raise": (*mgrit("rediscretize"), *WATCH, "--controller", "raise"),
    "adaptive": (*mgrit("aggregate"), *WATCH, "--controller", "adaptive"),
}
PENALISED = (  # with the first seed only
    ("h=1/16", "serial", 1.0),
    ("h=1/16", "serial", 10.0),
    ("h=1/16", "pure identity c=4 1/1", 1.0),
    ("h=1/16", "pure identity c=4 1/1", 10.0),
    ("h=1", "serial", 1.0),
    ("h=1", "pure aggregate c=4 1/1", 1.0),
)
"""Step size, side and weight of the increment penalty."""

FIRST = ("serial", "adaptive", "paper", "raise", "pure aggregate c=4 1/1", "pure identity c=4 1/1")
"""The sides to run first, with every seed at h = 1/16."""
CONTROLLED = ("serial", "adaptive", "paper", "raise")
"""The sides that every seed trains at h = 1 too."""
CANDIDATES = ("pure aggregate c=8 1/1",)
"""Pure settings that every seed trains at h = 1/16, beside those in FIRST; the others train with the first seed."""


def jobs(steps: int, seeds: Sequence[int], only: Sequence[str]) -> list[dict[str, Any]]:
    """What to run, the most telling first."""
    found: dict[str, dict[str, Any]] = {}

    def add(label: str, name: str, seed: int, length: int = steps, penalty: float = 0.0) -> None:
        side, options = name, list(SIDES[name])
        if penalty:
            side, options = f"{name}, penalty {penalty:g}", [*options, "--increment_penalty", str(penalty)]
        run = f"{label} {side}, seed {seed}, {length} steps"
        if not only or any(text in run for text in only):
            job = {"run": run, "h": label, "side": side, "seed": seed, "steps": length, "options": options}
            found.setdefault(run, job)

    for label, names in (("h=1/16", FIRST), ("h=1", CONTROLLED)):
        for seed in seeds:
            for name in names:
                add(label, name, seed)
    for label in STEP_SIZES:
        for name in SIDES:
            add(label, name, seeds[0])
    for label, name, penalty in PENALISED:
        add(label, name, seeds[0], penalty=penalty)
    for name in ("serial", "pure aggregate c=4 1/1"):
        add("h=1/16", name, seeds[0], LONG)
    for seed in seeds:
        for name in CANDIDATES:
            add("h=1/16", name, seed)
    return list(found.values())


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """One training run, in this process."""
    import torch

    torch.set_num_threads(1)
    from recipes import pretrain_gpt2
    from recipes.benchmarks.probing import GradientTable

    began = time.perf_counter()
    probes = [GradientTable(PROBE_EVERY)] if job["side"].startswith("serial") and job["seed"] == 0 else []
    with tempfile.TemporaryDirectory() as folder:
        argv = [*NETWORK, *TRAINING, *job["options"], "--seed", str(job["seed"])]
        argv += ["--step_size", str(STEP_SIZES[job["h"]]), "--max_steps", str(job["steps"])]
        argv += ["--eval_steps", "200", "--output_dir", folder]
        result = pretrain_gpt2.main(argv, callbacks=probes)
    kept = {k: result[k] for k in ("settings", "checks")}
    kept["evaluation"] = [(entry["step"], entry["loss"]) for entry in result["evaluation"]]
    kept["losses"] = [(entry["step"], entry["loss"]) for entry in result["steps"]]
    kept["training_seconds"] = result["seconds"]["training"]
    return job | kept | {"gradients": probes[0].rows if probes else [], "seconds": time.perf_counter() - began}


def shares_of_steps(run: dict[str, Any]) -> dict[str, float]:
    """In what share of a controlled run's steps which settings were in force."""
    edges = [(entry["step"], entry["lp_check_name"]) for entry in run["checks"]]
    ends = [*(step for step, _ in edges[1:]), run["steps"]]
    steps: dict[str, int] = {}
    for (start, name), end in zip(edges, ends, strict=True):
        steps[name] = steps.get(name, 0) + end - start
    return {name: count / run["steps"] for name, count in steps.items()}


def modes(run: dict[str, Any], shares: dict[str, list[float]]) -> dict[str, Any]:
    """What was in force in a controlled run, and the time a step takes on average."""
    settings = shares_of_steps(run)
    return {
        "layer_parallel": 1 - settings.get("pipeline", 0.0),
        "settings": settings,
        "predicted_share": [
            sum(share * shares[name][i] for name, share in settings.items()) for i in range(len(RANKS))
        ],
        "check_seconds": sum(entry["lp_check_seconds"] for entry in run["checks"]),
    }


def settings_of(run: dict[str, Any]) -> LayerParallelConfig:
    """Those of the run; of an older one, as they are called today."""
    known = {f.name for f in dataclasses.fields(LayerParallelConfig)}
    values = {name: value for name, value in run["settings"]["layer_parallel"].items() if name in known}
    if values["coarse_operator"] in FITTED:
        values["coarse_operator"] = "identity"
    return LayerParallelConfig(**values)


def current_name(name: str) -> str:
    """The setting of the same tasks that there is today."""
    for operator in FITTED:
        name = name.replace(f"mgrit {operator} ", "mgrit identity ")
    return name.split(" damping")[0]


def known_settings(runs: list[dict[str, Any]]) -> dict[str, LayerParallelConfig]:
    """Every setting that trained in some run, by its name."""
    named: dict[str, LayerParallelConfig] = {}
    for operator in ("rediscretize", "aggregate"):
        start = LayerParallelConfig(strategy="mgrit", coarse_operator=operator)
        rungs = [*escalation(start), *cheapest_first(start, [SHAPE], LADDER_RANKS)]
        rungs += [dataclasses.replace(s, acceleration="none") for s in rungs]  # of runs before there was any
        named |= {describe(s): s for s in rungs}
    for run in runs:
        config = settings_of(run)
        named[describe(config)] = config
        for entry in run["checks"]:
            name = entry["lp_check_name"]
            named.setdefault(name, named[current_name(name)])
    return named


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Per step size and side: final losses, their distance from serial, modes and predicted times."""
    shares = {
        name: [predicted_share(settings, [SHAPE], ranks) for ranks in RANKS]
        for name, settings in known_settings(runs).items()
    }
    table: dict[str, Any] = {}
    for label in STEP_SIZES:
        here = [run for run in runs if run["h"] == label and run["steps"] != LONG]
        serial = {run["seed"]: run["evaluation"][-1][1] for run in here if run["side"] == "serial"}
        spread = max(serial.values()) - min(serial.values()) if serial else 0.0
        for side in dict.fromkeys(run["side"] for run in here):
            of_side = [run for run in here if run["side"] == side]
            finals = {run["seed"]: run["evaluation"][-1][1] for run in of_side}
            row: dict[str, Any] = {"final_losses": finals}
            row["minus_serial"] = {seed: loss - serial[seed] for seed, loss in finals.items() if seed in serial}
            if of_side[0]["checks"]:
                row["runs"] = [modes(run, shares) for run in of_side]
            else:
                row["predicted_share"] = shares[describe(settings_of(of_side[0]))]
            table.setdefault(label, {"serial_spread": spread, "sides": {}})["sides"][side] = row
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--processes", type=int, default=2, help="runs at the same time, one thread each")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="runs whose name contains one of these")
    parser.add_argument("--output", type=Path, default=RESULTS / "controller.json")
    parser.add_argument("--fresh", action="store_true", help="run again what the output has")
    options = parser.parse_args()

    content = run_missing(
        jobs(options.steps, options.seeds, options.only),
        run_job,
        lambda runs: {"summary": summarise(runs), "ranks": RANKS},
        options.output,
        processes=options.processes,
        fresh=options.fresh,
    )
    draw(content, options.output.with_suffix(".png"))
    print_summary(content["summary"])


def print_summary(summary: dict[str, Any]) -> None:
    rows = [
        (f"{label} {side}", ", ".join(f"{loss:.4f}" for loss in row["final_losses"].values()))
        for label, found in summary.items()
        for side, row in found["sides"].items()
    ]
    print_table([("final validation loss", "by seed"), *rows])


if __name__ == "__main__":
    main()
