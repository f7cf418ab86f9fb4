"""A plan as one rank sees it: which final steps it evaluates as one, what it sends, receives and keeps."""

from collections import Counter
from itertools import chain
from unittest.mock import patch

import pytest

from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.plan import step
from hf_layerpar.plan.ownership import interleaved_owner
from hf_layerpar.plan.part import LOOK_AHEAD, Post, RankPart
from hf_layerpar.plan.step import Anatomy, build_step
from hf_layerpar.plan.tasks import Reduction
from tests.problems import assert_same, blocks, gradients_of, state

LAYERS = 12


def plan_of(num_ranks=1, micro_batches=1, owner=None, **settings):
    owner = owner or [n * num_ranks // LAYERS for n in range(LAYERS)]
    config = LayerParallelConfig(micro_batches=micro_batches, **settings)
    return build_step(config, Anatomy.of_stack(owner), num_ranks, micro_batches)


def final_runs(plan, direction, rank=0):
    """(micro-batch, layers) of the final steps, in order."""
    tasks = (task for (task,) in RankPart.of(plan, rank).groups)
    return [(t.micro_batch, t.layers) for t in tasks if t.kind == "step" and t.final and t.direction == direction]


# ---- final steps in one
def test_an_exact_chain_is_one_run_there_and_one_back():
    plan = plan_of()
    assert final_runs(plan, "forward") == [(0, tuple(range(LAYERS)))]
    assert final_runs(plan, "backward") == [(0, tuple(range(LAYERS))[::-1])]
    assert [task.kind for (task,) in RankPart.of(plan, 0).groups] == ["phase", "step", "phase", "step", "phase"]


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_a_run_ends_at_the_rank_and_at_the_micro_batch(schedule):
    plan = plan_of(3, 2, schedule=schedule)
    for rank in range(3):
        block = tuple(range(4 * rank, 4 * rank + 4))
        assert final_runs(plan, "forward", rank) == [(0, block), (1, block)]
        assert final_runs(plan, "backward", rank) == [(0, block[::-1]), (1, block[::-1])]


def test_layers_whose_vjp_is_needed_alone_stand_alone():
    """The coarse adjoint of `rediscretize` takes the last layer of an interval by itself, that of `aggregate` all."""
    settings = {"strategy": "mgrit", "coarsening": 4}
    for operator in ("rediscretize", "aggregate"):
        plan = plan_of(coarse_operator=operator, backward_iterations=2, **settings)
        alone = {n for t in plan.tasks if t.direction == "backward" and not t.final for n in t.layers}
        assert alone
        assert all((n,) in [layers for _, layers in final_runs(plan, "backward")] for n in alone)
    plan = plan_of(coarse_operator="identity", **settings)
    assert sorted(final_runs(plan, "forward")) == [(0, (0, 1, 2, 3)), (0, (4, 5, 6, 7)), (0, (8, 9, 10, 11))]


@pytest.mark.parametrize(
    "settings",
    [
        {"micro_batches": 2},
        {"strategy": "mgrit", "coarse_operator": "identity", "forward_iterations": 2, "backward_iterations": 2},
        {"strategy": "mgrit", "coarse_operator": "rediscretize", "forward_iterations": 2, "relaxation": "FCF"},
        {"strategy": "mgrit", "coarse_operator": "aggregate", "micro_batches": 2},
    ],
)
def test_runs_change_no_bit(settings):
    """Nor who sends what to whom."""
    layers, x = blocks(LAYERS, dropout=0.1).train(), state()
    found, messages = [], []
    for joined in (True, False):
        step._built.cache_clear()
        with patch.object(step, "fused", step.fused if joined else lambda plan: plan):
            solved = gradients_of(LayerParallelConfig(**settings), layers, x, seed=1)
            messages.append(Counter((m.source, m.target) for m in plan_of(2, **settings).messages))
        found.append(solved)
    step._built.cache_clear()
    lengths = [max(len(t.layers) for t in solved.plan.tasks if t.kind == "step") for solved in found]
    if settings.get("strategy") != "mgrit":  # an exact block is one task from the beginning
        assert lengths == [LAYERS, LAYERS]
    else:
        assert lengths[0] > lengths[1] == 1
    assert messages[0] == messages[1]
    assert_same(found[0].results, found[1].results)


# ---- messages
PLANS = {
    "pipeline": {"num_ranks": 3, "micro_batches": 4},
    "two blocks": {"num_ranks": 2, "micro_batches": 3, "owner": [n // 3 % 2 for n in range(LAYERS)]},
    "mgrit": {"num_ranks": 3, "micro_batches": 2, "strategy": "mgrit", "coarsening": 2, "forward_iterations": 3},
    "interleaved": {"num_ranks": 3, "strategy": "mgrit", "coarsening": 3}
    | {"owner": interleaved_owner(LAYERS, 3, range(0, LAYERS + 1, 3))},
}


@pytest.mark.parametrize("name", PLANS)
def test_posts_have_one_order_on_all_ranks(name):
    plan = plan_of(**PLANS[name])
    parts = [RankPart.of(plan, rank) for rank in range(plan.num_ranks)]
    for part in parts:
        expected = []
        for entry in plan.traffic:
            if isinstance(entry, Reduction):
                expected.append(Post("reduce", entry.value))
            elif entry.source == part.rank:
                expected.append(Post("send", entry.value, entry.target))
            elif entry.target == part.rank:
                expected.append(Post("receive", entry.value, entry.source))
        assert list(chain(*part.posts)) == expected
    assert bool(plan.reductions) == (name == "interleaved")
    assert len(plan.messages) > 0


@pytest.mark.parametrize("name", PLANS)
def test_sends_are_posted_at_once_and_receives_before_their_use(name):
    plan = plan_of(**PLANS[name])
    for rank in range(plan.num_ranks):
        part = RankPart.of(plan, rank)
        made = {v: i for i, group in enumerate(part.groups) for task in group for v in task.outputs}
        used = {v: i for i, group in reversed(list(enumerate(part.groups))) for task in group for v in task.inputs}
        entered = {
            (task.place, task.micro_batch): i
            for i, (task, *_) in enumerate(part.groups)
            if task.kind == "phase" and task.direction == "forward"
        }
        bound = len(part.groups)  # by what stands behind it in the queue
        for place, posts in reversed(list(enumerate(part.posts))):
            for post in reversed(posts):
                if post.kind == "send":
                    assert place == made[post.value] + 1
                elif post.kind == "receive":
                    like, use = plan.values[post.value], used[post.value]
                    assert place <= use
                    assert place >= use - LOOK_AHEAD or bound == place
                    known = entered.get((like.place, like.micro_batch), -1)
                    assert place > known or known >= use
                else:
                    assert place <= used.get(post.value, len(part.groups))
                    own = [made[v] for r in plan.reductions if r.value == post.value for v in r.terms if v in made]
                    assert all(place > i for i in own)
                bound = place


@pytest.mark.parametrize("name", PLANS)
def test_values_are_kept_until_their_last_use(name):
    plan = plan_of(**PLANS[name])
    for rank in range(plan.num_ranks):
        part, dead = RankPart.of(plan, rank), set()
        for i, group in enumerate(part.groups):
            mine = {v for task in group for v in (*task.inputs, *task.outputs)}
            assert not dead & mine
            dead |= set(part.dead_after[i])
        assert dead == {v for group in part.groups for task in group for v in (*task.inputs, *task.outputs)}


def test_all_ranks_take_part_in_a_sum_that_some_have_no_term_of():
    """An interval of two layers on three ranks, in a call's backward: the third rank has nothing to add."""
    plan = plan_of(num_ranks=3, strategy="mgrit", coarsening=3, owner=interleaved_owner(8, 3, (0, 3, 6, 8)))
    assert any(len(reduction.terms) == 2 for reduction in plan.reductions)
    tasks = [t for t in plan.tasks if t.direction == "backward" and t.kind != "phase"]
    parts = [RankPart.of(plan, rank, tasks) for rank in range(3)]
    sums = [[post for posts in part.posts for post in posts if post.kind == "reduce"] for part in parts]
    assert sums[0] == sums[1] == sums[2]
    assert sums[0]


def test_some_of_the_tasks_and_values_to_have_in_the_end():
    """As a call of the model works them: one pass at a time."""
    plan = plan_of(2)
    forward = [t for t in plan.tasks if t.direction == "forward" and t.kind == "step"]
    end = forward[-1].output
    mine = [t for t in forward if t.rank == 0]
    part = RankPart.of(plan, 0, mine, (end,))
    assert [task for (task,) in part.groups] == mine
    assert part.fetch == (end,)
    # nobody who works the whole plan sends it there
    assert not any(post.kind == "receive" for post in chain(*part.posts))
    assert all(not keys for keys in part.leaves_after)  # the layers stay, for the backward
