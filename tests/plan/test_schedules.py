"""Schedules against the textbooks: bubbles, orders and memory in unit costs, and what holds in any costs."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from itertools import accumulate, groupby

import pytest
import torch

from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.errors import ConfigurationError
from hf_layerpar.plan.costs import Costs
from hf_layerpar.plan.order import Rule, in_order
from hf_layerpar.plan.schedules import SCHEDULES, WORTH, Schedule, forward_first
from hf_layerpar.plan.simulate import simulate
from hf_layerpar.plan.step import Anatomy, Pass, build_step
from hf_layerpar.plan.tasks import Plan, Task
from recipes.benchmarks.scaling import gpipe, one_forward_one_backward
from tests.plan.interpreter import DIM, F64, Run, Toy, reference
from tests.plan.shapes import (
    UNIT,
    exact_step,
    layers_of,
    makespan,
    owner_for,
    random_anatomy,
    random_config,
    random_costs,
    random_owner,
    two_stacks,
)
from tests.problems import relative

LAYERS = 4
"""Of each rank, in two blocks of two where a schedule wants two."""
SIZES = [(p, m) for p in (1, 2, 3, 4, 5, 8) for m in sorted({1, 2, p, p + 1, 2 * p, 3 * p + 1})]
RANKS = (1, 2, 3, 4, 5, 8)


def step(schedule: str, num_ranks: int, micro_batches: int, costs: Costs = UNIT) -> Plan:
    return exact_step(schedule, LAYERS * num_ranks, num_ranks, micro_batches, costs)


def bubble(plan: Plan) -> float:
    """Time beyond that of the work, in forwards of a rank's layers."""
    work = 3 * LAYERS * plan.micro_batches
    return (makespan(plan) - work) / LAYERS


def held(plan: Plan) -> list[float]:
    """The most graphs of each rank, in micro-batches."""
    return [peak.graphs / LAYERS for peak in simulate(plan).peaks]


def work_of(plan: Plan, rank: int) -> list[tuple[str, int, int]]:
    """The steps of a rank in their order: F or B, the micro-batch, and which of the rank's blocks it is."""
    steps = [t for t in plan.tasks if t.kind == "step" and t.rank == rank]
    blocks = sorted({min(t.layers) for t in steps})
    return [("F" if t.direction == "forward" else "B", t.micro_batch, blocks.index(min(t.layers))) for t in steps]


# ---- the textbooks
@pytest.mark.parametrize(("num_ranks", "micro_batches"), SIZES)
def test_gpipe(num_ranks, micro_batches):
    plan = step("gpipe", num_ranks, micro_batches)
    assert bubble(plan) == 3 * (num_ranks - 1)
    assert makespan(plan) == pytest.approx(micro_batches * gpipe(LAYERS * num_ranks, num_ranks, micro_batches).time)
    assert held(plan) == [micro_batches] * num_ranks
    for rank in range(num_ranks):
        order = [what for what, _, _ in work_of(plan, rank)]
        assert order == ["F"] * micro_batches + ["B"] * micro_batches


