"""The orders in which a controller moves through settings."""

from __future__ import annotations

import dataclasses

import pytest

from hf_layerpar.config import LayerParallelConfig, describe
from hf_layerpar.errors import ConfigurationError
from hf_layerpar.plan.ladder import (
    StackShape,
    cheapest_first,
    escalation,
    exact_settings,
    first_offer,
    predicted_share,
)
from hf_layerpar.plan.operators import OPERATORS, Rediscretize
from hf_layerpar.plan.ownership import contiguous_owner, interleaved_owner
from hf_layerpar.plan.planner import predict_step
from hf_layerpar.plan.step import interval_points

GPT = (StackShape(20, (2, 2)),)
DEEP = StackShape(36, (2, 2))
START = LayerParallelConfig(strategy="mgrit", coarsening=(4, 2), coarse_operator="rediscretize")


def test_escalation_changes_one_thing_a_step():
    steps = escalation(START)
    assert [describe(s) for s in steps] == [
        "mgrit rediscretize 1/1 c=4,2",
        "mgrit rediscretize 2/2 c=4,2",
        "mgrit rediscretize 2/2 c=4,2 krylov",
        "mgrit rediscretize 2/2 c=4 krylov",
        "mgrit rediscretize 2/2 c=2 krylov",
        "mgrit aggregate 2/2 c=2 krylov",
        "pipeline",
    ]
    assert [s.levels for s in steps[1:4]] == [3, 3, 2]


def test_steps_of_size_1_begin_with_an_exact_forward():
    assert [describe(s) for s in escalation(START, GPT)][:4] == [
        "mgrit rediscretize 1/1 c=4,2",
        "mgrit rediscretize exact/1 c=4,2",
        "mgrit rediscretize exact/2 c=4,2",
        "mgrit rediscretize exact/2 c=4,2 krylov",
    ]
    small = [dataclasses.replace(GPT[0], step_size=1 / 16)]
    assert escalation(START, small) == escalation(START)
    deep = (StackShape(68, (2, 2)),)
    ladder = cheapest_first(LayerParallelConfig(micro_batches=2), deep, 8)
    start = first_offer(ladder, deep)
    assert ladder[start].forward_iterations == 0
    assert all(settings.forward_iterations for settings in ladder[:start])
    assert first_offer(ladder, small) == 0
    assert [describe(s) for s in ladder if s.acceleration == "krylov"] == ["mgrit rediscretize exact/2 c=4 krylov"]


def test_escalation_leaves_out_what_changes_nothing():
    rich = LayerParallelConfig(strategy="mgrit", coarsening=2, coarse_operator="aggregate", forward_iterations=0)
    assert [describe(s) for s in escalation(rich)] == [
        "mgrit aggregate exact/1 c=2",
        "mgrit aggregate exact/2 c=2",
        "mgrit aggregate exact/2 c=2 krylov",
        "pipeline",
    ]


def test_the_exact_step_keeps_all_else():
    config = dataclasses.replace(START, micro_batches=3, schedule="1f1b", ends="spread", increment_penalty=0.5)
    exact = exact_settings(config)
    assert exact == escalation(config)[-1] == exact_settings(exact)
    assert exact == LayerParallelConfig(micro_batches=3, schedule="1f1b", ends="spread", increment_penalty=0.5)
    assert not exact_settings(dataclasses.replace(START, stacked=True)).stacked


def test_cheapest_first_is_sorted_by_predicted_time_and_ends_exact():
    config = LayerParallelConfig(micro_batches=2)
    ladder = cheapest_first(config, GPT, 4)
    shares = [predicted_share(settings, GPT, 4) for settings in ladder]
    assert shares == sorted(shares)
    assert ladder[-1] == exact_settings(config)
    assert all(settings.strategy == "mgrit" for settings in ladder[:-1])
    assert all(settings.micro_batches == 2 for settings in ladder)
    assert len(set(ladder)) == len(ladder)


def dealt(config: LayerParallelConfig, stack: StackShape = DEEP) -> StackShape:
    """With the intervals of `config` dealt out."""
    return dataclasses.replace(stack, dealt=tuple(interval_points(config, stack.num_layers, stack.buffers)))


@pytest.mark.parametrize("coarsening", [4, 8])
@pytest.mark.parametrize("pieces", [1, 2])
def test_intervals_that_are_dealt_out_make_aggregate_fast(coarsening, pieces):
    config = LayerParallelConfig(strategy="mgrit", coarsening=coarsening, micro_batches=pieces)
    stack = dealt(config)
    ladder = cheapest_first(config, [stack], 8)
    shares = {describe(settings): predicted_share(settings, [stack], 8) for settings in ladder}
    exact = predicted_share(exact_settings(config), [DEEP], 8)
    assert max(share for name, share in shares.items() if name != "pipeline") < exact
    assert list(shares.values()) == sorted(shares.values())
    assert shares[f"mgrit aggregate 1/1 c={coarsening}"] < exact * 0.75
    on_blocks = predicted_share(dataclasses.replace(config, forward_iterations=0), [DEEP], 8)
    assert shares[f"mgrit aggregate exact/1 c={coarsening}"] < min(exact, on_blocks)
    first = ladder[first_offer(ladder, [stack])]
    assert not first.forward_iterations
    assert first.strategy == "mgrit"
    if coarsening == 4:
        assert not any("aggregate" in describe(settings) for settings in cheapest_first(config, [DEEP], 8))


def test_exact_steps_run_where_the_layers_are():
    config = LayerParallelConfig(strategy="mgrit")
    stack, exact = dealt(config), exact_settings(config)
    owner = interleaved_owner(36, 8, range(2, 35, 4))
    assert stack.owner(config, 8) == stack.owner(exact, 8) == owner
    assert stack.owner(dataclasses.replace(config, coarsening=2), 8) == owner
    assert DEEP.owner(exact, 8) == contiguous_owner(36, 8)
    step = predict_step(exact, owner, num_ranks=8, buffers=(2, 2))
    assert predicted_share(exact, [stack], 8) == step.share != predicted_share(exact, [DEEP], 8)


def test_ranks_that_would_have_nothing():
    config = LayerParallelConfig(strategy="mgrit")
    message = r"split='interleaved' leaves lp ranks \[7\] of 8 without a layer: 16 layers in intervals of 4; use"
    with pytest.raises(ConfigurationError, match=message):
        cheapest_first(config, [dealt(config, StackShape(16, (0, 0)))], 8)


def test_an_operator_of_your_own_is_a_rung(monkeypatch):
    monkeypatch.setitem(OPERATORS, "own", Rediscretize())
    assert any(settings.coarse_operator == "own" for settings in cheapest_first(LayerParallelConfig(), GPT, 4))


def test_two_stacks_are_predicted_one_after_the_other():
    config = LayerParallelConfig(strategy="mgrit")
    one, two = (StackShape(16, (0, 0)),), (StackShape(16, (0, 0)), StackShape(32, (0, 0)))
    together = 16 * predicted_share(config, one, 2) + 32 * predicted_share(config, two[1:], 2)
    assert predicted_share(config, two, 2) == pytest.approx(together / 48)


def test_nothing_to_choose_from():
    message = r"no MGRIT setting with coarsening=4 is predicted to beat the exact pipeline on 1 ranks; .*controller_r"
    with pytest.raises(ConfigurationError, match=message):
        cheapest_first(LayerParallelConfig(), GPT, 1)


def test_names():
    config = LayerParallelConfig(strategy="mgrit", relaxation="FCF", backward_iterations=0)
    assert describe(config) == "mgrit aggregate 1/exact c=4 FCF"
    assert describe(exact_settings(config)) == "pipeline"
