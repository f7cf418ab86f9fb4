"""The layers of one forward as functions of the state: evaluation with a graph, vjps, dropout seeds, micro-batches.

Shapes: B batch, T tokens, D hidden; a state is `[B, T, D]`, a micro-batch holds some rows of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise, starmap
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from hf_layerpar.errors import ConfigurationError, UnsupportedModelError
from hf_layerpar.mgrit.plan import Direction
from hf_layerpar.parallel.deferral import PendingGradient, collecting, recording
from hf_layerpar.parallel.executor import Evaluator, Fit, Observe
from hf_layerpar.parallel.increments import Increments


class LayerCall(Protocol):
    """One layer's recorded call: the layer, and the arguments it was given beside the state."""

    layer: nn.Module
    args: tuple
    kwargs: dict[str, Any]

    def step(self, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """One Euler step from x, with the arguments given here (the recorded ones, or slices of them)."""
        ...


@dataclass(slots=True)
class _Recorded:
    """The graph of a run of final steps: from the leaf `x`, with a leaf for every side tensor of every layer (each with
    its place in `Program.side`), to `y`."""

    x: Tensor
    sides: list[tuple[int, Tensor]]
    y: Tensor


class Program:
    """A stack's recorded calls, made ready for evaluation in any order and any number of times.

    side: the tensors among the recorded arguments that require grad (encoder states, position biases), each once, in
        an order that is the same on every rank.
    params: the trainable parameters that this rank holds, each once.
    micro_batches: pieces to cut the batch into, at most its size.
    recompute: keep states instead of graphs, and run a layer's forward again in the backward.
    split_weights: weight gradients of linear modules (see `deferral`) wait for `weights` after the final vjp.
    autocast: the dtype of the autocast that the forward runs under, or None.
    seed: the stack's draw for this forward, or None when no layer is in training mode. Each layer of each micro-batch
        has a stream of its own, set before every evaluation: all sweeps, levels and ranks see the same dropout masks.
    increments: what watches and penalises the increments of the final steps, if anything does.
    """

    def __init__(
        self,
        calls: Sequence[LayerCall],
        x: Tensor,
        *,
        micro_batches: int,
        seed: int | None,
        recompute: bool,
        split_weights: bool = False,
        increments: Increments | None = None,
    ) -> None:
        self.increments = increments
        self.calls, self.seed, self.recompute, self.split_weights = calls, seed, recompute, split_weights
        self.device, self.batch_size = x.device, x.shape[0]
        self.micro_batches = micro_batches
        bounds = [self.batch_size * m // self.micro_batches for m in range(self.micro_batches + 1)]
        self.rows = list(starmap(slice, pairwise(bounds)))
        kind = x.device.type
        self.autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

        self.side: list[Tensor] = []
        side_place: dict[int, int] = {}
        self._arguments: list[tuple[list[Any], Any, dict[int, int]]] = []  # leaves, tree, leaf -> side
        for call in calls:
            leaves, tree = tree_flatten((call.args, call.kwargs))
            places = {}
            for j, leaf in enumerate(leaves):
                if isinstance(leaf, Tensor) and leaf.requires_grad:
                    places[j] = side_place.setdefault(id(leaf), len(self.side))
                    if places[j] == len(self.side):
                        self.side.append(leaf)
            self._arguments.append((leaves, tree, places))
        self._layer_params = [[p for p in call.layer.parameters() if p.requires_grad] for call in calls]
        self.params: list[nn.Parameter] = list(dict.fromkeys(p for ps in self._layer_params for p in ps))
        self._param_place = {p: i for i, p in enumerate(self.params)}

        self._slices: dict[tuple[int, int], Tensor] = {}
        # (lowest layer, micro-batch) -> final steps of a run, or its first state alone when the graph is spent
        self._tape: dict[tuple[int, int], _Recorded | Tensor] = {}
        self._keep_graphs = False
        self._pending: dict[tuple[int, int], list[PendingGradient]] = {}
        self.param_grads: list[Tensor | None] = []
        self._own_grads: set[int] = set()  # those that nobody else can hold, so that they may be added to in place
        self.side_grads: list[Tensor] = []

    kinds: tuple[int, ...] | None = None
    """Of a program that evaluates waves: a number for each layer, equal for those that can share one."""

    def evaluator(self, direction: Direction, fit: Fit, observe: Observe) -> Evaluator:
        step = self.forward_step if direction == "forward" else self.backward_step
        return Evaluator(step, self.weights, fit, observe)

    def arguments(self, layer: int) -> tuple[list[Any], Any]:
        """What the layer was called with beside the state: leaves and tree (torch.utils._pytree)."""
        leaves, tree, _ = self._arguments[layer]
        return leaves, tree

    def split(self, x: Tensor) -> list[Tensor]:
        """A full-batch state as one state per micro-batch."""
        return [x[rows] for rows in self.rows] if self.micro_batches > 1 else [x]

    def join(self, states: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(states)) if self.micro_batches > 1 else states[0]

    # ---- forward
    def forward_step(self, layers: Sequence[int], micro_batch: int, x: Tensor, final: bool) -> Tensor:
        """The steps of a run of layers, without graph, or (final, in grad mode) with one that is kept for the vjps.

        With a penalty on increments every run is a single layer.
        """
        kept = final and self._keep_graphs
        if kept and self._keeps(tuple(layers)):
            entry = self._with_graph(layers, micro_batch, x)
            self._tape[min(layers), micro_batch] = entry
            y = entry.y.detach()
        else:
            if kept:
                self._tape[min(layers), micro_batch] = x
            y = x
            with torch.no_grad():
                for layer in layers:
                    y = self._evaluate(layer, micro_batch, y, self._sides(layer, micro_batch))
        if kept and self.increments is not None:
            self.increments.note(layers[0], micro_batch, x, y)
        return y

    @contextmanager
    def running(self, *, keep_graphs: bool) -> Iterator[None]:
        """Around a solve: the caller's random stream is put back afterwards, whatever the layers drew."""
        self._keep_graphs = keep_graphs
        if self.seed is None:
            yield
            return
        devices = [] if self.device.type == "cpu" else [self.device]
        with torch.random.fork_rng(devices, device_type=self.device.type if devices else "cuda"):
            yield

    # ---- backward
    def begin_backward(self) -> None:
        self.param_grads, self._own_grads = [None] * len(self.params), set()
        self.side_grads = [torch.zeros_like(t) for t in self.side]

    def take_gradients(self) -> tuple[list[Tensor], list[Tensor | None]]:
        """The gradients of the side tensors and of the parameters, handed over: autograd copies a gradient that
        somebody else still holds."""
        taken = self.side_grads, self.param_grads
        self.side_grads, self.param_grads = [], []
        return taken

    def backward_step(self, layers: Sequence[int], micro_batch: int, lam: Tensor, final: bool) -> Tensor:
        """The input-vjp of a run of layers (the last one first) at its final states; if final also the gradients of
        parameters and side tensors. The run must be one that `forward_step` was given.

        With a penalty on its increment d, a step's adjoint is affine: lam -> J^T (lam + s) - s, s = dR/dd.
        """
        key = min(layers), micro_batch
        entry = self._tape[key]
        if isinstance(entry, Tensor):
            entry = self._with_graph(sorted(layers), micro_batch, entry)
            if not self.recompute:  # this backward's earlier vjps and its final one share the graph
                self._tape[key] = entry
        source = self.increments.source(layers[0], entry.x, entry.y) if self.increments is not None else None
        if source is not None:
            lam = lam + source
        if not final:
            with collecting(None):
                grad = torch.autograd.grad(entry.y, entry.x, lam, retain_graph=True)[0]
            return grad if source is None else grad - source
        # the last layer's first, the order in which the plain model's backward sums them up
        places = [place for place, _ in reversed(entry.sides)]
        sides = [side for _, side in reversed(entry.sides)]
        params = list(dict.fromkeys(p for layer in layers for p in self._layer_params[layer]))
        pending: list[PendingGradient] = []
        with collecting(pending):
            grads = torch.autograd.grad(entry.y, [entry.x, *sides, *params], lam, allow_unused=True)
        if pending:
            self._pending[key] = pending
        # the graph is spent; a second backward (retain_graph=True) evaluates the layers again from their state
        self._tape[key] = entry.x.detach()
        for place, grad in zip(places, grads[1 : 1 + len(sides)], strict=True):
            if grad is not None:
                self._rows_of(self.side_grads[place], micro_batch).add_(grad)
        for param, grad in zip(params, grads[1 + len(sides) :], strict=True):
            if grad is not None:
                self._add_gradient(param, grad)
        assert grads[0] is not None, f"layers {tuple(layers)} don't depend on their state"
        return grads[0] if source is None else grads[0] - source

    def weights(self, layer: int, micro_batch: int) -> None:
        """The weight gradients that the final vjp of this layer (of its own, not in a run) left to do."""
        with torch.no_grad():
            for pending in self._pending.pop((layer, micro_batch), ()):
                for param, grad in pending.gradients():
                    self._add_gradient(param, grad)

    # ---- inside
    def _keeps(self, layers: tuple[int, ...]) -> bool:
        """Whether the graph of a final evaluation of these layers together is kept."""
        return not self.recompute

    def _add_gradient(self, param: nn.Parameter, grad: Tensor) -> None:
        place = self._param_place[param]
        so_far = self.param_grads[place]
        if so_far is None:
            self.param_grads[place] = grad
        elif place in self._own_grads:
            so_far.add_(grad)
        else:
            self.param_grads[place] = so_far + grad
            self._own_grads.add(place)

    def _with_graph(self, layers: Sequence[int], micro_batch: int, x: Tensor) -> _Recorded:
        used: list[tuple[int, Tensor]] = []
        with torch.enable_grad(), recording() if self.split_weights else nullcontext():
            start = y = x.detach().requires_grad_()
            for layer in layers:
                sides = {p: t.detach().requires_grad_() for p, t in self._sides(layer, micro_batch).items()}
                used += sides.items()
                y = self._evaluate(layer, micro_batch, y, sides)
        return _Recorded(start, used, y)

    def _evaluate(self, layer: int, micro_batch: int, x: Tensor, sides: dict[int, Tensor]) -> Tensor:
        leaves, tree, places = self._arguments[layer]
        if places or self.micro_batches > 1:
            leaves = [
                sides[places[j]]
                if j in places
                else self._slice(leaf, micro_batch)
                if isinstance(leaf, Tensor)
                else leaf
                for j, leaf in enumerate(leaves)
            ]
            args, kwargs = tree_unflatten(leaves, tree)
        else:
            args, kwargs = self.calls[layer].args, self.calls[layer].kwargs
        if self.seed is not None:
            self._seed(mix(self.seed, layer, micro_batch))
        with self._cast():
            y = self.calls[layer].step(x, args, kwargs)
        if y.shape != x.shape:
            raise UnsupportedModelError(
                f"layer {layer} ({type(self.calls[layer].layer).__name__}) maps a state of shape {tuple(x.shape)} to "
                f"{tuple(y.shape)}; layer-parallel solving needs states of one shape"
            )
        return y.to(x.dtype)  # autocast may narrow it; the state keeps the dtype it entered the stack with

    def _cast(self) -> AbstractContextManager[Any]:
        """The autocast of the forward, also in the backward."""
        if self.autocast is None:
            return nullcontext()
        # no cache: a weight cast made without graph would lose its gradient in the final relaxation
        return torch.autocast(self.device.type, dtype=self.autocast, cache_enabled=False)

    def _sides(self, layer: int, micro_batch: int) -> dict[int, Tensor]:
        return {p: self._slice(self.side[p], micro_batch) for p in self._arguments[layer][2].values()}

    def _slice(self, tensor: Tensor, micro_batch: int) -> Tensor:
        """The micro-batch's rows of a recorded argument, or all of it where it has no batch dimension."""
        if self.micro_batches == 1:
            return tensor
        key = (id(tensor), micro_batch)  # the tensors live as long as the calls
        if key not in self._slices:
            self._slices[key] = self._rows_of(tensor, micro_batch)
        return self._slices[key]

    def _rows_of(self, tensor: Tensor, micro_batch: int) -> Tensor:
        if self.micro_batches == 1 or not self._is_batched(tensor):
            return tensor
        return tensor[self.rows[micro_batch]]

    def _is_batched(self, tensor: Tensor) -> bool:
        """Whether dimension 0 is the batch. Of the `[x, y]` tensors only integers and booleans are (masks, positions);
        floating-point ones are tables such as DeBERTa's relative embeddings."""
        if tensor.ndim < 2 or tensor.shape[0] == 1:
            return False
        if tensor.ndim == 2 and (tensor.is_floating_point() or tensor.shape[0] != self.batch_size):
            return False
        if tensor.shape[0] == self.batch_size:
            return True
        raise ConfigurationError(
            f"micro_batches={self.micro_batches} can't cut a layer argument of shape {tuple(tensor.shape)} whose first "
            f"dimension is neither 1 nor the batch size {self.batch_size}; use micro_batches=1"
        )

    def _seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)


def mix(seed: int, first: int, second: int) -> int:
    """A well-spread seed for every pair of small numbers (the finaliser of splitmix64)."""
    z = (seed + 0x9E3779B97F4A7C15 * (first + 1) + 0xD1B54A32D192ED03 * second) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (z ^ (z >> 31)) & 0x7FFFFFFFFFFFFFFF
