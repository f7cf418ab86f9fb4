"""A pool of gloo ranks that stay alive, so that many short runs pay for starting and importing once."""

from __future__ import annotations

import multiprocessing as mp
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from tests.multiproc import free_port


def _serve(rank: int, world: int, port: int, pipe: Any) -> None:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # or accelerate sets it by the number of processes, and sums round differently
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "TOKENIZERS_PARALLELISM": "false"}
    if world > 1:
        dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=60))
    while True:
        try:
            fn, args = pipe.recv()
        except EOFError:  # the tests ended
            return
        try:
            pipe.send((True, fn(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


class RankPool:
    """`run(fn, *args)`: `[fn(*args) on rank 0, on rank 1, ...]`; the ranks live until `close`, or until one fails."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._ranks: list[tuple[Any, Any]] = []

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float = 150.0) -> list[Any]:
        if not self._ranks:
            self._start()
        for _, pipe in self._ranks:
            pipe.send((fn, args))
        results = []
        for rank, (_, pipe) in enumerate(self._ranks):
            if not pipe.poll(timeout):
                self.close()
                raise TimeoutError(f"rank {rank} of {self.world} gave no result within {timeout} s")
            try:
                ok, value = pipe.recv()
            except EOFError:
                ok, value = False, "the process died"
            if not ok:
                self.close()  # the others may be stuck in a collective
                raise RuntimeError(f"rank {rank} of {self.world} failed:\n{value}")
            results.append(value)
        return results

    def _start(self) -> None:
        context, port = mp.get_context("forkserver"), free_port()
        context.set_forkserver_preload(["tests.training.scenarios"])  # imports once for all pools
        for rank in range(self.world):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world, port, theirs))
            process.start()
            theirs.close()
            self._ranks.append((process, mine))

    def close(self) -> None:
        for process, pipe in self._ranks:
            process.kill()
            process.join()
            pipe.close()
        self._ranks = []
