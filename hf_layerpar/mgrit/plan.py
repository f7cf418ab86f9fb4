"""A plan is data: the tasks of one forward or backward solve, where each runs, and the states they pass.

A plan imports neither torch nor torch.distributed. The list order of its tasks is a topological order; every rank works
its own tasks in that order (see `hf_layerpar.mgrit.schedule`), so a validated plan can't deadlock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

Direction = Literal["forward", "backward"]
EVERYWHERE = -1
"""Owner of a value that every rank already holds (the start of a sweep)."""


@dataclass(slots=True)
class Task:
    """One piece of work on one rank.

    kind: "step" evaluates fine step `layer` (backward: its input-vjp); "combine" is the linear combination of its
        inputs with `coefficients`; "fit" is the running fit of the interval `span` at inputs[0], and "observe" shows
        that fit that the interval maps inputs[0] to inputs[1]; "residual" adds ||inputs[0] - inputs[1]||^2 to the
        residual of `iteration`; "weights" takes the weight gradients of `layer`, whose final vjp made inputs[0].
    final: a step of the last relaxation. Forward it keeps its graph, backward it takes the weight gradients too, unless
        the plan has "weights" tasks for that.
    inputs, output: value numbers; a residual, an observation and weight gradients have no output (None).
    span: first layer of the interval and last + 1, whatever the direction.
    wave: steps of one wave are independent of each other and evaluated together (-1: alone).
    """

    kind: Literal["step", "combine", "fit", "observe", "residual", "weights"]
    rank: int
    micro_batch: int
    inputs: tuple[int, ...]
    output: int | None
    layer: int = -1
    final: bool = False
    coefficients: tuple[float, ...] = ()
    iteration: int = 0
    span: tuple[int, int] = (0, 0)
    wave: int = -1

    def __str__(self) -> str:
        where = f"rank {self.rank} micro-batch {self.micro_batch}"
        values = [f"v{v}" for v in self.inputs]
        if self.kind == "step":
            end = (" final" if self.final else "") + (f" wave {self.wave}" if self.wave >= 0 else "")
            return f"{where}: v{self.output} = step {self.layer}({values[0]}){end}"
        if self.kind == "combine":
            terms = " ".join(f"{c:+g} {v}" for c, v in zip(self.coefficients, values, strict=True))
            return f"{where}: v{self.output} = {terms}"
        if self.kind == "fit":
            return f"{where}: v{self.output} = fit {self.span}({values[0]})"
        if self.kind == "observe":
            return f"{where}: fit {self.span} observes {values[0]} -> {values[1]}"
        if self.kind == "weights":
            return f"{where}: weight gradients of layer {self.layer} (after {values[0]})"
        return f"{where}: residual {self.iteration} += |{values[0]} - {values[1]}|^2"


@dataclass(frozen=True)
class Message:
    """Value `value` travels from rank `source` to rank `target`."""

    value: int
    source: int
    target: int


@dataclass(frozen=True)
class Plan:
    """The tasks of one solve. `starts[m]` / `ends[m]` are the values of micro-batch m at both ends of the stack."""

    direction: Direction
    num_ranks: int
    num_layers: int
    starts: tuple[int, ...]
    ends: tuple[int, ...]
    tasks: tuple[Task, ...]
    iterations: int = 0  # relaxation sweeps of the fine level whose residual is measured (0: an exact plan)
    split_weights: bool = False  # weight gradients are tasks of their own, final vjps are input-only
    producer: dict[int, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        producer = dict.fromkeys(self.starts, EVERYWHERE)
        producer |= {t.output: t.rank for t in self.tasks if t.output is not None}
        object.__setattr__(self, "producer", producer)

    @property
    def micro_batches(self) -> int:
        return len(self.starts)

    def messages(self) -> list[Message]:
        """Every value that is used away from home, once per using rank, in the order in which they are produced."""
        wanted: dict[int, list[int]] = {}
        for task in self.tasks:
            for value in task.inputs:
                home = self.producer[value]
                if home not in (EVERYWHERE, task.rank) and task.rank not in wanted.setdefault(value, []):
                    wanted[value].append(task.rank)
        return [
            Message(t.output, t.rank, target)
            for t in self.tasks
            if t.output is not None
            for target in wanted.get(t.output, ())
        ]

    def groups(self) -> Iterator[tuple[Task, ...]]:
        """The tasks in order, those of one wave together and every other alone."""
        for wave, tasks in groupby(self.tasks, key=lambda t: t.wave):
            if wave >= 0:
                yield tuple(tasks)
            else:
                yield from ((task,) for task in tasks)

    def validate(self) -> None:
        """Asserts that every value is made once and before its use, that each layer has one final step, and that the
        steps of a wave depend on none of it, differ in layer and agree in all else."""
        made = set(self.starts)
        waves: set[int] = set()
        for group in self.groups():
            for task in group:
                assert 0 <= task.rank < self.num_ranks, f"{task}: no such rank"
                missing = [v for v in task.inputs if v not in made]
                assert not missing, f"{task}: values {missing} are used before they are made"
            for task in group:
                if task.output is not None:
                    assert task.output not in made, f"{task}: value made twice"
                    made.add(task.output)
            assert group[0].wave not in waves, f"{group[0]}: the wave was through already"
            waves |= {group[0].wave} - {-1}
            assert len({(t.kind, t.rank, t.micro_batch, t.final) for t in group}) == 1, f"{group[0]}: a mixed wave"
            assert len(group) == 1 or len({t.layer for t in group}) == len(group), (
                f"{group[0]}: a layer twice in a wave"
            )
        assert set(self.ends) <= made, "an end value is never made"
        finals = Counter((t.layer, t.micro_batch) for t in self.tasks if t.final)
        expected = {(n, m) for n in range(self.num_layers) for m in range(self.micro_batches)}
        assert set(finals) == expected, f"final steps are wrong: {set(finals) ^ expected}"
        assert set(finals.values()) <= {1}, "a layer has several final steps"

    def __str__(self) -> str:
        head = (
            f"{self.direction} plan: {self.num_layers} layers, {self.num_ranks} ranks, "
            f"{self.micro_batches} micro-batches, {len(self.tasks)} tasks, {len(self.messages())} messages"
        )
        return "\n".join([head, *map(str, self.tasks)])


class PlanBuilder:
    """Writes tasks by running an algorithm on value numbers instead of tensors.

    Values are hash-consed: the same step of the same value is one task, and a combination that cancels to one of its
    inputs is that input. So nothing is computed twice, a converged interval is never relaxed again, and a solve with
    enough iterations is the serial chain itself, bit for bit.

    stacked: the steps of the last relaxation are tasks of their own, even where an earlier sweep made the same ones, so
        that all intervals are relaxed together: a few evaluations more, in far fewer waves (see `waves`).
    """

    def __init__(self, direction: Direction, owner: Sequence[int], *, stacked: bool = False) -> None:
        self.stacked = stacked
        self.wave = -1  # of the steps that are written next
        self.direction: Direction = direction
        self.owner = tuple(owner)  # lp rank of each layer
        self.tasks: list[Task] = []
        self.starts: list[int] = []
        self.ends: list[int] = []
        self.iterations = 0
        self._home: dict[int, int] = {}
        self._micro_batch = -1
        self._next = self._waves = 0
        self._made: dict[tuple, Task] = {}
        self._copies: dict[int, dict[int, int]] = {}  # value -> rank -> the same value, made there too

    def start(self) -> int:
        """Opens the next micro-batch and returns its start value."""
        self._micro_batch += 1
        value = self._new_value(EVERYWHERE)
        self.starts.append(value)
        return value

    def step(self, layer: int, x: int, *, final: bool = False) -> int:
        """final: the step of the last relaxation."""
        key = ("final" if final and self.stacked else "step", layer, x)
        value = self._make(key, "step", self.owner[layer], (x,), layer=layer, wave=self.wave if self.stacked else -1)
        self._made[key].final |= final
        return value

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
        made = self._make(key, "combine", ranks[0], values, coefficients=coefficients)
        if len(ranks) > 1:
            copies = self._copies.setdefault(made, {self._home[made]: made})
            for rank in ranks:
                if rank not in copies:
                    copies[rank] = self._make((*key, rank), "combine", rank, values, coefficients=coefficients)
        return made

    def combine_everywhere(self, terms: Sequence[tuple[float, int]], parts: dict[int, list[tuple[float, int]]]) -> int:
        """sum of `terms`, which all ranks of `parts` hold, and of every rank's part, on each of these ranks.

        By recursive doubling: log2(ranks) messages one after the other. Ranks beyond a power of two hand their part in
        first and take the result from those that have it.
        """
        ranks, held = list(parts), {value for _, value in terms}
        # of a part with one value of its own that value travels: the others may need it anyway
        groups = [
            part if sum(value not in held for _, value in part) == 1 else [(1.0, self.combine(part, rank))]
            for rank, part in parts.items()
        ]
        width = 1
        power = 1 << (len(ranks).bit_length() - 1)
        for i, extra in enumerate(groups[power:]):
            groups[i] = [(1.0, self.combine([*groups[i], *extra], ranks[i]))]
        ranks, groups = ranks[:power], groups[:power]
        while len(groups) > 2:
            width *= 2
            groups = [
                [(1.0, self.combine([*a, *b], *ranks[g * width : (g + 1) * width]))]
                for g, (a, b) in enumerate(zip(groups[::2], groups[1::2], strict=True))
            ]
        return self.combine([*terms, *(term for group in groups for term in group)], *ranks)

    def fit(self, span: tuple[int, int], x: int) -> int:
        """The running fit of an interval at value x, on the rank that makes the interval's end."""
        return self._make(("fit", span, x), "fit", self._fit_home(span), (x,), span=span)

    def observe(self, span: tuple[int, int], start: int, end: int) -> None:
        """Shows the interval's fit what it stands for."""
        self.tasks.append(Task("observe", self._fit_home(span), self._micro_batch, (start, end), None, span=span))

    def _fit_home(self, span: tuple[int, int]) -> int:
        return self.owner[span[1] - 1 if self.direction == "forward" else span[0]]

    def residual(self, a: int, b: int, iteration: int) -> None:
        if a != b:  # the same value leaves no residual
            rank = self.home(a)
            inputs = (a, self._nearest(b, rank))
            self.tasks.append(Task("residual", rank, self._micro_batch, inputs, None, iteration=iteration))

    def home(self, value: int, default: int = 0) -> int:
        """The rank that makes `value` (`default` for a start, which every rank holds)."""
        rank = self._home[value]
        return default if rank == EVERYWHERE else rank

    def end(self, value: int) -> None:
        self.ends.append(value)

    def build(self, num_ranks: int, *, split_weights: bool = False) -> Plan:
        """The plan without the tasks that nothing needs.

        split_weights: of a backward plan: weight gradients become tasks of their own. No other rank waits for them, so
            they can fill the gaps between the others.
        """
        tasks = list(self.tasks)
        if split_weights:
            finals = [(t, t.output) for t in tasks if t.final and t.output is not None]
            tasks += [Task("weights", t.rank, t.micro_batch, (v,), None, layer=t.layer) for t, v in finals]
        needed = set(self.ends)
        kept: list[Task] = []
        for task in reversed(tasks):
            if task.output is None or task.final or task.output in needed:
                needed.update(task.inputs)
                kept.append(task)
        return Plan(
            self.direction,
            num_ranks,
            len(self.owner),
            tuple(self.starts),
            tuple(self.ends),
            tuple(reversed(kept)),
            self.iterations,
            split_weights,
        )

    def _nearest(self, value: int, rank: int) -> int:
        """The copy of a value that `rank` takes: its own, else one of the others, so that all of them are asked."""
        copies = self._copies.get(value)
        if copies is None:
            return value
        return copies[rank] if rank in copies else list(copies.values())[rank % len(copies)]

    def _new_value(self, rank: int) -> int:
        value, self._next = self._next, self._next + 1
        self._home[value] = rank
        return value

    def _make(
        self, key: tuple, kind: Literal["step", "combine", "fit"], rank: int, inputs: tuple[int, ...], **more
    ) -> int:
        task = self._made.get(key)
        if task is None:
            inputs = tuple(self._nearest(value, rank) for value in inputs)
            task = Task(kind, rank, self._micro_batch, inputs, self._new_value(rank), **more)
            self._made[key] = task
            self.tasks.append(task)
        assert task.output is not None
        return task.output
