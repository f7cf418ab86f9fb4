"""What the kernel keeps of this process's memory."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Storage bytes of the tensors, each storage counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def status_bytes(key: str) -> int:
    """A size that the kernel keeps for this process: VmRSS (now) or VmHWM (the peak)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def restart_peak() -> int:
    """The peak starts again from what is resident now, in bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # pages that were freed go back to the system
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")


def resident_growth(work: Callable[[], object]) -> int:
    """Bytes by which this process's resident memory grows at most during `work`."""
    before = restart_peak()
    work()
    return status_bytes("VmHWM") - before
