"""The planner: what it may choose from, that it ranks, and that its splits are the ones `parallelize` makes."""

from __future__ import annotations

import random
import resource
import subprocess
import sys
from itertools import pairwise

import pytest

from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.errors import ConfigurationError
from hf_layerpar.plan import planner
from hf_layerpar.plan.costs import Costs
from hf_layerpar.plan.ownership import balanced_split, contiguous_owner, interleaved_owner, two_blocks_owner
from hf_layerpar.plan.planner import check_size, plan_step, predict_step
from hf_layerpar.plan.simulate import simulate
from hf_layerpar.plan.step import Anatomy, build_step, inner_grid

CLASSES = ("exact", "high", "good", "any")


def test_a_looser_class_is_never_slower():
    best = [plan_step(24, 4, accuracy=a, micro_batches=(1, 2), interleaved=True)[0].time for a in CLASSES]
    assert best == sorted(best, reverse=True)
    assert best[-1] < best[0]


@pytest.mark.parametrize("accuracy", CLASSES)
def test_choices_are_ranked_and_of_their_class(accuracy):
    choices = plan_step(24, 4, accuracy=accuracy, buffers=(2, 2), micro_batches=(1, 4))
    assert [c.time for c in choices] == sorted(c.time for c in choices)
    assert len({(c.config, c.split) for c in choices}) == len(choices)
    mgrit = [c.config for c in choices if c.config.strategy == "mgrit"]
    assert {c.config.micro_batches for c in choices} == {1, 4}
    assert bool(mgrit) == (accuracy != "exact")
    if accuracy != "any":
        assert {config.coarse_operator for config in mgrit} <= {"aggregate"}
    if accuracy == "high":
        assert all(config.forward_iterations != 1 for config in mgrit)


def test_a_prediction_is_the_simulated_step():
    costs = Costs(step=2.0, graph_step=2.5, vjp=3.0, weights=1.5, final_vjp=4.0, latency=0.25, fixed_share=0.1, tail=1)
    for choice in plan_step(20, 3, costs, accuracy="any", buffers=(1, 1), micro_batches=(2,), interleaved=True):
        step = predict_step(choice.config, choice.owner, costs, num_ranks=3, buffers=(1, 1))
        assert choice.time == pytest.approx(step.makespan)
        assert choice.share == pytest.approx(step.share)
        assert step.serial == pytest.approx(20 * 6.5 + 1)
        anatomy = Anatomy.of_stack(choice.owner, (1, 1))
        plan = build_step(choice.config, anatomy, 3, 2, costs=costs.cut(2))
        assert simulate(plan, costs.cut(2)).makespan == pytest.approx(step.makespan)


def test_spread_ends_are_predicted():
    """A dear head on all ranks instead of one."""
    costs = Costs(tail=32.0)
    times = {
        ends: predict_step(
            LayerParallelConfig(micro_batches=4, ends=ends), contiguous_owner(16, 4), costs, num_ranks=4
        ).makespan
        for ends in ("first_last", "spread")
    }
    assert times["spread"] < 0.8 * times["first_last"]


def test_splits_are_what_parallelize_makes():
    choices = plan_step(30, 4, accuracy="good", buffers=(2, 1), micro_batches=(1,), interleaved=True)
    pipelines = {c.split for c in choices if c.config.strategy == "pipeline"}
    assert pipelines == {(8, 8, 7, 7), "interleaved", "v"}
    assert any(c.split == "interleaved" for c in choices if c.config.strategy == "mgrit")
    for choice in choices:
        if not isinstance(choice.split, str):
            assert choice.owner == contiguous_owner(30, 4, split=choice.split)
        elif choice.config.strategy == "pipeline":
            assert choice.owner == two_blocks_owner(30, 4, choice.split)
        else:
            points = [2 + p for p in inner_grid(choice.config, 30, (2, 1)).levels[1]]
            assert choice.owner == interleaved_owner(30, 4, points)


def test_dear_ends_leave_their_ranks_fewer_layers():
    costs = Costs(front=2.0, front_backward=4.0, tail=12.0)
    choices = plan_step(30, 3, costs, accuracy="exact", micro_batches=(2,))
    assert [c.split for c in choices] == [(10, 12, 8)]


def test_slow_messages_turn_the_choice():
    """Where messages are free many micro-batches win; where each is as dear as a block of layers, none is cut."""

    def best(**prices: float) -> int:
        costs = Costs(vjp=1.5, weights=1.5, **prices)  # weight gradients apart would blur it
        choices = plan_step(16, 4, costs, accuracy="exact", micro_batches=(1, 2, 4, 8))
        return choices[0].config.micro_batches

    assert best() == 8
    assert best(latency=20.0) < 8
    assert best(fixed_share=1.0) == 1


