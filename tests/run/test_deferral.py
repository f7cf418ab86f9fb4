"""Weight gradients computed apart from the input gradients are the same bits."""

import copy
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.run.deferral import Record, make_deferrable, recording
from tests.problems import F64, assert_same, gradients_of, state


class Layer(nn.Module):
    """Both kinds of linear module, with and without bias, one of them used twice, one (past) also past its forward, one
    on a constant, as relative positions are."""

    def __init__(self, past: bool = True) -> None:
        super().__init__()
        self.past = past
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 6, bias=False), Conv1D(6, 6)
        self.norm, self.fourth = nn.LayerNorm(6), nn.Linear(6, 6)
        self.register_buffer("places", torch.randn(1, 6))

    def forward(self, x):
        y = self.second(torch.tanh(self.first(self.norm(x))))
        y = self.third(y) + self.second(torch.relu(self.first(x))) + self.fourth(self.places)
        return x + (y @ self.third.weight if self.past else y)


def gradients(layer, x, lam, deferred, autocast):
    record = Record()
    cast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast, cache_enabled=False)
    with cast, recording(record) if deferred else nullcontext():
        y = layer(x)
    trainable = [p for p in layer.parameters() if p.requires_grad]
    record.wanted = True
    found = torch.autograd.grad(y, [x, *trainable], lam.to(y.dtype), allow_unused=True)
    total = dict(zip(trainable, found[1:], strict=True))
    assert bool(record.pending) == deferred
    with torch.no_grad():
        for pending in record.pending:
            for param, grad in pending.gradients():
                total[param] = grad if total[param] is None else total[param] + grad
    return [found[0], *total.values()]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("frozen", [(), ("second.weight",), ("first.weight", "first.bias")])
@pytest.mark.parametrize("contiguous", [False, True])
def test_same_bits_as_autograd(autocast, frozen, contiguous):
    torch.manual_seed(0)
    plain = Layer()
    for name, param in plain.named_parameters():
        param.requires_grad_(name not in frozen)
    x = torch.randn(3, 5, 6) if contiguous else torch.randn(5, 3, 6).transpose(0, 1)
    x.requires_grad_()
    lam = torch.randn(3, 5, 6)
    split = copy.deepcopy(plain)
    make_deferrable(split)
    expected = gradients(plain, x, lam, False, autocast)
    for a, b in zip(gradients(split, x, lam, True, autocast), expected, strict=True):
        assert a is not None
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    # outside of `recording` nothing is deferred
    for a, b in zip(gradients(split, x, lam, False, autocast), expected, strict=True):
        assert torch.equal(a, b)


def recorded(layer, x):
    """(record, result) of a forward whose weight gradients are left out."""
    record = Record()
    with recording(record):
        return record, layer(x)


def deferrable():
    torch.manual_seed(0)
    layer = Layer()
    make_deferrable(layer)
    return layer, torch.randn(2, 3, 6, requires_grad=True)


def test_vjps_that_want_no_weights_leave_nothing():
    layer, x = deferrable()
    record, y = recorded(layer, x)
    torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
    assert not record.pending
    record.wanted = True
    torch.autograd.grad(y, x, torch.ones_like(y))
    assert len(record.pending) == 5


def test_vjps_on_another_thread_are_recorded():
    """Autograd has threads of its own for accelerators, which know no context of the caller's."""
    layer, x = deferrable()
    found = []
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()  # the thread is there before anything is recorded
        for run in (lambda work: work(), lambda work: pool.submit(work).result()):
            record, y = recorded(layer, x)
            record.wanted = True
            run(lambda y=y: torch.autograd.grad(y, x, torch.ones_like(y)))
            found.append([(p, grad) for pending in record.pending for p, grad in pending.gradients()])
    here, there = found
    assert len(here) == 8
    for (param, grad), (other, same) in zip(here, there, strict=True):
        assert param is other
        assert torch.equal(grad, same)


def test_every_graph_has_its_own_record():
    """Also where their vjps are interleaved, and a recording inside another one."""
    layer, x = deferrable()
    outer, inner = Record(), Record()
    with recording(outer):
        a = layer(x)
        with recording(inner):
            b = layer(2 * x)
        c = layer(3 * x)
    outer.wanted = inner.wanted = True
    for y in (c, b, a):
        torch.autograd.grad(y, x, torch.ones_like(y))
    assert (len(outer.pending), len(inner.pending)) == (10, 5)
    assert all(p.inputs.shape[0] == 6 for p in (*outer.pending, *inner.pending))


def test_copies_and_modules_with_a_forward_of_their_own():
    layer = Layer()
    layer.first.forward = lambda x: nn.functional.linear(x, 2 * layer.first.weight)
    make_deferrable(layer)
    make_deferrable(layer)  # once more changes nothing
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        for p in twin.second.parameters():
            p.zero_()
    x = torch.randn(2, 8)
    assert not twin.second(x).any()
    assert layer.second(x).any()
    assert "lambda" in layer.first.forward.__qualname__


def test_what_is_compiled_is_left_alone():
    layer = nn.Sequential(nn.Linear(6, 6), Layer(), torch.compile(Layer(), backend="eager"))
    layer[1].compile(backend="eager")
    make_deferrable(layer)
    linear = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    assert len(linear) == 9
    assert [name for name, module in linear.items() if "forward" in vars(module)] == ["0"]


@pytest.mark.parametrize("bias", [False, True])
def test_the_result_may_be_changed_in_place(bias):
    """DeBERTa scales a permuted view of it."""
    module, x = nn.Linear(4, 6, bias=bias), torch.randn(1, 3, 4, requires_grad=True)

    def heads():
        y = module(x).view(1, 3, 2, 3).permute(0, 2, 1, 3)
        y /= 2.0
        return torch.autograd.grad(y.square().sum(), x)[0]

    expected = heads()
    make_deferrable(module)
    with recording(Record()):
        assert torch.equal(heads(), expected)


@pytest.mark.parametrize("past", [False, True])
def test_steps_with_and_without_splits(past):
    """The same bits, but where a weight is used past its module: that part is added before the rest."""
    torch.manual_seed(0)
    layers, x = nn.ModuleList(Layer(past) for _ in range(4)).to(F64), state(batch=4)
    found = []
    for schedule, kinds in (("gpipe", {"phase", "step"}), ("zb_h1", {"phase", "step", "weights"})):
        solved = gradients_of(LayerParallelConfig(schedule=schedule, micro_batches=3), layers, x)
        assert {task.kind for task in solved.plan.tasks} == kinds
        found.append(solved.results)
    assert_same(found[1], found[0], 1e-14 if past else 0.0)
