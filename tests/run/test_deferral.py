"""Weight gradients computed apart from the input gradients are the same bits."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_layerpar.run.deferral import collecting, make_deferrable, recording


class Layer(nn.Module):
    """Both kinds of linear module, with and without bias, one of them used twice, one also used past its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 6, bias=False), Conv1D(6, 6)
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        y = self.second(torch.tanh(self.first(self.norm(x))))
        y = self.third(y) + self.second(torch.relu(self.first(x)))
        return x + y @ self.third.weight


def gradients(layer, x, lam, deferred, autocast):
    pending = []
    params = dict(layer.named_parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast, cache_enabled=False):
        if deferred:
            with recording():
                y = layer(x)
        else:
            y = layer(x)
    trainable = [p for p in params.values() if p.requires_grad]
    with collecting(pending if deferred else None):
        found = torch.autograd.grad(y, [x, *trainable], lam.to(y.dtype), allow_unused=True)
    total = dict(zip(trainable, found[1:], strict=True))
    assert bool(pending) == deferred
    with torch.no_grad():
        for entry in pending:
            for param, grad in entry.gradients():
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


def test_vjps_that_want_no_weights_leave_nothing():
    layer = Layer()
    make_deferrable(layer)
    x = torch.randn(2, 3, 6, requires_grad=True)
    with recording():
        y = layer(x)
    pending = []
    with collecting(None):
        torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
    with collecting(pending):
        torch.autograd.grad(y, x, torch.ones_like(y))
    assert len(pending) == 5


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
    with recording():
        assert torch.equal(heads(), expected)
