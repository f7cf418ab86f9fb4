"""Which settings train a deep network, and which lose it: 2 + 32 + 2 layers at three step sizes, 3,000 steps.

    python recipes/benchmarks/at_size.py [--only TEXT ...] [--device cuda]

`recipes/pretrain_gpt2.py`'s network on the bytes of text. Beside serial training (two seeds) train pure `aggregate`
with one iteration each way (1/1), with an exact forward (exact/1) and with two iterations (2/2), and the adaptive
controller, which plans for 8 ranks with intervals dealt out to them; then serial runs of an eighth of the steps with
`increment_penalty` and without. These, and the long serial runs of the first seed, compare gradients with the exact one
as they go; with a penalty, those of the loss with it and those of the loss alone.

On a GPU the network is 512 wide with rows of 256 tokens, in bfloat16, and four runs share the device; on CPUs it is 64
wide with rows of 64, a run being one process of one thread. Every run is one process: which settings train doesn't
depend on the number of ranks. The share of serial time that steps would take on 4 and 8 H200 is the simulator's, from
`layer_costs.json` (D=1024, one row, NVLink), with the layers where they are fastest; in the controller's runs they stay
dealt out, in exact steps too.

Written to recipes/benchmarks/results/at_size.json and .png after every run; a command that is started again goes on
with the runs that are missing there, or were made with other options. `--fresh` forgets all.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that a checkout runs without being installed

from hf_layerpar.config import LayerParallelConfig, describe
from hf_layerpar.errors import ConfigurationError
from hf_layerpar.plan.costs import Costs
from hf_layerpar.plan.ladder import StackShape, cheapest_first, escalation
from hf_layerpar.plan.ownership import INTERLEAVED, V, interleaved_owner, two_blocks_owner
from hf_layerpar.plan.planner import predict_step
from hf_layerpar.plan.step import interval_points
from recipes.benchmarks.at_size_picture import draw
from recipes.benchmarks.controller import print_summary, shares_of_steps
from recipes.benchmarks.launch import RESULTS
from recipes.benchmarks.layer_costs import LINKS, MEASURED
from recipes.benchmarks.pool import run_missing
from recipes.benchmarks.systems import EXACT, mgrit, words

NETWORK = words("--inner_layers 32 --buffers 2 2 --max_eval_blocks 128 --micro_batches 1 --agreement_batches 0")
SIZES = {
    "cpu": words("--width 64 --heads 4 --block_size 64 --per_device_train_batch_size 8"),
    "cuda": words(
        "--width 512 --heads 8 --block_size 256 --per_device_train_batch_size 24 --bf16 --learning_rate 6e-4"
    ),
}
STEP_SIZES = {"h=1/16": 1 / 16, "h=1/4": 1 / 4, "h=1": 1.0}
SHAPE = StackShape(36, (2, 2))
START = LayerParallelConfig(strategy="mgrit", forward_iterations=0)
DEALT = dataclasses.replace(SHAPE, dealt=tuple(interval_points(START, SHAPE.num_layers, SHAPE.buffers)))
"""With the intervals of the adaptive side's grid dealt out."""
LADDER_RANKS = 8
SIDES: dict[str, tuple[str, ...]] = {
    "serial": EXACT,
    "aggregate 1/1": mgrit("aggregate"),
    "aggregate exact/1": mgrit("aggregate", forward=0),
    "aggregate 2/2": mgrit("aggregate", forward=2, backward=2),
    "adaptive": (
        *mgrit("aggregate"),
        *words(f"--controller adaptive --check_every 150 --controller_ranks {LADDER_RANKS} --split {INTERLEAVED}"),
    ),
}
DEVICES = (4, 8)
PENALTIES = (0.0, 0.1, 1.0, 10.0)
PENALISED_SHARE = 8
"""Runs for the penalty have so many times fewer steps."""
SEEDS = (0, 1)
PROBED = [("rediscretize", 4, 1, 1), ("identity", 4, 1, 1), ("aggregate", 4, 1, 1), ("aggregate", 8, 1, 1)]
PROBED += [("aggregate", 4, 0, 1), ("aggregate", 4, 2, 2)]
PROBES, SHORT_PROBES = 6, 2
"""Comparisons of gradients in a long run, and in a short one."""


