"""The planner: what it may choose from, that it ranks, and that its splits are the ones `parallelize` makes."""

from __future__ import annotations

import pytest

from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.errors import ConfigurationError
from hf_layerpar.plan.costs import Costs
from hf_layerpar.plan.ownership import contiguous_owner, interleaved_owner, two_blocks_owner
from hf_layerpar.plan.planner import gpipe, one_forward_one_backward, plan_step, predict_step
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
            assert choice.owner == interleaved_owner(30, 4, points, (2, 1))


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


def test_textbook_pipelines():
    assert gpipe(32, 4, 1).time == 96.0
    assert gpipe(32, 4, 4).time == pytest.approx(7 / 4 * 24)
    assert one_forward_one_backward(32, 4, 16).time == gpipe(32, 4, 16).time
    assert gpipe(32, 4, 16).graphs == 8.0
    assert one_forward_one_backward(32, 4, 16).graphs == 2.0
    assert one_forward_one_backward(32, 4, 2).graphs == 8.0