@pytest.mark.parametrize(("num_ranks", "micro_batches"), SIZES)
def test_1f1b(num_ranks, micro_batches):
    """GPipe's time with P - r micro-batches in flight: as many forwards but one, then one forward and one backward in
    turn, then what backwards are left."""
    plan = step("1f1b", num_ranks, micro_batches)
    textbook = one_forward_one_backward(LAYERS * num_ranks, num_ranks, micro_batches)
    assert makespan(plan) == pytest.approx(micro_batches * textbook.time)
    assert held(plan) == [min(micro_batches, num_ranks - rank) for rank in range(num_ranks)]
    assert max(held(plan)) * LAYERS == pytest.approx(micro_batches * textbook.graphs)
    for rank in range(num_ranks):
        warm_up = min(micro_batches, num_ranks - rank - 1)
        forwards = [("F", m, 0) for m in range(micro_batches)]
        backwards = [("B", m, 0) for m in range(micro_batches)]
        turns = [both for pair in zip(forwards[warm_up:], backwards, strict=False) for both in pair]
        assert work_of(plan, rank) == [*forwards[:warm_up], *turns, *backwards[micro_batches - warm_up :]]


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_interleaved_1f1b(num_ranks, rounds):
    """Half the bubble of 1F1B with two blocks a rank, for the memory of Megatron's warm-up."""
    plan = step("interleaved_1f1b", num_ranks, rounds * num_ranks)
    assert bubble(plan) == 3 * (num_ranks - 1) / 2
    micro_batches = rounds * num_ranks
    in_flight = [min(2 * micro_batches, 2 * (num_ranks - r - 1) + num_ranks + 1) / 2 for r in range(num_ranks)]
    assert held(plan) == (in_flight if num_ranks > 1 else [1])  # of one rank both blocks are one
    for rank in range(num_ranks) if num_ranks > 1 else ():
        forwards = [(m, block) for what, m, block in work_of(plan, rank) if what == "F"]
        backwards = [(m, block) for what, m, block in work_of(plan, rank) if what == "B"]
        starts = range(0, micro_batches, num_ranks)
        assert forwards == [(m, b) for s in starts for b in (0, 1) for m in range(s, s + num_ranks)]
        assert backwards == [(m, b) for s in starts for b in (1, 0) for m in range(s, s + num_ranks)]


