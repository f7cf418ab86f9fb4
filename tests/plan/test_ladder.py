"""The orders in which a controller moves through settings."""

import dataclasses

import pytest

from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.errors import ConfigurationError
from hf_layerpar.plan.ladder import (
    StackShape,
    cheapest_first,
    describe,
    escalation,
    exact_settings,
    predicted_share,
)

GPT = (StackShape(20, (2, 2)),)
START = LayerParallelConfig(strategy="mgrit", levels=3, coarsening=(4, 2), coarse_operator="rediscretize")


def test_escalation_changes_one_thing_a_step():
    steps = escalation(START)
    assert [describe(s) for s in steps] == [
        "mgrit rediscretize 1/1 c=4,2",
        "mgrit rediscretize 2/2 c=4,2",
        "mgrit rediscretize 2/2 c=4",
        "mgrit rediscretize 2/2 c=2",
        "mgrit aggregate 2/2 c=2",
        "pipeline",
    ]


def test_escalation_leaves_out_what_changes_nothing():
    rich = LayerParallelConfig(strategy="mgrit", coarsening=2, coarse_operator="aggregate", forward_iterations=0)
    assert [describe(s) for s in escalation(rich)] == [
        "mgrit aggregate exact/1 c=2",
        "mgrit aggregate exact/2 c=2",
        "pipeline",
    ]


def test_cheapest_first_is_sorted_by_predicted_time_and_ends_exact():
    config = LayerParallelConfig(micro_batches=2)
    ladder = cheapest_first(config, GPT, 4)
    shares = [predicted_share(settings, GPT, 4) for settings in ladder]
    assert shares == sorted(shares)
    assert ladder[-1] == exact_settings(config)
    assert all(settings.strategy == "mgrit" for settings in ladder[:-1])
    assert all(settings.micro_batches == 2 for settings in ladder)
    assert len(set(ladder)) == len(ladder)


def test_two_stacks_are_predicted_one_after_the_other():
    config = LayerParallelConfig(strategy="mgrit")
    one, two = (StackShape(16, (0, 0)),), (StackShape(16, (0, 0)), StackShape(32, (0, 0)))
    together = 16 * predicted_share(config, one, 2) + 32 * predicted_share(config, two[1:], 2)
    assert predicted_share(config, two, 2) == pytest.approx(together / 48)


def test_nothing_to_choose_from():
    with pytest.raises(
        ConfigurationError, match=r"no MGRIT setting with coarsening=4 .* on 1 ranks; .*controller_ranks"
    ):
        cheapest_first(LayerParallelConfig(), GPT, 1)


def test_names():
    config = LayerParallelConfig(strategy="mgrit", relaxation="FCF", damping=0.25, backward_iterations=0)
    assert describe(config) == "mgrit aggregate 1/exact c=4 FCF damping 0.25"
    assert describe(dataclasses.replace(config, strategy="serial")) == "serial"
