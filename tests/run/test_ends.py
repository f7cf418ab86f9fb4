"""Rows on their way between a rank's slice and the batch, forward and backward, without a model."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from hf_layerpar.errors import RankMismatchError, UnsupportedModelError
from hf_layerpar.run.communicator import GroupCommunicator
from hf_layerpar.run.ends import CannotSlice, Slices, summed_gradients
from tests.multiproc import run_ranks


@dataclass
class Call:
    layer: nn.Module = field(default_factory=nn.Module)
    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def step(self, x, args, kwargs):
        return x


def solve(calls, x):
    """Reads every kind of argument."""
    for call in calls:
        (mask, table), states = call.args, call.kwargs["states"]
        x = x * mask[:, None] + states.sum(1) @ table
    return x


def rows_of(batch):
    """Errors of a solve on slices: the result, and the gradients of states, table and input."""
    communicator = GroupCommunicator(dist.group.WORLD)
    generator = torch.Generator().manual_seed(0)
    x, states, table, upstream = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((batch, 4), (batch, 3, 6), (6, 4), (batch, 4))
    )
    mask = torch.arange(batch) % 2 == 0

    def calls(states, mask, table):
        return [Call(args=(mask, table), kwargs={"states": states}) for _ in range(2)]

    expected = solve(calls(states, mask, table), x)
    expected_grads = torch.autograd.grad(expected, [x, states, table], upstream)

    slices = Slices(communicator, batch, seed=5)
    own, draws = slices.own, []

    def drawing(calls, x):
        draws.append(int(torch.randint(2**31, ())))
        return solve(calls, x)

    before = torch.get_rng_state()
    with slices.random_stream(x.device):
        draws.append(int(torch.randint(2**31, ())))
        y = slices.solve(drawing, calls(states[own], mask[own], table), x[own])
    errors = [float((y - expected[own]).norm())]
    for found, wanted in zip(torch.autograd.grad(y, [x, states, table], upstream[own]), expected_grads, strict=True):
        communicator.all_reduce(found)  # gradients are shares
        errors.append(float((found - wanted).norm() / wanted.norm()))
    return errors, draws, torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("world", "batch"), [(2, 5), (3, 4), (3, 11)])
def test_a_solve_on_slices(world, batch):
    results = run_ranks(rows_of, world, batch)
    for errors, _, stream_kept in results:
        assert max(errors) < 1e-12
        assert stream_kept
    own, common = zip(*(draws for _, draws, _ in results), strict=True)
    assert len(set(own)) == world
    assert len(set(common)) == 1


def unlike():
    """What happens with arguments that can't be put together, by name."""
    communicator = GroupCommunicator(dist.group.WORLD)
    rank = communicator.rank
    x, mask, found = torch.randn(2, 4), torch.ones(2, 1), {}

    def attempt(name, *args, batch=4):
        try:
            Slices(communicator, batch, 0).solve(lambda calls, x: x, [Call(args=args)], x)
        except (CannotSlice, UnsupportedModelError, RankMismatchError) as error:
            found[name] = type(error).__name__

    attempt("mask on one rank", mask if rank else None)
    attempt("other lengths", torch.ones(2, 3 + rank, dtype=torch.bool))
    attempt("other rows", torch.ones(2, 1, 1) if rank else torch.ones(3, 1, 1))
    attempt("rows or table", torch.ones(2, 6))
    attempt("object", object())
    attempt("table", torch.ones(3, 6))
    try:
        communicator.same({"one" if rank else "other": 1}, x.device)
    except RankMismatchError as error:
        found["other question"] = type(error).__name__
    return found


def test_unlike_arguments_are_noticed_on_all_ranks():
    assert run_ranks(unlike, 2) == 2 * [
        {
            "mask on one rank": "CannotSlice",
            "other lengths": "CannotSlice",
            "other rows": "CannotSlice",
            "rows or table": "CannotSlice",
            "object": "UnsupportedModelError",
            "other question": "RankMismatchError",
        }
    ]


def summed():
    """Gradients of a tied weight, of an unused one and of one outside, each rank giving its own share."""
    communicator = GroupCommunicator(dist.group.WORLD)
    first, second, unused, frozen = nn.Linear(2, 2, bias=False), nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    frozen.requires_grad_(False)
    weight = first.weight
    with summed_gradients([first, second, unused, frozen], communicator):
        y = (1 + communicator.rank) * (first.weight.sum() + 2 * second.weight.sum() + second.bias.sum())
        assert first.weight is not weight
    assert first.weight is second.weight is weight
    (y + weight.sum()).backward()
    return weight.grad.tolist(), second.bias.grad.tolist(), unused.weight.grad, frozen.weight.grad


def test_gradients_of_the_ends_are_summed_once():
    for weight, bias, *others in run_ranks(summed, 2):
        assert weight == [[10, 10], [10, 10]]  # (1 + 2) (1 + 2), and 1 from outside
        assert bias == [3, 3]
        assert others == [None, None]
