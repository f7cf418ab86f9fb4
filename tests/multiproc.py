"""Runs a module-level function on several gloo ranks (one process and one thread each) and returns what each returned."""

from __future__ import annotations

import multiprocessing as mp
import os
import queue
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _rank_main(fn: Callable[..., Any], rank: int, world: int, port: int, args: tuple, out: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "TOKENIZERS_PARALLELISM": "false"}
    try:
        dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=60))
        out.put((rank, True, fn(*args)))
        dist.barrier()  # nobody leaves while another still sends to it
        dist.destroy_process_group()
    except BaseException:
        out.put((rank, False, traceback.format_exc()))
        raise


class _Ranks:
    """The processes of one run and what they have reported so far."""

    def __init__(self, fn: Callable[..., Any], world: int, args: tuple, timeout: float) -> None:
        ctx = mp.get_context("spawn")
        self.world, self.timeout, self._out = world, timeout, ctx.Queue()
        port = free_port()
        self.processes = [
            ctx.Process(target=_rank_main, args=(fn, r, world, port, args, self._out), daemon=True) for r in range(world)
        ]
        self.reports: dict[int, tuple[bool, Any]] = {}  # rank -> (succeeded, result or traceback)

    def __enter__(self) -> _Ranks:
        for p in self.processes:
            p.start()
        self._deadline = time.monotonic() + self.timeout
        return self

    def __exit__(self, *exc: object) -> None:
        for p in self.processes:
            if p.is_alive():
                p.kill()

    def poll(self) -> None:
        """Takes in one report, if there is one within half a second."""
        try:
            rank, ok, value = self._out.get(timeout=0.5)
            self.reports[rank] = (ok, value)
        except queue.Empty:
            if time.monotonic() > self._deadline:
                late = sorted(set(range(self.world)) - set(self.reports))
                raise TimeoutError(f"ranks {late} of {self.world} still run after {self.timeout} s") from None

    def dead(self) -> dict[int, int]:
        """Exit codes of ranks that ended badly without a report."""
        codes = {r: p.exitcode for r, p in enumerate(self.processes) if p.exitcode and r not in self.reports}
        if codes:
            self.poll()  # a report may still have been under way
        return {r: code for r, code in codes.items() if r not in self.reports}


def run_ranks(fn: Callable[..., Any], world: int, *args: Any, timeout: float = 180.0) -> list[Any]:
    """`[fn(*args) on rank 0, on rank 1, ...]`; raises with the first failing rank's traceback, or after `timeout` seconds.

    fn and args must be picklable; results should be plain data or numpy arrays.
    """
    with _Ranks(fn, world, args, timeout) as ranks:
        while len(ranks.reports) < world:
            ranks.poll()
            for rank, (ok, value) in ranks.reports.items():
                if not ok:
                    raise RuntimeError(f"rank {rank} of {world} failed:\n{value}")
            if dead := ranks.dead():
                raise RuntimeError(f"ranks ended without a result; exit codes {dead}")
        for p in ranks.processes:
            p.join(timeout=30)
        return [ranks.reports[r][1] for r in range(world)]


def outcomes_of_ranks(fn: Callable[..., Any], world: int, *args: Any, timeout: float = 180.0) -> list[str]:
    """How each rank ended, also where others failed: its traceback, "exit code N", or the repr of its result."""
    with _Ranks(fn, world, args, timeout) as ranks:
        while len(ranks.reports) + len(dead := ranks.dead()) < world:
            ranks.poll()
        ended = {r: repr(value) if ok else value for r, (ok, value) in ranks.reports.items()}
        ended |= {r: f"exit code {code}" for r, code in dead.items()}
        return [ended[r] for r in range(world)]
