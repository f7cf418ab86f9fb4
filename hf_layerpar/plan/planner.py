"""Which setting is fastest on so many ranks, by simulation."""

from __future__ import annotations

import dataclasses
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal, get_args

from hf_layerpar.config import Buffers, LayerParallelConfig, buffer_places, num_buffers, shown, sweeps
from hf_layerpar.errors import ConfigurationError
from hf_layerpar.plan.costs import Costs
from hf_layerpar.plan.memory import check_memory, fullest
from hf_layerpar.plan.ownership import SplitName, balanced_split, contiguous_owner, interleaved_owner, two_blocks_owner
from hf_layerpar.plan.simulate import Timeline, simulate
from hf_layerpar.plan.step import Anatomy, build_step, interval_points

Accuracy = Literal["exact", "high", "good", "any"]
"""How far the gradient may be from the exact one, by what was measured on networks made for MGRIT (small steps,
buffers). exact: not at all (the pipeline). high: `aggregate` with a correction in the forward, or with an exact one.
good: also `aggregate` without. any: every operator. Measure before trusting it: `gradient_agreement`."""


Split = tuple[int, ...] | SplitName
"""What `parallelize` takes: the layers of each rank, or a placement by name."""


@dataclass(frozen=True)
class Choice:
    """A setting and its predicted time for one training step of the model; `share` is that over serial, `bytes` what
    the fullest rank holds, as far as the costs say.

    split: for `parallelize`; owner: the rank of every layer that it makes.
    """

    config: LayerParallelConfig
    split: Split
    owner: tuple[int, ...]
    time: float
    share: float
    bytes: float = 0.0


def predict_step(
    config: LayerParallelConfig,
    owner: Sequence[int],
    costs: Costs | None = None,
    *,
    num_ranks: int,
    buffers: Buffers = (0, 0),
) -> Timeline:
    """One training step of a model with one stack, as it would run. costs: of the whole batch.

    Raises ConfigurationError when the grid doesn't fit the stack.
    """
    anatomy = Anatomy.of_stack(owner, buffers)
    if config.ends == "spread":
        anatomy = Anatomy(anatomy.passes, anatomy.ranks, anatomy.needs, num_ranks)
    piece = None if costs is None else costs.cut(config.micro_batches)
    plan = build_step(config, anatomy, num_ranks, config.micro_batches, costs=piece)
    whole = costs or Costs()
    return simulate(plan, whole.cut(config.micro_batches), serial=whole.serial(len(owner)))


def plan_step(
    num_layers: int,
    num_ranks: int,
    costs: Costs | None = None,
    *,
    accuracy: Accuracy = "high",
    buffers: Buffers = (0, 0),
    micro_batches: Sequence[int] = (1, 2, 4, 8),
    interleaved: bool = False,
    memory: float | None = None,
    note: Callable[[str], None] | None = None,
) -> list[Choice]:
    """Settings of an accuracy class, the fastest predicted first.

    Where their plans are too many or too long to make all of them (`MOST_SEARCH`), settings are ranked by stacks of two
    smaller sizes, as times grow in proportion to the size, and only the first of them predicted and returned.

    costs: of the whole batch; the default ones take half a batch to take half the time and messages to take none.
    micro_batches: the numbers to try (none above the batch size of a rank).
    interleaved: also try intervals dealt out to all ranks, and pipelines with two blocks a rank.
    memory: bytes that a rank has; what takes more is left out.
    note: told of such a ranking.

    Raises ConfigurationError when nothing that was tried fits into the memory, for more ranks than layers, buffers that
    leave no layer, an unknown accuracy class, and what is too large for either way.
    """
    if accuracy not in get_args(Accuracy):
        raise ConfigurationError(f"accuracy={shown(accuracy)} is unknown; use one of {', '.join(get_args(Accuracy))}")
    check_shape(num_layers, num_ranks, buffers)
    shape = _Shape(num_layers, num_ranks, buffers, costs, interleaved)
    tries = [
        (config, name)
        for config in _candidates(shape.inner, num_ranks, accuracy, micro_batches)
        if shape.holds(config)
        for name in shape.splits(config)
    ]
    if sum(shape.seconds(config) for config, _ in tries) > MOST_SEARCH:
        tries = _promising(tries, shape, note or (lambda text: None))
    choices = sorted((shape.predict(*one) for one in tries), key=lambda choice: choice.time)
    if memory is None:
        return choices
    if not any(choice.bytes <= memory for choice in choices):
        least = min(choices, key=lambda choice: choice.bytes)
        step = predict_step(least.config, least.owner, costs, num_ranks=num_ranks, buffers=buffers)
        check_fits(step, memory, least.config, costs, buffers=buffers)
    return [choice for choice in choices if choice.bytes <= memory]


