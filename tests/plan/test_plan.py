"""Grids, ownership, settings and plans: pure data, checked without tensors."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from itertools import chain

import pytest

from hf_layerpar.config import LayerParallelConfig, describe
from hf_layerpar.errors import ConfigurationError
from hf_layerpar.plan.builder import PlanBuilder
from hf_layerpar.plan.costs import Costs
from hf_layerpar.plan.grid import Grid
from hf_layerpar.plan.ownership import balanced_split, contiguous_owner, interleaved_owner, two_blocks_owner
from hf_layerpar.plan.part import RankPart, check_rendezvous
from hf_layerpar.plan.simulate import simulate
from hf_layerpar.plan.step import Anatomy, build_step
from hf_layerpar.plan.tasks import Direction, Plan, Task, Value
from tests.plan.shapes import UNIT, exact_step, makespan, two_stacks


def mgrit(**settings) -> LayerParallelConfig:
    return LayerParallelConfig(strategy="mgrit", **settings)


def step(
    config: LayerParallelConfig, num_layers: int, num_ranks: int, micro_batches: int = 1, buffers=(0, 0), costs=UNIT
) -> Plan:
    anatomy = Anatomy.of_stack(contiguous_owner(num_layers, num_ranks), buffers)
    return build_step(config, anatomy, num_ranks, micro_batches, costs=costs)


def steps(plan: Plan, direction: Direction) -> list[Task]:
    return [t for t in plan.tasks if t.kind == "step" and t.direction == direction]


# ---- grids and owners
@pytest.mark.parametrize(
    ("num_steps", "factors", "levels"),
    [
        (8, (4,), [(0, 4, 8)]),
        (10, (4,), [(0, 4, 8, 10)]),  # the last interval is shorter
        (7, (2, 2), [(0, 2, 4, 6, 7), (0, 4, 7)]),
        (3, (5,), [(0, 3)]),
        (12, (2, 3), [(0, 2, 4, 6, 8, 10, 12), (0, 6, 12)]),
    ],
)
def test_grid_levels(num_steps, factors, levels):
    grid = Grid.coarsened(num_steps, factors)
    assert list(grid.levels) == [tuple(range(num_steps + 1)), *levels]
    for level in range(grid.coarsest):
        inner = [list(grid.interval(level, j)) for j in range(grid.num_steps(level + 1))]
        assert list(chain(*inner)) == list(range(grid.num_steps(level)))
    assert grid.reversed().reversed() == grid
    assert [grid.span(1, s)[-1] for s in range(grid.num_steps(1))][-1] == num_steps - 1


def test_exact_steps_are_intervals_of_their_own_on_every_level():
    grid = Grid.coarsened(12, (2, 2), (5, 8))
    assert grid.levels[1:] == ((0, 2, 4, 5, 6, 8, 9, 11, 12), (0, 4, 5, 6, 8, 9, 12))
    for way in (grid, grid.reversed()):
        for level in (1, 2):
            spans = [way.span(level, s) for s in range(way.num_steps(level)) if way.is_exact(level, s)]
            assert sorted(n for span in spans for n in span) == sorted(way.exact)
    assert grid.reversed().exact == {3, 6}
    assert grid.reversed().reversed() == grid
    with pytest.raises(ConfigurationError, match=r"too deep for 5 steps, 2 of them exact: level 0 has no two steps"):
        Grid.coarsened(5, (2,), (1, 3))


def test_grid_too_deep():
    with pytest.raises(ConfigurationError, match=r"coarsening=\(3, 2, 2\) is too deep for 6 steps: .* use 2 factors"):
        Grid.coarsened(6, (3, 2, 2))
    with pytest.raises(ConfigurationError, match=r"buffers=\(3, 3\) leave 0 of 6 layers between them"):
        step(mgrit(), 6, 1, buffers=(3, 3))


def test_ownership():
    assert contiguous_owner(7, 2) == (0, 0, 0, 0, 1, 1, 1)
    assert contiguous_owner(10, 3, boundaries=(0, 4, 8, 10)) == (0,) * 4 + (1,) * 4 + (2,) * 2
    assert contiguous_owner(5, 5) == (0, 1, 2, 3, 4)
    assert contiguous_owner(4, 2, split=(1, 3)) == (0, 1, 1, 1)
    assert interleaved_owner(8, 2, (1, 3, 5, 7)) == (0, 0, 1, 1, 0, 0, 1, 1)
    assert interleaved_owner(7, 3, (0, 3, 6, 7)) == (0, 1, 2, 1, 2, 0, 2)
    assert two_blocks_owner(8, 2, "interleaved") == (0, 0, 1, 1, 0, 0, 1, 1)
    assert two_blocks_owner(8, 2, "v") == (0, 0, 1, 1, 1, 1, 0, 0)
    assert two_blocks_owner(6, 3, "v") == (0, 1, 2, 2, 1, 0)
    assert two_blocks_owner(3, 1, "v") == (0, 0, 0)
    assert balanced_split(10, 3, layer=3.0, first=0.0, last=6.0) == (4, 4, 2)
    assert balanced_split(3, 3, layer=1.0, first=9.0, last=9.0) == (1, 1, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: interleaved_owner(3, 4, (0, 2, 3)), r"lp ranks \[2, 3\] of 4 without a layer: 3 layers in"),
        (lambda: contiguous_owner(6, 7), "lp_size=7 is more than the 6 layers"),
        (lambda: contiguous_owner(6, 2, split=(4, 3)), r"split=\(4, 3\) doesn't share 6 layers over 2 lp ranks"),
        (lambda: contiguous_owner(6, 2, split=(6, 0)), r"split=\(6, 0\)"),
        (lambda: two_blocks_owner(5, 3, "v"), "split='v' makes 6 blocks of 5 layers on 3 lp ranks; use"),
    ],
)
def test_owners_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


# ---- settings
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "magic"}, "strategy='magic' is unknown; use one of pipeline, mgrit"),
        ({"ends": "middle"}, "ends='middle' is unknown; use one of first_last, spread"),
        ({"relaxation": "C"}, "relaxation='C' is unknown; use one of F, FCF"),
        ({"schedule": None}, "schedule=None must be a name"),
        ({"coarse_operator": 3}, "coarse_operator=3 must be a name"),
        ({"coarsening": 1}, "coarsening=1 must be an integer of at least 2"),
        ({"coarsening": (4, 1)}, "coarsening=1 must be an integer of at least 2"),
        ({"coarsening": ()}, r"coarsening=\(\) gives no coarse level"),
        ({"increment_penalty": -1.0}, "increment_penalty=-1.0 must be finite and at least 0"),
        ({"increment_penalty": float("inf")}, "increment_penalty=inf"),
        ({"micro_batches": 0}, "micro_batches=0"),
        ({"forward_iterations": -1}, "forward_iterations=-1"),
        ({"stacked": 1}, "stacked=1 must be True or False"),
    ],
)
def test_bad_settings_name_value_and_remedy(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        LayerParallelConfig(**settings)


def test_names_are_looked_up_where_plans_are_made():
    """Settings are plain data; what is registered may be added later."""
    with pytest.raises(ConfigurationError, match=r"schedule='2f2b' is unknown; use one of gpipe, .*, list, or add"):
        step(LayerParallelConfig(schedule="2f2b"), 4, 2)
    with pytest.raises(ConfigurationError, match=r"coarse_operator='mean' is unknown; use one of rediscretize, aggr"):
        step(mgrit(coarse_operator="mean"), 4, 2)


def test_settings_round_trip_and_unknown_keys():
    config = mgrit(coarsening=(4, 2), schedule="zb_v", ends="spread")
    assert config.levels == 3
    assert LayerParallelConfig.from_dict(config.to_dict()) == config
    assert mgrit(coarsening=[4, 2], schedule="zb_v", ends="spread") == config
    assert mgrit(coarsening=(4,)) == mgrit(coarsening=4)
    for gone in ("levels", "damping", "sliced_ends"):
        with pytest.raises(ConfigurationError, match=f"unknown LayerParallelConfig keys \\['{gone}'\\]; known keys"):
            LayerParallelConfig.from_dict({gone: 2})


# ---- plans
CONFIGS = [
    LayerParallelConfig(),
    LayerParallelConfig(schedule="zb_h1"),
    *(
        mgrit(coarsening=c, relaxation=r, coarse_operator=o, forward_iterations=k, backward_iterations=k)
        for c, r in ((4, "F"), (4, "FCF"), ((3, 2), "F"))
        for o in ("rediscretize", "aggregate", "identity")
        for k in (1, 3)
    ),
]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("micro_batches", [1, 2, 7])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{describe(config)} {config.schedule}")
def test_plans_are_valid_and_every_message_is_expected(config, micro_batches, num_ranks):
    plan = step(config, 13, num_ranks, micro_batches, (1, 2), None)
    plan.validate()
    parts = [RankPart.of(plan, r) for r in range(num_ranks)]
    check_rendezvous(plan, parts)
    posts = [(r, post) for r, part in enumerate(parts) for post in chain(*part.posts)]
    sent = [(post.value, r, post.peer) for r, post in posts if post.kind == "send"]
    received = [(post.value, post.peer, r) for r, post in posts if post.kind == "receive"]
    assert sorted(sent) == sorted(received) == sorted((m.value, m.source, m.target) for m in plan.messages)
    # contiguous ownership: each sweep travels one way, which is what NCCL's first-in first-out matching needs
    way = {t.output: 1 if t.direction == "forward" else -1 for t in plan.tasks if t.kind != "phase" and t.outputs}
    assert all((target - source) * way[value] > 0 for value, source, target in sent)


def broken(plan: Plan, **changes) -> Plan:
    return dataclasses.replace(plan, **changes)


def test_validate_finds_faults():
    plan = exact_step("zb_h1", 4, 2, 2)
    tasks = plan.tasks
    finals = [i for i, t in enumerate(tasks) if t.kind == "step" and t.direction == "backward" and t.rank == 1]
    weights = [i for i, t in enumerate(tasks) if t.kind == "weights" and t.rank == 1]
    graph = {i: tasks[i].inputs[1] for i in finals}

    def swapped(i: int, j: int) -> tuple[Task, ...]:
        order = list(tasks)
        order[i], order[j] = order[j], order[i]
        return tuple(order)

    def changed(i: int, **changes) -> tuple[Task, ...]:
        return (*tasks[:i], dataclasses.replace(tasks[i], **changes), *tasks[i + 1 :])

    some = next(i for i, t in enumerate(tasks) if t.kind == "step")
    faults = {
        "value made twice": (tasks[0], *tasks),
        "used before they are made": tasks[1:],
        "final steps are wrong": changed(some, final=False),
        "no such rank": changed(some, rank=2),
        "are on another rank": changed(finals[0], rank=0),
        "its graph is spent": changed(finals[1], inputs=(tasks[finals[1]].inputs[0], graph[finals[0]])),
        "out of the order of the micro-batches": swapped(*weights),
    }
    for message, tasks_ in faults.items():
        with pytest.raises(AssertionError, match=message):
            broken(plan, tasks=tasks_).validate()
    again = dataclasses.replace(tasks[some], outputs=(1000, 1001))
    values = plan.values | {1000: Value("state", 0, 0), 1001: Value("graph", 0, 0)}
    twice = broken(plan, tasks=(*tasks[: some + 1], again, *tasks[some + 1 :]), values=values)
    with pytest.raises(AssertionError, match="several final steps"):
        twice.validate()


def test_the_tails_gradients_are_summed_in_order_too():
    plan = exact_step("gpipe", 4, 2, 2)
    tails = [i for i, t in enumerate(plan.tasks) if t.kind == "phase" and t.place == 1]
    order = list(plan.tasks)
    second = order.pop(tails[1])
    order.insert(tails[0], second)
    ends = [i for i, t in enumerate(order) if second.inputs[0] in t.outputs]
    order.insert(tails[0], order.pop(ends[0]))  # with what it needs
    with pytest.raises(AssertionError, match="out of the order of the micro-batches"):
        broken(plan, tasks=tuple(order)).validate()


def test_plan_prints_its_tasks():
    config = mgrit(coarsening=2, forward_iterations=2, backward_iterations=0)
    anatomy = two_stacks((0, 0, 1, 1), (0, 0, 1, 1), tail_pieces=2)
    text = str(build_step(config, anatomy, 2, costs=UNIT))
    assert text.startswith("plan: 4 + 4 layers, 2 ranks, 1 micro-batches")
    for part in (
        "v0 = forward phase 0()",
        "= step 3(",
        "residual 1 += |v",
        "forward phase 2(v",
        "piece 2 of 2",
        "= cut(v",
        "= join(v",
        "= collect 3..2(v",
        "final",
        "= vjp 3",
        "backward phase 0(v",
    ):
        assert part in text, part
    assert "weights 1..0(v" in str(exact_step("zb_h1", 4, 2, 1))


# ---- what is written
def test_an_exact_step_is_a_block_a_rank():
    plan = exact_step("gpipe", 6, 3, 2)
    assert {t.layers for t in steps(plan, "forward")} == {(0, 1), (2, 3), (4, 5)}
    assert {t.layers for t in steps(plan, "backward")} == {(5, 4), (3, 2), (1, 0)}
    assert len(plan.messages) == 2 * 2 * 2


def test_nothing_converged_is_computed_again():
    """With as many iterations as intervals, interval k is relaxed k + 1 times, not once per iteration; the last one
    only at the end, as no correction needs its earlier ends."""
    plan = step(mgrit(coarsening=4, coarse_operator="identity", forward_iterations=4, increment_penalty=0.1), 16, 1)
    evaluations = [sum(n in t.layers for t in steps(plan, "forward")) for n in range(16)]
    assert evaluations == [1] * 4 + [2] * 4 + [3] * 4 + [1] * 4


def test_rediscretize_shares_its_evaluation_with_the_relaxation():
    """The coarse step evaluates the interval's first layer at the C-point, where the relaxation needs it too."""
    plan = step(mgrit(coarsening=4, coarse_operator="rediscretize", increment_penalty=0.1), 16, 1)
    assert len(steps(plan, "forward")) == 16
    assert sum(not t.final for t in steps(plan, "backward")) == 3


