"""Seconds to serial's validation loss: stock, DDP, the exact pipeline and adaptive MGRIT, on one and two processes.

    python recipes/benchmarks/race.py [--seeds 0 1] [--steps 1200] [--only TEXT ...]

`recipes/pretrain_gpt2.py`'s network with 2 open layers, 32 steps of h = 1/16 and 2 close ones, 64 wide, on the bytes of
text; stock and DDP are the Trainer of transformers. Every process has one thread, and two of them two cores. Of the
exact pipelines, `EXACT_SIDES`, the one with the shortest steps in short runs trains. The target of a seed is the last
validation loss of its stock run plus `TOLERANCE`; the seconds to it contain the controller's checks and not the
evaluations, and lie on a line between two of these.

Beside it stands the same race simulated on 8 H200: every step's settings as they were in the run, with the costs of
`layer_costs.json` (D=1024, NVLink), once for 8 rows of 1,024 tokens and once for one row, which DDP can't split.

Written to recipes/benchmarks/results/race.json and .png after every run; a command that is started again goes on with
the runs that are missing there. `--fresh` forgets them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that a checkout runs without being installed

import torch
import torch.distributed as dist
import transformers as hf

from hf_layerpar import LayerParallelConfig, LayerParallelTrainer
from hf_layerpar.config import describe
from hf_layerpar.plan.costs import Costs
from hf_layerpar.plan.ladder import cheapest_first, exact_settings
from hf_layerpar.report.drawing import matplotlib_classes
from recipes import pretrain_gpt2
from recipes.benchmarks.at_size import SHAPE, share
from recipes.benchmarks.controller import shares_of_steps
from recipes.benchmarks.launch import RESULTS, found_by_rank
from recipes.benchmarks.layer_costs import LINKS
from recipes.benchmarks.layer_costs import MEASURED as H200
from recipes.benchmarks.settings_map import MICRO_BATCHES
from recipes.benchmarks.systems import mgrit, words
from recipes.language import load_blocks
from recipes.results import print_table, versions, write_json

NETWORK = words(
    "--inner_layers 32 --buffers 2 2 --step_size 0.0625 --width 64 --heads 4 --block_size 64 --max_eval_blocks 128"
)
STEP_SIZE = 1 / 16
ROWS = 8
EVALUATIONS = 20
TOLERANCE = 0.005
"""Above stock's last validation loss: a sum in another order ends up above it or below."""
STOCK, DDP, PIPELINE, ADAPTIVE = "stock, 1 process", "DDP, 2", "exact pipeline, 2", "adaptive MGRIT, 2"
PROCESSES = {STOCK: 1, DDP: 2, PIPELINE: 2, ADAPTIVE: 2}
EXACT_SIDES = {
    f"{schedule}, {count} micro-batches": ("--schedule", schedule, "--micro_batches", str(count))
    for schedule in ("1f1b", "zb_h1")
    for count in (2, 4)
}
WATCHED = (*mgrit("aggregate"), "--controller", "adaptive", "--check_every", "60", "--micro_batches", "1")
DEVICES = 8
MEASURED = "measured: 2 cores, gloo"


class Clock(hf.TrainerCallback):
    """(step, validation loss, seconds of training until then, evaluations left out) at every evaluation; and the
    seconds of every step, checks of a controller left out."""

    def __init__(self) -> None:
        self.curve: list[tuple[int, float, float]] = []
        self.steps: list[float] = []
        self._evaluating, self._began, self._step_began = 0.0, 0.0, 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.perf_counter()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._step_began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps.append(time.perf_counter() - self._step_began)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        self._evaluating += metrics["eval_runtime"]
        seconds = time.perf_counter() - self._began - self._evaluating
        self.curve.append((state.global_step, metrics["eval_loss"], seconds))


