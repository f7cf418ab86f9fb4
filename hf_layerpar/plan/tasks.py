"""A plan is data: the tasks of one training step, where each runs, and the values they pass.

One plan holds both directions, the ends of the model and all micro-batches. A micro-batch goes through phases and
passes in turn: phase 0 (the front: embeddings), pass 0 (its state through a stack), phase 1 (a middle, or the tail:
head and loss), and so on; then back. An encoder-decoder has two passes, so three phases.

A plan imports neither torch nor torch.distributed. The list order of its tasks is a topological order; every rank works
its own tasks in that order and posts its messages in the order in which all of them are made (`plan/part.py`), so a
validated plan can't deadlock.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Literal

Direction = Literal["forward", "backward"]
Kind = Literal["phase", "cut", "join", "step", "combine", "residual", "weights", "collect", "products", "least"]
Pieces = tuple[int, int]
"""(i, n): the i-th of n parts of a micro-batch's rows."""


@dataclass(frozen=True, slots=True)
class Value:
    """What a value number stands for.

    kind: "state" (a state or an adjoint), "sides" (what a pass's layers are given beside the state and that depends on
        parameters or earlier passes, or the gradient of that), "products" (numbers, of which each row of the
        micro-batch has `shape`), "graph" (kept for the backward) or "pending" (what weight gradients still need). The
        last two never travel.
    place: the pass that it belongs to.
    """

    kind: Literal["state", "sides", "products", "graph", "pending"]
    place: int
    micro_batch: int
    piece: Pieces = (0, 1)
    shape: tuple[int, ...] = ()


@dataclass(slots=True)
class Task:
    """One piece of work on one rank.

    kind: "phase" runs phase `place` forward (its inputs: the end states that it depends on; its outputs: the state and
        the sides of pass `place`) or backward; the last phase is the tail, which goes forward and backward at once and
        gives the adjoints of its inputs. "step" evaluates `layers` one after the other (backward: their input-vjps);
        "combine" is the linear combination of its inputs with `coefficients`; "residual" adds
        ||inputs[0] - inputs[1]||^2 to the residual of `iteration`; "weights" takes the weight gradients that the final
        vjp of `layers` left; "products" multiplies residuals with each other, for each of `slots` those of as many
        tries, given as pairs of minuend and subtrahend; "least" makes, for each of its outputs, of what as many tries
        made of it, the combination whose residual is least by the products in inputs[0]; "collect" adds the layers'
        gradients of the sides to those of the layers behind them; "cut" and "join" part the rows of a state and put
        them together.
    place: the phase of a "phase", else the pass.
    layers: in the order of the sweep.
    final: a step of the last relaxation. Forward it keeps its graph, backward it takes the weight gradients too, unless
        it leaves them to a "weights" task.
    wave: steps of one wave are independent of each other and evaluated together (-1: alone).
    """

    kind: Kind
    direction: Direction
    rank: int
    place: int
    micro_batch: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    layers: tuple[int, ...] = ()
    final: bool = False
    coefficients: tuple[float, ...] = ()
    iteration: int = 0
    wave: int = -1
    piece: Pieces = (0, 1)
    slots: tuple[int, ...] = ()

    @property
    def output(self) -> int:
        return self.outputs[0]

    def __str__(self) -> str:
        where = f"rank {self.rank} micro-batch {self.micro_batch}"
        given = ", ".join(f"v{v}" for v in self.inputs)
        made = ", ".join(f"v{v}" for v in self.outputs)
        made = f"{made} = " if made else ""
        if self.kind == "step":
            end = (" final" if self.final else "") + (f" wave {self.wave}" if self.wave >= 0 else "")
            name = "step" if self.direction == "forward" else "vjp"
            return f"{where}: {made}{name} {_span(self.layers)}({given}){end}"
        if self.kind == "combine":
            terms = " ".join(f"{c:+g} v{v}" for c, v in zip(self.coefficients, self.inputs, strict=True))
            return f"{where}: {made}{terms}"
        if self.kind == "residual":
            return f"{where}: residual {self.iteration} += |v{self.inputs[0]} - v{self.inputs[1]}|^2"
        what = f"{self.direction} phase {self.place}" if self.kind == "phase" else f"{self.kind} {_span(self.layers)}"
        piece = f" piece {self.piece[0] + 1} of {self.piece[1]}" if self.piece[1] > 1 else ""
        return f"{where}: {made}{what.strip()}({given}){piece}"


