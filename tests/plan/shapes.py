"""Steps to plan: owners, anatomies and settings, named or drawn at random."""

from __future__ import annotations

import random

from hf_layerpar.config import Buffers, LayerParallelConfig, num_buffers
from hf_layerpar.plan.costs import Costs
from hf_layerpar.plan.operators import OPERATORS
from hf_layerpar.plan.ownership import contiguous_owner, interleaved_owner, two_blocks_owner
from hf_layerpar.plan.schedules import SCHEDULES
from hf_layerpar.plan.simulate import simulate
from hf_layerpar.plan.step import Anatomy, Pass, build_step
from hf_layerpar.plan.tasks import Plan

UNIT = Costs()
"""A layer forward, its input-vjp and its weight gradients take one unit each, a whole backward two."""


def owner_for(schedule: str, num_layers: int, num_ranks: int) -> tuple[int, ...]:
    """The split that a schedule is made for."""
    placement = getattr(SCHEDULES[schedule], "placement", "blocks")
    if placement == "blocks" or num_ranks == 1:
        return contiguous_owner(num_layers, num_ranks)
    return two_blocks_owner(num_layers, num_ranks, placement)


def exact_step(
    schedule: str, num_layers: int, num_ranks: int, micro_batches: int, costs: Costs = UNIT, *, ends: int = 1
) -> Plan:
    """A pipelined step of one stack. ends: pieces of the tail."""
    anatomy = Anatomy.of_stack(owner_for(schedule, num_layers, num_ranks))
    anatomy = Anatomy(anatomy.passes, anatomy.ranks, anatomy.needs, ends)
    config = LayerParallelConfig(schedule=schedule, micro_batches=micro_batches)
    return build_step(config, anatomy, num_ranks, micro_batches, costs=costs)


def two_stacks(
    encoder: tuple[int, ...], decoder: tuple[int, ...], buffers: Buffers = (0, 0), *, tail_pieces: int = 1
) -> Anatomy:
    """An encoder-decoder whose decoder layers are given the encoder's end, and whose head looks at both."""
    passes = (Pass(encoder, buffers), Pass(decoder, buffers, sides=True))
    return Anatomy(passes, (encoder[0], decoder[0], decoder[-1]), ((), (0,), (0, 1)), tail_pieces)


def layers_of(anatomy: Anatomy, rank: int) -> int:
    return sum(owner == rank for run in anatomy.passes for owner in run.owner)


def makespan(plan: Plan, costs: Costs = UNIT) -> float:
    return simulate(plan, costs).makespan


# ---- at random
def random_owner(rng: random.Random, num_layers: int, num_ranks: int, buffers: Buffers) -> tuple[int, ...]:
    """Blocks of any sizes, two blocks a rank, or layers dealt out; every rank owns one."""
    kind = rng.choice(["even", "uneven", "uneven", "interleaved", "v", "dealt"])
    if kind in ("interleaved", "v") and num_layers >= 2 * num_ranks:
        return two_blocks_owner(num_layers, num_ranks, kind)  # type: ignore[arg-type]
    if kind == "dealt" and num_layers - num_buffers(buffers) >= 2 * num_ranks:
        points = [*range(buffers[0], num_layers - buffers[-1], num_ranks), num_layers - buffers[-1]]
        return interleaved_owner(num_layers, num_ranks, points)
    cuts = sorted(rng.sample(range(1, num_layers), num_ranks - 1)) if kind == "uneven" else None
    split = None if cuts is None else [b - a for a, b in zip([0, *cuts], [*cuts, num_layers], strict=True)]
    return contiguous_owner(num_layers, num_ranks, split=split)


def random_anatomy(rng: random.Random, num_ranks: int) -> Anatomy:
    buffers = rng.choice([(0, 0), (0, 0), (1, 2), (0, 1), (0, 4, 1), (1, 5, 0), (0, 4, 5, 0)])
    owners = [
        random_owner(rng, rng.randint(6, 3 * num_ranks + 5), num_ranks, buffers)
        for _ in range(rng.choice([1, 1, 1, 2, 3]))
    ]
    passes = tuple(Pass(owner, buffers, sides=rng.random() < 0.5) for owner in owners)
    ranks = (*(owner[0] for owner in owners), owners[-1][-1])
    if rng.random() < 0.2:  # a phase may sit where its parameters are
        ranks = tuple(rng.randrange(num_ranks) for _ in ranks)
    # each end state is needed by something, or there would be no backward through it
    needs: list[tuple[int, ...]] = [()]
    for k in range(1, len(passes) + 1):
        others = [j for j in range(k - 1) if rng.random() < 0.5 or k == len(passes)]
        needs.append((*others, k - 1))
    return Anatomy(passes, ranks, tuple(needs), rng.choice([1, 1, num_ranks]))


def random_config(rng: random.Random, num_ranks: int) -> LayerParallelConfig:
    if rng.random() < 0.7:
        return LayerParallelConfig(schedule=rng.choice([*SCHEDULES]))
    iterations = rng.choice([(1, 1), (2, 1), (0, 1), (0, 2), (1, 0), (3, 3)])
    return LayerParallelConfig(
        strategy="mgrit",
        coarse_operator=rng.choice([*OPERATORS]),
        coarsening=rng.choice([2, 3, (2, 2)]),
        relaxation=rng.choice(["F", "F", "FCF"]),
        forward_iterations=iterations[0],
        backward_iterations=iterations[1],
        acceleration=rng.choice(["none", "none", "krylov"]),
        stacked=num_ranks == 1 and rng.random() < 0.5,
    )


def random_costs(rng: random.Random) -> Costs:
    return Costs(
        vjp=rng.uniform(0.8, 1.8),
        weights=rng.uniform(0.5, 1.2),
        final_vjp=rng.uniform(1.5, 2.5),
        front=rng.choice([0.0, 0.3]),
        front_backward=0.1,
        tail=rng.choice([0.0, 0.5, 3.0]),
        overhead=rng.choice([0.0, 0.05]),
        latency=rng.choice([0.0, 0.1, 1.0]),
        send=rng.choice([0.0, 0.1]),
        state_bytes=1.0,
        bandwidth=rng.choice([2.0, 100.0]),
    )