def test_exact_sweeps_of_mgrit_have_no_residuals():
    plan = step(mgrit(coarsening=4, forward_iterations=0, backward_iterations=2), 16, 2)
    assert plan.iterations == {(0, "backward"): 2}
    assert {t.direction for t in plan.tasks if t.kind == "residual"} == {"backward"}
    assert all(t.final for t in steps(plan, "forward"))


@pytest.mark.parametrize("config", [LayerParallelConfig(), mgrit(), mgrit(stacked=True)], ids=lambda c: c.strategy)
def test_a_forward_alone_is_exact(config):
    num_ranks = 1 if config.stacked else 3
    anatomy = two_stacks(contiguous_owner(6, num_ranks), contiguous_owner(6, num_ranks))
    plan = build_step(config, anatomy, num_ranks, 4, trains=False)
    assert not plan.trains
    assert plan.iterations == {}
    assert {t.direction for t in plan.tasks} == {"forward"}
    assert {t.kind for t in plan.tasks} == {"phase", "step"}
    done = sorted((t.place, t.micro_batch, n) for t in steps(plan, "forward") for n in t.layers)
    assert done == [(k, m, n) for k in range(2) for m in range(4) for n in range(6)]
    assert all(not t.outputs for t in plan.tasks if t.kind == "phase" and t.place == 2)


