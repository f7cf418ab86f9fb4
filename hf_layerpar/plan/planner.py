"""Which setting is fastest on so many ranks, by simulation; and the textbook pipelines to compare it with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.errors import ConfigurationError
from hf_layerpar.plan.costs import Costs
from hf_layerpar.plan.ownership import balanced_split, interleaved_owner, two_blocks_owner
from hf_layerpar.plan.simulate import Timeline, simulate
from hf_layerpar.plan.step import Anatomy, build_step, interval_points

Accuracy = Literal["exact", "high", "good", "any"]
"""How far the gradient may be from the exact one, by what was measured on networks made for MGRIT (small steps,
buffers). exact: not at all (the pipeline). high: `aggregate` with a correction in the forward, or with an exact one.
good: also `aggregate` without. any: every operator. Measure before trusting it: `gradient_agreement`."""


Split = tuple[int, ...] | Literal["interleaved", "v"]
"""What `parallelize` takes: the layers of each rank, or a placement by name."""


@dataclass(frozen=True)
class Choice:
    """A setting and its predicted time for one training step of the model; `share` is that over serial.

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
    buffers: tuple[int, int] = (0, 0),
    micro_batches: Sequence[int] = (1, 2, 4, 8),
    interleaved: bool = False,
) -> list[Choice]:
    """Settings of an accuracy class, the fastest predicted first.

    costs: of the whole batch. micro_batches: the numbers to try (none above the batch size of a rank).
    interleaved: also try intervals dealt out to all ranks, and pipelines with two blocks a rank.
    Raises ConfigurationError for more ranks than layers and an unknown accuracy class.
    """
    if accuracy not in get_args(Accuracy):
        raise ConfigurationError(f"accuracy={accuracy!r} is unknown; use one of {', '.join(get_args(Accuracy))}")
    if not 1 <= num_ranks <= num_layers:
        raise ConfigurationError(
            f"{num_ranks} ranks can't share {num_layers} layers; use 1 to {num_layers} (other devices serve as "
            f"data-parallel ranks)"
        )
    choices = []
    for config in _candidates(num_layers - sum(buffers), num_ranks, accuracy, micro_batches):
        for split, owner in _splits(config, num_layers, num_ranks, buffers, costs or Costs(), interleaved).items():
            step = predict_step(config, owner, costs, num_ranks=num_ranks, buffers=buffers)
            choices.append(Choice(config, split, owner, step.makespan, step.share))
    return sorted(choices, key=lambda choice: choice.time)


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
                            coarsening=coarsening,
                            coarse_operator=operator,
                            forward_iterations=forward,
                            backward_iterations=backward,
                            micro_batches=pieces,
                        )


def _splits(
    config: LayerParallelConfig,
    num_layers: int,
    num_ranks: int,
    buffers: tuple[int, int],
    costs: Costs,
    interleaved: bool,
) -> dict[Split, tuple[int, ...]]:
    """Splits worth trying and the owners they make: blocks (fewer layers beside the ends, by their cost), blocks cut at
    C-points, and dealt out."""

    def blocks(counts: Sequence[int]) -> dict[Split, tuple[int, ...]]:
        return {tuple(counts): tuple(rank for rank, count in enumerate(counts) for _ in range(count))}

    found: dict[Split, tuple[int, ...]] = {}
    layer, front = costs.graph_step + costs.final_vjp, costs.front + costs.front_backward
    found |= blocks(balanced_split(num_layers, num_ranks, layer, front, costs.tail))
    if config.strategy != "mgrit":
        if interleaved and num_ranks > 1 and num_layers >= 2 * num_ranks:
            found["interleaved"] = two_blocks_owner(num_layers, num_ranks, "interleaved")
            found["v"] = two_blocks_owner(num_layers, num_ranks, "v")
        return found
    points = interval_points(config, num_layers, buffers)
    places = [0, *points[1:-1], num_layers]
    ideal = [rank * num_layers / num_ranks for rank in range(num_ranks + 1)]
    cuts = sorted({min(places, key=lambda p: abs(p - cut)) for cut in ideal})
    if len(cuts) == num_ranks + 1:
        found |= blocks([b - a for a, b in pairwise(cuts)])
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
