"""Runs module-level functions on several gloo ranks (one process and one thread each).

The ranks of a pool stay alive between runs, and all are forked from one server that has imported torch and
transformers, so that many short runs pay for starting once.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing as mp
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import connection
from typing import Any

import torch
import torch.distributed as dist

_PRELOAD = ["tests.problems", "tests.zoo", "hf_layerpar.sharding", "hf_layerpar.training.trainer"]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _serve(rank: int, world: int, port: int, pipe: Any, backend: str, device: str | None) -> None:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # or accelerate sets it by the number of processes, and sums round differently
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
    os.environ.setdefault("LOCAL_RANK", str(rank))
    os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "TOKENIZERS_PARALLELISM": "false"}
    if world > 1:
        found = None if device is None else torch.device(device)
        timeout = timedelta(seconds=60)
        dist.init_process_group(backend, rank=rank, world_size=world, timeout=timeout, device_id=found)
    gc.freeze()  # or every collection (accelerate asks for one in each training run) walks through all libraries
    while True:
        try:
            fn, args = pipe.recv()
        except EOFError:  # the tests ended
            return
        try:
            pipe.send((True, fn(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
            return  # as a program would: ranks that wait for this one see its connections close


class RankPool:
    """`world` ranks that live until `close`, or until one of them fails.

    environment: variables that count when a library is imported, "{rank}" in them the rank's number; with them every
        rank starts from nothing.
    backend, device: of the process group, and the device that it is bound to from the beginning.
    """

    def __init__(
        self,
        world: int,
        environment: dict[str, str] | None = None,
        *,
        backend: str = "gloo",
        device: str | None = None,
    ) -> None:
        self.world, self.environment, self.backend, self.device = world, environment, backend, device
        self._ranks: list[tuple[Any, Any]] = []  # (process, pipe)

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float = 180.0) -> list[Any]:
        """`[fn(*args) on rank 0, on rank 1, ...]`; raises with the first failing rank's traceback."""
        results: dict[int, Any] = {}
        for rank, (ok, value) in self._reports(fn, args, timeout):
            if not ok:
                self.close()  # the others may be stuck in a collective
                raise RuntimeError(f"rank {rank} of {self.world} failed:\n{value}")
            results[rank] = value
        return [results[rank] for rank in range(self.world)]

    def outcomes(self, fn: Callable[..., Any], *args: Any, timeout: float = 180.0) -> list[str]:
        """How each rank ended, also where others failed: its traceback, "exit code N", or the repr of its result."""
        ended = {rank: repr(v) if ok else v for rank, (ok, v) in self._reports(fn, args, timeout)}
        self.close()
        return [ended[rank] for rank in range(self.world)]

    def close(self) -> None:
        for process, pipe in self._ranks:
            process.kill()
            process.join()
            pipe.close()
        self._ranks = []

    def _reports(self, fn: Callable[..., Any], args: tuple, timeout: float) -> Any:
        """(rank, (succeeded, result or why not)) as the ranks come to an end, in whatever order."""
        if not self._ranks:
            self._start()
        waiting = {pipe: rank for rank, (_, pipe) in enumerate(self._ranks)}
        for pipe in waiting:
            pipe.send((fn, args))
        deadline = time.monotonic() + timeout
        while waiting:
            ready = connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                late = sorted(waiting.values())
                self.close()
                raise TimeoutError(f"ranks {late} of {self.world} gave no result within {timeout} s")
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    report = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    process = self._ranks[rank][0]
                    process.join()
                    report = (False, f"exit code {process.exitcode}")
                yield rank, report

    def _start(self) -> None:
        context, port = mp.get_context("forkserver" if self.environment is None else "spawn"), free_port()
        if self.environment is None:
            context.set_forkserver_preload(_PRELOAD)
        for rank in range(self.world):
            mine, theirs = context.Pipe()
            arguments = (rank, self.world, port, theirs, self.backend, self.device)
            process = context.Process(target=_serve, args=arguments)
            with _variables({name: v.format(rank=rank) for name, v in (self.environment or {}).items()}):
                process.start()
            theirs.close()
            self._ranks.append((process, mine))


@contextmanager
def _variables(values: dict[str, str]) -> Iterator[None]:
    """The environment with `values`, which a process started inside inherits."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


_POOLS: dict[int, RankPool] = {}


def shared_pool(world: int) -> RankPool:
    """The ranks that all tests use, so that they start once."""
    return _POOLS.setdefault(world, RankPool(world))


@atexit.register
def _close_pools() -> None:
    for pool in _POOLS.values():
        pool.close()


def run_ranks(fn: Callable[..., Any], world: int, *args: Any, timeout: float = 180.0) -> list[Any]:
    """`[fn(*args) on rank 0, on rank 1, ...]`, on ranks that are kept for the next call.

    fn and args must be picklable; results should be plain data or numpy arrays. Raises RuntimeError with the first
    failing rank's traceback, TimeoutError after `timeout` seconds.
    """
    return shared_pool(world).run(fn, *args, timeout=timeout)


def outcomes_of_ranks(fn: Callable[..., Any], world: int, *args: Any, timeout: float = 180.0) -> list[str]:
    """How each of `world` fresh ranks ended, also where others failed (see `RankPool.outcomes`)."""
    return RankPool(world).outcomes(fn, *args, timeout=timeout)
