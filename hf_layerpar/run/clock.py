"""How long work takes on its device. An accelerator is told what to do and asked later how long it took: events in its
queue mark where a span begins and ends, so that taking the time holds nothing up."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Clock:
    """The total of the spans that were timed."""

    def __init__(self, device: torch.device) -> None:
        self._seconds = 0.0
        self._module = None if device.type == "cpu" else torch.get_device_module(device)
        self._device = device
        self._events: list[tuple[Any, Any]] = []

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Around what is timed; on an accelerator with the time in which its queue only waits, as for a message."""
        if self._module is None:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began
            return
        start, end = (self._module.Event(enable_timing=True) for _ in range(2))
        start.record(self._module.current_stream(self._device))
        yield
        end.record(self._module.current_stream(self._device))
        self._events.append((start, end))

    @property
    def seconds(self) -> float:
        """Asks for the time; waits for the device to come to the last mark."""
        for start, end in self._events:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000.0
        self._events.clear()
        return self._seconds


def seconds_of(work: Any, device: torch.device) -> float:
    """What `work()` takes by itself, begun when nothing else is in the queue."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
    clock = Clock(device)
    with clock.timed():
        work()
    return clock.seconds
