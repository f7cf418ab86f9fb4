"""The calling convention of a stack's layers: where the state stands among a layer's arguments and in its output.

Shapes: B batch, T tokens, D hidden; a state is `[B, T, D]`, also where it is several tensors to the layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from hf_layerpar.errors import UnsupportedModelError
from hf_layerpar.ode.families import family_of

_SIZES = "_hf_layerpar_sizes"
"""Among a recorded layer's arguments the second dimensions of the parts of its state, if it has several."""


class Convention:
    """How the layers of one ModuleList are called.

    path: name of the ModuleList in the model. family: of its layers.
    originals: forwards that others put on the layers before us (accelerate's device hooks), or None.
    """

    def __init__(self, path: str, layers: Sequence[nn.Module]) -> None:
        self.path, self.layers = path, layers
        self.family = family_of(layers[0])
        self.originals = [vars(layer).get("forward") for layer in layers]

    def name(self, index: int) -> str:
        """Of a layer, in messages."""
        return f"{self.path}.{index} ({type(self.layers[index]).__name__})"

    def stock_forward(self, index: int) -> Callable[..., Any]:
        """The layer's forward as it was before the interception."""
        return stock_forward(self.layers[index], self.originals[index])

    def split(self, index: int, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, tuple, dict[str, Any]]:
        """The parts of the state among the arguments with which the model calls a layer, and the other arguments."""
        state = self.family.state
        if args and not state:
            return args[:1], args[1:], kwargs
        names = argument_names(self.layers[index], self.originals[index])
        given = dict(zip(names, args, strict=False)) | kwargs
        if not state:
            return (given.pop(names[0]),), (), given
        parts = tuple(given.pop(name) for name in state)
        given[_SIZES] = tuple(part.shape[1] for part in parts)
        return parts, (), given

    def joined(self, index: int, parts: tuple[Tensor, ...]) -> Tensor:
        """The state of these parts, which a layer is called with."""
        if len(parts) == 1:
            return parts[0]
        if len({(part.shape[0], part.shape[2:]) for part in parts}) > 1:
            raise UnsupportedModelError(
                f"the state of {self.name(index)} is in parts of shapes {[tuple(part.shape) for part in parts]}, "
                "which can't be solved as one: they may only differ in their second dimension"
            )
        return torch.cat(parts, dim=1)

    def parts(self, x: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        """The tensors that make up the state of a layer that was called with `kwargs`."""
        return x.split(kwargs[_SIZES], dim=1) if self.family.state else (x,)

    def merged(self, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The arguments with which the model calls a layer: `split` undone."""
        if not self.family.state:
            return (x, *args), kwargs
        named = dict(zip(self.family.state, self.parts(x, kwargs), strict=True)) | kwargs
        del named[_SIZES]
        return (), named

    def evaluate(self, index: int, function: Callable[..., Any], x: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The output of the layer by `function`, itself or its forward, without gradient checkpointing."""
        given, named = self.merged(x, args, kwargs)
        with _without_checkpointing(self.layers[index]):
            return function(*given, **named)

    def state_in(self, index: int, output: Any, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The state in the output of a layer that was called with `x` and `kwargs`.

        Raises UnsupportedModelError for an output that holds none, or one of another shape.
        """
        given = self.parts(x, kwargs)
        found = self.family.parts_of(output)
        if len(given) > 1:
            found = tuple(old if new is None else new for old, new in zip(given, found, strict=True))
        for old, new in zip(given, found, strict=True):
            if not isinstance(new, Tensor):
                raise UnsupportedModelError(
                    f"{self.name(index)} returns a {type(output).__name__} that doesn't begin with its state, so it "
                    "is no step from state to state; leave this stack out of the conversion (stacks=[...])"
                )
            if new.shape != old.shape:
                raise UnsupportedModelError(
                    f"{self.name(index)} makes a state of shape {tuple(new.shape)} of one of shape "
                    f"{tuple(old.shape)}, so it is no step from state to state; leave this stack out of the "
                    "conversion (stacks=[...])"
                )
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)


def stock_forward(module: nn.Module, original: Callable[..., Any] | None) -> Callable[..., Any]:
    """The module's forward before ours. original: what stood on the instance in place of its class's."""
    return original or type(module).forward.__get__(module)


def argument_names(module: nn.Module, original: Callable[..., Any] | None) -> tuple[str, ...]:
    """What `stock_forward` takes."""
    return _names_of(type(module).forward)[1:] if original is None else _names_of(original)


@lru_cache(maxsize=256)
def _names_of(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


@contextmanager
def _without_checkpointing(layer: Any) -> Iterator[None]:
    if not getattr(layer, "gradient_checkpointing", False):
        yield
        return
    layer.gradient_checkpointing = False
    try:
        yield
    finally:
        layer.gradient_checkpointing = True
