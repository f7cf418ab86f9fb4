"""Time of one forward and backward: serial torch, what torch offers for two ranks, and ours, beside their accuracy.

    python recipes/benchmarks/speed.py [--layers 32 64 128] [--tables stack ends] [--rounds N] [--only TEXT ...]

Starts its ranks itself: one and two gloo processes of one thread each. For every depth and number of ranks all sides
are alive at once and make their steps in alternation. Two tables: "stack", the bare stack of `stack.py` with the
gradient at its end given; "ends", a GPT-2 around the same stack with embedding, head and loss. Ratios are to the
median of serial one-thread torch in the same processes. On two ranks:
- torch's schedules (torch.distributed.pipelining) with 1, 2, 4 and 8 micro-batches
- "ours M=m": what the planner picks for so many micro-batches from costs that are measured here beforehand; "ours
  blocks", "interleaved" and "v": with the layers placed so
- MGRIT
Beside every time stand the gradient's cosine with the exact one, its relative error and norm ratio over all layers, how
much the memory of each rank grew in a step, and for ours the simulator's time. Written to
recipes/benchmarks/results/speed.json after every depth, each table with its command; tables that weren't asked for stay
there. Takes some forty minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that a checkout runs without being installed

import torch.distributed as dist

from recipes.benchmarks.alternate import measure
from recipes.benchmarks.ends import ENDS, model_sides
from recipes.benchmarks.launch import RESULTS, launch
from recipes.benchmarks.sides import init_ranks, stack_sides
from recipes.benchmarks.stack import SIZES
from recipes.results import print_table, versions, write_json

TABLES = {"stack": stack_sides, "ends": model_sides}


def default_rounds(num_layers: int) -> int:
    """Deep stacks take longer a step and spread less."""
    return min(9, max(5, 448 // num_layers))


def machine() -> dict[str, Any]:
    models = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "cores_usable": len(os.sched_getaffinity(0)),
        "load_average_before": os.getloadavg()[0],
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def run_rank(options: argparse.Namespace) -> None:
    """What each started process does: both tables of one depth."""
    init_ranks()
    found: dict[str, Any] = {}
    (num_layers,) = options.layers
    for table in options.tables:
        made = TABLES[table](num_layers, options.cost_seconds)
        kept = [e for e in made.entries[1:] if not options.only or any(text in e.name for text in options.only)]
        rounds = options.rounds if table == "stack" else (options.rounds + 1) // 2
        sides = measure([made.entries[0], *kept], made.exact, rounds)
        found[table] = {"rounds": rounds, "sides": sides}
        if made.prices is not None:
            found[table]["costs"] = dataclasses.asdict(made.prices)
        del made, kept
        gc.collect()
    if not dist.is_initialized() or dist.get_rank() == 0:
        write_json(options.rank_output, found)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def print_sides(title: str, sides: dict[str, dict[str, Any]]) -> None:
    print(f"\n{title}")
    rows: list[tuple[str, Any]] = [("", "ratio   seconds  cosine     error     memory   predicted")]
    for name, side in sides.items():
        if "error" in side:
            rows.append((name, f"can't: {side['error'].splitlines()[0]}"))
            continue
        gradient, growth = side["gradient"], max(side["memory_growth_bytes"]) / 2**20
        rows.append(
            (
                name,
                f"{side['ratio']:.3f}  {side['seconds']['median']:8.4f}  {gradient['cosine']:.6f}  "
                f"{gradient['relative_error']:.2e}  {growth:5.0f} MiB"
                + (f"  {side['predicted_over_measured']:.2f}" if "predicted_over_measured" in side else ""),
            )
        )
    print_table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument(
        "--rounds",
        type=int,
        help="timed steps of each side, half as many with ends (default: 9 at 32 layers, 7 at 64, 5 at 128)",
    )
    parser.add_argument("--ranks", type=int, nargs="+", choices=(1, 2), default=[1, 2])
    parser.add_argument("--cost_seconds", type=float, default=4.0, help="how long to measure costs, roughly, each time")
    parser.add_argument("--tables", nargs="+", choices=tuple(TABLES), default=list(TABLES))
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="sides whose name contains one of these")
    parser.add_argument("--output", type=Path, default=RESULTS / "speed.json")
    parser.add_argument("--rank_output", type=Path, help=argparse.SUPPRESS)  # given to the ranks this script starts
    options = parser.parse_args()
    if options.rank_output is not None:
        run_rank(options)
        return

    for num_layers in options.layers:
        for ranks in options.ranks:
            rounds = options.rounds or default_rounds(num_layers)
            how = {"command": [Path(sys.argv[0]).name, *sys.argv[1:]], "machine": machine()}
            began = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                output = Path(folder) / "found.json"
                arguments = ["--layers", str(num_layers), "--rounds", str(rounds), "--rank_output", str(output)]
                arguments += ["--cost_seconds", str(options.cost_seconds)]
                arguments += ["--tables", *options.tables, *(["--only", *options.only] if options.only else [])]
                launch(ranks, Path(__file__), arguments, timeout=3 * 3600.0)
                found = json.loads(output.read_text())
            how |= {"seconds": time.perf_counter() - began}  # of all tables of this depth and number of ranks
            for table, content in found.items():
                what = {"table": table, "layers": num_layers, "ranks": ranks}
                add_table(options.output, what | how | content)
                title = f"{table}, {num_layers} layers, {ranks} rank(s), {content['rounds']} rounds"
                print_sides(title, content["sides"])


def add_table(path: Path, table: dict[str, Any]) -> None:
    """Writes a table to the file, in the place of the one before."""
    tables = json.loads(path.read_text(encoding="utf-8"))["tables"] if path.exists() else []
    by_place = {(t["table"], t["layers"], t["ranks"]): t for t in [*tables, table]}
    result = {"sizes": SIZES, "ends": ENDS, "tables": list(by_place.values()), "versions": versions()}
    write_json(path, result)


if __name__ == "__main__":
    main()
