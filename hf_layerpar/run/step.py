"""How a step runs: one rank's tasks of a plan in their order, messages beside them.

    plan (what to do, in which order)  ->  Step  ->  phases (the model's ends), layers, messages

`Phases` is the model as a step needs it; `hf_layerpar.ode.phases` makes one of a transformers model.

Shapes: a state is `[B, T, D]`, B the rows of a micro-batch or of a piece of one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_layerpar.compat.torch import norms_of
from hf_layerpar.plan.part import Post, RankPart
from hf_layerpar.plan.tasks import Direction, Pieces, Plan, Task, Value
from hf_layerpar.run.batched import lying_together
from hf_layerpar.run.clock import Clock
from hf_layerpar.run.increments import Increments, wide_dtype
from hf_layerpar.run.krylov import combinations, products
from hf_layerpar.run.layers import Common, Entry, Layers, mix, seed_device
from hf_layerpar.run.transport import Transport

_MOST_DIFFERENCES = 8
"""Residuals that wait for their norms: few, as each holds on to two states."""


class Phases(Protocol):
    """A model's forward in parts. `given` are the end states of the passes that are through, None for one that the
    part doesn't depend on."""

    def enter(self, place: int, micro_batch: int, given: Sequence[Tensor | None], *, real: bool) -> Entry:
        """Runs phase `place` to the entry of pass `place`. real: with a graph, on the rank that owns the phase;
        otherwise only for shapes and for what the layers are given that needs no parameters."""
        ...

    def finish(self, micro_batch: int, piece: Pieces, given: Sequence[Tensor | None]) -> Tensor | None:
        """Runs the tail on the given rows. In training its loss, a scalar with a graph; otherwise what it returns is
        the phases' own affair."""
        ...


@dataclass
class Outcome:
    """What one rank brought out of a step.

    losses: of the (micro-batch, piece)s whose tails ran here. norms: by (pass, direction), of each iteration, those of
    the residuals of this rank's intervals, in float32 or wider. penalty: that of this rank's layers.
    working, waiting: the time that it took, and the part of it spent waiting for messages.
    """

    working: Clock
    waiting: Clock
    losses: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    norms: dict[tuple[int, Direction], list[list[Tensor]]] = field(default_factory=dict)
    penalties: dict[int, Tensor] = field(default_factory=dict)

    @property
    def residuals(self) -> dict[tuple[int, Direction], Tensor]:
        """By (pass, direction), sums of squares of each iteration, `[iterations]`."""
        return {
            key: torch.stack([torch.stack(norms).square().sum() if norms else some.new_zeros(()) for norms in found])
            for key, found in self.norms.items()
            for some in [next(norm for norms in found for norm in norms)]
        }


LayersOf = Callable[[Entry, Common, int, int, Increments | None], Layers]
Penalty = Callable[[int], Increments | None]
Finished = Callable[[tuple[int, int]], None]


