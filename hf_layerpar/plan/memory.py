"""Whether a step fits into the memory of its ranks, and with what it would."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

from hf_layerpar.config import LayerParallelConfig, shown
from hf_layerpar.errors import ConfigurationError
from hf_layerpar.plan.simulate import Peak, Timeline

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SIZE = re.compile(r"(\d+(?:\.\d*)?(?:[eE]\+?\d+)?)\s*(?:([KMGT]?)(i?)B?)", re.IGNORECASE)
_MOST_PIECES = 32


def size_of(text: str) -> float:
    """Bytes of "24GB", "24GiB" or a number. Raises ConfigurationError for what is none of them, and for 0."""
    found = _SIZE.fullmatch(text.strip()) if len(text) < 40 else None
    size = 0.0
    if found is not None:
        number, unit, binary = found.groups()
        factor = _UNITS[unit.upper()]
        size = float(number) * (2 ** (10 * "KMGT".index(unit.upper()) + 10) if binary and unit else factor)
    if not 0 < size < 1e15:
        raise ConfigurationError(f"{shown(text)} is no size of a memory; write bytes, or as in 24GB or 24GiB")
    return size


def size_text(size: float) -> str:
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 2**power:
            return f"{size / 2**power:.3g} {unit}"
    return f"{size:.3g} bytes"


def fullest(step: Timeline) -> int:
    """The rank that holds most."""
    peaks = step.peaks
    return max(range(len(peaks)), key=lambda r: (peaks[r].bytes, peaks[r].graphs, peaks[r].states))


def parts_text(peak: Peak) -> str:
    names = ("parameters", "gradients", "optimizer", "activations")
    return ", ".join(f"{name} {size_text(getattr(peak, name))}" for name in names)


Predict = Callable[[LayerParallelConfig, int, bool], Timeline]
"""The step of a setting on so many ranks, with or without gradient checkpointing."""


def check_memory(step: Timeline, memory: float, config: LayerParallelConfig, num_layers: int, predict: Predict) -> None:
    """Raises ConfigurationError for a step of which a rank takes more than `memory` bytes, with changes that fit.

    predict: of other settings, to try them; it may refuse some.
    """
    rank = fullest(step)
    peak = step.peaks[rank]
    if peak.bytes <= memory:
        return
    raise ConfigurationError(
        f"rank {rank} takes {size_text(peak.bytes)} ({parts_text(peak)}), and {size_text(memory)} are allowed; "
        f"{what_fits(memory, config, step.plan.num_ranks, num_layers, predict)}"
    )


def what_fits(memory: float, config: LayerParallelConfig, num_ranks: int, num_layers: int, predict: Predict) -> str:
    """A sentence that names the least change of each kind with which the fullest rank takes no more than `memory`."""
    found = []
    *single, together = _changes(config, num_ranks, num_layers)
    for changes in (*single, together):
        if found and changes is together:
            break
        for name, (other, ranks, again) in changes:
            with suppress(ConfigurationError):  # a grid that doesn't fit, or a plan that takes long to make
                step = predict(other, ranks, again)
                size = step.peaks[fullest(step)].bytes
                if size <= memory:
                    found.append(f"{name} ({size_text(size)})")
                    break
    if not found:
        return (
            f"neither gradient checkpointing, {_MOST_PIECES} micro-batches nor {num_layers} ranks, nor all of them, "
            "make it fit: use a smaller batch or model, or shard over dp ranks (fsdp)"
        )
    return f"it fits {', or '.join(found)}"


_Try = tuple[str, tuple[LayerParallelConfig, int, bool]]


def _changes(config: LayerParallelConfig, num_ranks: int, num_layers: int) -> Iterator[list[_Try]]:
    """Kinds of changes, each the least one first; last all of them together."""
    pieces = _doubled(config.micro_batches, _MOST_PIECES)
    ranks = _doubled(num_ranks, num_layers)
    yield [("with gradient checkpointing", (config, num_ranks, True))]
    yield [(f"with {m} micro-batches", (replace(config, micro_batches=m), num_ranks, False)) for m in pieces]
    yield [(f"on {r} ranks", (config, r, False)) for r in ranks]
    yield [
        (f"on {r} ranks with {m} micro-batches and gradient checkpointing", (replace(config, micro_batches=m), r, True))
        for m in (config.micro_batches, *pieces[-1:])
        for r in (num_ranks, *ranks)
    ]


def _doubled(number: int, most: int) -> Sequence[int]:
    found = []
    while number < most:
        number = min(2 * number, most)
        found.append(number)
    return found
