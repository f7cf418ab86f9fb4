"""How a layer returns its state: found by evaluating one of its kind on zeros, and then repeated for any state.

So the model's loop gets what its layers return before any is evaluated, with `Later` where that isn't made yet.

Shapes: B batch, T tokens, D hidden; a state is `[B, T, D]`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from hf_layerpar.compat.torch import (
    DisableTorchFunction,
    DisableTorchFunctionSubclass,
    as_subclass,
    tree_leaves,
    tree_map,
)
from hf_layerpar.errors import UnsupportedModelError
from hf_layerpar.ode.convention import Convention
from hf_layerpar.ode.stand_ins import ZeroLayers, shadowed


class Packings:
    """How each layer of a stack returns its state: the first of its kind is evaluated, the same on every rank.

    unseen: why that was not possible on zeros, for messages; empty where it was.
    """

    def __init__(self, convention: Convention, zeros: ZeroLayers) -> None:
        self.unseen = ""
        self._convention, self._zeros = convention, zeros
        self._found: dict[Any, Packing] = {}  # by place, and by class and shapes

    def of(self, index: int, x: Tensor, args: tuple, kwargs: dict[str, Any], *, sharded: bool) -> Packing:
        """Of a layer that is called with these. sharded: this rank may lack its parameters."""
        if index not in self._found:
            kind = (type(self._convention.layers[index]), self._zeros.shapes_of(index))
            if kind not in self._found:
                self._found[kind] = self._find(index, x, args, kwargs, sharded)
            self._found[index] = self._found[kind]
        return self._found[index]

    def _find(self, index: int, x: Tensor, args: tuple, kwargs: dict[str, Any], sharded: bool) -> Packing:
        convention = self._convention
        forward, name = convention.stock_forward(index), convention.name(index)
        shadows = self._zeros.all(index, x.device)
        args, kwargs = tree_map(_own, (args, kwargs), is_leaf=lambda leaf: isinstance(leaf, Cache))
        devices = [x.device] if x.is_cuda else []
        start = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
        output: Any = start
        # a rehearsal's linear maps make tensors that some layers can't write to, and zeros are no weights for others
        off = DisableTorchFunction
        lacks = sharded or any(p.is_meta for p in convention.layers[index].parameters())  # the layer's own parameters
        ways = [(nullcontext, shadows), (off, shadows)] + ([] if lacks else [(off, [])])
        with torch.no_grad(), torch.random.fork_rng(devices):
            for number, (mode, values) in enumerate(ways, 1):
                try:
                    with mode(), shadowed(values):
                        output, self.unseen = convention.evaluate(index, forward, start, args, kwargs), ""
                    break
                except Exception as error:
                    if number == len(ways) and not lacks:
                        raise
                    self.unseen = f" ({name} could not be evaluated ahead on zeros: {error})"
        convention.state_in(index, output, x, kwargs)
        return Packing.of(output, convention.family.parts_of(output), name, args, kwargs)


def _own(leaf: Any) -> Any:
    return copy.deepcopy(leaf) if isinstance(leaf, Cache) else leaf


@dataclass(frozen=True)
class Packing:
    """How a layer returns its state. output: what it returned once, with marks for the tensors in it."""

    output: Any

    @classmethod
    def of(cls, output: Any, parts: Sequence[Any], name: str, args: tuple, kwargs: dict[str, Any]) -> Packing:
        """As in `output`, which layer `name` returned for these arguments (beside the state).

        parts: the tensors in it that are the state.
        """
        marks: dict[int, Any] = {id(v): _Given(k) for k, v in (*enumerate(args), *kwargs.items()) if v is not None}
        marks |= {id(part): _State(i) for i, part in enumerate(parts) if part is not None}

        def found(place: Any, leaf: Any) -> Any:
            if id(leaf) in marks:
                return marks[id(leaf)]
            what = f"the model uses item {place} of what {name} returns, {_TOO_EARLY}"
            return _Made(what) if isinstance(leaf, Tensor) else leaf

        if type(output) is dict:
            return cls({key: tree_map(partial(found, key), value) for key, value in output.items()})
        if isinstance(output, tuple | list):
            return cls(tuple(tree_map(partial(found, place), value) for place, value in enumerate(output)))
        return cls(_State(0))

    @classmethod
    def with_shared(cls, shared: tuple) -> Packing:
        """The state, and behind it what the first layer made for all."""
        return cls((_State(0), *shared))

    def pack(self, parts: Sequence[Tensor], args: tuple, kwargs: dict[str, Any]) -> Any:
        """What a layer that was called with these arguments returns with this state."""

        def found(leaf: Any) -> Any:
            if isinstance(leaf, _State):
                return parts[leaf.part]
            if isinstance(leaf, _Given):
                return args[leaf.key] if isinstance(leaf.key, int) else kwargs[leaf.key]
            return later(torch.empty(()), leaf.what) if isinstance(leaf, _Made) else leaf

        return tree_map(found, self.output)


@dataclass(frozen=True)
class _State:
    """The state, or a part of it."""

    part: int


@dataclass(frozen=True)
class _Given:
    """An argument that a layer returns again, such as a KV cache. key: its place or name."""

    key: int | str


@dataclass(frozen=True)
class _Made:
    """A tensor that a layer makes. what: says who may not use it."""

    what: str


class Later(Tensor):
    """What the model's loop holds in place of a value that a solver will only make when all layers were called.

    A state may be asked for shape, dtype and device. Any other use raises UnsupportedModelError with the text `what`.
    """

    what: str
    is_state: bool

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        first = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Later))
        if first.is_state and (func in _FACTS or func in _PERHAPS_ITSELF):
            with DisableTorchFunctionSubclass():
                found = func(*args, **(kwargs or {}))
            if func in _FACTS or found is first:
                return found
        raise UnsupportedModelError(first.what)


_FACTS = {
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.stride, Tensor.is_contiguous),
    *(torch.is_floating_point, torch.numel, Tensor.get_device),
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "layout")),
    *(getattr(Tensor, name).__get__ for name in ("is_cuda", "is_cpu", "is_meta", "is_quantized", "is_sparse")),
}
_PERHAPS_ITSELF = {
    *(Tensor.to, Tensor.contiguous, Tensor.type_as, Tensor.cuda, Tensor.cpu),
    *(Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16),
}
_TOO_EARLY = (
    "a tensor that is only made when a solver has evaluated all layers. Leave out what uses it, leave this stack out "
    "of the conversion (stacks=[...]), or run the model without parallelize"
)


def later(like: Tensor, what: str, *, is_state: bool = False) -> Later:
    found = as_subclass(Later, like.detach())
    found.what, found.is_state = what, is_state
    return found
