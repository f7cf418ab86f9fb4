"""How long a plan takes and what it holds, from unit costs: no processes, no tensors."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property

from hf_layerpar.errors import ConfigurationError
from hf_layerpar.mgrit.plan import EVERYWHERE, Plan, Task

_FIT = 1 / 12
"""A fitted coarse step, or an observation for it, in layer forwards: one D x D product beside a transformer layer's
twelve. (The fit `mean` costs less.)"""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Prices in seconds (or any unit) and bytes. The defaults are the units of the cost model: one layer forward is 1.

    step: a layer forward without graph. graph_step: a final one, which keeps its graph.
    vjp: an input-only vjp. weights: weight gradients alone. final_vjp: both in one backward.
    combine: a linear combination, for each of its terms. residual: one residual norm.
    overhead: what every task takes beside its work.
    fixed_share: the part of a price that doesn't shrink when the batch is cut into micro-batches.
    latency, bandwidth: a message of b bytes arrives latency + b / bandwidth after its send. A rank's messages go out
        one behind the other.
    send: working time that a message takes from its sender.
    state_bytes: one state. graph_bytes: one kept graph (the activations of a layer; with recomputation, one state).
    Raises ConfigurationError for a negative price.
    """

    step: float = 1.0
    graph_step: float = 1.0
    vjp: float = 1.0
    weights: float = 1.0
    final_vjp: float = 2.0
    combine: float = 0.0
    residual: float = 0.0
    overhead: float = 0.0
    fixed_share: float = 0.0
    latency: float = 0.0
    bandwidth: float = math.inf
    send: float = 0.0
    state_bytes: float = 0.0
    graph_bytes: float = 0.0

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not value >= 0 or (name == "bandwidth" and value == 0) or (name == "fixed_share" and value > 1):
                limit = {"bandwidth": "positive", "fixed_share": "in [0, 1]"}.get(name, "at least 0")
                raise ConfigurationError(f"costs: {name}={value!r} must be {limit}")

    def of(self, task: Task, plan: Plan) -> float:
        """The working time of a task of `plan`."""
        if task.kind == "combine":
            price = self.combine * len(task.inputs)
        elif task.kind in ("fit", "observe"):
            price = _FIT * self.step
        elif task.kind == "residual":
            price = self.residual
        elif task.kind == "weights":
            price = self.weights
        elif plan.direction == "forward":
            price = self.graph_step if task.final else self.step
        else:
            price = self.final_vjp if task.final and not plan.split_weights else self.vjp
        return price + self.overhead

    def transfer(self) -> float:
        """From the send of a state to its arrival on another rank."""
        return self.latency + self.state_bytes / self.bandwidth

    def broadcast(self, num_ranks: int) -> float:
        """A state to all ranks, along a binary tree."""
        return self.transfer() * math.ceil(math.log2(num_ranks))

    def serial(self, num_layers: int) -> float:
        """Forward and backward of the whole batch on one rank, layer after layer."""
        return num_layers * (self.graph_step + self.final_vjp + 2 * self.overhead)

    def cut(self, micro_batches: int) -> Costs:
        """The costs of one micro-batch, when these are those of the whole batch."""
        work = self.fixed_share + (1.0 - self.fixed_share) / micro_batches
        shrinking = dict.fromkeys(("step", "graph_step", "vjp", "weights", "final_vjp", "combine", "residual"), work)
        shrinking |= dict.fromkeys(("state_bytes", "graph_bytes"), 1 / micro_batches)
        return dataclasses.replace(self, **{name: getattr(self, name) * s for name, s in shrinking.items()})


@dataclass(frozen=True)
class Timeline:
    """When every task of a plan starts and ends, in the units of the costs.

    spans: (start, end) of plan.tasks[i].
    finish: when each rank is through, the end states handed to it included.
    sending: working time that each rank's messages took from it.
    """

    plan: Plan
    costs: Costs
    spans: tuple[tuple[float, float], ...]
    finish: tuple[float, ...]
    sending: tuple[float, ...]

    @property
    def makespan(self) -> float:
        return max(self.finish, default=0.0)

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
        """By point-to-point messages and by handing the end states to all ranks."""
        to_all = len(self.plan.ends) * (self.plan.num_ranks - 1)
        return (len(self.plan.messages()) + to_all) * self.costs.state_bytes

    @cached_property
    def peaks(self) -> tuple[Peak, ...]:
        return _peaks(self.plan, self.costs)


@dataclass(frozen=True)
class Peak:
    """The most a rank holds at once: states in flight (the start states, which the model holds itself, not counted),
    kept graphs, and both together in bytes."""

    states: int
    graphs: int
    bytes: float