@pytest.mark.parametrize("num_ranks", RANKS[1:])
def test_interleaved_1f1b_with_rounds_that_do_not_come_out_even(num_ranks):
    """Longer rounds keep the bubble small and hold more; of fewer micro-batches than ranks the bubble grows."""
    for micro_batches in range(1, 3 * num_ranks):
        plan = step("interleaved_1f1b", num_ranks, micro_batches)
        missing = max(0, num_ranks - micro_batches)
        assert bubble(plan) == pytest.approx(3 * (num_ranks - 1 + missing) / 2)
        longest = -(-micro_batches // max(1, micro_batches // num_ranks))
        for rank, most in enumerate(held(plan)):
            assert most <= (2 * (num_ranks - rank - 1) + longest + 1) / 2


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("prices", [{}, {"vjp": 1.5, "weights": 0.5}])
def test_zb_h1(num_ranks, prices):
    """(P - 1)(F + B - W) of bubble, for no more than 1F1B's first rank holds on any."""
    costs = Costs(**prices)
    for micro_batches in (num_ranks, num_ranks + 1, 2 * num_ranks, 3 * num_ranks + 2):
        plan = step("zb_h1", num_ranks, micro_batches, costs)
        beyond = makespan(plan, costs) / LAYERS - 3 * micro_batches
        assert beyond == pytest.approx((num_ranks - 1) * (1 + costs.vjp - costs.weights))
        assert max(held(plan)) == num_ranks
        assert min(held(plan)) > 0
    for micro_batches in range(1, num_ranks):
        assert max(held(step("zb_h1", num_ranks, micro_batches))) == micro_batches


@pytest.mark.parametrize("num_ranks", RANKS)
def test_zb_v(num_ranks):
    """Nearly no bubble: the last rank can't start before P - 1 blocks, and no rank waits for more than two blocks'
    forwards beside; with P micro-batches of memory everywhere, as 1F1B's first rank has."""
    for micro_batches in (num_ranks, 2 * num_ranks, 2 * num_ranks + 1, 3 * num_ranks, 4 * num_ranks + 1):
        plan = step("zb_v", num_ranks, micro_batches)
        least = (num_ranks - 1) / 2
        assert least <= bubble(plan) <= least + 1
        assert max(held(plan)) == num_ranks
    # at its own sizes nothing at all
    assert bubble(step("zb_v", num_ranks, 2 * num_ranks)) == (num_ranks - 1) / 2


def test_the_bubbles_are_in_the_order_of_the_papers():
    for num_ranks in (2, 4, 8):
        names = ("1f1b", "interleaved_1f1b", "zb_h1", "zb_v")
        times = [makespan(step(name, num_ranks, 2 * num_ranks)) for name in names]
        assert times == sorted(times, reverse=True)
        assert len(set(times)) == 4


# ---- the list schedule
def test_list_is_no_longer_than_what_it_starts_from():
    """In any costs, on any blocks; with the memory of 1F1B's first rank."""
    rng = random.Random(0)
    for _ in range(60):
        num_ranks, micro_batches = rng.randint(1, 6), rng.randint(1, 9)
        num_layers = rng.randint(num_ranks, 5 * num_ranks)
        cuts = [0, *sorted(rng.sample(range(1, num_layers), num_ranks - 1)), num_layers]
        owner = [rank for rank in range(num_ranks) for _ in range(cuts[rank], cuts[rank + 1])]
        anatomy, costs = Anatomy.of_stack(owner), random_costs(rng)
        plans = {
            name: build_step(LayerParallelConfig(schedule=name), anatomy, num_ranks, micro_batches, costs=costs)
            for name in ("list", "1f1b", "zb_h1")
        }
        times = {name: makespan(plan, costs) for name, plan in plans.items()}
        assert times["list"] <= times["1f1b"] + 1e-9
        assert times["list"] <= times["zb_h1"] / WORTH + 1e-9  # taken apart only where that is worth it
        for rank, peak in enumerate(simulate(plans["list"]).peaks):
            assert peak.graphs <= num_ranks * layers_of(anatomy, rank)


def test_list_takes_apart_what_is_worth_it():
    """Where a backward in halves costs nothing, and then where it costs as much again."""
    cheap, dear = UNIT, Costs(vjp=2.0, weights=2.0)
    split = [Counter(t.kind for t in step("list", 4, 4, costs).tasks)["weights"] for costs in (cheap, dear)]
    assert split[0] > 0
    assert split[1] == 0
    assert makespan(step("list", 4, 4)) == makespan(step("zb_h1", 4, 4))


# ---- any shape
@pytest.mark.parametrize("steps", [300, pytest.param(1000, marks=pytest.mark.slow)])
def test_random_steps_are_valid(steps):
    """Every schedule and MGRIT, on any number of ranks, splits, passes, sides and pieces of the tail."""
    rng = random.Random(1)
    seen: Counter[str] = Counter()
    for _ in range(steps):
        num_ranks = rng.randint(1, 5)
        config = random_config(rng, num_ranks)
        exact = config.strategy == "pipeline"
        micro_batches = rng.randint(1, 9 if exact else 2)
        anatomy, trains = random_anatomy(rng, num_ranks), rng.random() < 0.9
        costs = rng.choice([None, random_costs(rng)])
        plan = build_step(config, anatomy, num_ranks, micro_batches, trains=trains, costs=costs)
        plan.validate()
        kinds = Counter(t.kind for t in plan.tasks)
        phases = len(anatomy.passes) * (1 + trains) + anatomy.tail_pieces
        assert kinds["phase"] == phases * micro_batches
        assert kinds["cut"] == len(anatomy.needs[-1]) * micro_batches * (anatomy.tail_pieces > 1)
        assert trains or not any(plan.values[v].kind in ("graph", "pending") for t in plan.tasks for v in t.outputs)
        seen[config.schedule if exact else config.strategy] += 1
    assert min(seen[name] for name in (*SCHEDULES, "mgrit")) >= steps // 20


@pytest.mark.parametrize("schedule", [*SCHEDULES])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 5])
def test_any_number_of_micro_batches_and_ranks(schedule, num_ranks):
    """With their ends on the first and last rank, and with the tail spread over all."""
    for micro_batches in range(1, 10):
        for pieces in {1, num_ranks}:
            num_layers = 2 * num_ranks + (3 if micro_batches % 2 else 0)
            plan = exact_step(schedule, num_layers, num_ranks, micro_batches, ends=pieces)
            plan.validate()
            tails = Counter(t.rank for t in plan.tasks if t.kind == "phase" and t.place == 1)
            assert set(tails.values()) == {micro_batches}
            assert len(tails) == pieces


