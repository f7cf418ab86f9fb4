"""Schedules: which of its tasks a rank takes first, and how many graphs it may hold. One object each.

The names are those of torch.distributed.pipelining and the papers. A new schedule is one entry of `SCHEDULES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from hf_layerpar.plan.builder import Split
from hf_layerpar.plan.costs import Costs
from hf_layerpar.plan.order import Cap, Priority, in_order
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


def forward_first(task: Task, tail: float) -> tuple:
    """All forwards, then all backwards."""
    return (task.direction == "backward", task.kind == "weights", task.micro_batch, -task.place, -_depth(task))


def backward_first(task: Task, tail: float) -> tuple:
    """A backward as soon as there is one; of the forwards those deepest in the model; weight gradients in the gaps."""
    return (task.kind == "weights", task.direction == "forward", -task.place, -_depth(task), task.micro_batch)


def _depth(task: Task) -> int:
    return task.layers[0] if task.layers else 0


@dataclass(frozen=True)
class Schedule:
    """An exact schedule: what goes first, how many graphs a rank may hold, and whether backwards are split in two.

    placement: the blocks that it is made for.
    """

    priority: Priority
    cap: Callable[[int, Shape], int] | None
    split: bool
    placement: Placement

    def __call__(self, plan_of: PlanOf, shape: Shape, costs: Costs) -> Plan:
        cap = self._cap_of(shape)
        return in_order(plan_of(always if self.split else None), self.priority, costs, cap)

    def _cap_of(self, shape: Shape) -> Cap | None:
        of = self.cap
        return None if of is None else lambda rank: max(shape.blocks, of(rank, shape))


def always(task: Task) -> bool:
    return True


def _one_f_one_b_cap(rank: int, shape: Shape) -> int:
    """P - r micro-batches with one block a rank; with several, Megatron's warm-up (arXiv 2104.04473, section 2.2)."""
    if shape.blocks == 1:
        return shape.num_ranks - rank
    return 2 * (shape.num_ranks - rank - 1) + (shape.blocks - 1) * shape.num_ranks + 1


def _whole_cap(rank: int, shape: Shape) -> int:
    """As many graphs as the first rank holds in 1F1B."""
    return shape.num_ranks * shape.blocks


SCHEDULES: dict[str, Callable[[PlanOf, Shape, Costs], Plan]] = {
    # arXiv 1811.06965
    "gpipe": Schedule(forward_first, None, split=False, placement="blocks"),
    # arXiv 1806.03377
    "1f1b": Schedule(backward_first, _one_f_one_b_cap, split=False, placement="blocks"),
    # arXiv 2104.04473
    "interleaved_1f1b": Schedule(backward_first, _one_f_one_b_cap, split=False, placement="interleaved"),
    # arXiv 2401.10241, the variant with the memory of 1F1B
    "zb_h1": Schedule(backward_first, _whole_cap, split=True, placement="blocks"),
    # arXiv 2405.15362
    "zb_v": Schedule(backward_first, _whole_cap, split=True, placement="v"),
}


def fastest(plan_of: PlanOf, shape: Shape, costs: Costs) -> Plan:
    """The list schedule: 1F1B's memory, and weight gradients taken apart where another rank waits for the rest.

    Starts from the schedules with nothing and with everything split, whichever is shorter, and splits (or leaves
    whole) one final vjp after the other as long as that shortens the step.
    """

    def memory(rank: int) -> int:
        return max(_one_f_one_b_cap(0, shape), shape.blocks)

    def plan(split: Split | None) -> Plan:
        return in_order(plan_of(split), backward_first, costs, memory)

    best = min((plan(split) for split in (None, always)), key=lambda p: _length(p, costs))
    apart = {_key(task) for task in best.tasks if _is_split(task, best)}
    finals = [t for t in best.tasks if t.kind == "step" and t.final and t.direction == "backward"]
    if len(finals) > 64:  # the search is for short plans; in long ones few splits matter
        return best
    # the last micro-batches first: behind them comes nothing that would fill the gaps
    for task in sorted(finals, key=lambda t: (-t.micro_batch, -t.rank)):
        tried = apart ^ {_key(task)}
        candidate = plan(lambda t, tried=tried: _key(t) in tried)
        if _length(candidate, costs) < _length(best, costs) - 1e-9:
            best, apart = candidate, tried
    return best


def _key(task: Task) -> tuple:
    return (task.place, task.micro_batch, task.layers)


def _is_split(task: Task, plan: Plan) -> bool:
    return any(plan.values[v].kind == "pending" for v in task.outputs)


def _length(plan: Plan, costs: Costs) -> float:
    return simulate(plan, costs).makespan


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


def shortest(plan_of: PlanOf, costs: Costs, splits: Iterable[Split | None]) -> Plan:
    """No rule is best everywhere, so each is tried and the shortest schedule kept."""
    plans = (in_order(plan_of(split), priority, costs) for split in splits for priority in PRIORITIES)
    return min(plans, key=lambda p: simulate(p, costs).makespan)
