"""Writes the tasks of a plan by running an algorithm on value numbers instead of tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from hf_layerpar.plan.tasks import Direction, Kind, Pieces, Plan, Reduction, Task, Value

Split = Callable[[Task], bool]
"""Whether a final vjp leaves its weight gradients to a task of their own."""


class PlanBuilder:
    """Values are hash-consed: the same step of the same value is one task, and a combination that cancels to one of its
    inputs is that input. So nothing is computed twice, a converged interval is never relaxed again, and a solve with
    enough iterations is the serial chain itself, bit for bit.

    `sweep` says which pass, direction and micro-batch the following steps are of.

    stacked: the steps of the last relaxation are tasks of their own, even where an earlier sweep made the same ones, so
        that all intervals are relaxed together: a few evaluations more, in far fewer waves (see `waves`).
    """

    def __init__(self, num_ranks: int, *, stacked: bool = False) -> None:
        self.num_ranks, self.stacked = num_ranks, stacked
        self.wave = -1  # of the steps that are written next
        self.tasks: list[Task] = []
        self.values: dict[int, Value] = {}
        self.iterations: dict[tuple[int, Direction], int] = {}
        self.direction: Direction = "forward"
        self.owner: tuple[int, ...] = ()
        self._place = self._micro_batch = 0
        self._waves = 0
        self._home: dict[int, int] = {}
        self._made: dict[tuple, Task] = {}
        self._copies: dict[int, dict[int, int]] = {}  # value -> rank -> the same value, made there too
        self._reduced: dict[tuple, Reduction] = {}

    def sweep(self, place: int, direction: Direction, micro_batch: int, owner: Sequence[int]) -> None:
        """owner: the rank of every layer of the pass."""
        self._place, self.direction, self._micro_batch = place, direction, micro_batch
        self.owner = tuple(owner)

    # ---- ends
    def phase(
        self,
        place: int,
        direction: Direction,
        micro_batch: int,
        rank: int,
        inputs: Sequence[int],
        outputs: Sequence[Value],
        piece: Pieces = (0, 1),
    ) -> tuple[int, ...]:
        """A phase, or its backward."""
        return self._add("phase", direction, rank, place, micro_batch, inputs, outputs, piece=piece)

    def cut(self, value: int, place: int, pieces: int) -> tuple[int, ...]:
        """The rows of a state in so many parts."""
        like = self.values[value]
        parts = [dataclasses.replace(like, piece=(i, pieces)) for i in range(pieces)]
        return self._add("cut", "forward", self._home[value], place, like.micro_batch, [value], parts)

    def join(self, values: Sequence[int], place: int, rank: int) -> int:
        """The state whose rows lie in `values`."""
        like = dataclasses.replace(self.values[values[0]], piece=(0, 1))
        return self._add("join", "backward", rank, place, like.micro_batch, values, [like])[0]

    def collect(self, place: int, micro_batch: int, owner: Sequence[int], finals: dict[int, int]) -> int:
        """The gradient of the sides of a pass, summed in the order in which a serial backward comes by its layers: the
        sum so far goes from rank to rank. finals: what the final vjp of each layer made."""
        so_far: list[int] = []
        layers = list(range(len(owner)))[::-1]
        value = Value("sides", place, micro_batch)
        while layers:
            rank = owner[layers[0]]
            own = []
            while layers and owner[layers[0]] == rank:
                own.append(layers.pop(0))
            inputs = [*so_far, *dict.fromkeys(finals[n] for n in own)]
            so_far = [*self._add("collect", "backward", rank, place, micro_batch, inputs, [value], layers=tuple(own))]
        return so_far[0]

    # ---- sweeps
    def step(self, layer: int, x: int, *, final: bool = False) -> int:
        """final: the step of the last relaxation."""
        key = ("final" if final and self.stacked else "step", layer, x)
        wave = self.wave if self.stacked else -1
        task = self._make(key, "step", self.owner[layer], (x,), layers=(layer,), wave=wave)
        task.final |= final
        return task.output

    def block(self, layers: Sequence[int], x: int) -> int:
        """Final steps of layers that one rank owns, as one task."""
        key = ("block", *layers, x)
        return self._make(key, "step", self.owner[layers[0]], (x,), layers=tuple(layers), final=True).output

    def open_waves(self, count: int = 1) -> int:
        """Numbers `count` waves behind all others and returns the first. Steps go to the one that `wave` is set to,
        and may depend on earlier waves alone. (Plans that aren't stacked leave the waves out.)"""
        self._waves += count
        return self._waves - count

    def combine(self, terms: Sequence[tuple[float, int]], *ranks: int) -> int:
        """sum of coefficient * value, made on each of `ranks` (the same bits); like terms are merged first."""
        merged: dict[int, float] = {}
        for coefficient, value in terms:
            merged[value] = merged.get(value, 0.0) + coefficient
        merged = {v: c for v, c in merged.items() if c != 0.0}
        if list(merged.values()) == [1.0]:
            return next(iter(merged))
        values, coefficients = tuple(merged), tuple(merged.values())
        key = ("combine", *sorted(merged.items()))
        made = self._make(key, "combine", ranks[0], values, coefficients=coefficients).output
        if len(ranks) > 1:
            copies = self._copies.setdefault(made, {self._home[made]: made})
            for rank in ranks:
                if rank not in copies:
                    task = self._make((*key, rank), "combine", rank, values, coefficients=coefficients)
                    copies[rank] = task.output
        return made

    def all_reduce(self, parts: dict[int, list[tuple[float, int]]]) -> int:
        """The sum of every rank's part (summed there first), on all ranks."""
        terms = tuple(self.combine(part, rank) for rank, part in sorted(parts.items()))
        key = (self._place, self.direction, *terms)
        if key not in self._reduced:
            value = len(self.values)
            self.values[value] = Value("state", self._place, self._micro_batch)
            self._reduced[key] = Reduction(value, terms)
        return self._reduced[key].value

    def residual(self, a: int, b: int, iteration: int) -> None:
        if a != b:  # the same value leaves no residual
            rank = self.home(a)
            inputs = (a, self._nearest(b, rank))
            self._add("residual", self.direction, rank, self._place, self._micro_batch, inputs, [], iteration=iteration)

    def least(
        self, states: Sequence[Sequence[int]], residuals: Sequence[Sequence[tuple[int, int]]], ranks: Sequence[int]
    ) -> list[int]:
        """Of every place the combination of its `states`, made on its rank, with weights (for each row of the batch the
        same at all places) that make the combination of the `residuals`, differences (a, b), smallest. What are the
        same states in every try are left as they are.

        Each rank multiplies the residuals of its places with each other; these products are summed by one all-reduce,
        in which every place has a part of its own, so that no sum depends on the ranks.
        """
        moved = [j for j, of in enumerate(states) if len(set(of)) > 1]
        places = [j for j, of in enumerate(residuals) if any(a != b for a, b in of)]
        tries = len(states[0])
        like = Value("products", self._place, self._micro_batch, shape=(len(places), 2 * tries - 1, 2 * tries - 1))
        terms: dict[int, int] = {}
        by_rank: dict[int, list[int]] = {}
        for slot, j in enumerate(places):
            by_rank.setdefault(self.home(residuals[j][0][0]), []).append(slot)
        about = (self._place, self._micro_batch)
        for rank, slots in sorted(by_rank.items()):
            pairs = [(a, self._nearest(b, rank)) for slot in slots for a, b in residuals[places[slot]]]
            given = [v for pair in pairs for v in pair]
            (terms[rank],) = self._add("products", self.direction, rank, *about, given, [like], slots=tuple(slots))
        products = next(iter(terms.values()))
        if len(terms) > 1:
            products = len(self.values)
            self.values[products] = like
            self._reduced[products,] = Reduction(products, tuple(terms.values()))
        made = {}
        for rank in sorted({ranks[j] for j in moved}):
            own = [j for j in moved if ranks[j] == rank]
            given = [products, *(self._nearest(v, rank) for j in own for v in states[j])]
            outputs = [Value("state", *about) for _ in own]
            made |= dict(zip(own, self._add("least", self.direction, rank, *about, given, outputs), strict=True))
        return [made.get(j, of[-1]) for j, of in enumerate(states)]

    def home(self, value: int) -> int:
        """The rank that makes `value`."""
        return self._home[value]

    # ---- the plan
    def build(
        self,
        passes: Sequence[int],
        micro_batches: int,
        *,
        trains: bool,
        stacks: Sequence[int] | None = None,
        sides: dict[tuple[int, int], int] | None = None,
        split: Split | None = None,
    ) -> Plan:
        """The plan without the tasks that nothing needs.

        stacks: which stack each pass goes through, by default each another one. sides: by (pass, micro-batch), what its
        forward steps are given beside the state. split: which final vjps leave their weight gradients to tasks of their
        own. No other rank waits for these, so they can fill the gaps between the others.
        """
        wanted: set[int] = set()
        kept: list[Task] = []
        terms = {reduction.value: reduction.terms for reduction in self._reduced.values()}
        for task in reversed(self.tasks):
            if not task.outputs or task.final or task.kind == "phase" or not wanted.isdisjoint(task.outputs):
                for value in task.inputs:
                    wanted.update((value, *terms.get(value, ())))
                kept.append(task)
        values = dict(self.values)
        new = len(values)
        graphs: dict[tuple[int, int, int], int] = {}  # (pass, micro-batch, layer) -> the graph of its final step
        tasks: list[Task] = []
        for task in reversed(kept):
            if task.kind != "step":
                tasks.append(task)
                continue
            where, inputs, outputs = (task.place, task.micro_batch), task.inputs, task.outputs
            if task.direction == "forward":
                if sides and where in sides:
                    inputs += (sides[where],)
                if task.final and trains:
                    values[new] = Value("graph", *where)
                    outputs += (new,)
                    graphs |= {(*where, n): new for n in task.layers}
                    new += 1
            else:
                inputs += tuple(dict.fromkeys(graphs[*where, n] for n in task.layers))
            apart = task.final and task.direction == "backward" and split is not None and split(task)
            if apart:
                values[new] = Value("pending", *where)
                outputs += (new,)
                new += 1
            about = (task.direction, task.rank, *where)
            tasks.append(Task("step", *about, inputs, outputs, task.layers, task.final, wave=task.wave))
            if apart:
                tasks.append(Task("weights", *about, outputs[-1:], (), task.layers))
        return Plan(
            self.num_ranks,
            micro_batches,
            tuple(passes),
            tuple(range(len(passes)) if stacks is None else stacks),
            tuple(tasks),
            values,
            dict(self.iterations),
            trains,
            tuple(reduction for reduction in self._reduced.values() if reduction.value in wanted),
        )

    def _nearest(self, value: int, rank: int) -> int:
        """The copy of a value that `rank` takes: its own, else one of the others, so that all of them are asked."""
        copies = self._copies.get(value)
        if copies is None:
            return value
        return copies[rank] if rank in copies else list(copies.values())[rank % len(copies)]

    def _add(
        self,
        kind: Kind,
        direction: Direction,
        rank: int,
        place: int,
        micro_batch: int,
        inputs: Sequence[int],
        outputs: Sequence[Value],
        **more: Any,
    ) -> tuple[int, ...]:
        numbers = tuple(range(len(self.values), len(self.values) + len(outputs)))
        self.values |= dict(zip(numbers, outputs, strict=True))
        self._home |= dict.fromkeys(numbers, rank)
        self.tasks.append(Task(kind, direction, rank, place, micro_batch, tuple(inputs), numbers, **more))
        return numbers

    def _make(self, key: tuple, kind: Kind, rank: int, inputs: tuple[int, ...], **more: Any) -> Task:
        key = (self._place, self.direction, *key)
        task = self._made.get(key)
        if task is None:
            inputs = tuple(self._nearest(value, rank) for value in inputs)
            value = Value("state", self._place, self._micro_batch)
            self._add(kind, self.direction, rank, self._place, self._micro_batch, inputs, [value], **more)
            task = self._made[key] = self.tasks[-1]
        return task