def test_refusals():
    with pytest.raises(ConfigurationError, match="accuracy='best' is unknown; use one of exact, high, good, any"):
        plan_step(8, 2, accuracy="best")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="9 ranks can't share 8 layers; use 1 to 8"):
        plan_step(8, 9)


def test_one_rank_stays_serial():
    best = plan_step(8, 1, Costs(overhead=0.01), accuracy="any")[0]
    assert best.config == LayerParallelConfig(strategy="pipeline")
    # all layers are one task each way, with an end before and behind
    assert best.time == pytest.approx(24 + 5 * 0.01)


def test_owners_are_those_of_a_plain_search():
    """The same cuts and blocks as by looking at all of them, ties included."""
    rng = random.Random(3)
    for _ in range(300):
        layers, ranks = rng.randint(1, 40), rng.randint(1, 8)
        ranks = min(ranks, layers)
        counts, extra = [1] * ranks, [rng.choice([0.0, 1.5, 3.0]) for _ in "ab"]
        ends = [extra[0] * (r == 0) + extra[1] * (r == ranks - 1) for r in range(ranks)]
        for _ in range(layers - ranks):
            counts[min(range(ranks), key=lambda r: (counts[r] * 1.5 + ends[r], r))] += 1
        assert balanced_split(layers, ranks, 1.5, *extra) == tuple(counts)
        points = sorted(rng.sample(range(layers + 1), rng.randint(0, layers + 1)))
        places = sorted(set(points) - {0, layers})
        places = places if len(places) >= ranks - 1 else list(range(1, layers))
        cuts = [0]
        for rank in range(1, ranks):
            after = [p for p in places if p > cuts[-1]]
            after = after[: len(after) - (ranks - 1 - rank)]
            cuts.append(min(after, key=lambda p: (abs(p - rank * layers / ranks), -p)))
        owner = [rank for rank, (a, b) in enumerate(pairwise([*cuts, layers])) for _ in range(b - a)]
        assert contiguous_owner(layers, ranks, boundaries=points) == tuple(owner)


@pytest.mark.parametrize(("layers", "ranks", "pieces"), [(40, 8, (1, 2)), (60, 2, (1,))])
def test_a_search_that_is_too_long_ranks_by_smaller_stacks(layers, ranks, pieces, monkeypatch):
    whole = plan_step(layers, ranks, accuracy="good", buffers=(1, 1), micro_batches=pieces)
    monkeypatch.setattr(planner, "MOST_SEARCH", 0.01)
    monkeypatch.setattr(planner, "_SAMPLED", 10)
    notes: list[str] = []
    monkeypatch.setattr(planner, "_PREDICTED", 0.06)
    few = plan_step(layers, ranks, accuracy="good", buffers=(1, 1), micro_batches=pieces, note=notes.append)
    assert len(notes) == 1
    assert f"predicted in full, for {layers} layers on {ranks}" in notes[0]
    assert 0 < len(few) < len(whole)
    assert few[0] in whole[:3]
    assert few[0].time <= 1.05 * whole[0].time
    monkeypatch.setattr(planner, "_SAMPLED", 0.01)
    with pytest.raises(ConfigurationError, match="is too long; try fewer micro-batches"):
        plan_step(layers, ranks, accuracy="good", micro_batches=(1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--strategy", "mgrit"], ["--choose", "high"]], ids=str)
def test_ten_thousand_layers_on_1024_ranks_in_30_seconds(more):
    command = [sys.executable, "-m", "hf_layerpar.cli", "plan", "--layers", "10000", "--ranks", "1024", *more]
    began = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    assert sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - began < 30


def test_shapes_that_do_not_fit_and_plans_that_take_minutes_are_refused():
    with pytest.raises(ConfigurationError, match=r"buffers=\(4, 4\) leave 0 of 8 layers between them"):
        plan_step(8, 2, buffers=(4, 4))
    check_size(LayerParallelConfig(micro_batches=32), 10_000, 1024)
    check_size(LayerParallelConfig(strategy="mgrit"), 10_000, 1024)
    with pytest.raises(ConfigurationError, match="take about 60 s to plan, and the limit is 30 s; use less of one"):
        check_size(LayerParallelConfig(strategy="mgrit"), 100_000, 8)
