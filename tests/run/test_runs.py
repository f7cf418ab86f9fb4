"""Runs of final steps that a rank evaluates as one: where they are, and that they leave every task in its place."""

import pytest

from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.plan.strategies import build_plan
from hf_layerpar.run.executor import RankPart
from hf_layerpar.run.runs import joints


def plan_of(direction, num_ranks=1, micro_batches=1, layers=12, **settings):
    owner = [n * num_ranks // layers for n in range(layers)]
    config = LayerParallelConfig(micro_batches=micro_batches, **settings)
    return build_plan(config, direction, owner, num_ranks=num_ranks, micro_batches=micro_batches)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_an_exact_chain_is_one_run(direction):
    plan = plan_of(direction)
    part = RankPart.of(plan, 0, joints(plan, 0))
    order = range(12) if direction == "forward" else range(11, -1, -1)
    assert part.layers == (tuple(order),)
    assert part.tasks[0].inputs == plan.starts
    assert part.tasks[0].output == plan.ends[0]


def test_a_run_ends_at_the_rank_and_at_the_micro_batch():
    plan = plan_of("forward", num_ranks=3, micro_batches=2)
    for rank in range(3):
        part = RankPart.of(plan, rank, joints(plan, rank))
        block = tuple(range(4 * rank, 4 * rank + 4))
        assert [(t.micro_batch, layers) for t, layers in zip(part.tasks, part.layers, strict=True)] == [
            (0, block),
            (1, block),
        ]


def test_layers_whose_vjp_is_needed_alone_stand_alone():
    """The coarse adjoint of `rediscretize` takes the last layer of an interval by itself, that of `aggregate` all."""
    settings = {"strategy": "mgrit", "coarsening": 4}
    coarse = {
        operator: {t.layer for t in plan.tasks if t.kind == "step" and not t.final}
        for operator in ("rediscretize", "aggregate")
        for plan in [plan_of("backward", coarse_operator=operator, backward_iterations=2, **settings)]
    }
    for operator, alone in coarse.items():
        plan = plan_of("backward", coarse_operator=operator, backward_iterations=2, **settings)
        found = {layer for layer, _ in joints(plan, 0)}
        assert alone
        assert not found & (alone | {layer - 1 for layer in alone})
    identity = plan_of("backward", coarse_operator="identity", **settings)
    assert {layer for layer, _ in joints(identity, 0)} == {0, 1, 2, 4, 5, 6, 8, 9, 10}


def test_joining_keeps_inputs_outputs_and_messages():
    settings = {"strategy": "mgrit", "coarsening": 4, "coarse_operator": "identity", "forward_iterations": 2}
    plan = plan_of("forward", num_ranks=2, **settings)
    for rank in range(2):
        whole = RankPart.of(plan, rank)
        joined = RankPart.of(plan, rank, joints(plan, rank))
        assert len(joined.tasks) < len(whole.tasks)
        assert sum(joined.layers, ()) == sum(whole.layers, ())
        assert joined.receives == whole.receives
        assert set(joined.sends) <= {t.output for t in joined.tasks}
        made = {*plan.starts, *(value for value, _ in joined.receives)}
        for task in joined.tasks:
            assert set(task.inputs) <= made
            made.add(task.output)
