"""Waves on one device: alike layers evaluated as one, with stacked weights and stacked states, and their vjps.

Shapes: K layers in a wave, B batch, T tokens, D hidden; a state is `[B, T, D]`, a wave's states `[K, B, T, D]`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hf_layerpar.compat.torch import tree_unflatten
from hf_layerpar.run.batched import InOne, lying_together
from hf_layerpar.run.layers import Common, Entry, LayerCall, Layers, Run, add_gradient

Wave = tuple[int, ...]


class StackedLayers(Layers):
    """`Layers` that also evaluate waves: layers of one kind (see `stackable`), ascending, one state for each.

    kinds: a number for each layer. kept: which layers the final vjps of the backward take together, alone ones too.
        The last relaxation keeps the graph of a wave that is among them, and the final vjp is a backward through it
        and nothing else. A graph can't be taken apart, so vjps of other sets of layers (the adjoint's coarse sweep)
        evaluate their layers again, together, from the states of the last relaxation.
    weights: of alike layers, stacked, by the layers' `id`s; kept from step to step.

    The weights of evenly spaced layers are a view of the stack.
    """

    def __init__(
        self,
        entry: Entry,
        common: Common,
        place: int,
        micro_batch: int,
        *,
        kinds: Sequence[int],
        kept: Set[Wave],
        weights: dict[Wave, Weights],
    ) -> None:
        super().__init__(entry, common, place, micro_batch)
        self.kinds, self.kept = tuple(kinds), kept
        self._weights = weights
        self._ready: dict[int, Weights] = {}  # by kind
        self._graphs: dict[Wave, _Graph] = {}

    def forward_wave(self, layers: Wave, states: Sequence[Tensor], final: bool) -> list[Tensor]:
        """`forward` of all `layers`."""
        kept = final and self.common.keeps
        if kept and self._keeps(layers):
            graph = self._wave_with_graph(layers, states, with_weights=True)
            self._graphs[layers] = graph
            states, y = graph.x.detach().unbind(), graph.y.detach()
        else:
            with torch.no_grad():
                x, dim = (states[0], None) if _all_same(states) else (joined(states), 0)
                y = self.evaluate_wave(layers, self._weights_of(layers).select(layers), x, dim)
        if kept:
            for layer, state in zip(layers, states, strict=True):
                self._tape[layer] = [Run((layer,), state)]
        return list(y.unbind())

    def backward_wave(self, layers: Wave, lams: Sequence[Tensor], final: bool) -> list[Tensor]:
        """`backward` of all `layers`."""
        graph = self._graphs.pop(layers, None) if final else self._graphs.get(layers)
        retain = graph is not None and not final
        if graph is None:
            graph = self._wave_with_graph(layers, [self._state(n) for n in layers], with_weights=final)
        lam = lams[0].expand_as(graph.y) if _all_same(lams) else joined(lams)
        inputs = [graph.x, *graph.weights.values()] if final else [graph.x]
        grads = torch.autograd.grad(graph.y, inputs, lam, retain_graph=retain, allow_unused=final)
        weights = self._weights_of(layers)
        for name, grad in zip(graph.weights if final else (), grads[1:], strict=True):
            if grad is not None:
                # one copy here if any: a parameter takes over a gradient only when it lies like the parameter
                for layer, part in zip(layers, grad.contiguous().unbind(), strict=True):
                    param = weights.params[layer][name]
                    if param.requires_grad:
                        add_gradient(param, part)
        assert grads[0] is not None, f"layers {layers} don't depend on their states"
        return list(grads[0].unbind())

    # ---- a trial before the first solve: steps from one state and their input-vjps of ones
    def try_wave(self, layers: Wave, x: Tensor) -> tuple[Tensor, Tensor]:
        graph = self._wave_with_graph(layers, [x] * len(layers), with_weights=True)
        grads = torch.autograd.grad(
            graph.y, [graph.x, *graph.weights.values()], torch.ones_like(graph.y), allow_unused=True
        )
        with torch.no_grad():  # also as the coarse sweep does it
            y = self.evaluate_wave(layers, self._weights_of(layers).select(layers), x, None)
        return y, grads[0]

    def try_layer(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        alone = self._with_graph((layer,), x)
        assert alone.y is not None
        return alone.y.detach(), torch.autograd.grad(alone.y, alone.x, torch.ones_like(alone.y))[0]

    # ---- inside
    def _keeps(self, layers: Wave) -> bool:
        return super()._keeps(layers) and layers in self.kept

    def _state(self, layer: int) -> Tensor:
        return self._tape[layer][0].x

    def _weights_of(self, layers: Wave) -> Weights:
        kind = self.kinds[layers[0]]
        if kind not in self._ready:
            members = {n: self.calls[n].layer for n, k in enumerate(self.kinds) if k == kind}
            key = tuple(map(id, members.values()))
            found = self._weights.get(key)
            if found is None or not found.hold():
                found = self._weights[key] = Weights(members)
            found.refresh()
            self._ready[kind] = found
        return self._ready[kind]

    def _wave_with_graph(self, layers: Wave, states: Sequence[Tensor], *, with_weights: bool) -> _Graph:
        """The wave's evaluation with a graph from its states, and from its weights if these gradients are wanted."""
        weights = self._weights_of(layers)
        leaves = {name: t.detach() for name, t in weights.select(layers).items()}
        trained = {n: t.requires_grad_() for n, t in leaves.items() if with_weights and weights.trainable(layers, n)}
        x = joined(states).detach().requires_grad_()
        with torch.enable_grad():
            return _Graph(x, trained, self.evaluate_wave(layers, leaves, x, 0))

    def evaluate_wave(self, layers: Wave, weights: dict[str, Tensor], x: Tensor, dim: int | None) -> Tensor:
        """The steps of `layers` `[K, B, T, D]` from their states x `[K, B, T, D]` (dim 0), or from one `[B, T, D]`
        (dim None). Arguments that are one object for all are shared, other tensors stacked."""
        shared, tree = self.arguments(layers[0])
        own: dict[int, Tensor] = {}
        for j, leaf in enumerate(shared):
            found = [self.arguments(n)[0][j] for n in layers]
            if isinstance(leaf, Tensor) and not _all_same(found):
                own[j] = torch.stack(found)
        step = _Step(self.calls[layers[0]])

        def one(weights: dict[str, Tensor], x: Tensor, own: dict[int, Tensor]) -> Tensor:
            args, kwargs = tree_unflatten([own.get(j, leaf) for j, leaf in enumerate(shared)], tree)
            return functional_call(step, weights, (x, args, kwargs))

        with self.cast(), InOne():
            y = torch.vmap(one, in_dims=(0, dim, 0))(weights, x, own)
        return y.to(x.dtype)


