"""How long a plan takes and what it holds, from unit costs: no processes, no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from hf_layerpar.plan.costs import Costs
from hf_layerpar.plan.tasks import Plan, Task


@dataclass(frozen=True)
class Peak:
    """The most a rank holds at once: states in flight, kept graphs (of single layers), and bytes by what they are.

    activations: of states, graphs and the work on them together. parameters, gradients, optimizer: from the first step
    on.
    """

    states: int
    graphs: int
    activations: float
    parameters: float
    gradients: float
    optimizer: float

    @property
    def bytes(self) -> float:
        return self.activations + self.parameters + self.gradients + self.optimizer


@dataclass(frozen=True)
class Timeline:
    """When every task of a plan starts and ends, in the units of the costs (of one micro-batch).

    spans: (start, end) of plan.tasks[i].
    finish: when each rank is through.
    sending: working time that each rank's messages took from it.
    serial: the time of the same work on one rank.
    """

    plan: Plan
    costs: Costs
    spans: tuple[tuple[float, float], ...]
    finish: tuple[float, ...]
    sending: tuple[float, ...]
    serial: float

    @property
    def makespan(self) -> float:
        return max(self.finish, default=0.0)

    @property
    def share(self) -> float:
        """Predicted time as a share of serial."""
        return self.makespan / self.serial if self.serial else 0.0

    @property
    def busy(self) -> tuple[float, ...]:
        """Working time of each rank."""
        totals = list(self.sending)
        for task, (start, end) in zip(self.plan.tasks, self.spans, strict=True):
            totals[task.rank] += end - start
        return tuple(totals)

    @property
    def idle_shares(self) -> tuple[float, ...]:
        """Share of the makespan in which a rank computes nothing."""
        return tuple(1.0 - busy / self.makespan if self.makespan else 0.0 for busy in self.busy)

    @property
    def idle_share(self) -> float:
        """The bubble: share of rank time, over all ranks and the whole makespan, in which nothing is computed."""
        return sum(self.idle_shares) / self.plan.num_ranks

    @property
    def bytes_moved(self) -> float:
        """Over all ranks; of an all-reduce what a ring moves."""
        sums = sum(self.plan.values[reduction.value].kind == "state" for reduction in self.plan.reductions)
        moved = len(self.plan.messages) + 2 * (self.plan.num_ranks - 1) * sums
        return moved * self.costs.state_bytes

    @cached_property
    def peaks(self) -> tuple[Peak, ...]:
        """Of each rank: a state is held where it was made or received until its last use there, a graph until the
        weight gradients, which need much of it."""
        plan, costs = self.plan, self.costs
        last: dict[tuple[int, int], int] = {}
        size: dict[int, int] = {}  # graph -> its layers
        for i, task in enumerate(plan.tasks):
            for value in (*task.inputs, *task.outputs):
                last[value, task.rank] = i
                if plan.values[value].kind in ("graph", "pending"):
                    size.setdefault(value, len(task.layers))
        states, graphs, pending, fronts = ([0] * plan.num_ranks for _ in range(4))
        most = [[0, 0, 0.0] for _ in range(plan.num_ranks)]
        present: set[tuple[int, int]] = set()
        for i, task in enumerate(plan.tasks):
            rank = task.rank
            for value in (*task.inputs, *task.outputs):
                if (value, rank) not in present:
                    present.add((value, rank))
                    states[rank] += value not in size
                    graphs[rank] += size.get(value, 0) if plan.values[value].kind == "graph" else 0
            at_front = task.kind == "phase" and task.place == 0 and plan.trains
            fronts[rank] += at_front and task.direction == "forward"
            kept = states[rank] * costs.state_bytes + (graphs[rank] - pending[rank]) * costs.graph_bytes
            kept += pending[rank] * costs.pending_bytes
            kept += fronts[rank] * costs.front_graph_bytes + _work(task, plan, costs)
            # what weight gradients wait for takes the place of the graph
            left = sum(size[v] for v in task.outputs if plan.values[v].kind == "pending")
            kept += max(0.0, left * (costs.pending_bytes - costs.graph_bytes))
            held = (states[rank], graphs[rank], kept)
            most[rank] = [max(a, b) for a, b in zip(most[rank], held, strict=True)]
            graphs[rank] += left
            pending[rank] += left
            fronts[rank] -= at_front and task.direction == "backward"
            for value in {*task.inputs, *task.outputs}:
                if last[value, rank] == i:
                    states[rank] -= value not in size
                    graphs[rank] -= size.get(value, 0)
                    pending[rank] -= size.get(value, 0) if plan.values[value].kind == "pending" else 0
        found = []
        for (s, g, activations), (parameters, ends) in zip(most, self._parameters, strict=True):
            trained = costs.trained_share if plan.trains else 0.0
            gradients = trained * (parameters + ends * costs.shared_bytes)
            optimizer = trained * parameters * costs.optimizer_share
            found.append(Peak(int(s), int(g), float(activations), parameters, gradients, optimizer))
        return tuple(found)

    @property
    def _parameters(self) -> list[tuple[float, int]]:
        """Of each rank the bytes of its layers and ends, and the number of ends."""
        plan, costs = self.plan, self.costs
        layers: list[set[tuple[int, int]]] = [set() for _ in range(plan.num_ranks)]
        ends: list[set[int]] = [set() for _ in range(plan.num_ranks)]
        for task in plan.tasks:
            if task.kind == "step" and (task.final or not plan.trains):
                layers[task.rank] |= {(plan.stacks[task.place], n) for n in task.layers}
            elif task.kind == "phase":
                ends[task.rank].add(task.place)
        sizes = {0: costs.front_bytes, len(plan.passes): costs.tail_bytes}
        return [
            (len(own) * costs.layer_bytes + sum(sizes.get(k, 0.0) for k in phases), len(phases & set(sizes)))
            for own, phases in zip(layers, ends, strict=True)
        ]


def _work(task: Task, plan: Plan, costs: Costs) -> float:
    """What is held only as long as the task runs."""
    if task.kind == "step":
        if task.direction == "backward" and not task.final:
            return costs.vjp_bytes
        return costs.work_bytes + costs.added_bytes * (task.direction == "backward")
    if task.kind == "phase" and task.place == len(plan.passes):
        return costs.tail_graph_bytes / task.piece[1] + costs.tail_added_bytes * plan.trains
    return costs.added_bytes * (task.kind == "weights")


def simulate(plan: Plan, costs: Costs | None = None, *, serial: float = 0.0) -> Timeline:
    """Times a plan as the executor runs it: every rank works its tasks in plan order, each as soon as its inputs have
    arrived, and sends without waiting.

    costs: of one micro-batch (see `Costs.cut`). serial: the time on one rank, for shares of it.
    """
    costs = costs or Costs()
    producer, targets = plan.producer, plan.targets
    flight = costs.state_bytes / costs.bandwidth
    made: dict[int, float] = {}
    arrived: dict[tuple[int, int], float] = {}
    prepared: set[tuple[int, int, int]] = set()
    free, link, sending = ([0.0] * plan.num_ranks for _ in range(3))
    sums = {reduction.value: [len(reduction.terms), 0.0] for reduction in plan.reductions}  # terms missing, last there
    sums_of: dict[int, list[int]] = {}
    for reduction in plan.reductions:
        for term in reduction.terms:
            sums_of.setdefault(term, []).append(reduction.value)
    spans = []
    for task in plan.tasks:
        rank, start = task.rank, free[task.rank]
        if costs.arguments and task.kind != "weights" and (rank, task.place, task.micro_batch) not in prepared:
            prepared.add((rank, task.place, task.micro_batch))
            start += costs.arguments if task.kind == "step" else 0.0
        for value in task.inputs:
            if value in sums:
                missing, there = sums[value]
                assert not missing, f"{task}: value {value} is used before it is summed"
            else:
                there = made[value] if producer[value] == rank else arrived[value, rank]
            if there > start:
                start = there
        free[rank] = end = start + costs.of(task, plan)
        spans.append((start, end))
        for value in task.outputs:
            made[value] = end
            for target in targets.get(value, ()):
                free[rank] += costs.send
                sending[rank] += costs.send
                link[rank] = max(link[rank], free[rank]) + flight
                arrived[value, target] = link[rank] + costs.latency
            for total in sums_of.get(value, ()):
                free[rank] += costs.send
                sending[rank] += costs.send
                entry, whole = sums[total], costs.all_reduce(plan.num_ranks, plan.values[total])
                entry[0] -= 1
                entry[1] = max(entry[1], free[rank] + (0.0 if entry[0] else whole))
    return Timeline(plan, costs, tuple(spans), tuple(free), tuple(sending), serial)