def test_sides_go_to_every_rank_and_their_gradients_from_rank_to_rank():
    plan = build_step(LayerParallelConfig(), two_stacks((0, 0, 1, 1), (0, 0, 1, 1)), 2)
    phases = [t for t in plan.tasks if t.kind == "phase" and t.direction == "forward"]
    (made,) = (v for t in phases for v in t.outputs if plan.values[v].kind == "sides")
    assert all((made in t.inputs) == (t.place == 1) for t in steps(plan, "forward"))
    collects = [t for t in plan.tasks if t.kind == "collect"]
    assert [(t.rank, t.layers) for t in collects] == [(1, (3, 2)), (0, (1, 0))]
    assert collects[0].output == collects[1].inputs[0]
    (back,) = (t for t in plan.tasks if t.kind == "phase" and t.place == 1 and t.direction == "backward")
    assert back.inputs[1] == collects[1].output


def test_an_end_that_several_phases_look_at_has_the_sum_of_their_adjoints():
    plan = build_step(LayerParallelConfig(), two_stacks((0, 1), (0, 1)), 2)
    adjoints = [t for t in plan.tasks if t.kind == "combine"]
    assert [(t.place, t.direction, t.coefficients) for t in adjoints] == [(0, "backward", (1.0, 1.0))]
    said = [t for t in plan.tasks if t.kind == "phase" and set(t.outputs) & set(adjoints[0].inputs)]
    assert {(t.place, t.direction) for t in said} == {(2, "forward"), (1, "backward")}


