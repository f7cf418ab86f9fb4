"""In which order every rank works its tasks: list scheduling of a plan."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Callable, Sequence

from hf_layerpar.mgrit.plan import EVERYWHERE, Plan, Task
from hf_layerpar.mgrit.simulate import Costs

Priority = Callable[[Task, float], tuple]
"""Sort key of a ready task from the task and its tail, the time from its start to the end of the longest chain that
hangs on it. Smallest first; the plan's order breaks ties."""


def earliest_micro_batch(task: Task, tail: float) -> tuple:
    """Later micro-batches fill the gaps of earlier ones; within one, the longest tail first. Weight gradients, for
    which nobody waits, fill what gaps there are left."""
    return (task.kind == "weights", task.micro_batch, -tail)


def final_steps_last(task: Task, tail: float) -> tuple:
    """What the coarse sweeps of any micro-batch wait for comes before the last relaxation, which fills the gaps."""
    return (task.kind == "weights", task.final, task.micro_batch, -tail)


def as_written(task: Task, tail: float) -> tuple:
    """The order in which the algorithm is written down."""
    return (task.kind == "weights", task.micro_batch)


PRIORITIES: tuple[Priority, ...] = (as_written, earliest_micro_batch, final_steps_last)
"""Of equally short schedules the first is taken: as written, the steps of an interval follow each other."""


def in_schedule_order(plan: Plan, costs: Costs | None = None, priorities: Sequence[Priority] = PRIORITIES) -> Plan:
    """The plan with its tasks in list-schedule order: a free rank takes, of the tasks whose inputs have arrived, the
    first by priority. No rule is best everywhere, so each is tried and the shortest schedule kept.

    Sorted by starting time the result is a topological order, so ranks that work it in order can't wait for each other
    in a circle.
    """
    costs = costs or Costs()
    tasks = plan.tasks
    price = [costs.of(t, plan) for t in tasks]
    users: dict[int, list[int]] = {}
    for i, task in enumerate(tasks):
        for value in set(task.inputs):
            users.setdefault(value, []).append(i)
    followers = [users.get(t.output, []) if t.output is not None else [] for t in tasks]
    tail = [0.0] * len(tasks)
    for i in range(len(tasks) - 1, -1, -1):
        tail[i] = price[i] + max((tail[u] for u in followers[i]), default=0.0)

    schedules = []
    for priority in priorities:
        keys = [(*priority(task, tail[i]), i) for i, task in enumerate(tasks)]
        schedules.append(_list_schedule(plan, price, followers, keys, costs.send + costs.transfer()))
    order = min(schedules, key=lambda schedule: schedule[0])[1]
    return dataclasses.replace(plan, tasks=tuple(tasks[i] for i in order))


def _list_schedule(
    plan: Plan, price: list[float], followers: list[list[int]], keys: list[tuple], message: float
) -> tuple[float, list[int]]:
    """The end of the last task, and the tasks in the order of their starts."""
    tasks = plan.tasks
    waiting = [len([v for v in set(t.inputs) if plan.producer[v] != EVERYWHERE]) for t in tasks]
    ready: list[list[tuple]] = [[] for _ in range(plan.num_ranks)]
    busy = [False] * plan.num_ranks
    events: list[tuple[float, int, int]] = []  # (time, 0 an input arrives / 1 a task ends, task)
    for i, task in enumerate(tasks):
        if waiting[i] == 0:
            heapq.heappush(ready[task.rank], keys[i])
    order: list[int] = []
    now, touched = 0.0, set(range(plan.num_ranks))
    while True:
        for rank in sorted(touched):
            if not busy[rank] and ready[rank]:
                i = heapq.heappop(ready[rank])[-1]
                busy[rank] = True
                order.append(i)
                heapq.heappush(events, (now + price[i], 1, i))
        if not events:
            break
        now, touched = events[0][0], set()
        while events and events[0][0] == now:
            _, ended, i = heapq.heappop(events)
            rank = tasks[i].rank
            if not ended:
                waiting[i] -= 1
                if waiting[i] == 0:
                    heapq.heappush(ready[rank], keys[i])
                    touched.add(rank)
                continue
            busy[rank] = False
            touched.add(rank)
            for user in followers[i]:
                delay = message if tasks[user].rank != rank else 0.0
                heapq.heappush(events, (now + delay, 0, user))
    assert len(order) == len(tasks), "the plan has a cycle"
    return now, order