def jobs(steps: int, only: Sequence[str]) -> list[dict[str, Any]]:
    """What to run, the most telling first."""
    found: dict[str, dict[str, Any]] = {}
    long = steps

    def add(h: str, side: str, seed: int, steps: int = steps, penalty: float = 0.0) -> None:
        name = f"{side}, penalty {penalty:g}" if penalty else side
        run = f"{h} {name}, seed {seed}, {steps} steps"
        if not only or any(text in run for text in only):
            job = {"run": run, "h": h, "side": name, "seed": seed, "steps": steps, "penalty": penalty}
            # the long runs of the first seed, and all short ones
            probes = 0 if side != "serial" else SHORT_PROBES if steps != long else PROBES if seed == 0 else 0
            job["probes"] = probes
            found.setdefault(run, job | {"options": [*SIDES[side], "--increment_penalty", str(penalty)]})

    for h, side in (("h=1/16", "aggregate 1/1"), ("h=1", "aggregate exact/1")):
        for name in ("serial", side, "adaptive"):
            add(h, name, 0)
        add(h, "serial", 1)
    for h in ("h=1", "h=1/16"):
        for seed in SEEDS:
            for penalty in PENALTIES:
                add(h, "serial", seed, max(1, steps // PENALISED_SHARE), penalty)
    add("h=1/4", "serial", 0)
    for seed in SEEDS:
        for h in STEP_SIZES:
            for side in SIDES:
                add(h, side, seed)
    return list(found.values())


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """One training run, in this process."""
    import torch

    torch.set_num_threads(1)
    from recipes import pretrain_gpt2
    from recipes.benchmarks.probing import GradientTable, setting

    began = time.perf_counter()
    probes = []
    if job["probes"]:
        probes.append(GradientTable(max(1, job["steps"] // job["probes"]), [setting(*values) for values in PROBED]))
    with tempfile.TemporaryDirectory() as folder:
        argv = [*NETWORK, *SIZES[job["device"]], *job["options"], "--seed", str(job["seed"])]
        argv += ["--step_size", str(STEP_SIZES[job["h"]]), "--max_steps", str(job["steps"])]
        argv += ["--eval_steps", str(max(1, job["steps"] // 15)), "--output_dir", folder]
        result = pretrain_gpt2.main(argv, callbacks=probes)
    kept = {k: result[k] for k in ("settings", "checks")}
    kept["evaluation"] = [(entry["step"], entry["loss"]) for entry in result["evaluation"]]
    kept["training_seconds"] = result["seconds"]["training"]
    return job | kept | {"gradients": probes[0].rows if probes else [], "seconds": time.perf_counter() - began}


def share(config: LayerParallelConfig, ranks: int, costs: Costs, *, dealt: bool = False) -> float:
    """Simulated time of a step over one device's, with the layers where they are fastest, or where `DEALT` has them."""
    owners = [DEALT.owner(config, ranks)] if dealt else _owners(config, ranks)
    steps = (predict_step(config, owner, costs, num_ranks=ranks, buffers=SHAPE.buffers) for owner in owners)
    return min(step.makespan for step in steps) / costs.serial(SHAPE.num_layers)


def _owners(config: LayerParallelConfig, ranks: int) -> list[tuple[int, ...]]:
    points = interval_points(config, SHAPE.num_layers, SHAPE.buffers)
    owners = [SHAPE.owner(config, ranks)]
    if config.strategy == "pipeline" and 2 * ranks <= SHAPE.num_layers:
        owners += [two_blocks_owner(SHAPE.num_layers, ranks, how) for how in (INTERLEAVED, V)]
    if config.coarse_operator == "aggregate" and config.strategy == "mgrit":
        with suppress(ConfigurationError):  # a rank would have no layer
            owners.append(interleaved_owner(SHAPE.num_layers, ranks, points))
    return owners


def predicted_shares(runs: list[dict[str, Any]], *, dealt: bool = False) -> dict[str, list[float]]:
    """Simulated times of a step over serial's on `DEVICES` H200, by the names of all settings that trained.

    dealt: as of `share`.
    """
    table = json.loads(MEASURED.read_text(encoding="utf-8"))["tables"][0]
    costs = dataclasses.replace(Costs(**table["costs"]), **LINKS["NVLink"])
    shape = DEALT if dealt else SHAPE
    settings = [LayerParallelConfig(), *escalation(START, [shape]), *cheapest_first(START, [shape], LADDER_RANKS)]
    settings += [LayerParallelConfig.from_dict(run["settings"]["layer_parallel"]) for run in runs]
    named = {describe(config): config for config in settings}  # most runs have the same
    return {name: [share(config, ranks, costs, dealt=dealt) for ranks in DEVICES] for name, config in named.items()}


def is_dealt(run: dict[str, Any]) -> bool:
    """Whether its layers are dealt out in every step."""
    return "--split" in run["options"]


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Per step size and side, of the long runs: final losses, their distance from serial, shares of steps, predicted
    times."""
    predicted = {dealt: predicted_shares(runs, dealt=dealt) for dealt in {False, *map(is_dealt, runs)}}
    long = max(run["steps"] for run in runs)
    runs = sorted(runs, key=lambda run: (list(SIDES).index(run["side"].split(",")[0]), run["seed"]))
    table: dict[str, Any] = {}
    for h in STEP_SIZES:
        here = [run for run in runs if run["h"] == h and run["steps"] == long]
        serial = {run["seed"]: run["evaluation"][-1][1] for run in here if run["side"] == "serial"}
        sides: dict[str, Any] = {}
        for side in dict.fromkeys(run["side"] for run in here):
            of_side = [run for run in here if run["side"] == side]
            finals = {run["seed"]: run["evaluation"][-1][1] for run in of_side}
            sides[side] = {
                "final_losses": finals,
                "minus_serial": {seed: loss - serial[seed] for seed, loss in finals.items() if seed in serial},
            }
            if of_side[0]["checks"]:
                shares = [(shares_of_steps(run), predicted[is_dealt(run)]) for run in of_side]
                sides[side]["shares_of_steps"] = [parts for parts, _ in shares]
                sides[side]["predicted_share"] = [
                    sum(part * times[name][i] for parts, times in shares for name, part in parts.items()) / len(shares)
                    for i in range(len(DEVICES))
                ]
            else:
                config = LayerParallelConfig.from_dict(of_side[0]["settings"]["layer_parallel"])
                sides[side]["predicted_share"] = predicted[False][describe(config)]
        if sides:
            spread = max(serial.values()) - min(serial.values()) if len(serial) > 1 else None
            table[h] = {"serial_spread": spread, "sides": sides}
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--device", choices=list(SIZES), default="cpu")
    parser.add_argument("--processes", type=int, help="runs at the same time; default: 2 on CPUs, 4 on a GPU")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="runs whose name contains one of these")
    parser.add_argument("--output", type=Path, default=RESULTS / "at_size.json")
    parser.add_argument("--fresh", action="store_true", help="run again what the output has")
    options = parser.parse_args()

    content = run_missing(
        [job | {"device": options.device} for job in jobs(options.steps, options.only)],
        run_job,
        lambda runs: {"summary": summarise(runs), "size": SIZES[options.device]},
        options.output,
        processes=options.processes or {"cpu": 2, "cuda": 4}[options.device],
        fresh=options.fresh,
    )
    draw(content, options.output.with_suffix(".png"))
    print_summary(content["summary"])


if __name__ == "__main__":
    main()
