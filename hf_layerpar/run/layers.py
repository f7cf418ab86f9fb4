"""The layers of one micro-batch's pass as functions of the state: evaluation with a graph, vjps, dropout seeds.

Gradients of parameters go to `.grad`, as in any backward.

Shapes: B rows of the micro-batch, T tokens, D hidden; a state is `[B, T, D]`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_layerpar.compat.torch import has_gradient_hooks, tree_flatten, tree_unflatten
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
    _flat: dict[int, tuple[list[Any], Any]] = field(default_factory=dict, init=False, repr=False)
    _modules: list[nn.Module] = field(default_factory=list, init=False, repr=False)

    def arguments(self, layer: int) -> tuple[list[Any], Any]:
        """What the layer was called with beside the state: leaves and tree (torch.utils._pytree)."""
        if layer not in self._flat:
            call = self.calls[layer]
            self._flat[layer] = tree_flatten((call.args, call.kwargs))
        return self._flat[layer]

    @property
    def modules(self) -> list[nn.Module]:
        """Those of all layers, as they are in this step: each once."""
        if not self._modules:
            self._modules += dict.fromkeys(m for call in self.calls for m in call.layer.modules())
        return self._modules

    @property
    def sources(self) -> list[Tensor]:
        return [self.arguments(places[0][0])[0][places[0][1]] for places in self.sides]


def sides_of(calls: Sequence[LayerCall]) -> SidePlaces:
    """Where among the layers' arguments the tensors that require grad stand."""
    places: dict[int, list[tuple[int, int]]] = {}
    for layer, call in enumerate(calls):
        for j, leaf in enumerate(tree_flatten((call.args, call.kwargs))[0]):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                places.setdefault(id(leaf), []).append((layer, j))
    return tuple(map(tuple, places.values()))


@dataclass(slots=True)
class Run:
    """The graph of final steps of some layers: from the leaf `x`, with a leaf for every side of every layer, to `y`. Of
    layers that are to be evaluated again there is `x` alone."""

    layers: tuple[int, ...]
    x: Tensor
    sides: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    y: Tensor | None = None
    record: Record | None = None


@dataclass
class Common:
    """What all layers of a step have in common.

    seed: the step's draw, or None when no layer is in training mode. Each layer of each micro-batch has a stream of its
        own, set before every evaluation: all sweeps, levels, schedules and ranks see the same dropout masks.
    recompute: keep a layer's state instead of its graph, and run its forward again in the backward; of all layers, or
        of those of which it is true.
    keeps: whether final steps keep what a backward needs.
    deferrable: the layers that were made so (by `id`).
    compiled: layers run as compiled code, which makes all gradients at once: none are taken apart.
    """

    seed: int | None = None
    recompute: bool | Callable[[nn.Module], bool] = False
    keeps: bool = True
    deferrable: set[int] = field(default_factory=set)
    compiled: bool = False

    def recomputes(self, layer: nn.Module) -> bool:
        return self.recompute if isinstance(self.recompute, bool) else self.recompute(layer)


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
        self._side_of: dict[int, dict[int, int]] = {}  # layer -> leaf -> side
        for side, places in enumerate(entry.sides):
            for layer, leaf in places:
                self._side_of.setdefault(layer, {})[leaf] = side
        self.sides: list[Tensor] = []
        self._tape: dict[int, list[Run]] = {}  # by the lowest layer of a task
        self._pending: dict[int, list[Record]] = {}
        self._side_grads: dict[tuple[int, int], Tensor] = {}  # (layer, side)

    def arguments(self, layer: int) -> tuple[list[Any], Any]:
        """As `Entry.arguments`."""
        return self.entry.arguments(layer)

    # ---- forward
    def forward(self, layers: Sequence[int], x: Tensor, *, final: bool = False, split: bool = False) -> Tensor:
        """The steps of a run of layers, without graph, or (final, in training) with one that is kept for the vjps.

        split: weight gradients of linear modules (see `deferral`) will be taken apart.
        """
        if final and self.common.keeps:
            tape = self._tape[min(layers)] = []
            for part in self._parts(layers):
                if self._keeps(part):
                    run = self._with_graph(part, x, split=split)
                    assert run.y is not None
                    y = run.y.detach()
                else:
                    run = Run(part, x)
                    y = self._without_graph(part, x)
                if self.increments is not None:
                    self.increments.note(part[0], self.micro_batch, x, y)
                tape.append(run)
                x = y
            return x
        return self._without_graph(layers, x)

    # ---- backward
    def backward(self, layers: Sequence[int], lam: Tensor, *, final: bool = False, split: bool = False) -> Tensor:
        """The input-vjp of a run of layers (the last one first) at its final states; if final, gradients of parameters
        go to `.grad`, those of sides wait for `collect`. The run must be one that `forward` was given.

        With a penalty on its increment d, a step's adjoint is affine: lam -> J^T (lam + s) - s, s = dR/dd.
        """
        key = min(layers)
        tape = self._tape.pop(key) if final else self._tape[key]
        records: list[Record] = []
        for place in reversed(range(len(tape))):
            run = tape.pop() if final else tape[place]  # freed as soon as it is done
            if run.y is None:
                again = any(self.common.recomputes(self.calls[n].layer) for n in run.layers)
                run = self._with_graph(run.layers, run.x, split=split)
                if not final and not again:
                    tape[place] = run
            assert run.y is not None
            source = None if self.increments is None else self.increments.source(run.layers[0], run.x, run.y)
            if source is not None:
                lam = lam + source
            if final:
                if run.record is not None:
                    run.record.wanted = True
                    records.append(run.record)
                torch.autograd.backward(run.y, lam)
                grad = run.x.grad
                for where, leaf in run.sides.items():
                    if leaf.grad is not None:
                        self._side_grads[where] = leaf.grad
            else:
                grad = torch.autograd.grad(run.y, run.x, lam, retain_graph=True)[0]
            assert grad is not None, f"layers {tuple(layers)} don't depend on their state"
            lam = grad if source is None else grad - source
        if split:
            self._pending[key] = records
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
        return not any(self.common.recomputes(self.calls[n].layer) for n in layers)

    def _parts(self, layers: Sequence[int]) -> Iterator[tuple[int, ...]]:
        """The layers of a run that have one graph: those that follow each other; each alone where it is evaluated
        again, or where increments are looked at."""
        part: tuple[int, ...] = ()
        for layer in layers:
            alone = self.increments is not None or self.common.recomputes(self.calls[layer].layer)
            if part and alone:
                yield part
                part = ()
            part = (*part, layer)
            if alone:
                yield part
                part = ()
        if part:
            yield part

    def _without_graph(self, layers: Sequence[int], x: Tensor) -> Tensor:
        with torch.no_grad():
            for layer in layers:
                x = self._evaluate(layer, x, {})
        return x

    def _with_graph(self, layers: Sequence[int], x: Tensor, *, split: bool = False) -> Run:
        record = Record() if split and not self.common.compiled else None
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
        return Run(tuple(layers), start, used, y, record)

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
    if has_gradient_hooks(param):
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