def test_the_tail_in_pieces():
    plan = build_step(LayerParallelConfig(), two_stacks((0, 1, 2), (0, 1, 2), tail_pieces=3), 3, 2)
    tails = [t for t in plan.tasks if t.kind == "phase" and t.place == 2]
    assert sorted((t.micro_batch, t.piece, t.rank) for t in tails) == [
        (m, (i, 3), i) for m in range(2) for i in range(3)
    ]
    cuts = [t for t in plan.tasks if t.kind == "cut"]
    assert all(t.rank == 2 and len(t.outputs) == 3 for t in cuts)  # where both stacks end
    assert [plan.values[v].piece for v in cuts[0].outputs] == [(0, 3), (1, 3), (2, 3)]
    joins = [t for t in plan.tasks if t.kind == "join"]
    assert sorted((t.micro_batch, t.place) for t in joins) == [(m, k) for m in range(2) for k in range(2)]
    costs = Costs(tail=3.0)
    assert all(costs.of(t, plan) == 1.0 for t in tails)


@pytest.mark.parametrize(
    ("config", "num_layers", "num_ranks", "micro_batches", "at_most"),
    [  # the design's critical paths, as shares of serial 3N
        (LayerParallelConfig(), 32, 2, 1, 0.834),
        (LayerParallelConfig(), 32, 2, 4, 0.625),
        (mgrit(coarse_operator="rediscretize"), 32, 2, 1, 0.625),
        (mgrit(coarse_operator="rediscretize", forward_iterations=2), 32, 2, 1, 0.896),
        (mgrit(coarse_operator="identity"), 32, 2, 1, 0.500),
        (mgrit(coarse_operator="identity", forward_iterations=2), 32, 2, 1, 0.677),
        (mgrit(coarse_operator="rediscretize", coarsening=8), 64, 8, 1, 0.203),
        (mgrit(coarse_operator="rediscretize", coarsening=8), 64, 8, 4, 0.152),
    ],
)
def test_predicted_time_is_the_critical_path(config, num_layers, num_ranks, micro_batches, at_most):
    total = makespan(step(config, num_layers, num_ranks, micro_batches))
    assert total / micro_batches / (3 * num_layers) <= at_most + 5e-4


