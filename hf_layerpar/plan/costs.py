"""What the tasks of a plan cost: prices in seconds (or any unit) and bytes."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated

from hf_layerpar.config import checked, real, setting
from hf_layerpar.plan.tasks import Plan, Task, Value

MOST_COST = 1e15
"""Sums of what is larger lose what is smaller, or run over."""

Price = Annotated[
    float, real(lambda price: 0 <= price <= MOST_COST, f"at least 0 and at most {MOST_COST:g}; use a larger unit")
]
Speed = Annotated[
    float, real(lambda b: b >= 1 / MOST_COST, f"positive and at least {1 / MOST_COST:g}; inf costs nothing")
]
Share = Annotated[float, real(lambda share: 0 <= share <= 1, "in [0, 1]")]

_OF_THE_BATCH = (
    *("state_bytes", "graph_bytes", "pending_bytes", "work_bytes", "vjp_bytes"),
    *("front_graph_bytes", "tail_graph_bytes"),
)


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Prices of the whole batch (see `cut`). The defaults are the units of the cost model: one layer forward is 1.

    Raises ConfigurationError for a price that is negative, endless or no number.
    """

    step: Price = setting(1.0, "A layer forward without graph (MGRIT's sweeps).")
    graph_step: Price = setting(1.0, "A final layer forward, which keeps its graph (a pipeline has no others).")
    vjp: Price = setting(1.0, "An input-only vjp of a layer.")
    weights: Price = setting(1.0, "A layer's weight gradients alone.")
    final_vjp: Price = setting(2.0, "A layer's vjp and weight gradients in one backward.")
    front: Price = setting(0.0, "Embeddings, forward; a middle of several stacks costs as much.")
    front_backward: Price = setting(0.0, "Embeddings, backward; a middle of several stacks costs as much.")
    tail: Price = setting(0.0, "Head and loss, forward and backward.")
    arguments: Price = setting(0.0, "Making the layers' arguments (masks, rotary tables) on a rank that has no ends.")
    combine: Price = setting(0.0, "A linear combination, for each of its terms.")
    residual: Price = setting(0.0, "A residual norm, or a product of two residuals.")
    overhead: Price = setting(0.0, "What every task takes beside its work.")
    fixed_share: Share = setting(0.0, "Part of a price that doesn't shrink when the batch is cut into micro-batches.")
    latency: Price = setting(0.0, "From a message's send to its arrival, beside its bytes.")
    bandwidth: Speed = setting(math.inf, "Bytes a unit of time; of a rank's messages one at a time.")
    send: Price = setting(0.0, "Working time that a message takes from its sender.")
    state_bytes: Price = setting(0.0, "One state, which is what a message carries.")
    graph_bytes: Price = setting(0.0, "One kept graph: a layer's activations (with recomputation, one state).")
    pending_bytes: Price = setting(0.0, "What waits for a layer's weight gradients where these are taken apart.")
    work_bytes: Price = setting(
        0.0, "What a layer's forward or final backward takes beside graph and gradients at most."
    )
    vjp_bytes: Price = setting(0.0, "What an input-only vjp takes, which frees nothing of the graph on its way.")
    added_bytes: Price = setting(0.0, "The largest gradient of a parameter in a layer, made before it is added.")
    tail_added_bytes: Price = setting(0.0, "The largest gradient of a parameter in the tail.")
    front_graph_bytes: Price = setting(0.0, "What the front keeps for its backward.")
    tail_graph_bytes: Price = setting(0.0, "What the tail takes while it runs.")
    layer_bytes: Price = setting(0.0, "Parameters of a layer.")
    front_bytes: Price = setting(0.0, "Parameters of the embeddings.")
    tail_bytes: Price = setting(0.0, "Parameters of head and loss.")
    shared_bytes: Price = setting(
        0.0, "Parameters of both ends; their gradients are kept apart until the end of a step."
    )
    trained_share: Share = setting(1.0, "Part of the parameters that is trained.")
    optimizer_share: Price = setting(
        2.0, "Optimizer bytes for each trained one (AdamW in the parameters' precision: 2)."
    )

    def __post_init__(self) -> None:
        checked(self)

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
