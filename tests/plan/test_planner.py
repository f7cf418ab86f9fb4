"""The planner: what it may choose from, that it ranks, and that its splits are the ones `parallelize` makes."""

import pytest

from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.errors import ConfigurationError
from hf_layerpar.plan.ownership import contiguous_owner, interleaved_owner
from hf_layerpar.plan.planner import gpipe, one_forward_one_backward, plan_step, predict_step
from hf_layerpar.plan.simulate import Costs
from hf_layerpar.plan.strategies import inner_grid

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
    costs = Costs(step=2.0, graph_step=2.5, vjp=3.0, weights=1.5, final_vjp=4.0, latency=0.25, fixed_share=0.1)
    for choice in plan_step(20, 3, costs, accuracy="any", buffers=(1, 1), micro_batches=(2,), interleaved=True):
        step = predict_step(choice.config, choice.owner, costs, num_ranks=3, buffers=(1, 1))
        assert choice.time == pytest.approx(step.makespan)
        assert choice.share == pytest.approx(step.share)
        assert step.serial == pytest.approx(20 * 6.5)


def test_splits_are_what_parallelize_makes():
    choices = plan_step(30, 4, accuracy="good", buffers=(2, 1), micro_batches=(1,), interleaved=True)
    assert any(c.split == "interleaved" for c in choices)
    for choice in choices:
        if choice.split == "interleaved":
            points = [2 + p for p in inner_grid(choice.config, 30, (2, 1)).levels[1]]
            assert choice.owner == interleaved_owner(30, 4, points, (2, 1))
        else:
            assert choice.owner == contiguous_owner(30, 4, split=choice.split)
    assert {c.split for c in choices if c.config.strategy == "pipeline"} == {(8, 7, 7, 8)}


def test_slow_messages_turn_the_choice():
    """Where messages are free many micro-batches win; where each is as dear as a block of layers, none is cut."""
    free = plan_step(16, 4, accuracy="exact", micro_batches=(1, 2, 4, 8))
    dear = plan_step(16, 4, Costs(latency=20.0), accuracy="exact", micro_batches=(1, 2, 4, 8))
    assert free[0].config.micro_batches == 8
    assert dear[0].config.micro_batches < 8
    fixed = plan_step(16, 4, Costs(fixed_share=1.0), accuracy="exact", micro_batches=(1, 2, 4, 8))
    assert fixed[0].config.micro_batches == 1


def test_refusals():
    with pytest.raises(ConfigurationError, match="accuracy='best' is unknown; use one of exact, high, good, any"):
        plan_step(8, 2, accuracy="best")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="9 ranks can't share 8 layers; use 1 to 8"):
        plan_step(8, 9)


def test_one_rank_stays_serial():
    best = plan_step(8, 1, Costs(overhead=0.01), accuracy="any")[0]
    assert best.config == LayerParallelConfig(strategy="pipeline")
    assert best.share == pytest.approx(1.0)


def test_textbook_pipelines():
    assert gpipe(32, 4, 1).time == 96.0
    assert gpipe(32, 4, 4).time == pytest.approx(7 / 4 * 24)
    assert one_forward_one_backward(32, 4, 16).time == gpipe(32, 4, 16).time
    assert gpipe(32, 4, 16).graphs == 8.0
    assert one_forward_one_backward(32, 4, 16).graphs == 2.0
    assert one_forward_one_backward(32, 4, 2).graphs == 8.0
