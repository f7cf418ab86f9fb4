"""A solver that runs the recorded calls one after the other, bitwise comparison of training steps, and refusals."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_layerpar.ode.convert import ode_view

EXACT_MGRIT = {"strategy": "mgrit", "coarsening": 2, "forward_iterations": 2, "backward_iterations": 2}
"""With two intervals of two layers, two iterations are exact."""


@dataclass
class SerialSolver:
    """What a solver must compute, in its plainest form; counts its runs and notes how many calls it got."""

    runs: list[int] = field(default_factory=list)

    def __call__(self, calls: Any, x: Tensor) -> Tensor:
        self.runs.append(len(calls))
        for call in calls:
            x = call.step(x, call.args, call.kwargs)
        return x


def use_solver(model: nn.Module, solver: Any) -> Any:
    for stack in ode_view(model).stacks:
        stack.solver = solver
    return solver


def without_cache(model: Any) -> dict[str, bool]:
    """A solver turns the KV cache off by itself; stock must be told so, because its last bits depend on the cache."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


@dataclass
class Outcome:
    loss: Tensor
    logits: Tensor
    gradients: dict[str, Tensor | None]


def training_step(model: Any, inputs: dict[str, Tensor], train: bool, **options: Any) -> Outcome:
    model.train(train)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(7)
    output = model(**inputs, **options)
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return Outcome(output.loss.detach(), output.logits.detach(), gradients)


def assert_same(ours: Outcome, stock: Outcome) -> None:
    """Bit-equal loss, logits and every gradient."""
    assert torch.equal(ours.loss, stock.loss)
    assert torch.equal(ours.logits, stock.logits)
    assert list(ours.gradients) == list(stock.gradients)
    for name, theirs in stock.gradients.items():
        mine = ours.gradients[name]
        assert (mine is None) == (theirs is None), name
        assert mine is None or theirs is None or torch.equal(mine, theirs), name
    assert any(gradient is not None and gradient.any() for gradient in stock.gradients.values())


def same_tensors(ours: Any, stock: Any) -> bool:
    """Whether two nests of tuples hold bit-equal tensors."""
    if isinstance(stock, Tensor):
        return torch.equal(ours, stock)
    return len(ours) == len(stock) and all(same_tensors(a, b) for a, b in zip(ours, stock, strict=True))


def euler_loop(layers: Any, h: Callable[[int], float], x: Tensor, run: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
    """x + h (layer(x) - x), written out: the oracle of the euler form."""
    for n, layer in enumerate(layers):
        x = x + h(n) * (run(layer, x) - x)
    return x


def refused(error: type[Exception], *words: str) -> Any:
    """`pytest.raises` for a message that holds all the words, in this order."""
    return pytest.raises(error, match="(?s)" + ".*".join(words))