def test_predicted_time_of_dealt_layers():
    """`aggregate` has all ranks evaluate an interval at once."""
    for num_layers, num_ranks, at_most in ((32, 2, 0.719), (64, 8, 0.25)):
        owner = interleaved_owner(num_layers, num_ranks, range(0, num_layers + 1, num_ranks))
        plan = build_step(mgrit(coarsening=num_ranks), Anatomy.of_stack(owner), num_ranks, costs=UNIT)
        assert makespan(plan) / (3 * num_layers) <= at_most + 5e-4


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("iterations", [1, 2])
def test_an_interleaved_coarse_step_is_one_all_reduce(num_ranks, iterations):
    """Of the nested start one for each interval but the last; of a correction likewise, but for the first interval,
    whose start is exact, and with the last relaxation's ends in the same sum."""
    layers = 4 * num_ranks
    points = range(0, layers + 1, num_ranks)
    owner = interleaved_owner(layers, num_ranks, points)
    config = mgrit(
        coarsening=num_ranks, coarse_operator="aggregate", forward_iterations=iterations, backward_iterations=0
    )
    plan = build_step(config, Anatomy.of_stack(owner), num_ranks, costs=UNIT)
    assert len(plan.reductions) == 3 + 2 * (iterations - 1)
    assert all(len(reduction.terms) == num_ranks for reduction in plan.reductions)
    free = Costs(step=0, graph_step=0, vjp=0, weights=0, final_vjp=0, latency=1.0)
    spans = simulate(plan, free).spans
    sums = [spans[i][1] for i, t in enumerate(plan.tasks) if t.kind == "combine" and len(t.inputs) == 2]
    depth = (num_ranks - 1).bit_length()
    assert 3 * depth <= max(sums) <= 2 + (3 + 2 * (iterations - 1)) * (depth + 1)


