"""The layers of one micro-batch's pass as functions of the state: evaluation with a graph, vjps, dropout seeds.

Gradients of parameters go to `.grad`, as in any backward.

Shapes: B rows of the micro-batch, T tokens, D hidden; a state is `[B, T, D]`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from hf_layerpar.errors import UnsupportedModelError
from hf_layerpar.run.deferral import Record, make_deferrable, recording
from hf_layerpar.run.increments import Increments

SidePlaces = tuple[tuple[tuple[int, int], ...], ...]
"""For each side of a pass, where the layers are given it: (layer, leaf among its arguments)."""


class LayerCall(Protocol):
    """One layer's recorded call: the layer, and the arguments it was given beside the state."""

    layer: nn.Module
    args: tuple
    kwargs: dict[str, Any]

    def step(self, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """One Euler step from x, with the arguments given here (the recorded ones, or copies of them)."""
        ...


@dataclass
class Entry:
    """The entry of a pass, as a forward came by it.

    x: the state; on a rank that doesn't own the phase before, one of the same shape and dtype.
    sides: places of the sides among the layers' arguments. source: the tensors that stand there.
    autocast: the dtype of the autocast that the layers run under, or None.
    """

    x: Tensor
    calls: Sequence[LayerCall]
    sides: SidePlaces = ()
    autocast: torch.dtype | None = None

    @property
    def sources(self) -> list[Tensor]:
        flat = {}
        for places in self.sides:
            layer, _ = places[0]
            if layer not in flat:
                flat[layer] = tree_flatten((self.calls[layer].args, self.calls[layer].kwargs))[0]
        return [flat[places[0][0]][places[0][1]] for places in self.sides]


def sides_of(calls: Sequence[LayerCall]) -> SidePlaces:
    """Where among the layers' arguments the tensors that require grad stand."""
    places: dict[int, list[tuple[int, int]]] = {}
    for layer, call in enumerate(calls):
        for j, leaf in enumerate(tree_flatten((call.args, call.kwargs))[0]):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                places.setdefault(id(leaf), []).append((layer, j))
    return tuple(map(tuple, places.values()))


def autocast_of(x: Tensor) -> torch.dtype | None:
    """The dtype of the autocast that is on, or None."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


@dataclass(slots=True)
class _Run:
    """The graph of final steps of some layers: from the leaf `x`, with a leaf for every side of every layer, to `y`."""

    x: Tensor
    sides: dict[tuple[int, int], Tensor]
    y: Tensor
    record: Record | None = None


@dataclass
class Common:
    """What all layers of a step have in common.

    seed: the step's draw, or None when no layer is in training mode. Each layer of each micro-batch has a stream of its
        own, set before every evaluation: all sweeps, levels, schedules and ranks see the same dropout masks.
    recompute: keep states instead of graphs, and run a layer's forward again in the backward.
    keeps: whether final steps keep what a backward needs.
    deferrable: the layers that were made so (by `id`).
    """

    seed: int | None = None
    recompute: bool = False
    keeps: bool = True
    deferrable: set[int] = field(default_factory=set)


class Layers:
    """An entry's layers, ready for evaluation in any order and any number of times.

    place, micro_batch: of the pass, for the random streams. increments: what watches and penalises the increments of
    the final steps, if anything does.
    """

    def __init__(
        self, entry: Entry, common: Common, place: int, micro_batch: int, increments: Increments | None = None
    ) -> None:
        self.entry, self.calls, self.common, self.increments = entry, entry.calls, common, increments
        self.place, self.micro_batch = place, micro_batch
        self.device = entry.x.device
        self._leaves: dict[int, tuple[list[Any], Any]] = {}
        self._side_of: dict[int, dict[int, int]] = {}  # layer -> leaf -> side
        for side, places in enumerate(entry.sides):
            for layer, leaf in places:
                self._side_of.setdefault(layer, {})[leaf] = side
        self.sides: list[Tensor] = []
        # lowest layer of a run -> its graph, or its first state alone where that is recomputed
        self._tape: dict[int, list[_Run] | Tensor] = {}
        self._pending: dict[int, list[Record]] = {}
        self._side_grads: dict[tuple[int, int], Tensor] = {}  # (layer, side)

    def arguments(self, layer: int) -> tuple[list[Any], Any]:
        """What the layer was called with beside the state: leaves and tree (torch.utils._pytree)."""
        if layer not in self._leaves:
            call = self.calls[layer]
            self._leaves[layer] = tree_flatten((call.args, call.kwargs))
        return self._leaves[layer]

    # ---- forward
    def forward(self, layers: Sequence[int], x: Tensor, *, final: bool = False, split: bool = False) -> Tensor:
        """The steps of a run of layers, without graph, or (final, in training) with one that is kept for the vjps.

        split: weight gradients of linear modules (see `deferral`) will be taken apart.
        """
        kept = final and self.common.keeps
        if kept and self._keeps(tuple(layers)):
            runs, y = self._with_graphs(layers, x, split=split)
            self._tape[min(layers)] = runs
            if self.increments is not None:
                for layer, run in zip(layers, runs, strict=True):
                    self.increments.note(layer, self.micro_batch, run.x, run.y)
            return y.detach()
        if kept:
            self._tape[min(layers)] = x
        with torch.no_grad():
            for layer in layers:
                y = self._evaluate(layer, x, {})
                if kept and self.increments is not None:
                    self.increments.note(layer, self.micro_batch, x, y)
                x = y
        return x

    # ---- backward
    def backward(self, layers: Sequence[int], lam: Tensor, *, final: bool = False, split: bool = False) -> Tensor:
        """The input-vjp of a run of layers (the last one first) at its final states; if final, gradients of parameters
        go to `.grad`, those of sides wait for `collect`. The run must be one that `forward` was given.

        With a penalty on its increment d, a step's adjoint is affine: lam -> J^T (lam + s) - s, s = dR/dd.
        """
        key = min(layers)
        tape = self._tape[key]
        if isinstance(tape, Tensor):
            tape, _ = self._with_graphs(sorted(layers), tape, split=split)
            if not final and not self.common.recompute:
                self._tape[key] = tape
        if final:
            self._tape.pop(key)
        for layer, run in zip(sorted(layers)[::-1], tape[::-1], strict=False):
            source = None if self.increments is None else self.increments.source(layer, run.x, run.y)
            if source is not None:
                lam = lam + source
            if final:
                if run.record is not None:
                    run.record.wanted = True
                torch.autograd.backward(run.y, lam)
                grad = run.x.grad
                for place, leaf in run.sides.items():
                    if leaf.grad is not None:
                        self._side_grads[place] = leaf.grad
            else:
                grad = torch.autograd.grad(run.y, run.x, lam, retain_graph=True)[0]
            assert grad is not None, f"layers {tuple(layers)} don't depend on their state"
            lam = grad if source is None else grad - source
        if split:
            self._pending[key] = [run.record for run in tape if run.record is not None]
        return lam

    def weights(self, layers: Sequence[int]) -> None:
        """The weight gradients that the final vjp of this run left to do."""
        with torch.no_grad():
            for record in self._pending.pop(min(layers)):
                # a module may be called twice: added up as autograd does it, before they are added to `.grad`
                calls = Counter(id(pending.module) for pending in record.pending)
                sums: dict[nn.Parameter, Tensor] = {}
                record.pending.reverse()
                while record.pending:  # each is freed as soon as it is done
                    pending = record.pending.pop()
                    calls[id(pending.module)] -= 1
                    for param, grad in pending.gradients():
                        sums[param] = sums[param] + grad if param in sums else grad
                        if not calls[id(pending.module)]:
                            add_gradient(param, sums.pop(param))

    def collect(self, layers: Sequence[int], so_far: Sequence[Tensor] | None) -> list[Tensor]:
        """The gradients of the sides: those of the layers behind, and of `layers` one after the other."""
        found = [torch.zeros_like(side) for side in self.sides] if so_far is None else [t.clone() for t in so_far]
        for layer in layers:
            for side in range(len(self.sides)):
                grad = self._side_grads.pop((layer, side), None)
                if grad is not None:
                    found[side] += grad
        return found

    # ---- inside
    def _keeps(self, layers: tuple[int, ...]) -> bool:
        """Whether the graph of a final evaluation of these layers together is kept."""
        return not self.common.recompute

    def _with_graphs(self, layers: Sequence[int], x: Tensor, *, split: bool) -> tuple[list[_Run], Tensor]:
        """One graph for all layers; one for each where their increments are looked at."""
        if self.increments is None:
            run = self._with_graph(layers, x, split=split)
            return [run], run.y
        runs = []
        for layer in layers:
            runs.append(self._with_graph([layer], x, split=split))
            x = runs[-1].y.detach()
        return runs, x

    def _with_graph(self, layers: Sequence[int], x: Tensor, *, split: bool = False) -> _Run:
        record = Record() if split else None
        used: dict[tuple[int, int], Tensor] = {}
        with torch.enable_grad(), nullcontext() if record is None else recording(record):
            start = y = x.detach().requires_grad_()
            for layer in layers:
                module = self.calls[layer].layer
                if record is not None and id(module) not in self.common.deferrable:
                    make_deferrable(module)
                    self.common.deferrable.add(id(module))
                mine = {s: self.sides[s].detach().requires_grad_() for s in set(self._side_of.get(layer, {}).values())}
                used |= {(layer, s): leaf for s, leaf in mine.items()}
                y = self._evaluate(layer, y, mine)
        return _Run(start, used, y, record)

    def _evaluate(self, layer: int, x: Tensor, sides: dict[int, Tensor]) -> Tensor:
        call = self.calls[layer]
        args, kwargs = call.args, call.kwargs
        if places := self._side_of.get(layer):
            leaves, tree = self.arguments(layer)
            leaves = [
                (sides.get(places[j], self.sides[places[j]]) if j in places else leaf) for j, leaf in enumerate(leaves)
            ]
            args, kwargs = tree_unflatten(leaves, tree)
        if self.common.seed is not None:
            seed_device(self.device, mix(self.common.seed, layer, self.micro_batch, self.place))
        with self.cast():
            y = call.step(x, args, kwargs)
        if y.shape != x.shape:
            raise UnsupportedModelError(
                f"layer {layer} ({type(call.layer).__name__}) maps a state of shape {tuple(x.shape)} to "
                f"{tuple(y.shape)}; layer-parallel solving needs states of one shape"
            )
        return y.to(x.dtype)  # autocast may narrow it; the state keeps the dtype it entered the stack with

    def cast(self) -> AbstractContextManager[Any]:
        """The autocast of the forward, also in the backward."""
        if self.entry.autocast is None:
            return nullcontext()
        # no cache: a weight cast made without graph would lose its gradient in the final relaxation
        return torch.autocast(self.device.type, dtype=self.entry.autocast, cache_enabled=False)


def add_gradient(param: nn.Parameter, grad: Tensor) -> None:
    """To `.grad`, in place where there is one; by autograd (and with a copy) where hooks wait for it."""
    held: Any = param
    if held._backward_hooks or held._post_accumulate_grad_hooks:
        torch.autograd.backward(param, grad)
    elif param.grad is None:
        param.grad = grad
    else:
        param.grad.add_(grad)


@contextmanager
def kept_streams(device: torch.device) -> Iterator[None]:
    """What is drawn inside leaves the random streams where they were."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        yield


def seed_device(device: torch.device, seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def mix(seed: int, *numbers: int) -> int:
    """A well-spread seed for every tuple of small numbers (the finaliser of splitmix64)."""
    odd = (0x9E3779B97F4A7C15, 0xD1B54A32D192ED03, 0x8CB92BA72F3D8DD7)
    z = (seed + sum(a * (n + 1) for a, n in zip(odd, numbers, strict=False))) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (z ^ (z >> 31)) & 0x7FFFFFFFFFFFFFFF
