"""Grids, plans and their schedule: pure data, checked without tensors."""

import itertools
import subprocess
import sys

import pytest

from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.errors import ConfigurationError
from hf_layerpar.plan.grid import Grid
from hf_layerpar.plan.ownership import contiguous_owner, interleaved_owner
from hf_layerpar.plan.plan import Task
from hf_layerpar.plan.simulate import Costs, simulate
from hf_layerpar.plan.strategies import build_plan
from hf_layerpar.run.executor import RankPart


def mgrit(**settings) -> LayerParallelConfig:
    return LayerParallelConfig(strategy="mgrit", **settings)


def plans(config, num_layers, num_ranks, micro_batches=1, buffers=(0, 0)):
    owner = contiguous_owner(num_layers, num_ranks)
    return [
        build_plan(config, d, owner, num_ranks=num_ranks, micro_batches=micro_batches, buffers=buffers)
        for d in ("forward", "backward")
    ]


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
        steps = [list(grid.interval(level, j)) for j in range(grid.num_steps(level + 1))]
        assert list(itertools.chain(*steps)) == list(range(grid.num_steps(level)))
    assert grid.reversed().reversed() == grid
    assert [grid.span(1, s)[-1] for s in range(grid.num_steps(1))][-1] == num_steps - 1


def test_grid_too_deep():
    with pytest.raises(ConfigurationError, match=r"levels=4.*use levels=3"):
        Grid.coarsened(6, (3, 2, 2))


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("micro_batches", [1, 2, 7])
@pytest.mark.parametrize(
    "config",
    [
        LayerParallelConfig(),
        *(
            mgrit(levels=lv, coarsening=c, relaxation=r, coarse_operator=o, forward_iterations=k, backward_iterations=k)
            for lv, c in ((2, 4), (3, (3, 2)))
            for r in ("F", "FCF")
            for o in ("rediscretize", "aggregate", "identity", "mean", "linear")
            for k in (1, 3)
        ),
    ],
    ids=str,
)
def test_plans_are_valid_and_every_message_is_expected(config, micro_batches, num_ranks):
    for plan in plans(config, 13, num_ranks, micro_batches, buffers=(1, 2)):
        plan.validate()
        parts = [RankPart.of(plan, r) for r in range(num_ranks)]
        sent = [(value, r, t) for r, part in enumerate(parts) for value, ts in part.sends.items() for t in ts]
        received = [(value, source, r) for r, part in enumerate(parts) for value, source in part.receives]
        assert sorted(sent) == sorted(received)
        # contiguous ownership: one direction of travel, which is what NCCL's first-in first-out matching needs
        way = 1 if plan.direction == "forward" else -1
        assert all((target - source) * way > 0 for _, source, target in sent)


def test_messages_arrive_in_the_order_in_which_they_are_sent():
    for plan in plans(mgrit(coarsening=2, forward_iterations=3, backward_iterations=3), 12, 3, micro_batches=3):
        parts = [RankPart.of(plan, r) for r in range(3)]
        for a, b in itertools.permutations(range(3), 2):
            sent = [t.output for t in parts[a].tasks if b in parts[a].sends.get(t.output, ())]
            assert sent == [value for value, source in parts[b].receives if source == a]


def test_validate_finds_faults():
    plan = plans(LayerParallelConfig(), 4, 2)[0]
    broken = [
        (plan.tasks[0], *plan.tasks),  # made twice
        plan.tasks[1:],  # used before made
        tuple(Task(**{f: getattr(t, f) for f in Task.__slots__} | {"final": False}) for t in plan.tasks),  # no final
    ]
    for tasks in broken:
        with pytest.raises(AssertionError):
            type(plan)(plan.direction, 2, 4, plan.starts, plan.ends, tasks).validate()


def test_plan_prints_its_tasks():
    text = str(plans(mgrit(coarsening=2, forward_iterations=2), 4, 2)[0])
    assert text.startswith("forward plan: 4 layers, 2 ranks, 1 micro-batches")
    assert "= step 3(" in text
    assert "residual 1 += " in text


