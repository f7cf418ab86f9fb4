"""What the tasks of a plan cost: prices in seconds (or any unit) and bytes."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from hf_layerpar.config import checked, real
from hf_layerpar.plan.tasks import Plan, Task, Value

MOST_COST = 1e15
"""Sums of what is larger lose what is smaller, or run over."""

_PRICE = real(lambda price: 0 <= price <= MOST_COST, f"at least 0 and at most {MOST_COST:g}; use a larger unit")
_LIMITS = {
    "bandwidth": real(lambda b: b >= 1 / MOST_COST, f"positive and at least {1 / MOST_COST:g}; inf costs nothing"),
    "fixed_share": real(lambda share: 0 <= share <= 1, "in [0, 1]"),
    "trained_share": real(lambda share: 0 <= share <= 1, "in [0, 1]"),
}
_OF_THE_BATCH = (
    *("state_bytes", "graph_bytes", "pending_bytes", "work_bytes", "vjp_bytes"),
    *("front_graph_bytes", "tail_graph_bytes"),
)


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Prices of the whole batch (see `cut`). The defaults are the units of the cost model: one layer forward is 1.

    step: a layer forward without graph. graph_step: a final one, which keeps its graph.
    vjp: an input-only vjp. weights: weight gradients alone. final_vjp: both in one backward.
    front, front_backward: the model's ends before the layers (embeddings); a middle of several stacks costs as much.
    tail: the ends behind the layers (head and loss), forward and backward.
    arguments: what a rank takes that has no ends to make the layers' arguments (masks, rotary tables).
    combine: a linear combination, for each of its terms. residual: one residual norm, or product of two residuals.
    overhead: what every task takes beside its work.
    fixed_share: the part of a price that doesn't shrink when the batch is cut into micro-batches.
    latency, bandwidth: a message of b bytes arrives latency + b / bandwidth after its send. A rank's messages go out
        one behind the other.
    send: working time that a message takes from its sender.
    state_bytes: one state. graph_bytes: one kept graph (the activations of a layer; with recomputation, one state).
    pending_bytes: what waits for a layer's weight gradients where these are taken apart.
    work_bytes: what a layer's forward or final backward takes beside its graph and its gradients at most. vjp_bytes: an
        input-only vjp, which frees nothing of the graph on its way.
    added_bytes, tail_added_bytes: the largest gradient of a parameter in a layer, or in the tail: it is made before it
        is added to what is there.
    front_graph_bytes: what the front keeps for its backward. tail_graph_bytes: what the tail takes while it runs.
    layer_bytes, front_bytes, tail_bytes: parameters of a layer, of the embeddings, of head and loss.
    shared_bytes: those of both ends, whose gradients are kept apart until the end of a step.
    trained_share: the part of these that is trained. optimizer_share: what the optimizer keeps for each byte of it (2
        is AdamW in the parameters' precision).
    Raises ConfigurationError for a price that is negative, endless or no number.
    """

    step: float = 1.0
    graph_step: float = 1.0
    vjp: float = 1.0
    weights: float = 1.0
    final_vjp: float = 2.0
    front: float = 0.0
    front_backward: float = 0.0
    tail: float = 0.0
    arguments: float = 0.0
    combine: float = 0.0
    residual: float = 0.0
    overhead: float = 0.0
    fixed_share: float = 0.0
    latency: float = 0.0
    bandwidth: float = math.inf
    send: float = 0.0
    state_bytes: float = 0.0
    graph_bytes: float = 0.0
    pending_bytes: float = 0.0
    work_bytes: float = 0.0
    vjp_bytes: float = 0.0
    added_bytes: float = 0.0
    tail_added_bytes: float = 0.0
    front_graph_bytes: float = 0.0
    tail_graph_bytes: float = 0.0
    layer_bytes: float = 0.0
    front_bytes: float = 0.0
    tail_bytes: float = 0.0
    shared_bytes: float = 0.0
    trained_share: float = 1.0
    optimizer_share: float = 2.0

    def __post_init__(self) -> None:
        checked(self, {f.name: _LIMITS.get(f.name, _PRICE) for f in dataclasses.fields(self)})

    def of(self, task: Task, plan: Plan) -> float:
        """The working time of a task of `plan`."""
        kind, forward = task.kind, task.direction == "forward"
        if kind == "step":
            if forward:
                price = self.graph_step if task.final and plan.trains else self.step
            else:
                price = self.final_vjp if task.final and not plan.is_split(task) else self.vjp
            price *= len(task.layers)
        elif kind == "weights":
            price = self.weights * len(task.layers)
        elif kind == "phase":
            is_tail = task.place == len(plan.passes)
            price = self.tail if is_tail else self.front if forward else self.front_backward
            price /= task.piece[1]
        elif kind in ("combine", "collect"):
            price = self.combine * len(task.inputs)
        elif kind == "least":
            price = self.combine * (len(task.inputs) - 1)
        elif kind == "products":  # of every two of the residuals and their differences
            _, size, _ = plan.values[task.output].shape
            price = self.residual * len(task.slots) * size * (size + 1) / 2
        else:
            price = self.residual if kind == "residual" else self.combine
        return price + self.overhead

    def transfer(self) -> float:
        """From the send of a state to its arrival on another rank."""
        return self.latency + self.state_bytes / self.bandwidth

    def all_reduce(self, num_ranks: int, value: Value) -> float:
        """From the last term of a sum to its arrival everywhere: as many latencies as a tree of ranks is deep, and the
        bytes of a ring (of a few numbers, none)."""
        size = self.state_bytes if value.kind == "state" else 0.0
        return math.ceil(math.log2(num_ranks)) * self.latency + 2 * (num_ranks - 1) / num_ranks * size / self.bandwidth

    def serial(self, num_layers: int) -> float:
        """Forward and backward of the whole batch on one rank, layer after layer, ends included."""
        layers = num_layers * (self.graph_step + self.final_vjp + 2 * self.overhead)
        return layers + self.front + self.front_backward + self.tail

    def cut(self, micro_batches: int) -> Costs:
        """The costs of one micro-batch, when these are those of the whole batch."""
        work = self.fixed_share + (1.0 - self.fixed_share) / micro_batches
        names = ("step", "graph_step", "vjp", "weights", "final_vjp", "combine", "residual")
        shrinking = dict.fromkeys((*names, "front", "front_backward", "tail"), work)
        shrinking |= dict.fromkeys(_OF_THE_BATCH, 1 / micro_batches)
        return dataclasses.replace(self, **{name: getattr(self, name) * s for name, s in shrinking.items()})

    def recomputed(self) -> Costs:
        """With gradient checkpointing: a layer keeps its state alone, and every vjp evaluates it again first."""
        return dataclasses.replace(
            self,
            vjp=self.vjp + self.graph_step,
            final_vjp=self.final_vjp + self.graph_step,
            graph_bytes=self.state_bytes,
            work_bytes=self.work_bytes + self.graph_bytes,
            vjp_bytes=self.vjp_bytes + self.graph_bytes,
        )


APART = Costs(vjp=1.4, weights=0.8)
"""What a backward costs in two halves: a tenth more than in one, and the input half is the larger, as all of attention
and the activations is in it. So weight gradients are taken apart only where the gaps they fill are worth it."""

COMPILED = Costs(vjp=2.0, weights=0.0)
"""Of layers that run as compiled code, whose backward makes all gradients whatever is asked for."""
