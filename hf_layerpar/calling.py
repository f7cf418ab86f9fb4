"""A parallelized model called as any other: `model(**batch)`, for evaluation, generation, and outputs in hand.

Every rank runs the model's own forward up to its stacks; these are solved over the ranks; the rank with the head goes
on and hands its output to all. Without gradient a batch is cut into micro-batches where its output can be put together.
With gradient nothing is cut: the output is in the caller's hands before the first vjp, so the backward waits for all of
the forward (`train_step` doesn't).

Shapes: a state is `[B, T, D]`.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from hf_layerpar.compat.torch import (
    after_backward,
    autocast_of,
    inside_ddp,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_unflatten,
)
from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.errors import ConfigurationError
from hf_layerpar.ode.model_forward import ModelForward
from hf_layerpar.ode.phases import ModelPhases, Reached
from hf_layerpar.ode.rehearsal import (
    Player,
    Rehearsed,
    batch_rows,
    check_parts,
    cut_rows,
    recount,
    rehearse,
    rehearse_parts,
    signature_of,
)
from hf_layerpar.ode.stack import NeedsSerialError, RecordedCall
from hf_layerpar.plan.ladder import exact_settings
from hf_layerpar.plan.part import RankPart
from hf_layerpar.plan.step import Anatomy, build_step
from hf_layerpar.plan.tasks import Plan, Task
from hf_layerpar.refusals import refused_wrapper
from hf_layerpar.run.layers import Common, Entry, Layers, kept_streams
from hf_layerpar.run.sharing import share
from hf_layerpar.run.step import Step
from hf_layerpar.run.transport import Attempt, GroupTransport
from hf_layerpar.shared_gradients import sum_over_ranks
from hf_layerpar.stepping import Stepper


class Calls:
    """The runner of a parallelized model's forwards. settings: of the next one."""

    def __init__(self, stepper: Stepper, settings: Callable[[], LayerParallelConfig]) -> None:
        self.stepper, self.settings = stepper, settings
        self._rehearsed: dict[tuple, Rehearsed] = {}

    def __call__(self, forward: ModelForward, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The output, on every rank. Collective.

        Raises RankMismatchError on all ranks for other inputs, UnsupportedModelError for what needs every layer's value
        on one rank.
        """
        if torch.is_grad_enabled():
            self.stepper.gather()  # for as long as gradients wait to be averaged
            return self._called(forward, args, kwargs)
        with self.stepper.whole():
            return self._called(forward, args, kwargs)

    def _called(self, forward: ModelForward, args: tuple, kwargs: dict[str, Any]) -> Any:
        stepper, config, grad = self.stepper, self.settings(), torch.is_grad_enabled()
        if grad and (config.stacked or config.cuda_graphs):
            warnings.warn(
                "stacked and cuda_graphs are for train_step and the Trainer; a call of the model works its layers one "
                "by one",
                stacklevel=3,
            )
        inexact = grad and (config.strategy == "mgrit" or config.increment_penalty)
        if stepper.transport.size == 1 and not inexact:
            return forward.run(args, kwargs)
        kwargs = _with_cache(forward, args, kwargs)
        batch = (args, kwargs)
        main = getattr(forward.model, "main_input_name", None)
        rows = batch_rows(kwargs if main in kwargs else batch, main)
        with kept_streams(stepper.device):
            found = Attempt(lambda: self._rehearse(forward, batch, rows))
        if inside_ddp():  # of a module around the model
            found.error = found.error or refused_wrapper(stepper.transport.size)
        if isinstance(found.error, NeedsSerialError) and stepper.transport.size == 1:
            warnings.warn(f"this forward runs layer by layer, not as the settings say: {found.error}", stacklevel=3)
            return forward.run(args, kwargs)
        seed = stepper.draw_seed()
        doing = {"a call of": type(forward.model).__name__, "gradients": grad}
        stepper.agree(doing, batch, config, seed, found.value, found.error)
        rehearsed = found.given()
        if not grad:
            config = exact_settings(config)
            parts = self._parts(config, batch, rows, rehearsed)
            if parts is not None:
                return self._in_parts(config, batch, rows, parts, rehearsed, forward, seed)
        config = dataclasses.replace(config, micro_batches=1, ends="first_last", stacked=False, cuda_graphs=False)
        return _Call(stepper, config, rehearsed, seed, rows, grad).run(forward, args, kwargs)

    def _rehearse(self, forward: ModelForward, batch: Any, rows: int) -> Rehearsed:
        """What is known of such a call; a loss that can't be put together from parts has no terms in it."""
        model = forward.model
        key = (id(model), signature_of(batch, rows), rows > 1, model.training, torch.is_grad_enabled())
        found = self._rehearsed.get(key)
        if found is None:
            grad, stepper = torch.is_grad_enabled(), self.stepper
            found = rehearse(_runs(forward), batch, stepper.stacks, stepper.ends, loss=False, trains=grad)
            if found.terms is not None and not grad and rows > 1:
                try:
                    halves = rehearse_parts(
                        _runs(forward),
                        cut_rows(batch, rows, 2),
                        stepper.stacks,
                        stepper.ends,
                        "micro_batches",
                        loss=False,
                        trains=False,
                    )
                    check_parts(found, halves, "micro_batches")
                except ConfigurationError:
                    found = dataclasses.replace(found, terms=None)
            kinds = tree_map(lambda leaf: _kind_of(leaf, rows), found.output)
            self._rehearsed[key] = found = dataclasses.replace(found, output=kinds)
        return found

    # ---- without gradient, in micro-batches
    def _parts(self, config: LayerParallelConfig, batch: Any, rows: int, rehearsed: Rehearsed) -> list[Any] | None:
        """The batch's micro-batches, where its output is made of rows and perhaps a loss of known terms."""
        pieces = min(config.micro_batches, rows)
        caching = any(isinstance(leaf, Cache) for leaf in tree_leaves(batch))
        if pieces < 2 or caching:
            return None
        kinds = tree_leaves(rehearsed.output)
        if "other" in kinds or kinds.count("scalar") > (rehearsed.terms is not None):
            return None
        try:
            return cut_rows(batch, rows, pieces)
        except ConfigurationError:
            return None

    def _in_parts(
        self,
        config: LayerParallelConfig,
        batch: Any,
        rows: int,
        parts: list[Any],
        rehearsed: Rehearsed,
        forward: ModelForward,
        seed: int | None,
    ) -> Any:
        stepper, pieces = self.stepper, len(parts)
        terms = rehearsed.terms
        if terms is not None and any(term.count is not None for term in terms):  # this batch's counts
            with kept_streams(stepper.device):
                terms = recount(_runs(forward), batch, stepper.stacks, stepper.ends, terms, trains=False)
        counts = [rows * (m + 1) // pieces - rows * m // pieces for m in range(pieces)]
        anatomy = stepper.anatomy(rehearsed)
        plan = build_step(config, anatomy, stepper.transport.size, len(parts), trains=False)
        phases = ModelPhases(
            _runs(forward), parts, counts, stepper.stacks, stepper.ends, rehearsed, Entry, terms=terms, trains=False
        )
        with kept_streams(stepper.device):
            part = RankPart.of(plan, stepper.transport.rank)
            Step(part, phases, stepper.transport, Common(seed, keeps=False), device=stepper.device).run()
        joined = _joined([phases.outputs[m, 0] for m in range(len(parts))]) if phases.outputs else None
        return _handed_out(joined, stepper, anatomy.ranks[-1], None)


def _runs(forward: ModelForward) -> Callable[[Any], Any]:
    return lambda batch: forward.run(*batch)


def _kind_of(leaf: Any, rows: int) -> str:
    """What can be put together from parts of a batch of so many rows: "rows" and "scalar" (a loss), not "other"."""
    if not isinstance(leaf, Tensor):
        return type(leaf).__name__
    return ("rows" if len(leaf) == rows else "other") if leaf.ndim else "scalar"


def _with_cache(forward: ModelForward, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A cache that the model would make itself is made here, so that its layers and its head see one."""
    given = forward.named(args, kwargs)
    wanted = given.get("use_cache") and given.get("past_key_values") is None and "past_key_values" in forward.names
    if not wanted or torch.is_grad_enabled():
        return kwargs
    cache: Any = DynamicCache()
    if getattr(getattr(forward.model, "config", None), "is_encoder_decoder", False):
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    return kwargs | {"past_key_values": cache}


class _Call:
    """One forward (and its backward), pass by pass as the model comes by its stacks."""

    def __init__(
        self,
        stepper: Stepper,
        config: LayerParallelConfig,
        rehearsed: Rehearsed,
        seed: int | None,
        rows: int,
        trains: bool,
    ) -> None:
        self.stepper, self.rehearsed, self.trains = stepper, rehearsed, trains
        self.anatomy: Anatomy = stepper.anatomy(rehearsed)
        self.rank, size = stepper.transport.rank, stepper.transport.size
        self.plan: Plan = build_step(config, self.anatomy, size, trains=trains, costs=stepper.costs)
        common = stepper.common(seed, trains)
        penalty = stepper.penalty(config, rehearsed, [rows], 1.0) if trains else None
        whole = RankPart.of(self.plan, self.rank)
        none: Any = None  # the model's own forward goes through its phases
        self.step = Step(whole, none, stepper.transport, common, device=stepper.device, penalty=penalty)
        self.caches: list[Cache] = []
        self.anchor: Tensor | None = None

    def run(self, forward: ModelForward, args: tuple, kwargs: dict[str, Any]) -> Any:
        source, last = self.anatomy.ranks[-1], len(self.anatomy.passes)
        output = None
        try:
            # one alias serves all phases of a call: each rank's gradients are summed as autograd comes by them
            with self.stepper.ends.of_phase(last), Player(self.stepper.stacks, self._reached).playing():
                output = forward.run(args, kwargs)
        except Reached:
            pass
        self.stepper.last = (self.step.close(), self.plan, self.rehearsed.stacks)
        if self.stepper.transport.size == 1:
            return output
        if not self.trains:
            return _handed_out(output, self.stepper, source, self.caches[0] if self.caches else None)
        shared = _handed_out(output, self.stepper, source, None)
        return output if self.rank == source else _hung_on(shared, self.anchor)

    # ---- forward
    def _reached(self, number: int, index: int, calls: Sequence[RecordedCall], x: Tensor) -> Tensor:
        cache = next((leaf for leaf in tree_leaves((calls[0].args, calls[0].kwargs)) if isinstance(leaf, Cache)), None)
        self.caches += [] if cache is None else [cache]
        entry = Entry(x.detach(), calls, self.rehearsed.sides[number], autocast_of(x))
        sources = entry.sources
        if self.trains:
            anchor = self.anchor
            if anchor is None:
                anchor = torch.zeros((), device=x.device, requires_grad=True)
            end, self.anchor = _Pass.apply(self, number, entry, anchor, x, *sources)  # type: ignore[misc]
        else:
            end = self.forward(number, entry, sources)
        self.stepper.stacks[index].count_in_cache(calls, x)
        if number + 1 == len(self.anatomy.passes) and self.rank != self.anatomy.ranks[-1]:
            raise Reached(calls, x, None)
        return end

    def forward(self, k: int, entry: Entry, sources: Sequence[Tensor]) -> Tensor:
        """The end state of pass k, where this rank goes on with it; else one of its shape."""
        step = self.step
        with kept_streams(step.device):
            layers = step.layers[k, 0] = Layers(entry, step.common, k, 0, step.increments[k])
            layers.sides = [t.detach() for t in sources] if self.rank == self.anatomy.ranks[k] else []
            tasks = [t for t in self.plan.tasks if t.direction == "forward" and t.place == k and t.kind != "phase"]
            (entering,) = (t for t in self.plan.tasks if _is_phase(t, k, "forward"))
            if entering.rank == self.rank:
                self._publish(entering.outputs, [entry.x, layers.sides])
            wanted = [
                v
                for t in self.plan.tasks
                if t.kind == "phase" and t.direction == "forward" and t.place > k and t.rank == self.rank
                for v in t.inputs
                if self.plan.values[v].place == k
            ]
            found = self._work(tasks, list(dict.fromkeys(wanted)))
        if not found:
            return torch.zeros((), dtype=entry.x.dtype, device=entry.x.device).expand(entry.x.shape)
        return found[0]

    # ---- backward
    def backward(self, k: int, lam: Tensor) -> tuple[Tensor | None, list[Tensor | None]]:
        """The adjoint at the entry of pass k and the gradients of its sides, on the rank that owns the phase before."""
        step, sides = self.step, len(self.rehearsed.sides[k])
        with kept_streams(step.device):
            # autograd has added up what this rank's phases say of the end: the first of them hands it on
            said = False
            for task in self.plan.tasks:
                later = task.kind == "phase" and task.place > k and task.rank == self.rank
                gives = task.direction == "backward" or task.place == len(self.anatomy.passes)
                for v in task.outputs if later and gives else ():
                    if self.plan.values[v].place == k:
                        self._publish([v], [torch.zeros_like(lam) if said else lam.contiguous()])
                        said = True
            tasks = [t for t in self.plan.tasks if t.direction == "backward" and t.place == k and t.kind != "phase"]
            (leaving,) = (t for t in self.plan.tasks if _is_phase(t, k, "backward"))
            found = self._work(tasks, leaving.inputs if leaving.rank == self.rank else [])
        step.settle()
        step.layers.pop((k, 0), None)
        if k == 0:  # at the end of this backward, when the front is through too
            stepper = self.stepper
            after_backward(partial(sum_over_ranks, stepper.ends, stepper.transport, stepper.device))
        if not found:
            return None, [None] * sides
        return found[0], list(found[1]) if sides else []

    # ---- inside
    def _publish(self, numbers: Sequence[int], values: Sequence[Any]) -> None:
        """Values that this rank's phases made."""
        for number, value in zip(numbers, values, strict=False):
            self.step.values[number] = value
            for target in self.plan.targets.get(number, ()):
                self.step.send(number, target)

    def _work(self, tasks: Sequence[Task], wanted: Sequence[int]) -> list[Any]:
        """Works this rank's part of `tasks` and returns the values that it goes on with."""
        own = [t for t in tasks if t.rank == self.rank]
        part = RankPart.of(self.plan, self.rank, tasks, wanted)
        later = {v for t in self.plan.tasks if t.rank == self.rank and t not in own for v in t.inputs}
        self.step.work(part, keep=later | set(wanted))
        return [self.step.values[v] for v in wanted]


def _is_phase(task: Task, place: int, direction: str) -> bool:
    return task.kind == "phase" and task.place == place and task.direction == direction


class _Pass(torch.autograd.Function):
    """A pass as one autograd node. Its parameters' gradients go to `.grad` by themselves."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, k: int, entry: Entry, anchor: Tensor, x: Tensor, *sources: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.call, ctx.k = call, k
        return call.forward(k, entry, sources), anchor.detach().clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, lam: Tensor, _: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        grad, sides = ctx.call.backward(ctx.k, lam)
        needed = ctx.needs_input_grad
        anchor = torch.zeros((), device=lam.device)
        return None, None, None, anchor, grad if needed[4] else None, *sides


class _Hung(torch.autograd.Function):
    """Another rank's output, whose backward starts this rank's."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, tensor: Tensor) -> Tensor:
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return torch.zeros((), device=grad.device), None


def _hung_on(output: Any, anchor: Tensor | None) -> Any:
    def hang(leaf: Any) -> Any:
        is_real = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return _Hung.apply(anchor, leaf) if is_real else leaf

    return tree_map(hang, output)


def _joined(outputs: Sequence[Any]) -> Any:
    """Outputs of micro-batches as one: rows behind each other, losses added up."""

    def join(column: Sequence[Any]) -> Any:
        first = column[0]
        if not isinstance(first, Tensor):
            return first
        return torch.cat(list(column)) if first.ndim else torch.stack(list(column)).sum()

    columns = zip(*(tree_flatten(output)[0] for output in outputs), strict=True)
    leaves = [join(column) for column in columns]
    return tree_unflatten(leaves, tree_flatten(outputs[0])[1])


def _handed_out(output: Any, stepper: Stepper, source: int, cache: Cache | None) -> Any:
    """The output of rank `source` on all ranks, each with its own KV cache in it."""
    transport = stepper.transport
    assert isinstance(transport, GroupTransport)
    where = (transport.group, stepper.device, source)
    is_cache, mark = (lambda leaf: isinstance(leaf, Cache)), _Mark()
    if transport.rank == source:
        share(tree_map(lambda leaf: mark if is_cache(leaf) else leaf, output, is_leaf=is_cache), *where)
        return output
    received = share(None, *where)
    return tree_map(lambda leaf: cache if isinstance(leaf, _Mark) else leaf, received)


class _Mark:
    """Stands for the KV cache, of which each rank has its own, in an output that travels."""