# ---- the builder
def test_the_builder_knows_what_is_there():
    """The same step of the same value is one task; what cancels is left out; a sum of one value is that value."""
    build = PlanBuilder(2)
    (x,) = build.phase(0, "forward", 0, 0, [], [Value("state", 0, 0)])
    build.sweep(0, "forward", 0, (0, 1))
    y = build.step(0, x)
    assert build.step(0, x) == y
    assert build.combine([(1.0, y)], 1) == y
    assert build.combine([(1.0, y), (0.5, x), (-0.5, x)], 1) == y
    z = build.combine([(1.0, y), (-1.0, x)], 1)
    assert build.combine([(-1.0, x), (1.0, y)], 0) == z
    assert build.combine([(2.0, y), (-1.0, x), (-1.0, y)], 0) == z
    assert (build.home(y), build.home(z)) == (0, 1)
    build.residual(y, y, 1)
    assert not any(t.kind == "residual" for t in build.tasks)
    build.sweep(0, "backward", 0, (0, 1))
    assert build.step(0, x) != y


def test_a_sum_on_several_ranks_is_taken_at_home():
    build = PlanBuilder(3)
    (x,) = build.phase(0, "forward", 0, 0, [], [Value("state", 0, 0)])
    build.sweep(0, "forward", 0, (0, 1, 2))
    y = build.step(0, x, final=True)
    both = build.combine([(0.5, x), (0.5, y)], 1, 2)
    end = build.step(2, build.step(1, both, final=True), final=True)
    assert end != both
    copies = [t for t in build.tasks if t.kind == "combine"]
    assert [t.rank for t in copies] == [1, 2]
    after = build.step(2, both)
    (task,) = (t for t in build.tasks if after in t.outputs)
    assert task.inputs == copies[1].outputs


def test_planning_needs_no_torch():
    modules = "planner, ladder, step, schedules, order, waves, simulate, costs, operators, cycle, grid, ownership"
    code = f"import sys; from hf_layerpar.plan import {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