def test_nothing_converged_is_computed_again():
    """With as many iterations as intervals, interval k is relaxed k + 1 times, not once per iteration; the last one
    only at the end, as no correction needs its earlier ends."""
    forward, _ = plans(mgrit(coarsening=4, coarse_operator="identity", forward_iterations=4), 16, 1)
    evaluations = [sum(t.kind == "step" and t.layer == n for t in forward.tasks) for n in range(16)]
    assert evaluations == [1] * 4 + [2] * 4 + [3] * 4 + [1] * 4


@pytest.mark.parametrize("owner", [(0,) * 6 + (1,) * 6, interleaved_owner(12, 2, (0, 4, 8, 12), (0, 0))])
def test_a_fit_lives_where_its_interval_ends(owner):
    """Fits and what they observe: on one rank, for every interval but the last, which no coarse step spans."""
    config = mgrit(coarse_operator="linear", forward_iterations=2, backward_iterations=2)
    for direction, spans, last in (("forward", {(0, 4), (4, 8)}, 1), ("backward", {(4, 8), (8, 12)}, 0)):
        plan = build_plan(config, direction, owner, num_ranks=2)
        fits = [t for t in plan.tasks if t.kind in ("fit", "observe")]
        assert {t.span for t in fits if t.kind == "observe"} == spans == {t.span for t in fits if t.kind == "fit"}
        assert all(t.rank == owner[t.span[last] - last] for t in fits)
        assert f"fit {min(spans)}(v" in str(plan)
        assert "observes v" in str(plan)


def test_a_mean_only_moves_the_nested_start_of_the_forward():
    forward, backward = plans(mgrit(coarse_operator="mean", forward_iterations=3, backward_iterations=3), 16, 1)
    identity, _ = plans(mgrit(coarse_operator="identity", forward_iterations=3, backward_iterations=3), 16, 1)
    assert sum(t.kind == "fit" for t in forward.tasks) == 3
    assert not any(t.kind in ("fit", "observe") for t in backward.tasks)
    # a first guess of its own is all it adds: the corrections are the identity's
    assert sum(t.kind == "combine" for t in forward.tasks) == sum(t.kind == "combine" for t in identity.tasks)


def test_coarser_levels_chain_the_fits_of_the_fine_intervals():
    config = mgrit(coarse_operator="linear", levels=3, coarsening=(2, 2))
    plan = plans(config, 12, 1)[0]
    # the nested start visits every C-point of the fine level once, whatever the levels above
    assert sorted(t.span for t in plan.tasks if t.kind == "fit") == [(n, n + 2) for n in range(0, 10, 2)]
    assert {t.span for t in plan.tasks if t.kind == "observe"} == {(n, n + 2) for n in range(0, 10, 2)}


def test_rediscretize_shares_its_evaluation_with_the_relaxation():
    """The coarse step evaluates the interval's first layer at the C-point, where the relaxation needs it too."""
    forward, backward = plans(mgrit(coarsening=4, coarse_operator="rediscretize"), 16, 1)
    assert sum(t.kind == "step" for t in forward.tasks) == 16
    assert sum(t.kind == "step" and not t.final for t in backward.tasks) == 3


@pytest.mark.parametrize(
    ("config", "num_layers", "num_ranks", "micro_batches", "at_most"),
    [  # the design's critical paths, as shares of serial 3N
        (LayerParallelConfig(), 32, 2, 1, 1.0),
        (LayerParallelConfig(), 32, 2, 4, 0.625),
        (mgrit(coarse_operator="rediscretize"), 32, 2, 1, 0.625),
        (mgrit(coarse_operator="rediscretize", forward_iterations=2), 32, 2, 1, 0.896),
        (mgrit(coarse_operator="identity"), 32, 2, 1, 0.500),
        (mgrit(coarse_operator="identity", forward_iterations=2), 32, 2, 1, 0.677),
        (mgrit(coarse_operator="rediscretize", coarsening=8), 64, 8, 1, 0.203),
        (mgrit(coarse_operator="rediscretize", coarsening=8, levels=2), 64, 8, 4, 0.152),
    ],
)
def test_predicted_time_is_the_critical_path(config, num_layers, num_ranks, micro_batches, at_most):
    total = sum(simulate(p).makespan for p in plans(config, num_layers, num_ranks, micro_batches))
    assert total / micro_batches / (3 * num_layers) <= at_most + 5e-4


