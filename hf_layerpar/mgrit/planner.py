"""Which setting is fastest on so many ranks, by simulation; and the textbook pipelines to compare it with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from hf_layerpar.config import LayerParallelConfig, Operator
from hf_layerpar.errors import ConfigurationError
from hf_layerpar.mgrit.ownership import interleaved_owner
from hf_layerpar.mgrit.plan import Direction
from hf_layerpar.mgrit.simulate import Costs, StepTimeline, simulate
from hf_layerpar.mgrit.strategies import build_plan, interval_points

Accuracy = Literal["exact", "high", "good", "any"]
"""How far the gradient may be from the exact one, by what was measured on networks made for MGRIT (small steps,
buffers). exact: not at all (the pipeline). high: `aggregate` with a correction in the forward, or with an exact one.
good: also `aggregate` without. any: every operator. Measure before trusting it: `gradient_agreement`."""


Split = tuple[int, ...] | Literal["interleaved"]
"""What `parallelize` takes: the layers of each rank, or each MGRIT interval dealt out to all ranks."""


@dataclass(frozen=True)
class Choice:
    """A setting and its predicted time for one training step of the stack; `share` is that over serial.

    split: for `parallelize`; owner: the rank of every layer that it makes.
    """

    config: LayerParallelConfig
    split: Split
    owner: tuple[int, ...]
    time: float
    share: float


def predict_step(
    config: LayerParallelConfig,
    owner: Sequence[int],
    costs: Costs | None = None,
    *,
    num_ranks: int,
    buffers: tuple[int, int] = (0, 0),
) -> StepTimeline:
    """One training step of a stack as the engine would run it. costs: of the whole batch.

    Raises ConfigurationError when the grid doesn't fit the stack.
    """
    costs = costs or Costs()
    piece = costs.cut(config.micro_batches)
    directions: tuple[Direction, Direction] = get_args(Direction)
    forward, backward = (
        simulate(
            build_plan(config, d, owner, num_ranks=num_ranks, micro_batches=config.micro_batches, buffers=buffers),
            piece,
        )
        for d in directions
    )
    return StepTimeline(forward, backward, costs.serial(len(owner)))


def plan_step(
    num_layers: int,
    num_ranks: int,
    costs: Costs | None = None,
    *,
    accuracy: Accuracy = "high",
    buffers: tuple[int, int] = (0, 0),
    micro_batches: Sequence[int] = (1, 2, 4, 8),
    interleaved: bool = False,
) -> list[Choice]:
    """Settings of an accuracy class, the fastest predicted first.

    costs: of the whole batch. micro_batches: the numbers to try (none above the batch size of a rank).
    interleaved: also try intervals dealt out to all ranks.
    Raises ConfigurationError for more ranks than layers and an unknown accuracy class.
    """
    if accuracy not in get_args(Accuracy):
        raise ConfigurationError(f"accuracy={accuracy!r} is unknown; use one of {', '.join(get_args(Accuracy))}")
    if not 1 <= num_ranks <= num_layers:
        raise ConfigurationError(
            f"{num_ranks} ranks can't share {num_layers} layers; use 1 to {num_layers} (other devices serve as "
            f"data-parallel ranks)"
        )
    costs = costs or Costs()
    serial = costs.serial(num_layers)
    times: dict[tuple, float] = {}

    def sweep(config: LayerParallelConfig, direction: Direction, owner: tuple[int, ...]) -> float:
        pieces = config.micro_batches
        exact = LayerParallelConfig(micro_batches=pieces)
        iterations = config.forward_iterations if direction == "forward" else config.backward_iterations
        if config.strategy != "mgrit" or iterations == 0:
            config, iterations = exact, 0
        key = (direction, iterations, config.coarse_operator, config.coarsening, pieces, owner)
        if key not in times:
            plan = build_plan(config, direction, owner, num_ranks=num_ranks, micro_batches=pieces, buffers=buffers)
            times[key] = simulate(plan, costs.cut(pieces)).makespan
        return times[key]

    choices = []
    for config in _candidates(num_layers - sum(buffers), num_ranks, accuracy, micro_batches):
        for split, owner in _splits(config, num_layers, num_ranks, buffers, interleaved).items():
            time = sweep(config, "forward", owner) + sweep(config, "backward", owner)
            choices.append(Choice(config, split, owner, time, time / serial))
    return sorted(choices, key=lambda choice: choice.time)


def _candidates(
    inner: int, num_ranks: int, accuracy: Accuracy, micro_batches: Sequence[int]
) -> Iterator[LayerParallelConfig]:
    aggregate = [(0, 1), (0, 2), (2, 1), (2, 2), *([(1, 1)] if accuracy in ("good", "any") else [])]
    cycles: dict[Operator, list[tuple[int, int]]] = {}
    if accuracy != "exact":
        cycles["aggregate"] = aggregate
    if accuracy == "any":
        cycles |= {"rediscretize": [(1, 1), (2, 1)], "identity": [(1, 1), (2, 1)]}
    # two intervals at least, and a coarse solve worth having
    factors = sorted({c for c in (2, 4, 8, num_ranks, -(-inner // num_ranks)) if 2 <= c < inner})
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
                            levels=len(coarsening) + 1,
                            coarsening=coarsening,
                            coarse_operator=operator,
                            forward_iterations=forward,
                            backward_iterations=backward,
                            micro_batches=pieces,
                        )


def _splits(
    config: LayerParallelConfig, num_layers: int, num_ranks: int, buffers: tuple[int, int], interleaved: bool
) -> dict[Split, tuple[int, ...]]:
    """Splits worth trying and the owners they make: even blocks, blocks cut at C-points, and interleaved."""

    def blocks(cuts: Sequence[int]) -> dict[Split, tuple[int, ...]]:
        counts = tuple(b - a for a, b in pairwise(cuts))
        return {counts: tuple(rank for rank, count in enumerate(counts) for _ in range(count))}

    ideal = [rank * num_layers / num_ranks for rank in range(num_ranks + 1)]
    found = blocks([round(cut) for cut in ideal])
    if config.strategy != "mgrit":
        return found
    points = interval_points(config, num_layers, buffers)
    places = [0, *points[1:-1], num_layers]
    cuts = sorted({min(places, key=lambda p: abs(p - cut)) for cut in ideal})
    if len(cuts) == num_ranks + 1:
        found |= blocks(cuts)
    if interleaved and num_ranks > 1:
        with suppress(ConfigurationError):  # intervals too short to give every rank a layer
            found["interleaved"] = interleaved_owner(num_layers, num_ranks, points, buffers)
    return found


@dataclass(frozen=True)
class Reference:
    """A textbook schedule: its time for one step, and the kept graphs of its fullest rank in those of a whole batch."""

    time: float
    graphs: float


def gpipe(num_layers: int, num_ranks: int, micro_batches: int) -> Reference:
    """All forwards, then all backwards (arXiv 1811.06965): (M + P - 1)/M of the ideal 3N/P, in layer forwards."""
    ideal = 3 * num_layers / num_ranks
    return Reference((micro_batches + num_ranks - 1) / micro_batches * ideal, num_layers / num_ranks)


def one_forward_one_backward(num_layers: int, num_ranks: int, micro_batches: int) -> Reference:
    """1F1B (arXiv 1806.03377): GPipe's bubble, with at most P micro-batches in flight on the first rank."""
    same = gpipe(num_layers, num_ranks, micro_batches)
    return Reference(same.time, same.graphs * min(num_ranks, micro_batches) / micro_batches)
