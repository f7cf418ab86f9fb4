"""The whole batch's loss from losses of slices.

A head's loss is a mean over valid labels, or a sum divided by a given count, or several of these added up. Means of
slices can't be averaged: slices have different numbers of valid labels. So the calls of torch's loss functions are
watched, what they sum and what they divide by is added up over the ranks, and the loss is put together again by the
factors with which it holds them. The autograd graph tells whether it holds nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from hf_layerpar.errors import UnsupportedModelError
from hf_layerpar.parallel.communicator import Communicator


@dataclass(frozen=True)
class Term:
    """One call of a loss function on a slice.

    total: the sum over the slice's elements, a scalar.
    count: what the mean divides by here, a scalar; None where the caller asked for the sum.
    value: what the caller was given.
    """

    function: str
    total: Tensor
    count: Tensor | None
    value: Tensor


class LossTerms(TorchFunctionMode):
    """Inside, notes the calls of loss functions that reduce to a mean or a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.terms: list[Term] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        count_of = _COUNTS.get(func)
        if count_of is None:
            return func(*args, **(kwargs or {}))
        bound = signature(func).bind(*args, **(kwargs or {}))
        bound.apply_defaults()
        given = bound.arguments
        reduction, legacy = given["reduction"], given.get("size_average") is not None or given.get("reduce") is not None
        count = None if legacy or reduction != "mean" else count_of(given)
        if count is None and (legacy or reduction != "sum"):
            return func(*args, **(kwargs or {}))
        total = func(**(given | {"reduction": "sum"}))
        value = total.clone() if count is None else total / count.clamp(min=1)
        self.terms.append(Term(func.__name__, total, count, value))
        return value.clone()  # the caller may change it in place

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Inside, torch functions run at their usual speed."""
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()

    def whole(self, loss: Tensor, communicator: Communicator, *, sums_are_divided: bool) -> Tensor:
        """The loss over the rows of all ranks, the same bits on each; its gradient goes to the own rows. Collective.

        sums_are_divided: sums in the loss are divided by a count of the whole batch, and may be added up.

        Raises UnsupportedModelError on all ranks when the loss can't be put together.
        """
        used = self._terms_in(loss)
        if used is None or (not sums_are_divided and any(term.count is None for term in used)):
            facts, factors = None, ()
        else:
            factors = torch.autograd.grad(loss, [term.value for term in used], retain_graph=True)
            facts = [(t.function, t.count is None, float(f)) for t, f in zip(used, factors, strict=True)]
        communicator.agree({"loss": facts}, loss.device)
        if used is None or facts is None:
            raise UnsupportedModelError(
                "the loss of the whole batch can't be put together from the losses of slices: it must be a sum of "
                f"means by {', '.join(sorted(f.__name__ for f in _COUNTS))} of torch.nn.functional, or of sums by "
                "them divided by num_items_in_batch. Use sliced_ends=False"
            )
        mine = [torch.stack([t.total.detach().double(), _double(t.count, t.total)]) for t in used]
        totals = torch.stack(mine)
        communicator.all_reduce(totals)
        value, share = totals.new_zeros(()), totals.new_zeros(())
        for term, factor, (total, count) in zip(used, factors, totals, strict=True):
            weight = factor.double() / (1 if term.count is None else count)
            value = value + weight * total
            share = share + weight * term.total.double()
        return _WithGradientOf.apply(share.to(loss.dtype), value.to(loss.dtype))  # type: ignore[return-value]

    def _terms_in(self, loss: Tensor) -> list[Term] | None:
        """The terms that the loss is a linear combination of; None where it holds anything else."""
        of_node = {term.value.grad_fn: term for term in self.terms if term.value.grad_fn is not None}
        used: list[Term] = []
        ahead: list[Any] = [loss.grad_fn]
        while ahead:
            node = ahead.pop()
            if node in of_node:
                if of_node[node] not in used:
                    used.append(of_node[node])
                continue
            inputs = [] if node is None else [below for below, _ in node.next_functions]
            name = None if node is None else node.name()
            if name in _SUMS:
                ahead += inputs  # a constant has no node and ends the search: every rank would add it
            elif name in _FACTORS and inputs[0] is not None and not any(inputs[1:]):
                ahead.append(inputs[0])
            elif name == "MulBackward0" and inputs[0] is None and inputs[1] is not None:
                ahead.append(inputs[1])
            else:
                return None
        return used


_SUMS = ("AddBackward0", "SubBackward0")
_FACTORS = ("MulBackward0", "DivBackward0", "NegBackward0", "ToCopyBackward0", "CloneBackward0")


class _WithGradientOf(torch.autograd.Function):
    """`value`, with the gradient of `share`."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


def _double(count: Tensor | None, like: Tensor) -> Tensor:
    return like.new_zeros((), dtype=torch.float64) if count is None else count.double()


def _integer(number: int, like: Tensor) -> Tensor:
    return torch.tensor(number, device=like.device)


def _valid_labels(given: dict[str, Any]) -> Tensor | None:
    logits, target, weight = given["input"], given["target"], given["weight"]
    if target.is_floating_point():  # class probabilities
        return _integer(target.numel() // target.shape[1 if target.ndim > 1 else 0], logits)
    valid = target != given["ignore_index"]
    if weight is None:
        return valid.sum()
    return (weight[target.where(valid, 0)] * valid).sum()


def _elements(given: dict[str, Any]) -> Tensor | None:
    logits, target = given["input"], given["target"]
    return _integer(torch.broadcast_shapes(logits.shape, target.shape).numel(), logits)


def _unweighted_elements(given: dict[str, Any]) -> Tensor | None:
    return _elements(given) if given.get("weight") is None else None


_COUNTS: dict[Callable[..., Tensor], Callable[[dict[str, Any]], Tensor | None]] = {
    functional.cross_entropy: _valid_labels,
    functional.mse_loss: _unweighted_elements,
    functional.l1_loss: _unweighted_elements,
    functional.smooth_l1_loss: _unweighted_elements,
    functional.binary_cross_entropy_with_logits: _elements,
}
"""The loss functions, and what their means divide by (None: not known for these arguments)."""
