"""How a dataset is dealt out over the dp ranks, as far as accelerate doesn't know it by itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset


class CountedStream(IterableDataset):
    """An iterable dataset that knows, once exhausted, how many samples it had in this process.

    Every dp rank reads all of it and keeps its share. accelerate fills the last batches up with first samples; without
    a count, those would be taken for samples of their own.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.count: int | None = None

    def __iter__(self) -> Iterator[Any]:
        self.count, count = None, 0
        for item in self.dataset:
            count += 1
            yield item
        self.count = count

    def __len__(self) -> int:
        return len(self.dataset)  # a TypeError where the dataset doesn't know, as for the dataset itself

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)


def real_rows(loading: Any, batch_size: int) -> int | None:
    """How many of the rows gathered for the current batch are samples; None: all.

    loading: accelerate's GradientState. batch_size: samples of one batch over all dp ranks.
    """
    if not loading.end_of_dataloader:
        return None
    stream = getattr(getattr(loading.active_dataloader, "dataset", None), "dataset", None)
    if isinstance(stream, CountedStream):
        assert stream.count is not None
        return stream.count % batch_size or None
    return loading.remainder if loading.remainder > 0 else None


def innermost_sampler(loader: Any) -> Any:
    """The sampler that orders the samples, below what accelerate wraps around it; None for iterable datasets."""
    sampler = getattr(loader, "batch_sampler", None)
    while (inner := getattr(sampler, "batch_sampler", None)) is not None:
        sampler = inner
    return getattr(sampler, "sampler", None)
