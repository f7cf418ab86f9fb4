"""A training step of a parallelized model: rehearsed, agreed on, planned and run.

Shapes: B batch, T tokens, D hidden; a state is `[B, T, D]`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from types import CellType
from typing import Any

import torch
from torch import Tensor, nn

from hf_layerpar.comparing import SAME_ROWS, batch_facts
from hf_layerpar.config import LayerParallelConfig, buffer_places, real
from hf_layerpar.errors import ConfigurationError, UnsupportedModelError
from hf_layerpar.ode.ends import Ends
from hf_layerpar.ode.phases import ModelPhases
from hf_layerpar.ode.rehearsal import (
    Closure,
    Rehearsed,
    batch_rows,
    check_parts,
    cut_rows,
    loss_and_metrics,
    recount,
    rehearse,
    rehearse_parts,
    signature_of,
)
from hf_layerpar.ode.stack import LayerStack, is_checkpointed
from hf_layerpar.plan.costs import COMPILED, Costs
from hf_layerpar.plan.part import RankPart
from hf_layerpar.plan.step import Anatomy, Pass, build_step
from hf_layerpar.plan.tasks import Plan
from hf_layerpar.run.captured import Captured
from hf_layerpar.run.data_shards import DataShards
from hf_layerpar.run.increments import Increments
from hf_layerpar.run.layers import Common, Entry, Layers, kept_streams
from hf_layerpar.run.stackable import OneDevice
from hf_layerpar.run.step import Finished, LayersOf, Outcome, Penalty, Step, enter
from hf_layerpar.run.step_report import StepReport, report_of
from hf_layerpar.run.transport import Attempt, Transport
from hf_layerpar.shared_gradients import sum_parts


@dataclass
class Prepared:
    """A batch made ready for a plan: its anatomy, and its parts."""

    rehearsed: Rehearsed
    anatomy: Anatomy
    parts: list[Any]
    rows: list[int]
    terms: Any


class Stepper:
    """The steps of a model whose layers live on the ranks of `transport`.

    owners: of the layers of every stack. ends: the parameters outside the layers. finished: is told in training steps
    of every layer, by stack and place, to whose gradients nothing more is added.
    """

    def __init__(
        self,
        model: nn.Module,
        stacks: Sequence[LayerStack],
        owners: Sequence[tuple[int, ...]],
        ends: Ends,
        transport: Transport,
    ) -> None:
        self.model, self.stacks, self.owners = model, tuple(stacks), tuple(owners)
        self.ends, self.transport = ends, transport
        self.last: tuple[Outcome, Plan, tuple[int, ...]] | None = None
        # with the losses, so that no other object takes the `id` of one
        self._rehearsed: dict[tuple, tuple[Rehearsed, Closure]] = {}
        self._parts: dict[int, RankPart] = {}
        self.deferrable: set[int] = set()
        self.shards: DataShards | None = None
        self.finished: Finished | None = None
        self._one_device = OneDevice()
        self._captured: Captured | None = None
        self._batches = 0

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def draw_seed(self) -> int | None:
        """One draw from the main stream per step keeps the ranks' streams in step; None in evaluation mode."""
        training = any(layer.training for stack in self.stacks for layer in stack.layers)
        return int(torch.randint(2**62, (), dtype=torch.int64)) if training else None

    def gather(self) -> None:
        """Makes parameters whole that lie in pieces on dp ranks. Collective over these, where they are in pieces."""
        if self.shards is not None:
            self.shards.gather()

    def whole(self, *, writes: bool = False) -> AbstractContextManager[None]:
        """Parameters are whole inside; see `DataShards.whole`."""
        return nullcontext() if self.shards is None else self.shards.whole(writes=writes)

    @property
    def compiled(self) -> bool:
        """Whether layers run as compiled code."""
        return any(stack.compiler is not None for stack in self.stacks)

    @property
    def costs(self) -> Costs | None:
        """What a step is scheduled by."""
        return COMPILED if self.compiled else None

    def common(self, seed: int | None, keeps: bool = True) -> Common:
        return Common(seed, is_checkpointed, keeps, self.deferrable, self.compiled)

    # ---- a training step
    def train(
        self, batch: Any, closure: Closure, config: LayerParallelConfig, scale: float, penalty_scale: float
    ) -> Any:
        """The loss of the whole batch, alike on all ranks, with `.grad` of `scale` times it; and the metrics that the
        closure returned beside it, if any, summed over the parts. Collective."""
        self.gather()
        seed = self.draw_seed()

        def play(part: Any) -> Any:
            return closure(part.copy() if isinstance(part, dict) else part)  # losses may take labels out of it

        def prepare() -> Prepared:
            for name, factor in (("scale", scale), ("penalty_scale", penalty_scale)):
                _FINITE(name, factor)
            return self._prepare(batch, play, config, _known_as(closure))

        with kept_streams(self.device):
            found = Attempt(prepare)
            doing = {"a training step of": type(self.model).__name__, "loss scale": (scale, penalty_scale)}
            self.agree(doing, batch, config, seed, found.value and found.value.rehearsed, found.error)
            ready = found.given()
            phases = self._phases(play, ready, trains=True)
            common = self.common(seed)
            entries = self._entries(ready, phases, seed) if config.stacked or config.cuda_graphs else {}
            plan, make_layers = self._plan(config, ready, entries, common)
            part = self._part(plan)

            def make(kind: type[Step] = Step, **instead: Any) -> Step:
                usual: dict[str, Any] = {
                    "common": common,
                    "device": self.device,
                    "scale": scale,
                    "penalty": self.penalty(config, ready.rehearsed, ready.rows, penalty_scale),
                    "make_layers": make_layers,
                    "finished": self.finished,
                    "entered": {key: entry for key, entry in entries.items() if key[0] == 0},
                }
                return kind(part, phases, self.transport, **usual | instead)

            if config.cuda_graphs:
                facts = (config.increment_penalty, penalty_scale)
                outcome = self._graphs().run(make, part, entries, common, facts)
            else:
                outcome = make().run()
        self.last = (outcome, plan, ready.rehearsed.stacks)
        return self._finish(ready, outcome, phases.metrics)

    def _prepare(self, batch: Any, closure: Closure, config: LayerParallelConfig, known_as: Any) -> Prepared:
        if config.stacked and self.compiled:
            raise ConfigurationError(
                "stacked=True evaluates layers together, and these are compiled one by one; use stacked=False, or "
                "compile nothing (torch_compile=False)"
            )
        if config.cuda_graphs:
            self._graphs()
            if self.compiled or self.shards is not None:
                what = "layers that are compiled" if self.compiled else "fsdp, whose parameters are made anew each step"
                raise ConfigurationError(f"cuda_graphs=True with {what}: use one of them")
        main = getattr(self.model, "main_input_name", None)
        rows = batch_rows(batch, main)
        if rows < 1:
            raise ConfigurationError("the batch holds no tensor with rows; give what the model's forward takes")
        pieces = max(1, min(config.micro_batches, rows))
        spread = config.ends == "spread" and self.transport.size > 1
        tail_pieces = min(self.transport.size, rows // pieces) if spread else 1
        parts = cut_rows(batch, rows, pieces)
        is_cut = pieces * tail_pieces > 1
        bounds = [rows * m // pieces for m in range(pieces + 1)]
        counts = [b - a for a, b in pairwise(bounds)]
        key = (known_as, signature_of(batch, rows), self.model.training, pieces, tail_pieces)
        rehearsed, _ = self._rehearsed.get(key, (None, None))
        terms = rehearsed.terms if rehearsed is not None else None
        if rehearsed is None:
            rehearsed = rehearse(closure, batch, self.stacks, self.ends, loss=True)
            self._refuse(rehearsed)
            if is_cut:
                smallest = [part for p, n in zip(parts, counts, strict=True) for part in cut_rows(p, n, tail_pieces)]
                why = f"micro_batches={pieces}" if pieces > 1 else "ends='spread'"
                of_parts = rehearse_parts(closure, smallest, self.stacks, self.ends, why)
                check_parts(rehearsed, of_parts, why)
            self._share(rehearsed)
            if len(self._rehearsed) >= _MOST_REHEARSED:
                self._rehearsed.clear()
            self._rehearsed[key] = rehearsed, closure
            terms = rehearsed.terms
        elif is_cut and any(term.count is not None for term in terms or ()):
            terms = recount(closure, batch, self.stacks, self.ends, terms or ())
        return Prepared(rehearsed, self.anatomy(rehearsed, tail_pieces), parts, counts, terms if is_cut else None)

    def _graphs(self) -> Captured:
        if self._captured is None or self._captured.device != self.device:
            self._captured = Captured(self.device)
        return self._captured

    def _refuse(self, rehearsed: Rehearsed) -> None:
        if rehearsed.foreign and self.transport.size > 1:
            raise UnsupportedModelError(
                f"the loss depends on {len(rehearsed.foreign)} trained parameters outside of the model that was given "
                f"to parallelize, or of its layers, such as one of shape {rehearsed.foreign[0]}; only one rank would "
                "train them. Parallelize a module that holds them too (a head belongs into the model). Weights of the "
                "layers themselves (a regulariser of the weights, as AdaLoRA's) no rank has all of: use lp_size=1, or "
                "LoRA"
            )
        passes = range(len(rehearsed.stacks))
        if idle := [k for k in passes if not any(k in needs for needs in rehearsed.needs[k + 1 :])]:
            raise UnsupportedModelError(
                f"the loss calls the model but doesn't use what comes of it (passes {idle} of {len(passes)} through a "
                "stack); leave these calls out of the step"
            )

    def _share(self, rehearsed: Rehearsed) -> None:
        """What this step uses in several phases has its gradient summed in one order, as that of tied parameters."""
        for p in self.ends:
            p.is_shared |= sum(p in uses for uses in rehearsed.uses) > 1

    def anatomy(self, rehearsed: Rehearsed, tail_pieces: int = 1) -> Anatomy:
        """Where a rehearsed forward runs. Raises UnsupportedModelError for a phase whose parameters no rank has all."""
        passes = [
            Pass(self.owners[s], self.stacks[s].settings.buffers, bool(sides), s)
            for s, sides in zip(rehearsed.stacks, rehearsed.sides, strict=True)
        ]
        usual = [*(p.owner[0] for p in passes), passes[-1].owner[-1]]
        ranks = []
        for k, (rank, uses) in enumerate(zip(usual, rehearsed.uses, strict=True)):
            able = set(range(self.transport.size)).intersection(*(p.holders for p in uses))
            if not able:
                apart = {name: p.holders for p in uses for name in p.names[:1]}
                raise UnsupportedModelError(
                    f"phase {k} of this forward uses parameters that no lp rank has all of: {apart} (by lp rank). "
                    "Call it in another way, or use lp_size=1"
                )
            ranks.append(rank if rank in able else min(able))
            everywhere = set(range(self.transport.size))
            if tail_pieces > 1 and k == len(passes) and able != everywhere:
                raise ConfigurationError(
                    "ends='spread' for a model that was parallelized with ends='first_last', whose head is not on "
                    "every rank; parallelize it with ends='spread'"
                )
        return Anatomy(tuple(passes), tuple(ranks), rehearsed.needs, tail_pieces)

    def _plan(
        self,
        config: LayerParallelConfig,
        ready: Prepared,
        entries: Mapping[tuple[int, int], Entry],
        common: Common,
    ) -> tuple[Plan, LayersOf]:
        """The plan, and what makes a pass's layers: one at a time, or (stacked) those of a wave together."""
        build = partial(
            build_step, anatomy=ready.anatomy, num_ranks=1, micro_batches=len(ready.parts), costs=self.costs
        )
        if config.stacked:
            passes = [Layers(entry, common, k, m) for (k, m), entry in entries.items() if m == 0]
            found = self._one_device.plan(config, build, passes)
            if found is not None:
                return found
            config = dataclasses.replace(config, stacked=False)
        return build(config, num_ranks=self.transport.size), Layers

    def _entries(self, ready: Prepared, phases: ModelPhases, seed: int | None) -> dict[tuple[int, int], Entry]:
        """By pass and micro-batch; of a first pass as a step enters it, of others for what layers are called with."""
        return {
            (k, m): phases.enter(k, m, [None] * k, real=False) if k else enter(phases, k, m, [], seed, self.device)
            for m in range(len(ready.parts))
            for k in range(len(ready.anatomy.passes))
        }

    def _part(self, plan: Plan) -> RankPart:
        key = id(plan)
        if key not in self._parts or self._parts[key].plan is not plan:
            self.transport.agree({"plan": plan.digest})
            self._parts[key] = RankPart.of(plan, self.transport.rank)
        return self._parts[key]

    def _phases(self, closure: Closure, ready: Prepared, *, trains: bool) -> ModelPhases:
        return ModelPhases(
            closure,
            ready.parts,
            ready.rows,
            self.stacks,
            self.ends,
            ready.rehearsed,
            Entry,
            terms=ready.terms,
            trains=trains,
        )

    def penalty(
        self, config: LayerParallelConfig, rehearsed: Rehearsed, rows: Sequence[int], scale: float
    ) -> Penalty | None:
        """What penalises the increments of each pass. rows: of every micro-batch. scale: of the loss."""
        if not config.increment_penalty:
            return None

        def of_pass(k: int) -> Increments:
            stack = self.stacks[rehearsed.stacks[k]]
            inner = frozenset(range(len(stack.layers))) - buffer_places(stack.settings.buffers, len(stack.layers))
            return Increments(inner, rows, config.increment_penalty, scale)

        return of_pass

    def agree(
        self,
        doing: dict[str, Any],
        batch: Any,
        config: LayerParallelConfig,
        seed: int | None,
        rehearsed: Rehearsed | None,
        error: Exception | None,
    ) -> None:
        """That all ranks are about to do the same with the same batch, or raises on all of them, `error` too."""
        if self.transport.size == 1 and error is None:
            return
        looks = self._batches < _LOOKED_AT_FIRST or self._batches % _LOOKED_AT_EVERY == 0
        self._batches += 1
        found = {} if rehearsed is None else rehearsed.facts
        facts = {**doing, "settings": config, "seed": seed, **batch_facts(batch, looks), **found}
        self.transport.agree(facts, error, SAME_ROWS)

    def _finish(self, ready: Prepared, outcome: Outcome, metrics: Mapping[tuple[int, int], Mapping[str, Any]]) -> Any:
        """The loss, after the gradients that several phases or ranks have a part in are summed."""
        pieces, phases = ready.anatomy.tail_pieces, len(ready.anatomy.ranks)
        shared = self.ends.shared
        parts = {
            (i, k): grad
            for i, p in enumerate(shared)
            for k in range(phases)
            if (grad := self.ends.take_gradient(p, k)) is not None
        }
        names = ready.rehearsed.metrics
        places = len(ready.parts) * pieces
        sums = torch.zeros(places * (1 + len(names)) + len(shared) * phases, dtype=torch.float64)
        for (m, i), loss in outcome.losses.items():
            sums[m * pieces + i] = float(loss)
            for j, name in enumerate(names):
                sums[places * (1 + j) + m * pieces + i] = float(metrics[m, i][name])
        for i, k in parts:
            sums[places * (1 + len(names)) + i * phases + k] = 1.0
        sums = sums.to(self.device)
        self.transport.all_reduce(sums)  # exact: each entry comes from one rank
        *numbers, present = sums.cpu().split([places] * (1 + len(names)) + [len(shared) * phases])
        is_there = present.view(len(shared), phases) > 0
        sum_parts(shared, parts, is_there, ready.anatomy.ranks, self.transport, self.device, spread=pieces > 1)
        totals = [sum(n.tolist()) for n in numbers]  # in the order of the parts
        dtype = loss_and_metrics(ready.rehearsed.output)[0].dtype
        loss = torch.tensor(totals[0], dtype=dtype, device=self.device)
        return (loss, dict(zip(names, totals[1:], strict=True))) if names else loss

    def report(self) -> StepReport | None:
        """Collective when the last step was inexact or penalised increments."""
        if self.last is None:
            return None
        outcome, plan, stacks = self.last
        return report_of(outcome, plan, [self.stacks[s].path for s in stacks], self.transport, self.device)


_LOOKED_AT_FIRST, _LOOKED_AT_EVERY = 8, 64
"""Which batches are compared by their contents too: the first ones, and one in so many."""

_FINITE = real(math.isfinite, "a finite number")

_MOST_REHEARSED = 64
"""Rehearsals that are kept. More come of losses that are other objects in every step."""


def _known_as(closure: Any, depth: int = 3) -> Any:
    """What a loss is known by, also where a new function is made in every step: its code and the objects that it holds
    on to. Tensors, numbers and containers are taken for data."""
    if isinstance(closure, Tensor | int | float | str | Mapping | Sequence | Set | None):
        return type(closure)
    if isinstance(closure, partial):
        code, held = partial, [closure.func, *closure.args, *closure.keywords.values()]
    elif (code := getattr(closure, "__code__", None)) is None:
        return id(closure)
    else:
        cells = getattr(closure, "__closure__", None) or ()
        held = [getattr(closure, "__self__", None), *(getattr(closure, "__defaults__", None) or ())]
        held += [cell.cell_contents for cell in cells if cell != CellType()]  # one that is empty still raises
    return (code, *(_known_as(value, depth - 1) for value in held if depth))
