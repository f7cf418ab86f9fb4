"""Tensors that stand where modules have others: for what a rank lacks, or is not to read.

Nothing is assigned: an attribute reads as another tensor for a while, and state dicts, optimizers and `.to` see the
module's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hf_layerpar.compat.torch import buffer_slots, parameter_slots

Shapes = tuple[tuple[str, str, torch.Size, torch.dtype, bool], ...]
"""(module, attribute, shape, dtype, is a parameter) of a layer's parameters and buffers."""
Shadow = tuple[tuple[nn.Module, str], Tensor]
"""((module, attribute), what it reads as)."""


class ZeroLayers:
    """Zeros of the shapes of the parameters and buffers of `layers`."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = layers
        self._shapes: list[Shapes] = []

    def note_shapes(self) -> None:
        """To be called where all layers are whole: from now on layers may lose their parameters."""
        self._shapes = [_shapes_of(layer) for layer in self.layers]

    def shapes_of(self, index: int) -> Shapes:
        return self._shapes[index] if self._shapes else _shapes_of(self.layers[index])

    def parameters(self, index: int, device: torch.device, but: Iterable[str] = ()) -> list[Shadow]:
        """For `shadowed`: a layer's parameters read as zeros, but those in the modules of these names inside it."""
        shapes = [s for s in self.shapes_of(index) if not any(f"{s[0]}.".startswith(f"{name}.") for name in but)]
        return [self._zeros(index, device, *entry) for entry in shapes if entry[-1]]

    def all(self, index: int, device: torch.device) -> list[Shadow]:
        """Its buffers too."""
        return [self._zeros(index, device, *entry) for entry in self.shapes_of(index)]

    def _zeros(
        self, index: int, device: torch.device, name: str, key: str, shape: torch.Size, dtype: torch.dtype, small: bool
    ) -> Shadow:
        zeros = torch.zeros(() if small else shape, dtype=dtype, device=device)
        return (self.layers[index].get_submodule(name), key), zeros.expand(shape)


def _shapes_of(layer: nn.Module) -> Shapes:
    return tuple(
        (name, key, value.shape, value.dtype, isinstance(value, nn.Parameter))
        for name, module in layer.named_modules()
        for key, value in (*parameter_slots(module).items(), *buffer_slots(module).items())
        if value is not None
    )


@contextmanager
def shadowed(shadows: Iterable[Shadow]) -> Iterator[None]:
    """Attributes of modules read as other tensors inside. (An entry of `__dict__` goes before `_parameters`, which
    state dicts, optimizers and `.to` look at.)"""
    placed = []
    try:
        for (module, key), tensor in shadows:
            vars(module)[key] = tensor
            placed.append((module, key))
        yield
    finally:
        for module, key in placed:
            vars(module).pop(key, None)