def check_fits(
    step: Timeline, memory: float, config: LayerParallelConfig, costs: Costs | None, *, buffers: Buffers = (0, 0)
) -> None:
    """Raises ConfigurationError for a predicted step of which a rank holds more than `memory` bytes; the error says
    what would fit: checkpointing, micro-batches, ranks. costs: of the whole batch."""
    (num_layers,) = step.plan.passes

    def predict(config: LayerParallelConfig, num_ranks: int, recompute: bool) -> Timeline:
        if planning_seconds(config, num_layers, num_ranks) > _SUGGESTED:
            raise ConfigurationError("too long to try")
        owner = contiguous_owner(num_layers, num_ranks, boundaries=interval_points(config, num_layers, buffers))
        whole = costs or Costs()
        return predict_step(
            config, owner, whole.recomputed() if recompute else whole, num_ranks=num_ranks, buffers=buffers
        )

    check_memory(step, memory, config, num_layers, predict)


def check_shape(num_layers: int, num_ranks: int, buffers: Buffers) -> None:
    """Raises ConfigurationError for more ranks than layers, and for buffers that don't fit."""
    if not 1 <= num_ranks <= num_layers:
        raise ConfigurationError(
            f"{num_ranks} ranks can't share {num_layers} layers; use 1 to {num_layers} (other devices serve as "
            f"data-parallel ranks)"
        )
    buffer_places(buffers, num_layers)


MOST_SECONDS = 30
"""That a plan may take to make (`planning_seconds`)."""

MOST_SEARCH = 40
"""Seconds, of all plans of a search."""

_SAMPLED, _PREDICTED = 15, 8
"""Seconds of a search that is too long, in smaller stacks, and in those of the full size."""

_KEPT = 4

_SUGGESTED = 2
"""Seconds that the plan of a step may take to make which is tried as a remedy."""

_Try = tuple[LayerParallelConfig, str]
"""A setting and the name of a split."""


def planning_seconds(config: LayerParallelConfig, num_layers: int, num_ranks: int) -> float:
    """About how long its plan takes to make, on one core. It is in proportion to its tasks; in a pipeline a rank has as
    many to choose from as there are micro-batches."""
    if config.strategy != "mgrit":
        tasks = config.micro_batches * (4 * num_ranks + num_layers / 20) * (1 + config.micro_batches / 200)
    else:
        sweeps = sum(1 + 2 * iterations for iterations in (config.forward_iterations, config.backward_iterations))
        tasks = config.micro_batches * num_layers * sweeps
    return tasks / 10_000


def check_size(config: LayerParallelConfig, num_layers: int, num_ranks: int) -> None:
    """Raises ConfigurationError for a plan that takes minutes to make."""
    seconds = planning_seconds(config, num_layers, num_ranks)
    iterations = f"{sweeps(config.forward_iterations, config.backward_iterations)} iterations"
    if seconds > MOST_SECONDS:
        raise ConfigurationError(
            f"{num_layers} layers on {num_ranks} ranks with {config.micro_batches} micro-batches"
            f"{f' and {iterations}' if config.strategy == 'mgrit' else ''} take about {seconds:.0f} s to plan, and the "
            f"limit is {MOST_SECONDS} s; use less of one of them"
        )


