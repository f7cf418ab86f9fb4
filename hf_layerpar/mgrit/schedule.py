"""When each task runs: list scheduling of a plan, and the time line that unit costs give it. No processes needed."""

from __future__ import annotations

import dataclasses
import heapq
from dataclasses import dataclass

from hf_layerpar.mgrit.plan import EVERYWHERE, Plan, Task


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds (or any unit) per task. The defaults are the units of the cost model: one layer evaluation is 1.

    step: one layer forward. vjp: an input-only vjp. weights: the weight half of a final vjp. combine: a linear
    combination or a residual. message: what it takes a value to reach another rank.
    """

    step: float = 1.0
    vjp: float = 1.0
    weights: float = 1.0
    combine: float = 0.0
    message: float = 0.0

    def of(self, task: Task, direction: str) -> float:
        if task.kind != "step":
            return self.combine
        if direction == "forward":
            return self.step
        return self.vjp + (self.weights if task.final else 0.0)


@dataclass(frozen=True)
class Timeline:
    """When every task of a plan starts and ends, in the units of the costs."""

    plan: Plan
    spans: tuple[tuple[float, float], ...]  # (start, end) of plan.tasks[i]

    @property
    def makespan(self) -> float:
        return max((end for _, end in self.spans), default=0.0)

    @property
    def busy(self) -> tuple[float, ...]:
        """Working time of each rank."""
        totals = [0.0] * self.plan.num_ranks
        for task, (start, end) in zip(self.plan.tasks, self.spans, strict=True):
            totals[task.rank] += end - start
        return tuple(totals)

    @property
    def idle_share(self) -> float:
        """Share of rank time, over all ranks and the whole makespan, in which nothing is computed."""
        total = self.makespan * self.plan.num_ranks
        return 1.0 - sum(self.busy) / total if total else 0.0


def simulate(plan: Plan, costs: Costs | None = None) -> Timeline:
    """Times a plan: every rank works its tasks in plan order, each as soon as its inputs have arrived."""
    costs = costs or Costs()
    ready: dict[int, float] = dict.fromkeys(plan.starts, 0.0)
    free = [0.0] * plan.num_ranks
    spans = []
    for task in plan.tasks:
        start = max([free[task.rank], *(_arrival(plan, ready, v, task.rank, costs) for v in task.inputs)])
        end = start + costs.of(task, plan.direction)
        free[task.rank] = end
        if task.output is not None:
            ready[task.output] = end
        spans.append((start, end))
    return Timeline(plan, tuple(spans))


def in_schedule_order(plan: Plan, costs: Costs | None = None) -> Plan:
    """The plan with its tasks in list-schedule order.

    A free rank takes, of the tasks whose inputs have arrived, the one of the earliest micro-batch and among these the
    one with the longest way to the end: later micro-batches fill the gaps of earlier ones. Sorted by starting time the
    result is a topological order, so ranks that work it in order can't wait for each other in a circle.
    """
    costs = costs or Costs()
    tasks = plan.tasks
    price = [costs.of(t, plan.direction) for t in tasks]
    users: dict[int, list[int]] = {}
    for i, task in enumerate(tasks):
        for value in set(task.inputs):
            users.setdefault(value, []).append(i)
    tail = [0.0] * len(tasks)
    for i in range(len(tasks) - 1, -1, -1):
        output = tasks[i].output
        after = max((tail[u] for u in users.get(output, ())), default=0.0) if output is not None else 0.0
        tail[i] = price[i] + after

    waiting = [len([v for v in set(t.inputs) if plan.producer[v] != EVERYWHERE]) for t in tasks]
    ready: list[list[tuple]] = [[] for _ in range(plan.num_ranks)]  # per rank: (micro-batch, -tail, task)
    busy = [False] * plan.num_ranks
    events: list[tuple[float, int, int]] = []  # (time, 0 an input arrives / 1 a task ends, task)

    def arrive(i: int) -> None:
        heapq.heappush(ready[tasks[i].rank], (tasks[i].micro_batch, -tail[i], i))

    for i in range(len(tasks)):
        if waiting[i] == 0:
            arrive(i)
    order: list[int] = []
    now, touched = 0.0, set(range(plan.num_ranks))
    while True:
        for rank in sorted(touched):
            if not busy[rank] and ready[rank]:
                i = heapq.heappop(ready[rank])[2]
                busy[rank] = True
                order.append(i)
                heapq.heappush(events, (now + price[i], 1, i))
        if not events:
            break
        now, touched = events[0][0], set()
        while events and events[0][0] == now:
            _, ended, i = heapq.heappop(events)
            if not ended:
                waiting[i] -= 1
                if waiting[i] == 0:
                    arrive(i)
                    touched.add(tasks[i].rank)
                continue
            busy[tasks[i].rank] = False
            touched.add(tasks[i].rank)
            output = tasks[i].output
            for user in users.get(output, ()) if output is not None else ():
                delay = costs.message if tasks[user].rank != tasks[i].rank else 0.0
                heapq.heappush(events, (now + delay, 0, user))
    assert len(order) == len(tasks), "the plan has a cycle"
    return dataclasses.replace(plan, tasks=tuple(tasks[i] for i in order))


def _arrival(plan: Plan, ready: dict[int, float], value: int, rank: int, costs: Costs) -> float:
    home = plan.producer[value]
    return ready[value] + (costs.message if home not in (EVERYWHERE, rank) else 0.0)
