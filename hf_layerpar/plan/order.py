"""In which order every rank works its tasks: list scheduling, under limits on the graphs that a rank keeps."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hf_layerpar.plan.costs import Costs
from hf_layerpar.plan.tasks import Plan, Task

Priority = Callable[[Task, float], tuple]
"""Sort key of a ready task from the task and its tail, the time from its start to the end of the longest chain that
hangs on it. Smallest first; the plan's order breaks ties."""


@dataclass(frozen=True)
class Rule:
    """What a rank takes next of the tasks whose inputs have arrived: the first by `priority` that nothing forbids.

    sequence: final steps of one rank and direction are worked strictly in this order (unless a stack is passed several
        times); None: as they come.
    flight: of a rank, the most blocks of layers (final forward steps) that may be ahead of their backward.
    memory: of a rank, the most micro-batches whose graphs it may hold, counted in layers; a graph is held until the
        weight gradients, which need much of it. A micro-batch enters only where all its later blocks on the rank
        still fit, so that it can't be stuck half way.

    Both limits give way where all ranks would wait for ever.
    """

    priority: Priority
    sequence: Callable[[Task], tuple] | None = None
    flight: Callable[[int], int] | None = None
    memory: Callable[[int], float] | None = None


def in_order(plan: Plan, rule: Rule, costs: Costs | None = None) -> Plan:
    """The plan with its tasks sorted by starting time. That is a topological order, so ranks that work it can't wait
    for each other in a circle."""
    return Work(plan, costs or Costs()).ordered(rule)


class Work:
    """The tasks of a plan with their prices and what waits for what, to be ordered by one rule or another."""

    def __init__(self, plan: Plan, costs: Costs) -> None:
        self.plan = plan
        tasks = plan.tasks
        self.price = [costs.of(t, plan) for t in tasks]
        self.ranks = [t.rank for t in tasks]
        self.message = costs.send + costs.transfer()
        makers = {v: [i] for i, t in enumerate(tasks) for v in t.outputs}
        for reduction in plan.reductions:
            makers[reduction.value] = [i for term in reduction.terms for i in makers[term]]
        self.followers: list[list[int]] = [[] for _ in tasks]
        for i, task in enumerate(tasks):
            for j in {j for v in task.inputs for j in makers[v]}:
                self.followers[j].append(i)
        self.later = _after_each_other(plan)
        self.tail = [0.0] * len(tasks)
        for i in range(len(tasks) - 1, -1, -1):
            self.tail[i] = self.price[i] + max((self.tail[u] for u in self.followers[i]), default=0.0)

    def ordered(self, rule: Rule) -> Plan:
        tasks = self.plan.tasks
        keys = [(*rule.priority(task, self.tail[i]), i) for i, task in enumerate(tasks)]
        # where a stack is passed several times, its sums have an order of their own, micro-batch by micro-batch
        repeats = len(set(self.plan.stacks)) < len(self.plan.stacks)
        later = self.later if rule.sequence is None or repeats else self._in_sequence(rule.sequence)
        order = self._list_schedule(keys, later, _Room(self.plan, rule))
        return dataclasses.replace(self.plan, tasks=tuple(tasks[i] for i in order))

    def _in_sequence(self, sequence: Callable[[Task], tuple]) -> list[list[int]]:
        """`later`, with the final steps of each rank and direction one after the other."""
        later = [list(after) for after in self.later]
        steps = [i for i, t in enumerate(self.plan.tasks) if t.kind == "step" and t.final]
        last: dict[tuple, int] = {}
        for i in sorted(steps, key=lambda i: (sequence(self.plan.tasks[i]), i)):
            way = (self.plan.tasks[i].rank, self.plan.tasks[i].direction)
            if way in last:
                later[last[way]].append(i)
            last[way] = i
        return later

    def _list_schedule(self, keys: Sequence[tuple], later: Sequence[Sequence[int]], room: _Room) -> list[int]:
        """The tasks in the order of their starts."""
        price, followers, ranks, message = self.price, self.followers, self.ranks, self.message
        waiting = [0] * len(keys)
        for after in (followers, later):
            for targets in after:
                for i in targets:
                    waiting[i] += 1
        ready: list[list[tuple]] = [[] for _ in range(self.plan.num_ranks)]
        idle = set(range(self.plan.num_ranks))
        touched: set[int] = set()  # ranks with something new to take
        events: list[tuple[float, int, int]] = []  # (time, 0 an input arrives / 1 a task ends, task)
        order: list[int] = []

        def start(key: tuple) -> None:
            i = key[-1]
            idle.discard(ranks[i])
            room.start(i)
            order.append(i)
            heapq.heappush(events, (now + price[i], 1, i))

        def arrive(i: int) -> None:
            waiting[i] -= 1
            if waiting[i] <= 0:
                heapq.heappush(ready[ranks[i]], keys[i])
                touched.add(ranks[i])

        now = 0.0
        for i, inputs in enumerate(waiting):
            if not inputs:
                arrive(i)
        while True:
            for rank in sorted(touched & idle):
                key = _first(ready[rank], room)
                if key is not None:
                    start(key)
            if not events:
                stuck = [(min(keys), rank) for rank, keys in enumerate(ready) if keys]
                if not stuck:
                    break
                key, rank = min(stuck)
                ready[rank].remove(key)
                heapq.heapify(ready[rank])
                start(key)
            now = events[0][0]
            touched.clear()
            while events and events[0][0] == now:
                _, ended, i = heapq.heappop(events)
                if not ended:
                    arrive(i)
                    continue
                idle.add(ranks[i])
                touched.add(ranks[i])
                room.end(i)
                for user in followers[i]:
                    if message and ranks[user] != ranks[i]:
                        heapq.heappush(events, (now + message, 0, user))
                    else:
                        arrive(user)
                for user in later[i]:
                    arrive(user)
        assert len(order) == len(keys), "the plan has a cycle"
        return order