@dataclass(frozen=True)
class _Shape:
    """What settings are tried on. Splits have names here, so that they can be told apart at any size."""

    num_layers: int
    num_ranks: int
    buffers: Buffers
    costs: Costs | None
    interleaved: bool

    @property
    def inner(self) -> int:
        return self.num_layers - num_buffers(self.buffers)

    def holds(self, config: LayerParallelConfig) -> bool:
        """Whether its grid fits, around buffers between."""
        try:
            interval_points(config, self.num_layers, self.buffers)
        except ConfigurationError:
            return False
        return True

    def seconds(self, config: LayerParallelConfig) -> float:
        return planning_seconds(config, self.num_layers, self.num_ranks)

    def splits(self, config: LayerParallelConfig) -> dict[str, tuple[Split, tuple[int, ...]]]:
        """Splits worth trying and the owners they make: blocks (fewer layers beside the ends, by their cost), blocks
        cut at C-points, and dealt out."""
        num_layers, num_ranks, buffers = self.num_layers, self.num_ranks, self.buffers
        costs = self.costs or Costs()

        def blocks(counts: Sequence[int]) -> tuple[Split, tuple[int, ...]]:
            return tuple(counts), tuple(rank for rank, count in enumerate(counts) for _ in range(count))

        layer, front = costs.graph_step + costs.final_vjp, costs.front + costs.front_backward
        found = {"blocks": blocks(balanced_split(num_layers, num_ranks, layer, front, costs.tail))}
        if config.strategy != "mgrit":
            if self.interleaved and num_ranks > 1 and num_layers >= 2 * num_ranks:
                found["interleaved"] = ("interleaved", two_blocks_owner(num_layers, num_ranks, "interleaved"))
                found["v"] = ("v", two_blocks_owner(num_layers, num_ranks, "v"))
            return found
        points = interval_points(config, num_layers, buffers)
        places = [0, *points[1:-1], num_layers]
        ideal = [rank * num_layers / num_ranks for rank in range(num_ranks + 1)]
        cuts = sorted({_nearest(places, cut) for cut in ideal})
        if len(cuts) == num_ranks + 1:
            at_points = blocks([b - a for a, b in pairwise(cuts)])
            if at_points != found["blocks"]:
                found["points"] = at_points
        if self.interleaved and num_ranks > 1:
            with suppress(ConfigurationError):  # intervals too short to give every rank a layer
                found["interleaved"] = ("interleaved", interleaved_owner(num_layers, num_ranks, points))
        return found

    def predict(self, config: LayerParallelConfig, name: str) -> Choice:
        split, owner = self.splits(config)[name]
        step = predict_step(config, owner, self.costs, num_ranks=self.num_ranks, buffers=self.buffers)
        return Choice(config, split, owner, step.makespan, step.share, step.peaks[fullest(step)].bytes)

    def resized(self, inner: int, num_ranks: int) -> _Shape:
        """Buffers between lie in proportion."""
        opening, *between, closing = self.buffers
        moved = [
            opening + n + (place - opening - n) * inner // self.inner for n, place in enumerate(between)
        ]  # n of the places before it are buffers
        return dataclasses.replace(
            self, num_layers=inner + num_buffers(self.buffers), num_ranks=num_ranks, buffers=(opening, *moved, closing)
        )

    def carried(self, config: LayerParallelConfig, other: _Shape) -> LayerParallelConfig:
        """`config` on another shape: coarsenings that follow from the number of ranks follow from its number."""
        follows = {-(-self.inner // self.num_ranks): -(-other.inner // other.num_ranks)}
        follows |= {self.num_ranks: other.num_ranks} | {c: c for c in _FACTORS}
        return dataclasses.replace(config, coarsening=tuple(follows[c] for c in config.factors))


def _promising(tries: Sequence[_Try], shape: _Shape, note: Callable[[str], None]) -> list[_Try]:
    """The first of the tries by their times on two smaller stacks, extrapolated to this one. Those with more than the
    fewest micro-batches are timed if they are pipelines, or among the first `_KEPT` with the fewest."""
    least = min(config.micro_batches for config, _ in tries)
    early = [one for one in tries if one[0].micro_batches == least or one[0].strategy != "mgrit"]
    late = [one for one in tries if one not in early]
    for small, large in _smaller(shape):
        first, then = (sum(at.seconds(config) for at in (small, large) for config, _ in part) for part in (early, late))
        if first + then * min(1.0, _KEPT / len(early)) <= _SAMPLED:
            break
    else:
        raise ConfigurationError(
            f"a search of {len(tries)} settings for {shape.num_layers} layers on {shape.num_ranks} ranks is too long; "
            "try fewer micro-batches, or predict single settings"
        )
    times: dict[_Try, float] = {}

    def time(part: Iterable[_Try]) -> list[_Try]:
        """The tries that were timed so far, the fastest first."""
        for config, name in part:
            with suppress(ConfigurationError, KeyError):  # it doesn't fit a stack so small
                a, b = (at.predict(shape.carried(config, at), name).time for at in (small, large))
                times[config, name] = b + (b - a) * (shape.inner - large.inner) / (large.inner - small.inner)
        return sorted(times, key=lambda one: times[one])

    kept = set(time(early)[:_KEPT])
    ranked = time(
        (config, name) for config, name in late if (dataclasses.replace(config, micro_batches=least), name) in kept
    )
    seconds = list(accumulate(shape.seconds(config) for config, _ in ranked))
    best = ranked[: max(1, bisect_right(seconds, _PREDICTED))]
    check_size(best[0][0], shape.num_layers, shape.num_ranks)
    note(
        f"{len(tries)} settings were ranked by stacks of {small.num_layers} and {large.num_layers} layers on "
        f"{small.num_ranks} and {large.num_ranks} ranks, and the first {len(best)} predicted in full, for "
        f"{shape.num_layers} layers on {shape.num_ranks}"
    )
    return best


def _smaller(shape: _Shape) -> Iterator[tuple[_Shape, _Shape]]:
    """Pairs of shapes, the second twice the size of the first: along both numbers, else along the layers alone."""
    for power in range(shape.num_ranks.bit_length() - 2, 1, -1):
        ranks = 2**power
        inner = shape.inner * ranks // shape.num_ranks
        yield shape.resized(inner, ranks), shape.resized(2 * inner, 2 * ranks)
    inner = shape.inner // 2
    while inner // 2 >= 2 * shape.num_ranks:
        inner //= 2
        yield shape.resized(inner, shape.num_ranks), shape.resized(2 * inner, shape.num_ranks)


_FACTORS = (2, 4, 8)


def _candidates(
    inner: int, num_ranks: int, accuracy: Accuracy, micro_batches: Sequence[int]
) -> Iterator[LayerParallelConfig]:
    aggregate = [(0, 1), (0, 2), (2, 1), (2, 2), *([(1, 1)] if accuracy in ("good", "any") else [])]
    cycles: dict[str, list[tuple[int, int]]] = {}
    if accuracy != "exact":
        cycles["aggregate"] = aggregate
    if accuracy == "any":
        cycles |= {"rediscretize": [(1, 1), (2, 1)], "identity": [(1, 1), (2, 1)]}
    # two intervals at least, and a coarse solve worth having
    factors = sorted({c for c in (*_FACTORS, num_ranks, -(-inner // num_ranks)) if 2 <= c < inner})
    for pieces in micro_batches:
        yield LayerParallelConfig(strategy="pipeline", micro_batches=pieces)
        for operator, iterations in cycles.items():
            for c in factors:
                # a third level only shortens a long coarse solve that costs something
                deeper = operator != "identity" and -(-inner // c) >= 4 * c
                for coarsening in [(c,), *([(c, c)] if deeper else [])]:
                    for forward, backward in iterations:
                        yield LayerParallelConfig(
                            strategy="mgrit",
                            coarsening=coarsening,
                            coarse_operator=operator,
                            forward_iterations=forward,
                            backward_iterations=backward,
                            micro_batches=pieces,
                        )


def _nearest(places: Sequence[int], to: float) -> int:
    """Of an ascending list; of two as near, the smaller."""
    at = bisect_left(places, to)
    return min(places[max(0, at - 1) : at + 1], key=lambda p: abs(p - to))
