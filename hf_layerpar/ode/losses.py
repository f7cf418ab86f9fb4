"""The whole batch's loss from losses of its parts.

A head's loss is a mean over valid labels, or a sum divided by a given count, or several of these added up. Means of
parts can't be averaged: parts have different numbers of valid labels. So the calls of torch's loss functions are
watched. In a rehearsal (`hf_layerpar.ode.rehearsal`) on the whole batch they are counted and not computed; in the step
each mean over a part divides its sum by the whole batch's count, and the parts' losses add up. The autograd graph of
the rehearsal tells whether the loss is made of nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from hf_layerpar.errors import UnsupportedModelError


@dataclass(frozen=True)
class Term:
    """One call of a loss function.

    count: what its mean divides by; None where the caller asked for the sum. size: numbers in its input. classes: the
    input's shape without the first dimension. targets: numbers in a target that has a part for every part of the
    input; 0 for one that is spread over it.
    """

    function: str
    count: float | None
    size: int
    classes: tuple[int, ...]
    targets: int

    @property
    def kind(self) -> tuple[str, bool]:
        return self.function, self.count is None


class Counting(TorchFunctionMode):
    """Inside, loss functions are counted, and give a scalar that hangs on what they are given; linear maps are not
    computed.

    follows: what comes of what is noted by values too, also past `detach` and `no_grad`, and through integers.
    values: what the callers were given, one for each of `terms`.
    """

    def __init__(self, *, follows: bool = True) -> None:
        super().__init__()
        self.follows = follows
        self.terms: list[Term] = []
        self.values: list[Tensor] = []
        self._origins = WeakTensorKeyDictionary()

    def mark(self, tensor: Tensor, origin: Any) -> None:
        """Everything that is made of `tensor` comes of `origin`."""
        self._origins[tensor] = frozenset([origin])

    def origins(self, tensors: Iterable[Any]) -> frozenset[Any]:
        found = [self._origins.get(t) for t in tensors if isinstance(t, Tensor)]
        return frozenset().union(*(f for f in found if f))

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        result = self._result(func, args, kwargs)
        if self.follows and not _looks_at_shapes_alone(func) and (origins := self.origins(_flat((args, kwargs)))):
            made = [args[0]] if func is Tensor.__setitem__ else _flat(result)
            for tensor in made:
                if isinstance(tensor, Tensor):
                    self._origins[tensor] = origins | (self._origins.get(tensor) or frozenset())
        return result

    def _result(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if func is functional.linear:
            return _shape_of_linear(*args, **kwargs)
        found = _reduction(func, args, kwargs)
        if found is not None:
            given, count = found
            shape = given["input"].shape
            number = None if count is None else float(count)
            target: Tensor = given["target"]
            has_parts = target.shape == shape or func in (functional.cross_entropy, functional.nll_loss)
            targets = target.numel() if has_parts else 0
            self.terms.append(Term(func.__name__, number, shape.numel(), tuple(shape[1:]), targets))
            value: Any = _Hangs.apply(given["input"], given["target"])
            self.values.append(value)
            return value.clone()  # the caller may change it in place
        if func is Tensor.add and type(args[1]) in (int, float) and args[1] == 0:
            return args[0].clone()  # `sum(losses)` starts from 0, which is no constant that every part would add
        if args and isinstance(args[0], Tensor) and _is_hollow(args[0]):
            if func in _CASTS:  # of one number, and not of memory that a linear map has not filled
                return func(args[0][(0,) * args[0].ndim], *args[1:], **kwargs).expand(args[0].shape)
            if func is Tensor.contiguous:
                return args[0]
            if func is Tensor.__setitem__:
                return None
            if _is_in_place(func):
                return args[0]
            if (
                getattr(func, "__module__", "") == functional.__name__
                and "inplace" in (known := signature(func)).parameters
            ):
                bound = known.bind(*args, **kwargs)
                return func(**bound.arguments | {"inplace": False})
        return func(*args, **kwargs)


class Whole(TorchFunctionMode):
    """Inside, the means that loss functions give are sums over the whole batch's counts.

    Raises UnsupportedModelError for other calls than those of the rehearsal.
    """

    def __init__(self, terms: Sequence[Term]) -> None:
        super().__init__()
        self.terms, self.calls = terms, 0

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        found = _reduction(func, args, kwargs)
        if found is None:
            return func(*args, **kwargs)
        given, count = found
        if self.calls >= len(self.terms) or self.terms[self.calls].function != func.__name__:
            raise UnsupportedModelError(
                f"the loss of a micro-batch calls {func.__name__} where that of the whole batch did not: its parts "
                "don't add up. Use micro_batches=1 and ends='first_last'"
            )
        whole = self.terms[self.calls].count
        self.calls += 1
        if count is None or whole is None:
            return func(*args, **kwargs)
        return func(**(given | {"reduction": "sum"})) / whole  # no number where nothing counts, as in torch


def factors(loss: Tensor, counting: Counting) -> list[float] | None:
    """By how much the loss grows with each of the counted terms, if it is a sum of multiples of them; else None."""
    if not counting.values or not _is_made_of(loss, counting.values):
        return None
    grads = torch.autograd.grad(loss, counting.values, retain_graph=True, allow_unused=True)
    return [0.0 if grad is None else float(grad) for grad in grads]


def _is_made_of(loss: Tensor, values: Sequence[Tensor]) -> bool:
    ends = {value.grad_fn for value in values}
    ahead: list[Any] = [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node in ends:
            continue
        inputs = [] if node is None else [below for below, _ in node.next_functions]
        name = None if node is None else node.name()
        if name in ("AddBackward0", "SubBackward0"):
            ahead += inputs  # a constant has no node and ends the search: every part would add it
        elif name in _FACTORS and inputs[0] is not None and not any(inputs[1:]):
            ahead.append(inputs[0])
        elif name == "MulBackward0" and inputs[0] is None and inputs[1] is not None:
            ahead.append(inputs[1])
        else:
            return False
    return True


_FACTORS = ("MulBackward0", "DivBackward0", "NegBackward0", "ToCopyBackward0", "CloneBackward0")


class _Hangs(torch.autograd.Function):
    """A scalar zero that depends on tensors."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        return torch.zeros((), dtype=tensors[0].dtype, device=tensors[0].device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        raise _own_backward()