def _first(ready: list[tuple], room: _Room) -> tuple | None:
    """Takes the first task that there is room for."""
    if not ready:
        return None
    if room.has(ready[0][-1]):
        return heapq.heappop(ready)
    key = min((key for key in ready if room.has(key[-1])), default=None)
    if key is not None:
        ready.remove(key)
        heapq.heapify(ready)
    return key


class _Room:
    """What a rule's limits leave of each rank."""

    def __init__(self, plan: Plan, rule: Rule) -> None:
        self.plan = plan
        self.grows: dict[int, int] = {}  # forward step that keeps a graph -> layers of it and of all later ones there
        if rule.flight is None and rule.memory is None:
            return
        ranks = range(plan.num_ranks)
        layers = [0] * plan.num_ranks  # of one micro-batch
        self.size: dict[int, int] = {}  # graph -> its layers
        for i, task in enumerate(plan.tasks):
            for value in task.outputs:
                if plan.values[value].kind in ("graph", "pending"):
                    self.size[value] = len(task.layers)
                    if task.direction == "forward":
                        self.grows[i] = 0
        blocks = sorted(self.grows, key=lambda i: (plan.tasks[i].place, plan.tasks[i].layers), reverse=True)
        behind: dict[tuple[int, int], int] = {}
        for i in blocks:
            task = plan.tasks[i]
            key = (task.rank, task.micro_batch)
            behind[key] = self.grows[i] = behind.get(key, 0) + len(task.layers)
            layers[task.rank] = max(layers[task.rank], behind[key])
        self.uses = dict.fromkeys(self.size, 0)
        for task in plan.tasks:
            for value in task.inputs:
                if value in self.uses:
                    self.uses[value] += 1
        unlimited = len(plan.tasks) * max(layers, default=0)
        self.most_flights = [rule.flight(r) if rule.flight else unlimited for r in ranks]
        self.most_layers = [rule.memory(r) * layers[r] + 1e-9 if rule.memory else unlimited for r in ranks]
        self.flights, self.held = [0] * plan.num_ranks, [0] * plan.num_ranks

    def has(self, i: int) -> bool:
        """Whether task i may start."""
        if i not in self.grows:
            return True
        rank = self.plan.tasks[i].rank
        fits = self.held[rank] + self.grows[i] <= self.most_layers[rank]
        return fits and self.flights[rank] < self.most_flights[rank]

    def start(self, i: int) -> None:
        if i in self.grows:
            task = self.plan.tasks[i]
            self.flights[task.rank] += 1
            self.held[task.rank] += len(task.layers)

    def end(self, i: int) -> None:
        if not self.grows:
            return
        task = self.plan.tasks[i]
        for value in task.inputs:
            if value in self.uses:
                self.uses[value] -= 1
                if self.uses[value]:
                    continue
                if self.plan.values[value].kind == "graph":
                    self.flights[task.rank] -= 1
                    if self.plan.is_split(task):  # the weight gradients go on holding it
                        continue
                self.held[task.rank] -= self.size[value]


def _after_each_other(plan: Plan) -> list[list[int]]:
    """For each task those that may only start after it: as both add to the same gradients, whose sums must not depend
    on the schedule; or as the final vjp spends a graph that it goes through too."""
    later: list[list[int]] = [[] for _ in plan.tasks]
    final = {v: i for i, t in enumerate(plan.tasks) if t.direction == "backward" and t.final for v in t.inputs}
    for i, task in enumerate(plan.tasks):
        if task.kind == "step" and task.direction == "backward" and not task.final:
            later[i] += {final[v] for v in task.inputs if plan.values[v].kind == "graph"}
    last: dict[tuple, int] = {}
    for i, task in enumerate(plan.tasks):
        for key in plan.sums(task):
            if key in last and i not in later[last[key]]:
                later[last[key]].append(i)
            last[key] = i
    return later
