"""The parameters outside the layers: which phase uses them, and what stands for those that a rank lacks.

A stand-in has a parameter's shape and dtype and the memory of one number. A forward runs on stand-ins as on parameters,
so every rank can make masks, positions and shapes by the model's own code; and whatever hangs on a stand-in is known by
its autograd graph, and is sent by the rank that has the parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_layerpar.compat.torch import parameter_slots
from hf_layerpar.ode.families import shared_modules
from hf_layerpar.ode.stack import LayerStack
from hf_layerpar.ode.stand_ins import shadowed


@dataclass(eq=False)
class EndParameter:
    """A parameter outside the layers, wherever modules hold it (tied ones at several places).

    names: full names. slots: (module, attribute). value: None where this rank lacks it.
    holders: the lp ranks that have it. aliases: by phase, what stands for it there (see `Ends.of_phase`).
    """

    names: list[str]
    slots: list[tuple[nn.Module, str]]
    value: nn.Parameter | None
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    holders: tuple[int, ...]
    aliases: dict[int, Tensor]
    is_shared: bool = False

    def stand_in(self) -> Tensor:
        zero = torch.zeros((), dtype=self.dtype, device=self.device).expand(self.shape)
        return zero.requires_grad_(self.dtype.is_floating_point)


class Ends:
    """The end parameters of a model on this rank. To be made before it loses layers."""

    def __init__(self, model: nn.Module, stacks: Sequence[LayerStack], num_ranks: int) -> None:
        for stack in stacks:
            stack.note_shapes()
        found: dict[int, EndParameter] = {}
        everywhere = tuple(range(num_ranks))
        for path, module in _end_modules(model, stacks):
            for key, value in parameter_slots(module).items():
                if value is None:
                    continue
                entry = found.get(id(value))
                if entry is None:
                    entry = found[id(value)] = EndParameter(
                        [], [], value, value.shape, value.dtype, value.device, everywhere, {}
                    )
                entry.slots.append((module, key))
                entry.names.append(f"{path}.{key}" if path else key)
        self.parameters = list(found.values())

    def __iter__(self) -> Iterator[EndParameter]:
        return iter(self.parameters)

    def refresh(self) -> None:
        """To be called when modules were given other parameters (pieces of them, or whole ones again)."""
        for p in self.parameters:
            module, key = p.slots[0]
            p.value = parameter_slots(module)[key]

    @property
    def shared(self) -> list[EndParameter]:
        """Those whose gradient is a sum over phases, so over ranks."""
        return [p for p in self.parameters if p.is_shared]

    @contextmanager
    def stood_in(self) -> Iterator[dict[EndParameter, Tensor]]:
        """All parameters are stand-ins inside, which it yields."""
        stand_ins = {p: p.stand_in() for p in self.parameters}
        with shadowed((slot, stand_ins[p]) for p in self.parameters for slot in p.slots):
            yield stand_ins

    @contextmanager
    def of_phase(self, place: int) -> Iterator[None]:
        """What this rank lacks is stood in for; shared parameters have an alias, so that each phase's gradient of them
        is known apart, and sums don't depend on which ranks run the phases."""
        shadows: list[tuple[tuple[nn.Module, str], Tensor]] = []
        for p in self.parameters:
            if p.value is None:
                tensor = p.stand_in()
            elif p.is_shared and p.value.requires_grad:
                tensor = p.aliases.get(place)
                if tensor is None or tensor.data_ptr() != p.value.data_ptr() or tensor.dtype != p.value.dtype:
                    tensor = p.aliases[place] = p.value.detach().requires_grad_()
            else:
                continue
            shadows += [(slot, tensor) for slot in p.slots]
        with shadowed(shadows):
            yield

    def take_gradient(self, parameter: EndParameter, place: int) -> Tensor | None:
        """The gradient that came in a phase, handed over."""
        alias = parameter.aliases.get(place)
        if alias is None or alias.grad is None:
            return None
        grad, alias.grad = alias.grad, None
        return grad


def _end_modules(model: nn.Module, stacks: Sequence[LayerStack]) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) outside the layers; and those inside the first layers that all others depend on."""
    layers = {id(layer) for stack in stacks for layer in stack.layers}
    ahead: list[tuple[str, nn.Module]] = [("", model)]
    seen: set[int] = set()
    while ahead:
        path, module = ahead.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if id(module) in layers:
            for name in shared_modules(module):
                ahead += [(f"{path}.{name}", module.get_submodule(name))]
            continue
        yield path, module
        ahead += [(f"{path}.{name}" if path else name, child) for name, child in module.named_children()][::-1]