@dataclass(frozen=True)
class _Graph:
    """A wave's evaluation: states x and results y `[K, B, T, D]`, weights `[K, ...]` by name (the trained ones)."""

    x: Tensor
    weights: dict[str, Tensor]
    y: Tensor


class Weights:
    """The parameters and buffers of layers of one kind, by name, each stacked along a new dimension 0.

    The parameters become views of their stacks: what an optimizer does to one is done to the other, and no step copies
    them. They stay ordinary parameters, each contiguous, so checkpoints are what they were. What layers share, and
    buffers, are copied by `refresh`.
    """

    def __init__(self, layers: dict[int, nn.Module]) -> None:
        self.layers = layers
        self.params = {n: {_PREFIX + k: p for k, p in layer.named_parameters()} for n, layer in layers.items()}
        self._tensors = [self.params[n] | {_PREFIX + k: b for k, b in m.named_buffers()} for n, m in layers.items()]
        self._place = {n: i for i, n in enumerate(layers)}
        uses = Counter(id(t) for tensors in self._tensors for t in tensors.values())
        self._stacked: dict[str, Tensor] = {}
        self._copied: list[str] = []
        for name in self._tensors[0]:
            members = [tensors[name] for tensors in self._tensors]
            self._stacked[name] = torch.stack([m.detach() for m in members])
            if all(type(m) is nn.Parameter and uses[id(m)] == 1 and m.is_contiguous() for m in members):
                for member, part in zip(members, self._stacked[name], strict=True):
                    member.data = part
            else:
                self._copied.append(name)

    def hold(self) -> bool:
        """Whether the parameters still lie in the stacks: a model that was moved or cast has others."""
        return all(
            tensors[name].data_ptr() == part.data_ptr() and tensors[name].dtype == part.dtype
            for name, stack in self._stacked.items()
            if name not in self._copied
            for tensors, part in zip(self._tensors, stack, strict=True)
        )

    def refresh(self) -> None:
        """Copies again what isn't a view; once a step."""
        for name in self._copied:
            self._stacked[name] = torch.stack([tensors[name].detach() for tensors in self._tensors])

    def select(self, layers: Wave) -> dict[str, Tensor]:
        places = [self._place[n] for n in layers]
        step = places[1] - places[0]
        if places == list(range(places[0], places[-1] + 1, step)):
            even = slice(places[0], places[-1] + 1, step)
            return {name: t[even] for name, t in self._stacked.items()}
        # one copy; index_select would first carry the places to the device
        return {name: torch.stack([t[i] for i in places]) for name, t in self._stacked.items()}

    def trainable(self, layers: Wave, name: str) -> bool:
        return any(name in self.params[n] and self.params[n][name].requires_grad for n in layers)


_PREFIX = "layer."


class _Step(nn.Module):
    """A layer's Euler step as a module, so that `functional_call` can put weights into it."""

    def __init__(self, call: LayerCall) -> None:
        super().__init__()
        self.layer, self._call = call.layer, call

    def forward(self, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        return self._call.step(x, args, kwargs)


def joined(states: Sequence[Tensor]) -> Tensor:
    """States stacked, `[K, ...]`; without a copy where they lie one after the other, as a wave leaves them."""
    found = lying_together(states)
    return torch.stack(list(states)) if found is None else found


def _all_same(items: Sequence[Any]) -> bool:
    return all(item is items[0] for item in items)
