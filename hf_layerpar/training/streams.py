"""Random streams of data and model kept apart, so that a resumed run sees the batches of an uninterrupted one.

Stock collates the first batches after a resume with other random numbers than the uninterrupted run did (the stream is
set back only after they were fetched, one batch ahead). Here the numbers that make training batch i (drawn by the
dataset's items and the collator) depend on the data seed, the dp rank and i only, whichever process fetches it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info


def main_streams() -> dict[str, Any]:
    """The states of this process's Python, NumPy and torch CPU random streams."""
    return {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}


def set_main_streams(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["cpu"].cpu())


@contextmanager
def kept_streams() -> Iterator[None]:
    """Random numbers drawn inside don't move the main streams."""
    states = main_streams()
    try:
        yield
    finally:
        set_main_streams(states)


def seed_streams(*key: int) -> None:
    """Seeds the main streams from integers; the accelerator's stream is left alone."""
    a, b, c = (int(word) for word in np.random.SeedSequence(key).generate_state(3))
    random.seed(a)
    np.random.seed(b)
    torch.default_generator.manual_seed(c)


class SeededCollator:
    """A collator that leaves the streams seeded for the next batch, items included.

    index: the training batch that the next call makes; set it where an iterator over the batches begins. Batches are
        counted by optimizer step times accumulation steps, so that a resumed run goes on with the right number.
    Dataloader workers each make every `num_workers`-th batch and get a copy as the iterator starts. Persistent workers
    keep their copy and count on from epoch to epoch: reproducible from the start of a run, but not over a resume.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], seed: int, dp_rank: int) -> None:
        self.collate, self.seed, self.dp_rank = collate, seed, dp_rank
        self.index = 0

    def reseed(self) -> None:
        seed_streams(self.seed, self.dp_rank, self.index)

    def start_worker(self, worker_id: int) -> None:
        """To be called in a new worker process (`worker_init_fn`)."""
        self.index += worker_id
        self.reseed()

    def __call__(self, items: list[Any]) -> Any:
        batch = self.collate(items)
        worker = get_worker_info()
        self.index += 1 if worker is None else worker.num_workers
        self.reseed()
        return batch