@dataclass(frozen=True)
class StepTimeline:
    """One training step of a stack: forward, then backward. `serial` is the time of the same work on one rank."""

    forward: Timeline
    backward: Timeline
    serial: float

    @property
    def makespan(self) -> float:
        return self.forward.makespan + self.backward.makespan

    @property
    def share(self) -> float:
        """Predicted time as a share of serial."""
        return self.makespan / self.serial

    @property
    def busy(self) -> tuple[float, ...]:
        return tuple(map(sum, zip(self.forward.busy, self.backward.busy, strict=True)))

    @property
    def idle_shares(self) -> tuple[float, ...]:
        return tuple(1.0 - busy / self.makespan for busy in self.busy)

    @property
    def idle_share(self) -> float:
        return sum(self.idle_shares) / len(self.idle_shares)

    @property
    def bytes_moved(self) -> float:
        return self.forward.bytes_moved + self.backward.bytes_moved

    @property
    def peaks(self) -> tuple[Peak, ...]:
        """Of each rank, over both sweeps."""
        both = zip(self.forward.peaks, self.backward.peaks, strict=True)
        return tuple(Peak(max(a.states, b.states), max(a.graphs, b.graphs), max(a.bytes, b.bytes)) for a, b in both)


def simulate(plan: Plan, costs: Costs | None = None) -> Timeline:
    """Times a plan as the executor runs it: every rank works its tasks in plan order, each as soon as its inputs have
    arrived, sends without waiting, and gets the end states when all is done.

    costs: of one micro-batch (see `Costs.cut`).
    """
    costs = costs or Costs()
    targets = _targets(plan)
    flight = costs.state_bytes / costs.bandwidth
    made = dict.fromkeys(plan.starts, 0.0)
    arrived: dict[tuple[int, int], float] = {}
    free, link, sending = ([0.0] * plan.num_ranks for _ in range(3))
    spans = []
    for task in plan.tasks:
        rank, start = task.rank, free[task.rank]
        for value in task.inputs:
            home = plan.producer[value]
            start = max(start, made[value] if home in (EVERYWHERE, rank) else arrived[value, rank])
        free[rank] = end = start + costs.of(task, plan)
        spans.append((start, end))
        if task.output is None:
            continue
        made[task.output] = end
        for target in targets.get(task.output, ()):
            free[rank] += costs.send
            sending[rank] += costs.send
            link[rank] = max(link[rank], free[rank]) + flight
            arrived[task.output, target] = link[rank] + costs.latency
    for end in plan.ends:
        root = plan.producer[end]
        if root != EVERYWHERE and plan.num_ranks > 1:
            everywhere = free[root] + costs.broadcast(plan.num_ranks)
            free = [everywhere if r == root else max(at, everywhere) for r, at in enumerate(free)]
    return Timeline(plan, costs, tuple(spans), tuple(free), tuple(sending))


def _targets(plan: Plan) -> dict[int, list[int]]:
    targets: dict[int, list[int]] = {}
    for message in plan.messages():
        targets.setdefault(message.value, []).append(message.target)
    return targets


def _peaks(plan: Plan, costs: Costs) -> tuple[Peak, ...]:
    """As the executor holds things: a buffer for every message from the start of the sweep, a sent state to its end,
    any other until its last use; the graphs of the forward until the weight gradients, which need much of them."""
    sent = _targets(plan)
    states = [0] * plan.num_ranks
    for ranks in sent.values():
        for rank in ranks:
            states[rank] += 1
    graphs = [0] * plan.num_ranks
    if plan.direction == "backward":
        for task in plan.tasks:
            graphs[task.rank] += task.final
    kept = {*plan.starts, *plan.ends}
    last_use: dict[tuple[int, int], int] = {}
    for i, task in enumerate(plan.tasks):
        for value in (*task.inputs, task.output):
            if value is not None and value not in kept:
                last_use[value, task.rank] = i
    most = [[s, g, s * costs.state_bytes + g * costs.graph_bytes] for s, g in zip(states, graphs, strict=True)]
    for i, task in enumerate(plan.tasks):
        rank = task.rank
        states[rank] += task.output is not None
        if task.final and plan.direction == "forward":
            graphs[rank] += 1
        held = states[rank], graphs[rank], states[rank] * costs.state_bytes + graphs[rank] * costs.graph_bytes
        most[rank] = [max(a, b) for a, b in zip(most[rank], held, strict=True)]
        if plan.direction == "backward" and (task.kind == "weights" if plan.split_weights else task.final):
            graphs[rank] -= 1
        for value in {*task.inputs, task.output}:
            if value is not None and last_use.get((value, rank)) == i:
                states[rank] -= not (plan.producer[value] == rank and value in sent)
    return tuple(Peak(int(s), int(g), float(b)) for s, g, b in most)
