"""Schedules: which of its tasks a rank takes first, and how many graphs it may hold. One object each.

The names are those of torch.distributed.pipelining and the papers. A new schedule is one entry of `SCHEDULES`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from hf_layerpar.plan.builder import Split
from hf_layerpar.plan.costs import Costs
from hf_layerpar.plan.order import Priority, Rule, Work
from hf_layerpar.plan.simulate import simulate
from hf_layerpar.plan.tasks import Plan, Task

PlanOf = Callable[[Split | None], Plan]
"""The tasks of a step in the order in which the algorithm is written down, given what is split."""

Placement = Literal["blocks", "interleaved", "v"]
"""Which blocks of layers a rank holds: one; two, in the ranks' order each (0 .. P-1, 0 .. P-1); or two, there and back
(0 .. P-1, P-1 .. 0)."""


@dataclass(frozen=True)
class Shape:
    """What a schedule may ask: ranks, micro-batches, and blocks that a rank holds, counted over all passes."""

    num_ranks: int
    micro_batches: int
    blocks: int

    @property
    def rounds(self) -> int:
        """Of several blocks, each is worked on a round of micro-batches before the next one is: on as many as there are
        ranks, or some more where these rounds don't come out even."""
        return max(1, self.micro_batches // self.num_ranks)

    @property
    def short_rounds(self) -> int:
        """The same, with some fewer."""
        return -(-self.micro_batches // self.num_ranks)


def forward_first(task: Task, tail: float) -> tuple:
    """A forward as soon as there is one (and room for it), the deepest in the model; weight gradients in the gaps. With
    a limited flight this is one forward, one backward in turn."""
    forward = task.direction == "forward"
    return (task.kind == "weights", not forward, -task.place, -_depth(task), task.micro_batch)


def backward_first(task: Task, tail: float) -> tuple:
    """A backward as soon as there is one."""
    forward = task.direction == "forward"
    return (task.kind == "weights", forward, -task.place, -_depth(task), task.micro_batch)


def micro_batch_first(task: Task, tail: float) -> tuple:
    """A forward as soon as there is one, of the first micro-batch that has one."""
    return (task.kind == "weights", task.direction == "backward", task.micro_batch)


def _depth(task: Task) -> float:
    """How deep in its pass; what makes the end state of a pass, or its adjoint, is deepest."""
    if task.kind in ("cut", "join", "combine"):
        return math.inf
    return task.layers[0] if task.layers else 0


def in_rounds(task: Task, shape: Shape) -> tuple:
    """Each block on a round of micro-batches, then the next."""
    return _in_rounds(task, shape, shape.rounds)


def in_short_rounds(task: Task, shape: Shape) -> tuple:
    """The same, for limits of memory that longer rounds would run into."""
    return _in_rounds(task, shape, shape.short_rounds)


def _in_rounds(task: Task, shape: Shape, rounds: int) -> tuple:
    way = 1 if task.direction == "forward" else -1
    this = task.micro_batch * rounds // shape.micro_batches
    return (this, way * task.place, way * _depth(task), task.micro_batch)


def one_forward_one_backward(rank: int, shape: Shape) -> int:
    """P - r blocks of layers with one block a rank (arXiv 1806.03377); with several, Megatron's warm-up
    (arXiv 2104.04473, section 2.2)."""
    if shape.blocks == 1:
        return shape.num_ranks - rank
    longest = -(-shape.micro_batches // shape.rounds)
    return 2 * (shape.num_ranks - rank - 1) + (shape.blocks - 1) * longest + 1


def as_one_per_rank(rank: int, shape: Shape) -> float:
    """As many micro-batches as ranks: what the first rank holds in 1F1B with one block a rank."""
    return shape.num_ranks


def first_rank(rank: int, shape: Shape) -> float:
    """As many micro-batches as the first rank holds in 1F1B, in rounds of as many as ranks."""
    even = dataclasses.replace(shape, micro_batches=shape.num_ranks)
    return one_forward_one_backward(0, even) / shape.blocks


@dataclass(frozen=True)
class Schedule:
    """An exact schedule: the shortest by one of its rules (see `Rule` for their parts).

    split: whether backwards are split in two. placement: the blocks that it is made for.
    """

    priorities: tuple[Priority, ...] = (forward_first,)
    sequence: Callable[[Task, Shape], tuple] | None = None
    flight: Callable[[int, Shape], int] | None = None
    memory: Callable[[int, Shape], float] | None = None
    split: bool = False
    placement: Placement = "blocks"

    def __call__(self, plan_of: PlanOf, shape: Shape, costs: Costs) -> Plan:
        work = Work(plan_of(always if self.split else None), costs)
        return min((work.ordered(rule) for rule in self.rules(shape)), key=lambda plan: simulate(plan, costs).makespan)

    def rules(self, shape: Shape) -> list[Rule]:
        def of(function: Callable | None) -> Callable | None:
            return function and (lambda what: function(what, shape))

        return [Rule(p, of(self.sequence), of(self.flight), of(self.memory)) for p in self.priorities]


def always(task: Task) -> bool:
    return True


SCHEDULES: dict[str, Callable[[PlanOf, Shape, Costs], Plan]] = {
    # arXiv 1811.06965
    "gpipe": Schedule((forward_first, micro_batch_first)),
    # arXiv 1806.03377
    "1f1b": Schedule(sequence=in_rounds, flight=one_forward_one_backward),
    # arXiv 2104.04473
    "interleaved_1f1b": Schedule(sequence=in_rounds, flight=one_forward_one_backward, placement="interleaved"),
    # arXiv 2401.10241, the variant with the memory of 1F1B
    "zb_h1": Schedule(flight=one_forward_one_backward, memory=first_rank, split=True),
    # arXiv 2405.15362
    "zb_v": Schedule((forward_first, backward_first), memory=as_one_per_rank, split=True, placement="v"),
}
RULES: tuple[Schedule, ...] = (
    Schedule(flight=one_forward_one_backward, memory=first_rank),
    Schedule(sequence=in_short_rounds, flight=one_forward_one_backward, memory=first_rank),
    Schedule((forward_first, backward_first), memory=first_rank),
)
"""What the list schedule tries. The first is 1F1B, or, split, ZB-H1; the second differs where a rank has several
blocks; the others keep more in flight, which hides slow messages."""


WORTH = 0.95
"""Weight gradients are taken apart for a step that a simulation finds shorter by so much: what they need has left the
caches by then, and is held longer, which unit costs don't show."""


def fastest(plan_of: PlanOf, shape: Shape, costs: Costs) -> Plan:
    """The list schedule: the shortest found that holds no more than 1F1B's first rank, with weight gradients taken
    apart where another rank waits for the rest.

    The rules are tried with nothing and with everything split; the best of them with the last micro-batches alone, as
    behind these comes nothing else that would fill the gaps; and in short plans with one final vjp more or less, as
    long as that shortens the step.
    """
    whole = plan_of(None)
    finals = [t for t in whole.tasks if t.kind == "step" and t.final and t.direction == "backward"]
    everything = {_key(task) for task in finals}

    def tried(rules: Iterable[Rule], apart: set[tuple]) -> Iterator[tuple[float, Plan, Rule, set[tuple]]]:
        work = Work(plan_of(lambda task: _key(task) in apart) if apart else whole, costs)
        for rule in rules:
            plan = work.ordered(rule)
            yield simulate(plan, costs).makespan, plan, rule, apart

    rules = [rule for s in RULES if shape.blocks > 1 or s.sequence is None for rule in s.rules(shape)]
    unsplit = min(tried(rules, set()), key=lambda t: t[0])
    best = min(unsplit, *tried(rules, everything), key=lambda t: t[0]) if finals else unsplit
    for first in _halves(shape.micro_batches) if finals else ():
        apart = {_key(t) for t in finals if t.micro_batch >= first}
        best = min(best, *tried([best[2]], apart), key=lambda t: t[0])
    if len(finals) <= 64:
        for task in sorted(finals, key=lambda t: (-t.micro_batch, -t.rank)):
            other = next(tried([best[2]], best[3] ^ {_key(task)}))
            if other[0] < best[0] - 1e-9:
                best = other
    return best[1] if best[0] < WORTH * unsplit[0] else unsplit[1]


def _halves(micro_batches: int) -> Iterator[int]:
    """The last half of the micro-batches, the last quarter, ...: where each begins."""
    left = micro_batches // 2
    while left:
        yield micro_batches - left
        left //= 2


def _key(task: Task) -> tuple:
    return (task.place, task.micro_batch, task.layers)


SCHEDULES["list"] = fastest


# ---- MGRIT: sweeps of single layers
def as_written(task: Task, tail: float) -> tuple:
    """The order in which the algorithm is written down."""
    return (task.kind == "weights", task.micro_batch)


def earliest_micro_batch(task: Task, tail: float) -> tuple:
    """Later micro-batches fill the gaps of earlier ones; within one, the longest tail first. Weight gradients, for
    which nobody waits, fill what gaps there are left."""
    return (task.kind == "weights", task.micro_batch, -tail)


def final_steps_last(task: Task, tail: float) -> tuple:
    """What the coarse sweeps of any micro-batch wait for comes before the last relaxation, which fills the gaps."""
    return (task.kind == "weights", task.final, task.micro_batch, -tail)


PRIORITIES: tuple[Priority, ...] = (as_written, earliest_micro_batch, final_steps_last)
"""Of equally short schedules the first is taken: as written, the steps of an interval follow each other."""


def shortest(plan_of: PlanOf, costs: Costs, splits: Sequence[Split | None]) -> Plan:
    """No rule is best everywhere, so each is tried and the shortest schedule kept; of splits but the first, only what
    is best for that one."""
    best: tuple[float, Priority, Plan] | None = None
    for split in splits:
        work = Work(plan_of(split), costs)
        for priority in PRIORITIES if best is None else [best[1]]:
            plan = work.ordered(Rule(priority))
            length = simulate(plan, costs).makespan
            if best is None or length < best[0]:
                best = (length, priority, plan)
    assert best is not None
    return best[2]
