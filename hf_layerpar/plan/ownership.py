"""Which lp rank owns which layer of a stack."""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import pairwise
from numbers import Integral
from typing import Literal

from hf_layerpar.config import shown
from hf_layerpar.errors import ConfigurationError

INTERLEAVED = "interleaved"
V = "v"
SplitName = Literal["interleaved", "v"]
"""The splits that have a name. v is one of pipelines only."""


def contiguous_owner(
    num_layers: int, num_ranks: int, *, boundaries: Sequence[int] = (), split: Sequence[int] | None = None
) -> tuple[int, ...]:
    """The owner of every layer for a contiguous split, as even as it goes.

    boundaries: layer indices where a split costs no extra message (the C-points); used when there are enough of them.
    split: the number of layers of each rank, given by hand.
    Raises ConfigurationError when a rank would own nothing or `split` doesn't add up.
    """
    if split is not None:
        counts = list(split) if isinstance(split, Sequence) and not isinstance(split, str | bytes) else []
        numbers = [n for n in counts if isinstance(n, Integral) and not isinstance(n, bool) and n >= 1]
        if not len(numbers) == len(counts) == num_ranks or sum(numbers) != num_layers:
            raise ConfigurationError(
                f"split={shown(tuple(counts) or split)} doesn't share {num_layers} layers over {num_ranks} lp ranks; "
                f"give {num_ranks} positive integers that add up to {num_layers}"
            )
        return tuple(rank for rank, count in enumerate(numbers) for _ in range(count))
    if num_ranks > num_layers:
        raise ConfigurationError(
            f"lp_size={num_ranks} is more than the {num_layers} layers of the stack; use lp_size <= {num_layers} "
            f"(other devices serve as data-parallel ranks)"
        )
    places = sorted(set(boundaries) - {0, num_layers})
    if len(places) < num_ranks - 1:
        places = list(range(1, num_layers))
    cuts = [0]
    for rank in range(1, num_ranks):
        low = bisect_right(places, cuts[-1])
        high = len(places) - (num_ranks - 1 - rank)  # leave a cut for every later rank
        ideal = rank * num_layers / num_ranks
        at = bisect_left(places, ideal, low, high)
        cuts.append(min(places[max(low, at - 1) : min(high, at + 1)], key=lambda p: (abs(p - ideal), -p)))
    cuts.append(num_layers)
    return tuple(rank for rank in range(num_ranks) for _ in range(cuts[rank], cuts[rank + 1]))


def interleaved_owner(num_layers: int, num_ranks: int, boundaries: Sequence[int]) -> tuple[int, ...]:
    """The owner of every layer when each interval is dealt out to all ranks: what the `aggregate` operator wants, whose
    coarse step evaluates all layers of an interval at once.

    boundaries: layer indices of the C-points, from the first inner layer to the end of the last; the layers before are
    the first rank's, those behind the last one's. The deal starts one rank later in every interval, so that each rank
    has as many first layers as any other.
    Raises ConfigurationError when a rank would own nothing.
    """
    owner = [0] * boundaries[0]
    for j, (start, stop) in enumerate(pairwise(boundaries)):
        owner += [(i + j) % num_ranks for i in range(stop - start)]
    owner += [num_ranks - 1] * (num_layers - boundaries[-1])
    idle = sorted(set(range(num_ranks)) - set(owner))
    if idle:
        raise ConfigurationError(
            f"split='interleaved' leaves lp ranks {shown(idle)} of {num_ranks} without a layer: {num_layers} layers in "
            f"intervals of {max(b - a for a, b in pairwise(boundaries))}; use a larger coarsening or a contiguous split"
        )
    return tuple(owner)


def two_blocks_owner(num_layers: int, num_ranks: int, placement: SplitName) -> tuple[int, ...]:
    """The owner of every layer when each rank holds two blocks: in the ranks' order twice, or there and back.

    Raises ConfigurationError for fewer layers than blocks.
    """
    if num_layers < 2 * num_ranks:
        raise ConfigurationError(
            f"split={placement!r} makes {2 * num_ranks} blocks of {num_layers} layers on {num_ranks} lp ranks; use a "
            "schedule with one block a rank, or fewer lp ranks"
        )
    ranks = [*range(num_ranks), *(range(num_ranks) if placement == INTERLEAVED else reversed(range(num_ranks)))]
    return tuple(ranks[block] for block in contiguous_owner(num_layers, 2 * num_ranks))


def balanced_split(num_layers: int, num_ranks: int, layer: float, first: float, last: float) -> tuple[int, ...]:
    """Layers of each rank such that the fullest has least to do, when the first and last rank have the ends as well.

    layer, first, last: the cost of a layer and of the two ends. Every rank gets at least one layer.
    """
    extra = [0.0] * num_ranks
    extra[0] += first
    extra[-1] += last
    counts = [1] * num_ranks
    loads = [(layer + extra[rank], rank) for rank in range(num_ranks)]
    heapq.heapify(loads)
    for _ in range(num_layers - num_ranks):
        _, rank = loads[0]
        counts[rank] += 1
        heapq.heapreplace(loads, (counts[rank] * layer + extra[rank], rank))
    return tuple(counts)