def _span(layers: tuple[int, ...]) -> str:
    return "" if not layers else str(layers[0]) if len(layers) == 1 else f"{layers[0]}..{layers[-1]}"


@dataclass(frozen=True)
class Message:
    """Value `value` travels from rank `source` to rank `target`."""

    value: int
    source: int
    target: int


@dataclass(frozen=True)
class Reduction:
    """An all-reduce: `value`, on every rank, is the sum of `terms`, of which each rank makes one at most."""

    value: int
    terms: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """The tasks of one step.

    passes: number of layers of every pass. stacks: which stack each goes through. iterations: by (pass, direction),
    relaxation sweeps whose residuals are measured. trains: whether it goes backward too.
    """

    num_ranks: int
    micro_batches: int
    passes: tuple[int, ...]
    stacks: tuple[int, ...]
    tasks: tuple[Task, ...]
    values: dict[int, Value]
    iterations: dict[tuple[int, Direction], int] = field(default_factory=dict)
    trains: bool = True
    reductions: tuple[Reduction, ...] = ()

    @cached_property
    def producer(self) -> dict[int, int]:
        """The rank that makes each value, but for those that all-reduces make."""
        return {v: t.rank for t in self.tasks for v in t.outputs}

    @cached_property
    def targets(self) -> dict[int, list[int]]:
        """The ranks that use each value away from home, in the order in which they come to need it."""
        producer, targets = self.producer, {}
        for task in self.tasks:
            for value in task.inputs:
                if producer.get(value, task.rank) != task.rank:
                    ranks = targets.setdefault(value, [])
                    if task.rank not in ranks:
                        ranks.append(task.rank)
        return targets

    @cached_property
    def traffic(self) -> tuple[Message | Reduction, ...]:
        """Every value that is used away from home, once per using rank, and every all-reduce, in the order of the tasks
        that make them: the order in which the ranks post them."""
        missing = {reduction: len(reduction.terms) for reduction in self.reductions}
        terms: dict[int, list[Reduction]] = {}
        for reduction in self.reductions:
            for term in reduction.terms:
                terms.setdefault(term, []).append(reduction)
        entries: list[Message | Reduction] = []
        for task in self.tasks:
            for value in task.outputs:
                entries += [Message(value, task.rank, target) for target in self.targets.get(value, ())]
                for reduction in terms.get(value, ()):
                    missing[reduction] -= 1
                    if not missing[reduction]:
                        entries.append(reduction)
        return tuple(entries)

    @property
    def messages(self) -> tuple[Message, ...]:
        return tuple(entry for entry in self.traffic if isinstance(entry, Message))

    @cached_property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """The ranks that have messages for each other, the lower one first, sorted."""
        return tuple(sorted({(min(m.source, m.target), max(m.source, m.target)) for m in self.messages}))

    @cached_property
    def digest(self) -> str:
        """Equal for equal plans, in any process."""
        return hashlib.sha256(repr((self.tasks, self.reductions)).encode()).hexdigest()

    def is_split(self, task: Task) -> bool:
        """Whether a final vjp leaves its weight gradients to a task of their own."""
        return any(self.values[v].kind == "pending" for v in task.outputs)

    def sums(self, task: Task) -> list[tuple]:
        """Names of the gradients that a task adds to. The vjp in a split backward has some of its own to add (those of
        norms), beside what it leaves to the other half."""
        if task.kind == "phase":
            adds = task.direction == "backward" or task.place == len(self.passes)
            return [("phase", task.rank, task.place)] if adds else []
        if not (task.kind == "weights" or (task.final and task.direction == "backward")):
            return []
        halves = ["vjp"] * (task.kind == "step") + ["weights"] * (not self.is_split(task))
        return [(half, task.rank, self.stacks[task.place], layer) for half in halves for layer in task.layers]

    def groups(self) -> Iterator[tuple[Task, ...]]:
        """The tasks in order, those of one wave together and every other alone."""
        for wave, tasks in groupby(self.tasks, key=lambda t: t.wave):
            if wave >= 0:
                yield tuple(tasks)
            else:
                yield from ((task,) for task in tasks)

    def validate(self) -> None:
        """Asserts that every value is made once and before its use, that graphs stay where they are, that each layer
        has one final step a micro-batch and direction, that a layer's gradients are added up in the order of the
        micro-batches, and that the steps of a wave depend on none of it, differ in layer and agree in all else."""
        made: set[int] = set()
        self._validate_reductions()
        terms = {reduction.value: reduction.terms for reduction in self.reductions}
        spent: set[int] = set()  # graphs that a final vjp went through
        waves: set[int] = set()
        for group in self.groups():
            for task in group:
                assert 0 <= task.rank < self.num_ranks, f"{task}: no such rank"
                missing = [v for given in task.inputs for v in terms.get(given, (given,)) if v not in made]
                assert not missing, f"{task}: values {missing} are used before they are made"
                away = [v for v in task.inputs if self.producer.get(v) != task.rank]
                stuck = [v for v in away if self.values[v].kind in ("graph", "pending")]
                assert not stuck, f"{task}: graphs {stuck} are on another rank"
                assert not spent & set(task.inputs), f"{task}: its graph is spent"
                if task.kind == "step" and task.direction == "backward" and task.final:
                    spent |= {v for v in task.inputs if self.values[v].kind == "graph"}
            for task in group:
                assert not made & set(task.outputs), f"{task}: value made twice"
                made |= set(task.outputs)
            assert group[0].wave not in waves, f"{group[0]}: the wave was through already"
            waves |= {group[0].wave} - {-1}
            alike = {(t.kind, t.direction, t.rank, t.place, t.micro_batch, t.final) for t in group}
            assert len(alike) == 1, f"{group[0]}: a mixed wave"
            assert len(group) == 1 or len({t.layers for t in group}) == len(group), f"{group[0]}: a layer twice"
        self._validate_finals()

    def _validate_reductions(self) -> None:
        for reduction in self.reductions:
            assert reduction.value not in self.producer, f"{reduction}: a task makes it too"
            homes = [self.producer.get(term) for term in reduction.terms]
            assert None not in homes, f"{reduction}: terms that no task makes"
            assert len(set(homes)) == len(homes) > 0, f"{reduction}: several terms of one rank"

    def _validate_finals(self) -> None:
        directions: list[Direction] = ["forward", "backward"] if self.trains else []
        expected = {
            (d, p, n, m)
            for d in directions
            for p, depth in enumerate(self.passes)
            for n in range(depth)
            for m in range(self.micro_batches)
        }
        finals = Counter((t.direction, t.place, n, t.micro_batch) for t in self.tasks if t.final for n in t.layers)
        assert not self.trains or set(finals) == expected, f"final steps are wrong: {set(finals) ^ expected}"
        assert set(finals.values()) <= {1}, "a layer has several final steps"
        latest: dict[tuple, tuple[int, ...]] = {}
        for task in self.tasks:
            for key in self.sums(task):
                # a stack that is passed several times: the last pass first, as a serial backward comes by them
                order = (task.micro_batch, task.piece[0], -task.place)
                assert latest.get(key, (-1,)) < order, f"{task}: gradients out of the order of the micro-batches"
                latest[key] = order

    def __str__(self) -> str:
        head = (
            f"plan: {' + '.join(map(str, self.passes))} layers, {self.num_ranks} ranks, {self.micro_batches} "
            f"micro-batches, {len(self.tasks)} tasks, {len(self.messages)} messages"
        )
        sums = [f"v{r.value} = all-reduce({', '.join(f'v{v}' for v in r.terms)})" for r in self.reductions]
        return "\n".join([head, *map(str, self.tasks), *sums])