def train(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One run, as one of its processes does it."""
    processes, rows = job["processes"], ROWS // (job["processes"] if job["side"] == DDP else 1)
    argv = [*NETWORK, *job["options"], "--seed", str(job["seed"]), "--per_device_train_batch_size", str(rows)]
    argv += ["--max_steps", str(job["steps"]), "--eval_steps", str(job["steps"] // EVALUATIONS or job["steps"])]
    argv += ["--save_strategy", "no", "--disable_tqdm", "true", "--output_dir", str(folder / "run")]
    recipe, args = pretrain_gpt2.parse(argv)
    data = (recipe.dataset_name, recipe.dataset_config, recipe.tokenizer_name, recipe.block_size)
    blocks = load_blocks(*data, recipe.max_eval_blocks, recipe.streaming, args.seed)
    clock = Clock()
    layer_parallel = job["side"] not in (STOCK, DDP)
    trainer = (LayerParallelTrainer if layer_parallel else hf.Trainer)(
        model=pretrain_gpt2.build_model(recipe, blocks.tokenizer, args.seed),
        args=args,
        train_dataset=blocks.train,
        eval_dataset=blocks.validation,
        data_collator=hf.default_data_collator,
        callbacks=[clock],
    )
    assert args.world_size == processes, (args.world_size, processes)
    trainer.train()
    checks = [entry for entry in trainer.state.log_history if "lp_check_setting" in entry]
    config = args.layer_parallel_config.to_dict() if layer_parallel else None
    return {"curve": clock.curve, "times": clock.steps, "checks": checks, "settings": {"layer_parallel": config}}


def run(job: dict[str, Any]) -> dict[str, Any]:
    """A run in processes of its own; its times are those of its main process, in step with the others."""
    found, *_ = found_by_rank(job["processes"], Path(__file__), ["--job", json.dumps(job)], timeout=7200)
    times = found.pop("times")
    return job | found | {"median_step": statistics.median(times)}


def times_of_exact(seed: int, folder: Path) -> dict[str, float]:
    """The median step of every exact pipeline in short runs, which alternate, as one of the processes times it."""
    times: dict[str, list[float]] = {name: [] for name in EXACT_SIDES}
    for _ in range(3):
        for name, options in EXACT_SIDES.items():
            job = {"side": PIPELINE, "seed": seed, "steps": 12, "options": options, "processes": PROCESSES[PIPELINE]}
            times[name] += train(job, folder)["times"][2:]
    return {name: statistics.median(values) for name, values in times.items()}


def seconds_to(target: float, curve: list[tuple[int, float, float]]) -> float | None:
    """When the loss is at `target` for the first time, on the line between two evaluations; None where it never is."""
    before: tuple[float, float] | None = None
    for _, loss, seconds in curve:
        if loss <= target:
            if before is None:
                return seconds
            share = (before[0] - target) / (before[0] - loss)
            return before[1] + share * (seconds - before[1])
        before = (loss, seconds)
    return None


def simulated_step(side: str, config: LayerParallelConfig | None, table: dict[str, Any]) -> float:
    """Seconds of a step on `DEVICES` H200 (stock: on one). DDP cuts the rows of the batch over them, where it has as
    many, and its all-reduce of the gradients, 12 D^2 a layer in bfloat16, isn't hidden. A pipeline has the fastest
    schedule, number of micro-batches and placement of layers there."""
    costs = dataclasses.replace(Costs(**table["costs"]), **LINKS["NVLink"])
    if config is None:
        splits = side == DDP and table["batch"] >= DEVICES
        moved = 2 * (DEVICES - 1) / DEVICES * SHAPE.num_layers * 12 * table["dim"] ** 2 * 2
        return costs.cut(DEVICES if splits else 1).serial(SHAPE.num_layers) + (
            moved / costs.bandwidth if splits else 0.0
        )
    if config.strategy == "pipeline":
        config = dataclasses.replace(config, schedule="list")
    counts = [m for m in MICRO_BATCHES if m <= table["batch"]] if config.strategy == "pipeline" else [1]
    shares = (share(dataclasses.replace(config, micro_batches=count), DEVICES, costs) for count in counts)
    return min(shares) * costs.serial(SHAPE.num_layers)


def simulated_curve(run: dict[str, Any], table: dict[str, Any]) -> list[tuple[int, float, float]]:
    """The run's evaluations at simulated seconds. A check costs an exact step and one of the setting it looks at."""
    values = run["settings"]["layer_parallel"]
    if not run["checks"]:
        config = None if values is None else LayerParallelConfig.from_dict(values)
        seconds = simulated_step(run["side"], config, table)
        return [(step, loss, step * seconds) for step, loss, _ in run["curve"]]
    start = LayerParallelConfig.from_dict(values)
    ladder = [start, *cheapest_first(start, [dataclasses.replace(SHAPE, step_size=STEP_SIZE)], PROCESSES[ADAPTIVE])]
    times = {describe(config): simulated_step(run["side"], config, table) for config in ladder}
    exact = simulated_step(run["side"], exact_settings(start), table)
    named = {entry["step"]: entry["lp_check_name"] for entry in run["checks"]}
    clock, name, at = 0.0, "", {}
    for step in range(run["steps"]):
        if step in named:
            name = named[step]
            clock += exact + times[name]
        clock += times[name]
        at[step + 1] = clock
    return [(step, loss, at[step]) for step, loss, _ in run["curve"]]


def races(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Every race by its name: side -> a curve for each seed that ran."""
    found: dict[str, Any] = {MEASURED: {}}
    for run in runs:
        found[MEASURED].setdefault(run["side"], {})[run["seed"]] = run["curve"]
    for table in json.loads(H200.read_text(encoding="utf-8"))["tables"]:
        if table["dim"] != 1024:
            continue
        rows = f"{table['batch']} rows" if table["batch"] > 1 else "1 row"
        race = found.setdefault(f"simulated: {DEVICES} H200, {rows} of {table['tokens']} tokens", {})
        for run in runs:
            race.setdefault(run["side"], {})[run["seed"]] = simulated_curve(run, table)
    return found


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """For each race and side, by seed: the seconds to the target, all seconds, and the last loss minus stock's."""
    finals = {run["seed"]: run["curve"][-1][1] for run in runs if run["side"] == STOCK}
    table: dict[str, Any] = {}
    for race, sides in races(runs).items():
        for side, curves in sides.items():
            known = {seed: curve for seed, curve in curves.items() if seed in finals}
            table.setdefault(race, {})[side] = {
                "seconds_to_target": {s: seconds_to(finals[s] + TOLERANCE, curve) for s, curve in known.items()},
                "seconds": {seed: curve[-1][2] for seed, curve in known.items()},
                "minus_stock": {seed: curve[-1][1] - finals[seed] for seed, curve in known.items()},
            }
    shares = {run["seed"]: shares_of_steps(run) for run in runs if run["checks"]}
    return {"summary": table, "adaptive_shares_of_steps": shares}


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Validation loss over seconds, a panel for each race; a line for each seed."""
    figure_class, _ = matplotlib_classes()
    found = races(runs)
    figure = figure_class(figsize=(5 * len(found), 4), layout="constrained")
    for axes, (race, sides) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        for i, (side, curves) in enumerate(sides.items()):
            for j, curve in enumerate(curves.values()):
                points = [(seconds, loss) for _, loss, seconds in curve]
                name = side if race == MEASURED else side.rsplit(",", 1)[0]
                axes.plot(*zip(*points, strict=True), color=f"C{i}", lw=1.2, label=None if j else name)
        axes.set(title=race, xlabel="seconds of training", ylabel="validation loss")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=100)


def jobs(steps: int, seeds: list[int], only: list[str], exact: tuple[str, ...]) -> list[dict[str, Any]]:
    """What to run: all sides of a seed, then the next seed."""
    options = {STOCK: (), DDP: (), PIPELINE: exact, ADAPTIVE: WATCHED}
    every = [
        {"run": f"{side}, seed {seed}, {steps} steps", "side": side, "seed": seed, "steps": steps}
        | {"options": options[side], "processes": PROCESSES[side]}
        for seed in seeds
        for side in PROCESSES
    ]
    return [job for job in every if not only or any(text in job["run"] for text in only)]


def run_rank(job: dict[str, Any], folder: Path) -> None:
    """What each started process does."""
    torch.set_num_threads(1)
    found = train(job, folder) if "side" in job else times_of_exact(job["seed"], folder)
    write_json(folder / f"{os.environ.get('RANK', '0')}.json", found)
    if dist.is_initialized():
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="runs whose name contains one of these")
    parser.add_argument("--output", type=Path, default=RESULTS / "race.json")
    parser.add_argument("--fresh", action="store_true", help="run again what the output has")
    parser.add_argument("--job", help=argparse.SUPPRESS)  # given, with its folder, to the processes this script starts
    parser.add_argument("--rank_folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        run_rank(json.loads(options.job), options.rank_folder)
        return

    kept: dict[str, Any] = {"runs": []}
    if options.output.exists() and not options.fresh:
        kept = json.loads(options.output.read_text(encoding="utf-8"))
    if "exact_steps" not in kept:
        arguments = ["--job", json.dumps({"seed": options.seeds[0]})]
        kept["exact_steps"], *_ = found_by_rank(PROCESSES[PIPELINE], Path(__file__), arguments)
        kept["exact"] = min(kept["exact_steps"], key=kept["exact_steps"].get)
    for job in jobs(options.steps, options.seeds, options.only, EXACT_SIDES[kept["exact"]]):
        if job["run"] in {run["run"] for run in kept["runs"]}:
            continue
        kept["runs"].append(run(job))
        print(job["run"], f"{kept['runs'][-1]['curve'][-1][2]:.0f} s", flush=True)
        write_json(options.output, kept)
    kept |= summarise(kept["runs"]) | {"tolerance": TOLERANCE, "cores": os.cpu_count(), "versions": versions()}
    write_json(options.output, kept)
    draw(kept["runs"], options.output.with_suffix(".png"))
    rows = [
        (
            f"{race}: {side}",
            f"target after {list(row['seconds_to_target'].values())} s of {list(row['seconds'].values())}",
        )
        for race, sides in kept["summary"].items()
        for side, row in sides.items()
    ]
    print_table(rows)


if __name__ == "__main__":
    main()
