"""Runs: final steps that follow each other on a rank are one task, wherever nothing else looks inside."""

from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter

import pytest
import torch

from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.plan.costs import Costs
from hf_layerpar.plan.simulate import simulate
from hf_layerpar.plan.step import Anatomy, Pass, build_step, fused
from hf_layerpar.plan.tasks import Plan
from tests.plan.interpreter import DIM, F64, Run, Toy
from tests.plan.shapes import random_anatomy, random_config, random_costs


def layer_by_layer(
    config: LayerParallelConfig, anatomy: Anatomy, num_ranks: int, micro_batches: int, costs: Costs | None = None
) -> Plan:
    """The plan before runs are made, which a penalty on the increments has no use for."""
    config = dataclasses.replace(config, increment_penalty=0.1, stacked=False)
    return build_step(config, anatomy, num_ranks, micro_batches, costs=costs)


def evaluated(plan: Plan) -> Counter[tuple]:
    """How often each layer is stepped and pulled back, finally and before."""
    steps = [t for t in plan.tasks if t.kind == "step"]
    return Counter((t.direction, t.place, t.micro_batch, n, t.final, t.rank) for t in steps for n in t.layers)


def long_runs(plan: Plan) -> list[tuple]:
    steps = [t for t in plan.tasks if t.kind == "step" and len(t.layers) > 1]
    return [(t.direction, t.place, t.micro_batch, tuple(sorted(t.layers))) for t in steps]


def test_runs_of_any_step():
    """The same work in fewer tasks and the same time, every run there and back; a layer whose vjp is needed before the
    last one, or whose weight gradients are apart, is in none."""
    rng = random.Random(0)
    joined = 0
    for _ in range(150):
        num_ranks = rng.randint(1, 4)
        config, anatomy, costs = random_config(rng, num_ranks), random_anatomy(rng, num_ranks), random_costs(rng)
        # a task less is an overhead less, and messages of a run leave in another order
        costs = dataclasses.replace(costs, overhead=0.0, bandwidth=math.inf, send=0.0)
        single = layer_by_layer(config, anatomy, num_ranks, 2, costs)
        plan = fused(single)
        plan.validate()
        assert evaluated(plan) == evaluated(single)
        assert simulate(plan, costs).makespan == pytest.approx(simulate(single, costs).makespan)
        assert len(plan.tasks) <= len(single.tasks)
        joined += len(single.tasks) - len(plan.tasks)
        runs = long_runs(plan)
        forward, backward = ([r[1:] for r in runs if r[0] == way] for way in ("forward", "backward"))
        assert sorted(forward) == sorted(backward)
        alone = {
            (t.place, t.micro_batch, n)
            for t in plan.tasks
            if t.kind == "step" and t.direction == "backward" and not t.final
            for n in t.layers
        }
        assert not alone & {(place, m, n) for place, m, layers in forward for n in layers}
        again = fused(plan)
        assert again.tasks == plan.tasks
        if not config.stacked:
            assert [str(t) for t in build_step(config, anatomy, num_ranks, 2, costs=costs).tasks] == [
                str(t) for t in plan.tasks
            ]
    assert joined > 100


def test_weights_apart_keep_their_layers_alone():
    """In MGRIT plans layers are split one by one: the smaller, the better they fill gaps."""
    config = LayerParallelConfig(strategy="mgrit", coarsening=3, coarse_operator="rediscretize", forward_iterations=0)
    plan = fused(layer_by_layer(config, Anatomy.of_stack((0,) * 6 + (1,) * 6), 2, 1, Costs()))
    split = {n for t in plan.tasks if t.kind == "weights" for n in t.layers}
    inside = {n for _, _, _, layers in long_runs(plan) for n in layers}
    assert split
    assert not split & inside


def test_a_run_is_cut_where_another_rank_or_interval_goes_on():
    """`identity` evaluates nothing before the last relaxation: on one rank every interval is a run each way."""
    config = LayerParallelConfig(strategy="mgrit", coarsening=4, coarse_operator="identity")
    one = build_step(config, Anatomy.of_stack((0,) * 12), 1)
    intervals = [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11)]
    assert sorted(long_runs(one)) == [(way, 0, 0, n) for way in ("backward", "forward") for n in intervals]
    two = build_step(config, Anatomy.of_stack((0,) * 6 + (1,) * 6), 2)
    pieces = [{0, 1, 2, 3}, {4, 5}, {6, 7}, {8, 9, 10, 11}]
    assert all(any(set(layers) <= piece for piece in pieces) for *_, layers in long_runs(two))


def test_the_gradients_of_sides_wait_for_the_run():
    anatomy = Anatomy((Pass((0,) * 8, sides=True),), (0, 0), ((), (0,)))
    config = LayerParallelConfig(strategy="mgrit", coarsening=4, coarse_operator="identity")
    plan = build_step(config, anatomy, 1, 1)
    intervals = [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert sorted(long_runs(plan)) == [(way, 0, 0, n) for way in ("backward", "forward") for n in intervals]
    (collect,) = (t for t in plan.tasks if t.kind == "collect")
    assert len(collect.inputs) == 2
    assert collect.layers == tuple(range(8))[::-1]


def test_runs_change_no_bit():
    rng = random.Random(1)
    for _ in range(10):
        num_ranks = rng.randint(1, 3)
        anatomy = dataclasses.replace(random_anatomy(rng, num_ranks), tail_pieces=1)
        config = random_config(rng, num_ranks)
        single = layer_by_layer(config, anatomy, num_ranks, 2)
        model, batch = Toy(anatomy), torch.randn(5, 3, DIM, dtype=F64, generator=torch.Generator().manual_seed(0))
        found = [Run(plan, model, batch).gradients for plan in (single, fused(single))]
        assert set(found[0]) == set(found[1])
        assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