def test_limits_of_memory_hold_on_any_shape():
    """With several blocks a rank 1F1B's first rank holds (2 (P - 1) + (blocks - 1) P + 1) of them."""
    rng = random.Random(2)
    for _ in range(60):
        num_ranks, micro_batches = rng.randint(1, 5), rng.randint(1, 7)
        anatomy = random_anatomy(rng, num_ranks)
        blocks = max(Counter(rank for run in anatomy.passes for rank, _ in groupby(run.owner)).values())
        first = (2 * (num_ranks - 1) + (blocks - 1) * num_ranks + 1) / blocks if blocks > 1 else num_ranks
        for schedule, most in (("zb_v", num_ranks), ("zb_h1", first), ("list", first)):
            config = LayerParallelConfig(schedule=schedule)
            peaks = simulate(build_step(config, anatomy, num_ranks, micro_batches)).peaks
            for rank, peak in enumerate(peaks):
                assert peak.graphs <= most * layers_of(anatomy, rank) + 1e-9, (schedule, anatomy)


# ---- sums
def sums_of(plan: Plan) -> dict[tuple, list[tuple[int, int]]]:
    """For the weights of each layer and for each phase, the micro-batches (and pieces) in the order of their adding."""
    found = defaultdict(list)
    for task in plan.tasks:
        added = (task.micro_batch, task.piece[0])
        whole = task.final and task.direction == "backward" and len(task.outputs) == 1
        if task.kind == "weights" or whole:
            for n in task.layers:
                found[task.place, n].append(added)
        if task.kind == "phase" and (task.direction == "backward" or task.place == len(plan.passes)):
            found[task.place, "phase", task.rank].append(added)
    return dict(found)


def test_sums_are_in_the_order_of_the_micro_batches_in_all_schedules():
    rng = random.Random(3)
    for _ in range(25):
        num_ranks, micro_batches = rng.randint(1, 5), rng.randint(2, 7)
        anatomy, costs = random_anatomy(rng, num_ranks), random_costs(rng)
        orders = []
        for schedule in SCHEDULES:
            config = LayerParallelConfig(schedule=schedule)
            orders.append(sums_of(build_step(config, anatomy, num_ranks, micro_batches, costs=costs)))
        assert all(order == orders[0] for order in orders)
        assert all(order == sorted(order) for order in orders[0].values())
        assert {len(order) for order in orders[0].values()} == {micro_batches}


def test_gradients_are_those_of_autograd_and_the_same_bits_in_all_schedules():
    rng = random.Random(4)
    for _ in range(6):
        micro_batches = rng.randint(1, 5)
        lengths = [rng.randint(6, 12) for _ in range(2)]
        found = []
        batch = torch.randn(2 * micro_batches + 1, 3, DIM, dtype=F64, generator=torch.Generator().manual_seed(0))
        for schedule in SCHEDULES:
            num_ranks = rng.randint(1, 3)
            encoder, decoder = (random_owner(rng, n, num_ranks, (0, 0)) for n in lengths)
            anatomy = two_stacks(encoder, decoder)
            plan = build_step(LayerParallelConfig(schedule=schedule), anatomy, num_ranks, micro_batches)
            model = Toy(anatomy)
            found.append(Run(plan, model, batch).gradients)
        expected = reference(model, batch)
        for gradients in found:
            assert set(gradients) == set(expected)
            assert all(torch.equal(gradients[name], found[0][name]) for name in expected)
            assert max(relative(gradients[name], expected[name]) for name in expected) < 1e-12


def test_pieces_of_the_tail_change_nothing():
    anatomy = two_stacks((0,) * 3 + (1,) * 3, (0,) * 2 + (1,) * 2, tail_pieces=2)
    plan = build_step(LayerParallelConfig(), anatomy, 2, 3)
    model, batch = Toy(anatomy), torch.randn(7, 3, DIM, dtype=F64, generator=torch.Generator().manual_seed(0))
    run = Run(plan, model, batch)
    expected = reference(model, batch)
    assert len(run.losses) == 6
    assert max(relative(run.gradients[name], expected[name]) for name in expected) < 1e-12


def test_a_forward_alone():
    """Fills the pipeline without a limit: nothing is kept. On two blocks it is as much shorter as a first block is."""
    for schedule, num_blocks in (("gpipe", 1), ("1f1b", 1), ("zb_h1", 1), ("list", 1), ("interleaved_1f1b", 2)):
        owner = owner_for(schedule, 16, 4)
        config = LayerParallelConfig(schedule=schedule)
        plan = build_step(config, Anatomy.of_stack(owner), 4, 12, trains=False)
        assert makespan(plan) == 4 * 12 + 3 * 4 / num_blocks
        assert not any(peak.graphs for peak in simulate(plan).peaks)


