"""Training runs of one process and one thread each, several at a time; what is finished is kept at once."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from recipes.results import versions, write_json

Run = dict[str, Any]


def worker_pool(processes: int) -> Any:
    """A pool whose processes work one job each."""
    return mp.get_context("spawn").Pool(processes, _pass_as_main, maxtasksperchild=1)


def _pass_as_main() -> None:
    # the masking collator of transformers takes a process of any other name for a worker of a data loader
    mp.current_process().name = "MainProcess"


def run_missing(
    jobs: Sequence[Run],
    work: Callable[[Run], Run],
    summarise: Callable[[list[Run]], dict[str, Any]],
    output: Path,
    *,
    processes: int,
    fresh: bool,
) -> dict[str, Any]:
    """Work those jobs that `output` doesn't have, or has with other "options", and write it anew after each.

    Args:
        jobs: each with its own name under "run".
        work: what is to be kept of a job's run, in a process of its own; with the name under "run".
        summarise: the entries of the file beside "runs" and "versions", from the runs so far.
        fresh: do the others again too.

    Returns: what `output` holds: the runs of these jobs, and before them others that it had.
    """
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done: dict[str, Run] = {}
    if output.exists() and not fresh:
        done = {run["run"]: run for run in json.loads(output.read_text(encoding="utf-8"))["runs"]}
    for job in jobs:
        if job["run"] in done and done[job["run"]].get("options") != job.get("options"):
            del done[job["run"]]
    missing = [job for job in jobs if job["run"] not in done]

    def write() -> None:
        wanted = {job["run"] for job in jobs}
        others = [run for name, run in done.items() if name not in wanted]
        runs = others + [done[job["run"]] for job in jobs if job["run"] in done]
        write_json(output, summarise(runs) | {"runs": runs, "versions": versions()})

    with worker_pool(processes) as pool:
        for count, run in enumerate(pool.imap_unordered(work, missing), start=1):
            done[run["run"]] = run
            print(f"{count}/{len(missing)}  {run['run']}", flush=True)
            write()
    write()
    return json.loads(output.read_text(encoding="utf-8"))
