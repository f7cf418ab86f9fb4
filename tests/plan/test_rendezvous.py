"""Plans on the strictest of transports: one queue a rank, no tags, and a message waits until both ranks come to it."""

import dataclasses
import random
from collections.abc import Iterator

import pytest

from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.plan.costs import Costs
from hf_layerpar.plan.order import Rule, Work
from hf_layerpar.plan.ownership import contiguous_owner, interleaved_owner, two_blocks_owner
from hf_layerpar.plan.part import Post, RankPart, check_rendezvous
from hf_layerpar.plan.schedules import SCHEDULES
from hf_layerpar.plan.step import Anatomy, Pass, build_step, by_ending, interval_points
from hf_layerpar.plan.tasks import Plan


def random_plan(draw: random.Random) -> Plan:
    """Any settings, placement and anatomy, on 2 to 5 ranks."""
    num_ranks, micro_batches, layers = draw.randint(2, 5), draw.randint(1, 4), draw.randint(5, 9)
    config = LayerParallelConfig(schedule=draw.choice(list(SCHEDULES)))
    if draw.random() < 0.6:
        config = LayerParallelConfig(
            strategy="mgrit",
            coarse_operator=draw.choice(["rediscretize", "aggregate", "identity"]),
            coarsening=draw.choice([2, 3, num_ranks, (2, 2)]),
            relaxation=draw.choice(["F", "FCF"]),
            forward_iterations=draw.randint(0, 3),
            backward_iterations=draw.randint(0, 3),
            acceleration=draw.choice(["none", "krylov"]),
        )
    buffers = draw.choice([(0, 0), (0, 0), (0, 4, 0)])
    passes = []
    for _ in range(draw.choice([1, 1, 2])):
        points = interval_points(config, layers, buffers)
        owner = draw.choice(
            [
                contiguous_owner(layers, num_ranks, boundaries=points),
                tuple((n + (n // num_ranks)) % num_ranks for n in range(layers)),  # dealt out
                *(two_blocks_owner(layers, num_ranks, how) for how in ("interleaved", "v") if layers >= 2 * num_ranks),
                tuple(draw.randrange(num_ranks) for _ in range(layers)),
            ]
        )
        passes.append(Pass(owner, buffers, sides=draw.random() < 0.3))
    ranks = tuple(draw.randrange(num_ranks) for _ in range(len(passes) + 1))
    needs = tuple(tuple(range(k)) for k in range(len(passes) + 1))
    pieces = draw.choice([1, 1, num_ranks])
    return build_step(config, Anatomy(tuple(passes), ranks, needs, pieces), num_ranks, micro_batches)


def reordered(plan: Plan, draw: random.Random, orders: int) -> Iterator[Plan]:
    """The same tasks in other orders, as other prices and other rules would have them."""
    prices = {f.name: draw.choice([0.0, 1.0, draw.random()]) for f in dataclasses.fields(Costs)}
    costs = Costs(**{**prices, "bandwidth": draw.choice([0.1, 1.0, float("inf")])})
    work = Work(plan, costs)
    for _ in range(orders):
        keys = {id(task): draw.random() for task in plan.tasks}
        yield by_ending(work.ordered(Rule(lambda task, tail, keys=keys: (keys[id(task)],))), costs)


def test_ten_thousand_random_plans():
    draw = random.Random(0)
    checked = reduced = 0
    while checked < 10_000:
        plan = random_plan(draw)
        for order in [plan, *reordered(plan, draw, 24)]:
            check_rendezvous(order, blocking=draw.random() < 0.5)
            checked += 1
            reduced += bool(plan.reductions)
    assert reduced > 1000


def interleaved(iterations: int) -> Plan:
    """`aggregate` with every interval dealt out to three ranks."""
    config = LayerParallelConfig(
        strategy="mgrit", coarse_operator="aggregate", coarsening=3, forward_iterations=iterations
    )
    owner = interleaved_owner(12, 3, range(0, 13, 3))
    return build_step(config, Anatomy.of_stack(owner), 3)


@pytest.mark.parametrize("iterations", [1, 2])
def test_receives_posted_ahead_of_what_must_come_before_them_are_found(iterations):
    """As it was: every receive of a step before its first task, which hangs on NCCL."""
    plan = interleaved(iterations)
    check_rendezvous(plan)
    parts = []
    for rank in range(3):
        part = RankPart.of(plan, rank)
        early = tuple(post for posts in part.posts for post in posts if post.kind == "receive")
        late = [tuple(post for post in posts if post.kind != "receive") for posts in part.posts]
        parts.append(dataclasses.replace(part, posts=(early + late[0], *late[1:])))
    with pytest.raises(RuntimeError, match="wait for each other"):
        check_rendezvous(plan, parts)


def test_crossed_messages_are_found():
    plan = interleaved(2)
    parts = [RankPart.of(plan, rank) for rank in range(3)]
    posts = [list(posts) for posts in parts[1].posts]
    from_0 = [(i, j) for i, of in enumerate(posts) for j, p in enumerate(of) if p.kind == "receive" and p.peer == 0]
    (i, j), (k, n) = from_0[0], from_0[1]
    posts[i][j], posts[k][n] = posts[k][n], posts[i][j]
    parts[1] = dataclasses.replace(parts[1], posts=tuple(map(tuple, posts)))
    with pytest.raises(RuntimeError, match="crossed"):
        check_rendezvous(plan, parts)


def test_all_reduces_that_differ_are_found():
    plan = interleaved(1)
    parts = [RankPart.of(plan, rank) for rank in range(3)]
    first, second = (r.value for r in plan.reductions[:2])
    other = {first: second, second: first}
    posts = tuple(
        tuple(Post("reduce", other.get(p.value, p.value)) if p.kind == "reduce" else p for p in of)
        for of in parts[2].posts
    )
    parts[2] = dataclasses.replace(parts[2], posts=posts)
    with pytest.raises(RuntimeError, match="different all-reduces"):
        check_rendezvous(plan, parts)