# ---- rules
def written(owner: tuple[int, ...], num_ranks: int, micro_batches: int, split: bool = False) -> Plan:
    """Tasks in the order in which the algorithm is written down, as a schedule gets them."""
    got: list[Plan] = []

    def keep(plan_of, shape, costs):
        got.append(plan_of((lambda task: True) if split else None))
        return got[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SCHEDULES, "as it comes", keep)
        config = LayerParallelConfig(schedule="as it comes")
        build_step(config, Anatomy.of_stack(owner), num_ranks, micro_batches)
    return got[0]


V = (0, 0, 0, 1, 1, 2, 2, 2, 2, 1, 0, 0)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("memory", [1, 2, 3])
def test_a_limit_of_memory_lets_every_micro_batch_through(memory, split):
    """However deep its blocks: one enters only where its later blocks fit too."""
    plan = written(V, 3, 7, split)
    ordered = in_order(plan, Rule(forward_first, memory=lambda rank: memory))
    ordered.validate()
    for rank, peak in enumerate(simulate(ordered).peaks):
        assert (memory - 1) * V.count(rank) < peak.graphs <= memory * V.count(rank)


def test_a_limit_that_nothing_fits_in_gives_way():
    for limits in ({"flight": lambda rank: 0}, {"memory": lambda rank: 0.5}):
        ordered = in_order(written(V, 3, 4), Rule(forward_first, **limits))
        ordered.validate()
        # one block of one micro-batch after the other
        assert [peak.graphs for peak in simulate(ordered).peaks] == [V.count(rank) for rank in range(3)]


def test_a_limit_of_flight_counts_blocks():
    for flight in (1, 2, 4):
        ordered = in_order(written((0, 1, 2, 2), 3, 5), Rule(forward_first, flight=lambda rank, flight=flight: flight))
        for rank in range(3):
            levels = accumulate(1 if what == "F" else -1 for what, _, _ in work_of(ordered, rank))
            assert max(levels) == flight


def test_a_sequence_against_the_order_of_sums_is_refused():
    rule = Rule(forward_first, sequence=lambda task: (-task.micro_batch,))
    with pytest.raises(AssertionError, match="the plan has a cycle"):
        in_order(written((0, 0, 1, 1), 2, 3), rule)


# ---- your own
def longest_first(task: Task, tail: float) -> tuple:
    return (task.micro_batch, -tail)


@pytest.mark.parametrize(
    "own",
    [
        Schedule((longest_first,), memory=lambda rank, shape: 2, split=True, placement="v"),
        lambda plan_of, shape, costs: plan_of(None),
    ],
    ids=["object", "function"],
)
def test_a_schedule_of_your_own(own, monkeypatch):
    with pytest.raises(ConfigurationError, match=r"schedule='own' is unknown; use one of gpipe, 1f1b, .* or add it to"):
        build_step(LayerParallelConfig(schedule="own"), Anatomy.of_stack((0, 1)), 2)
    monkeypatch.setitem(SCHEDULES, "own", own)
    owner = owner_for("own", 8, 2)
    assert owner == ((0, 0, 1, 1, 1, 1, 0, 0) if isinstance(own, Schedule) else (0, 0, 0, 0, 1, 1, 1, 1))
    anatomy = Anatomy((Pass(owner, sides=True),), (0, owner[-1]), ((), (0,)))
    plan = build_step(LayerParallelConfig(schedule="own"), anatomy, 2, 4)
    model, batch = Toy(anatomy), torch.randn(8, 3, DIM, dtype=F64, generator=torch.Generator().manual_seed(0))
    gradients = Run(plan, model, batch).gradients
    expected = reference(model, batch)
    assert max(relative(gradients[name], expected[name]) for name in expected) < 1e-12
    if isinstance(own, Schedule):
        assert [peak.graphs for peak in simulate(plan).peaks] == [2 * owner.count(rank) for rank in (0, 1)]