def test_timeline_accounts_for_every_unit():
    plan = plans(mgrit(coarsening=4, coarse_operator="aggregate"), 16, 2)[1]
    costs = Costs(step=1.0, vjp=1.5, final_vjp=2.0, combine=0.25, latency=2.0)
    timeline = simulate(plan, costs)
    assert sum(timeline.busy) == pytest.approx(sum(costs.of(t, plan) for t in plan.tasks))
    assert 0 <= timeline.idle_share < 1
    assert simulate(plan, costs).makespan > simulate(plan).makespan


def test_ownership():
    assert contiguous_owner(7, 2) == (0, 0, 0, 0, 1, 1, 1)
    assert contiguous_owner(10, 3, boundaries=(0, 4, 8, 10)) == (0,) * 4 + (1,) * 4 + (2,) * 2
    assert contiguous_owner(5, 5) == (0, 1, 2, 3, 4)
    assert contiguous_owner(4, 2, split=(1, 3)) == (0, 1, 1, 1)
    assert interleaved_owner(8, 2, (1, 3, 5, 7), (1, 1)) == (0, 0, 1, 1, 0, 0, 1, 1)
    assert interleaved_owner(7, 3, (0, 3, 6, 7), (0, 0)) == (0, 1, 2, 1, 2, 0, 2)
    with pytest.raises(ConfigurationError, match=r"lp ranks \[2, 3\] of 4 without a layer: 3 layers in intervals of 2"):
        interleaved_owner(3, 4, (0, 2, 3), (0, 0))
    with pytest.raises(ConfigurationError, match="lp_size=7 is more than the 6 layers"):
        contiguous_owner(6, 7)
    with pytest.raises(ConfigurationError, match="split=\\(4, 3\\)"):
        contiguous_owner(6, 2, split=(4, 3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "magic"}, "strategy='magic' is unknown; use one of serial, pipeline, mgrit"),
        ({"levels": 1}, "levels=1 must be an integer of at least 2"),
        ({"coarsening": 1}, "coarsening=1"),
        ({"coarsening": (2, 2)}, "gives 2 factors for levels=2"),
        ({"damping": 1.0}, "damping=1.0"),
        ({"increment_penalty": -1.0}, "increment_penalty=-1.0 must be finite and at least 0"),
        ({"increment_penalty": float("inf")}, "increment_penalty=inf"),
        ({"micro_batches": 0}, "micro_batches=0"),
        ({"strategy": "serial", "micro_batches": 2}, "use strategy='pipeline'"),
        ({"forward_iterations": -1}, "forward_iterations=-1"),
    ],
)
def test_bad_settings_name_value_and_remedy(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        LayerParallelConfig(**settings)


def test_settings_round_trip_and_unknown_keys():
    config = mgrit(levels=3, coarsening=(4, 2))
    assert LayerParallelConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigurationError, match="unknown LayerParallelConfig keys \\['level'\\]"):
        LayerParallelConfig.from_dict({"level": 2})


def test_planning_needs_no_torch():
    code = (
        "import sys; import hf_layerpar.plan.strategies, hf_layerpar.plan.simulate; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 5, 8])
def test_an_interleaved_coarse_step_takes_log_of_the_ranks_messages(num_ranks):
    """Every rank has the result: by recursive doubling, with one more message each way where the ranks are no power of
    two."""
    layers = 3 * num_ranks
    owner = interleaved_owner(layers, num_ranks, (0, num_ranks, 2 * num_ranks, layers), (0, 0))
    config = mgrit(coarsening=num_ranks, coarse_operator="aggregate")
    plan = build_plan(config, "forward", owner, num_ranks=num_ranks)
    spans = simulate(plan, Costs(step=0, graph_step=0, latency=1.0)).spans
    coarse = {i: t for i, t in enumerate(plan.tasks) if t.kind == "combine"}
    doublings = num_ranks.bit_length() - 1
    assert {t.rank for t in coarse.values()} == set(range(2**doublings))
    around = 2 * (2**doublings < num_ranks)
    assert 2 * doublings <= max(spans[i][1] for i in coarse) <= 2 * (doublings + around)