class _Linear(torch.autograd.Function):
    """A linear map's result as far as its shape and what it depends on: one zero, seen everywhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return torch.zeros((), dtype=dtype, device=x.device).expand(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        raise _own_backward()


def _own_backward() -> UnsupportedModelError:
    return UnsupportedModelError(
        "the loss goes backward by itself (torch.autograd.grad or .backward() inside of it), but the layers of a "
        "training step are not in its graph; take such gradients before the step"
    )


def _shape_of_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _Linear.apply(input, weight, bias)  # type: ignore[return-value]


_CASTS = (Tensor.to, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.type, Tensor.clone)


_OPERATORS_IN_PLACE = {"__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__", "__ipow__", "__imod__"}


def _is_hollow(tensor: Tensor) -> bool:
    """One number, seen everywhere: what can't be written to."""
    return tensor.numel() > 1 and not any(s for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1)


def _is_in_place(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return (name.endswith("_") and not name.startswith(("_", "requires_"))) or name in _OPERATORS_IN_PLACE


def _looks_at_shapes_alone(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return name.endswith("_like") or name.startswith("new_")


def _flat(nest: Any) -> Iterator[Any]:
    """The leaves of tuples, lists and dicts."""
    if isinstance(nest, tuple | list):
        for item in nest:
            yield from _flat(item)
    elif isinstance(nest, Mapping):
        yield from _flat(list(nest.values()))
    else:
        yield nest


# ---- the loss functions, and what their means divide by
def _reduction(func: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None] | None:
    """(arguments by name, count of the mean or None for a sum) of a call that can be put together from parts."""
    count_of = _COUNTS.get(func)
    if count_of is None:
        return None
    bound = signature(func).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    if given.get("size_average") is not None or given.get("reduce") is not None:
        return None
    if given["reduction"] == "sum":
        return given, None
    if given["reduction"] == "batchmean":
        return given, _integer(len(given["input"]), given["input"])
    count = count_of(given) if given["reduction"] == "mean" else None
    return None if count is None else (given, count)


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
    functional.nll_loss: _valid_labels,
    functional.kl_div: _elements,
    functional.mse_loss: _unweighted_elements,
    functional.l1_loss: _unweighted_elements,
    functional.smooth_l1_loss: _unweighted_elements,
    functional.huber_loss: _unweighted_elements,
    functional.binary_cross_entropy_with_logits: _elements,
}
LOSSES = tuple(sorted(function.__name__ for function in _COUNTS))
