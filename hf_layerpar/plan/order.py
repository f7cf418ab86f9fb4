"""In which order every rank works its tasks: list scheduling, under a limit on the graphs that a rank keeps."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Callable, Sequence

from hf_layerpar.plan.costs import Costs
from hf_layerpar.plan.tasks import Plan, Task

Priority = Callable[[Task, float], tuple]
"""Sort key of a ready task from the task and its tail, the time from its start to the end of the longest chain that
hangs on it. Smallest first; the plan's order breaks ties."""

Cap = Callable[[int], int]
"""The most final forward steps (blocks of layers) that a rank may hold the graphs of."""


def in_order(plan: Plan, priority: Priority, costs: Costs | None = None, cap: Cap | None = None) -> Plan:
    """The plan with its tasks sorted by starting time: a free rank takes, of the tasks whose inputs have arrived, the
    first by priority. That is a topological order, so ranks that work it can't wait for each other in a circle.

    cap: a rank that holds as many graphs takes no further forward step, unless all ranks would wait for ever.
    """
    costs = costs or Costs()
    tasks = plan.tasks
    price = [costs.of(t, plan) for t in tasks]
    users: dict[int, list[int]] = {}
    for i, task in enumerate(tasks):
        for value in set(task.inputs):
            users.setdefault(value, []).append(i)
    followers = [list(dict.fromkeys(u for v in t.outputs for u in users.get(v, ()))) for t in tasks]
    waiting = [0] * len(tasks)
    for after in (followers, later := _after_each_other(plan)):
        for targets in after:
            for i in targets:
                waiting[i] += 1
    tail = [0.0] * len(tasks)
    for i in range(len(tasks) - 1, -1, -1):
        tail[i] = price[i] + max((tail[u] for u in followers[i]), default=0.0)
    keys = [(*priority(task, tail[i]), i) for i, task in enumerate(tasks)]
    order = _list_schedule(plan, price, followers, later, waiting, keys, costs.send + costs.transfer(), cap)
    return dataclasses.replace(plan, tasks=tuple(tasks[i] for i in order))


def _after_each_other(plan: Plan) -> list[list[int]]:
    """For each task those that may only start after it: as both add to the same gradients, whose sums must not depend on
    the schedule; or as the final vjp spends a graph that it goes through too."""
    later: list[list[int]] = [[] for _ in plan.tasks]
    last: dict[tuple, int] = {}
    final = {v: i for i, t in enumerate(plan.tasks) if t.direction == "backward" and t.final for v in t.inputs}
    for i, task in enumerate(plan.tasks):
        if task.kind == "step" and task.direction == "backward" and not task.final:
            later[i] += {final[v] for v in task.inputs if plan.values[v].kind == "graph"}
    for i, task in enumerate(plan.tasks):
        if task.kind == "weights" or (task.direction == "backward" and (task.final or task.kind == "phase")):
            split = any(plan.values[v].kind == "pending" for v in task.outputs)
            for layer in task.layers or (-1,):
                # the rest of a split backward adds to the gradients too (norms): both have an order of their own
                key = (task.kind, task.rank, task.place, layer)
                if key in last and i not in later[last[key]]:
                    later[last[key]].append(i)
                last[key] = i
                if not split and task.kind == "step":  # no weight gradient of an earlier micro-batch may come after it
                    before = last.get(("weights", task.rank, task.place, layer))
                    if before is not None and i not in later[before]:
                        later[before].append(i)
    return later


def _list_schedule(
    plan: Plan,
    price: Sequence[float],
    followers: Sequence[list[int]],
    later: Sequence[list[int]],
    waiting: list[int],
    keys: Sequence[tuple],
    message: float,
    cap: Cap | None,
) -> list[int]:
    """The tasks in the order of their starts."""
    tasks = plan.tasks
    limits = [cap(rank) if cap else len(tasks) for rank in range(plan.num_ranks)]
    held = [0] * plan.num_ranks
    users = {v: 0 for t in tasks for v in t.outputs if plan.values[v].kind in ("graph", "pending")}
    for task in tasks:
        for value in task.inputs:
            if value in users:
                users[value] += 1
    ready: list[list[tuple]] = [[] for _ in range(plan.num_ranks)]
    busy = [False] * plan.num_ranks
    events: list[tuple[float, int, int]] = []  # (time, 0 an input arrives / 1 a task ends, task)
    for i, task in enumerate(tasks):
        if waiting[i] == 0:
            heapq.heappush(ready[task.rank], keys[i])
    order: list[int] = []

    def grows(i: int) -> bool:
        return tasks[i].kind == "step" and tasks[i].final and tasks[i].direction == "forward"

    def take(rank: int, *, anyway: bool = False) -> bool:
        full = held[rank] >= limits[rank] and not anyway
        allowed = [key for key in ready[rank] if not (full and grows(key[-1]))] if full else ready[rank]
        if busy[rank] or not allowed:
            return False
        key = min(allowed) if full else ready[rank][0]
        if full:
            ready[rank].remove(key)
            heapq.heapify(ready[rank])
        else:
            heapq.heappop(ready[rank])
        i = key[-1]
        busy[rank] = True
        held[rank] += grows(i)
        order.append(i)
        heapq.heappush(events, (now + price[i], 1, i))
        return True

    now, touched = 0.0, set(range(plan.num_ranks))
    while True:
        for rank in sorted(touched):
            take(rank)
        if not events:
            if not any([take(rank, anyway=True) for rank in range(plan.num_ranks)]):
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
            for value in tasks[i].inputs:
                if value in users:
                    users[value] -= 1
                    if users[value] == 0 and not any(plan.values[v].kind == "pending" for v in tasks[i].outputs):
                        held[rank] -= 1
            for user in followers[i]:
                delay = message if tasks[user].rank != rank else 0.0
                heapq.heappush(events, (now + delay, 0, user))
            for user in later[i]:
                heapq.heappush(events, (now, 0, user))
    assert len(order) == len(tasks), "the plan has a cycle"
    return order