class Step:
    """One rank's part in one step.

    common: what all layers share. seed: for the phases' random streams, None without any. scale: what the losses are
    multiplied by before they go backward. penalty: by pass, what watches the layers' increments. finished: is told of
    a layer, by stack and place, when this step adds nothing more to its gradients. entered: phases that were run
    beforehand, by (pass, micro-batch), as `enter` runs them.
    """

    def __init__(
        self,
        part: RankPart,
        phases: Phases,
        transport: Transport,
        common: Common,
        *,
        device: torch.device,
        scale: float = 1.0,
        penalty: Penalty | None = None,
        make_layers: LayersOf = Layers,
        finished: Finished | None = None,
        entered: Mapping[tuple[int, int], Entry] | None = None,
    ) -> None:
        self.part, self.phases, self.transport, self.common = part, phases, transport, common
        self.device, self.scale, self.make_layers = device, scale, make_layers
        self.outcome = Outcome(Clock(device), Clock(device))
        passes = range(len(part.plan.passes))
        self.increments = {k: None if penalty is None else penalty(k) for k in passes}
        self._entered = dict(entered or {})
        self._finished, self._left = finished, Counter[tuple[int, int]]()
        if finished is not None:
            self._left.update(layer for group in part.groups for task in group for layer in self._adds_to(task))
        self.values: dict[int, Any] = {}
        self._arriving: dict[int, tuple[list[Any], Any]] = {}
        self._terms: dict[int, Tensor] = {}  # of all-reduces that aren't posted yet
        self._sending: list[tuple[Any, Any]] = []
        self._differences: list[tuple[list[Tensor], Tensor, Tensor]] = []
        self.layers: dict[tuple[int, int], Layers] = {}
        # of a phase that will go backward: its results, and the leaves that stand for earlier passes' ends
        self._phases: dict[tuple[int, int], tuple[list[Tensor], list[Tensor]]] = {}
        transport.open(part.plan.pairs, device)

    # ---- the loop
    def run(self) -> Outcome:
        """Works all tasks. Collective over the transport's ranks. Raises PeerLostError when another rank is gone."""
        self.work(self.part)
        return self.close()

    def close(self) -> Outcome:
        """Waits for what is still being sent."""
        self.settle()
        for k, increments in self.increments.items():
            if increments is not None:
                self.outcome.penalties[k] = increments.penalty(self.device)
        return self.outcome

    def work(self, part: RankPart, keep: Set[int] = frozenset()) -> None:
        """Works the tasks of `part`. keep: values to leave in `values`."""
        with self.outcome.working.timed(), self.transport.unbroken():
            self._post(part.posts[0])
            for i in range(len(part.groups)):
                self.work_group(part, i, keep)
            self.measure()
            for value in part.fetch:
                if value not in self.values:
                    self._await(value)

    def work_group(self, part: RankPart, i: int, keep: Set[int] = frozenset()) -> None:
        """The tasks of `part.groups[i]`, and the posts behind them."""
        group = part.groups[i]
        for task in group:
            for value in task.inputs:
                if value not in self.values:
                    self._await(value)
        if len(group) == 1:
            self._work_one(group[0], part.plan)
        else:
            self._wave(group)
        for task in group:
            for value in task.outputs:
                for total in part.contributes.get(value, ()):
                    self._terms[total] = self.values[value]
        self._post(part.posts[i + 1])
        if self._finished is not None:
            self._count(group)
        for value in part.dead_after[i]:
            if value not in keep:
                self.values.pop(value, None)
        for key in part.leaves_after[i]:
            self.layers.pop(key, None)

    def _work_one(self, task: Task, plan: Plan) -> None:
        made = self._do(task, [self.values[v] for v in task.inputs], plan)
        self.values.update(zip(task.outputs, made, strict=True))

    def _adds_to(self, task: Task) -> list[tuple[int, int]]:
        """(stack, place) of the layers whose gradients a task adds to, once for each sum that it adds to."""
        return [(name[2], name[3]) for name in self.part.plan.sums(task) if len(name) == 4]

    def _count(self, group: Sequence[Task]) -> None:
        assert self._finished is not None
        for task in group:
            for layer in self._adds_to(task):
                self._left[layer] -= 1
                if not self._left[layer]:
                    self._finished(layer)

    def settle(self) -> None:
        """Waits for what is still being sent, and for sums that only others need."""
        for handle, _ in self._sending:
            self.transport.wait(handle)
        for handles, _ in self._arriving.values():
            for handle in handles:
                self.transport.wait(handle)
        self._sending, self._arriving = [], {}

    # ---- tasks
    def _do(self, task: Task, given: list[Any], plan: Plan) -> Sequence[Any]:
        kind, k, m = task.kind, task.place, task.micro_batch
        if kind == "step":
            return self._step(task, given, plan)
        if kind == "weights":
            self._layers_of(k, m).weights(task.layers)
            return ()
        if kind == "phase":
            if task.direction == "backward":
                return self._phase_backward(k, m, given)
            return self._phase(task, given) if k < len(plan.passes) else self._tail(task, given, plan)
        if kind == "combine":
            return [combine(task.coefficients, given)]
        if kind == "collect":
            so_far = given[0] if plan.values[task.inputs[0]].kind == "sides" else None
            return [self._layers_of(k, m).collect(task.layers, so_far)]
        if kind == "residual":
            self._residual(task, given, plan)
            return ()
        if kind == "products":
            return [products(given, task.slots, plan.values[task.output].shape)]
        if kind == "least":
            return combinations(given[0], given[1:])
        if kind == "cut":
            (state,), n = given, len(task.outputs)
            bounds = [len(state) * i // n for i in range(n + 1)]
            return [state[a:b].contiguous() for a, b in pairwise(bounds)]
        return [torch.cat(given)]

    def _step(self, task: Task, given: list[Any], plan: Plan) -> Sequence[Any]:
        layers = self._layers_of(task.place, task.micro_batch)
        if task.direction == "forward":
            if not layers.sides and layers.entry.sides:
                layers.sides = given[1]
            y = layers.forward(task.layers, given[0], final=task.final, split=task.wave == -1 and self._splits(task))
            return [y, *([None] * (len(task.outputs) - 1))]
        split = len(task.outputs) > 1
        return [layers.backward(task.layers, given[0], final=task.final, split=split), *([None] if split else [])]

    def _splits(self, task: Task) -> bool:
        """Whether the weight gradients of this forward's graph will be taken apart."""
        return task.final and (task.place, task.micro_batch, min(task.layers)) in self.part.split_runs

    def _wave(self, group: Sequence[Task]) -> None:
        first = group[0]
        layers: Any = self._layers_of(first.place, first.micro_batch)
        states = [self.values[t.inputs[0]] for t in group]
        work = layers.forward_wave if first.direction == "forward" else layers.backward_wave
        results = work(tuple(t.layers[0] for t in group), states, first.final)
        for task, result in zip(group, results, strict=True):
            self.values |= dict.fromkeys(task.outputs) | {task.output: result}

    def _phase(self, task: Task, given: list[Tensor]) -> list[Any]:
        k, m = task.place, task.micro_batch
        leaves, ends = self._leaves(task, given, k)
        entry = self._entered.pop((k, m), None) or enter(self.phases, k, m, ends, self.common.seed, self.device)
        self.layers[k, m] = self.make_layers(entry, self.common, k, m, self.increments[k])
        sources = entry.sources
        self.layers[k, m].sides = [t.detach() for t in sources]
        if self.part.plan.trains:
            self._phases[k, m] = ([entry.x, *sources], leaves)
        entry.x = entry.x.detach()
        made: list[Any] = [entry.x]
        return [*made, self.layers[k, m].sides] if len(task.outputs) > 1 else made

    def _tail(self, task: Task, given: list[Tensor], plan: Plan) -> list[Tensor]:
        m, (i, n) = task.micro_batch, task.piece
        leaves, ends = self._leaves(task, given, len(plan.passes))
        seed_phase(self.common.seed, len(plan.passes), m * n + i, self.device)
        loss = self.phases.finish(m, task.piece, ends)
        if not plan.trains:
            return []
        assert loss is not None
        self.outcome.losses[m, i] = loss.detach()
        (loss if self.scale == 1 else loss * self.scale).backward()
        return [_grad_of(leaf) for leaf in leaves]

    def _phase_backward(self, k: int, m: int, given: list[Any]) -> list[Tensor]:
        results, leaves = self._phases.pop((k, m))
        grads = [given[0], *(given[1] if len(given) > 1 else [])]
        pairs = [(r, g) for r, g in zip(results, grads, strict=True) if r.requires_grad]
        if pairs:
            torch.autograd.backward([r for r, _ in pairs], [g for _, g in pairs])
        return [_grad_of(leaf) for leaf in leaves]

    def _leaves(self, task: Task, given: list[Tensor], passes: int) -> tuple[list[Tensor], list[Tensor | None]]:
        """What stands for the ends of the earlier passes: leaves of those that the phase depends on."""
        ends: list[Tensor | None] = [None] * passes
        leaves = []
        for value, state in zip(task.inputs, given, strict=True):
            leaf = state.detach()
            if self.part.plan.trains:
                leaf.requires_grad_()
            ends[self.part.plan.values[value].place] = leaf
            leaves.append(leaf)
        return leaves, ends

    def _residual(self, task: Task, given: list[Tensor], plan: Plan) -> None:
        norms = self.outcome.norms.setdefault(
            (task.place, task.direction), [[] for _ in range(plan.iterations[task.place, task.direction])]
        )
        self._differences.append((norms[task.iteration - 1], given[0], given[1]))
        if len(self._differences) == _MOST_DIFFERENCES:
            self.measure()

    def measure(self) -> None:
        """The norms of the residuals that wait for it: of several at once, in a kernel or two."""
        found: dict[torch.dtype, list[tuple[list[Tensor], Tensor]]] = {}
        for norms, a, b in self._differences:
            found.setdefault(a.dtype, []).append((norms, a - b))
        for dtype, differences in found.items():
            values = norms_of([d for _, d in differences], wide_dtype(dtype))
            for (norms, _), value in zip(differences, values, strict=True):
                norms.append(value)
        self._differences = []

    def _layers_of(self, k: int, m: int) -> Layers:
        if (k, m) not in self.layers:
            entry = self.phases.enter(k, m, [None] * k, real=False)
            self.layers[k, m] = self.make_layers(entry, self.common, k, m, self.increments[k])
        return self.layers[k, m]

    # ---- messages
    def _post(self, posts: Sequence[Post]) -> None:
        for post in posts:
            if post.kind == "send":
                self.send(post.value, post.peer)
            elif post.kind == "receive":
                like = self._like(self.part.plan.values[post.value])
                buffers = like if isinstance(like, list) else [like]
                self._arriving[post.value] = ([self.transport.receive(b, post.peer) for b in buffers], like)
            else:
                term = self._terms.pop(post.value, None)
                total = self._like(self.part.plan.values[post.value]).zero_() if term is None else term.clone()
                self._arriving[post.value] = ([self.transport.start_all_reduce(total)], total)

    def send(self, value: int, target: int) -> None:
        held = self.values[value]
        for tensor in held if isinstance(held, list) else [held]:
            tensor = tensor.contiguous()
            self._sending.append((self.transport.send(tensor, target), tensor))
        if len(self._sending) > 16:  # what has arrived needs no buffer any more
            self._sending = [(h, t) for h, t in self._sending if not self.transport.is_done(h)]

    def _await(self, value: int) -> None:
        handles, buffer = self._arriving.pop(value)
        with self.outcome.waiting.timed():
            for handle in handles:
                self.transport.wait(handle)
        self.values[value] = buffer

    def _like(self, value: Value) -> Any:
        entry = self._layers_of(value.place, value.micro_batch).entry
        if value.kind == "sides":
            return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in entry.sources]
        rows = len(entry.x)
        if value.kind == "products":
            return torch.empty((rows, *value.shape), dtype=torch.float64, device=self.device)
        i, n = value.piece
        shape = (rows * (i + 1) // n - rows * i // n, *entry.x.shape[1:])
        return torch.empty(shape, dtype=entry.x.dtype, device=self.device)


def enter(
    phases: Phases,
    place: int,
    micro_batch: int,
    given: Sequence[Tensor | None],
    seed: int | None,
    device: torch.device,
) -> Entry:
    """Runs a phase with a graph, drawing from its own random stream."""
    seed_phase(seed, place, micro_batch, device)
    return phases.enter(place, micro_batch, given, real=True)


def seed_phase(seed: int | None, place: int, number: int, device: torch.device) -> None:
    if seed is not None:
        seed_device(device, mix(seed, -2 - place, number))


def _grad_of(leaf: Tensor) -> Tensor:
    # contiguous as what arrives by a message: kernels may sum other layouts in another order
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.contiguous()


def combine(coefficients: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """Their sum; of those that lie together (what a wave made) in one operation."""
    dtype = tensors[0].dtype
    wide = wide_dtype(dtype)
    total: Tensor | None = None
    at = 0
    while at < len(tensors):
        coefficient, end = coefficients[at], at + 1
        while end < len(tensors) and coefficients[end] == coefficient:
            end += 1
        together = lying_together(tensors[at:end]) if end - at > 2 else None
        if together is None:
            tensor, at = tensors[at].to(wide), at + 1
        else:
            tensor, at = together.sum(0, dtype=wide), end
        if total is not None:
            total = torch.add(total, tensor, alpha=coefficient)
        else:
            total = tensor * coefficient if coefficient != 1 else tensor
    assert total is not None
    return total.to(dtype)
