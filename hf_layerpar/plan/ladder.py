"""Settings in the order in which a controller moves through them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hf_layerpar.config import MOST_ITERATIONS, Acceleration, Buffers, LayerParallelConfig
from hf_layerpar.errors import ConfigurationError
from hf_layerpar.plan.operators import OPERATORS
from hf_layerpar.plan.ownership import contiguous_owner, interleaved_owner
from hf_layerpar.plan.planner import predict_step
from hf_layerpar.plan.step import interval_points

_ITERATIONS = ((1, 1), (2, 1), (2, 2), (0, 1), (0, 2))
_ACCELERATED = ((0, 2), (0, 3))
"""With Krylov acceleration, which doesn't help `identity`."""


@dataclass(frozen=True)
class StackShape:
    """What a prediction needs to know of a stack: its layers, which are always exact, and the size of its steps.

    dealt: the C-points of the intervals that are dealt out to all ranks; None where each rank has a block of layers.
    """

    num_layers: int
    buffers: Buffers
    step_size: float = 1.0
    dealt: tuple[int, ...] | None = None

    def owner(self, config: LayerParallelConfig, num_ranks: int) -> tuple[int, ...]:
        """The rank of every layer. Layers that were dealt out stay where they are, whatever `config` is.

        Raises ConfigurationError when a rank would own nothing, or the grid doesn't fit.
        """
        if self.dealt is not None:
            return interleaved_owner(self.num_layers, num_ranks, self.dealt)
        points = interval_points(config, self.num_layers, self.buffers)
        return contiguous_owner(self.num_layers, num_ranks, boundaries=points)


def exact_settings(config: LayerParallelConfig) -> LayerParallelConfig:
    """The exact solve that goes with `config`: the pipeline, with all else (micro-batches, ends, loss) the same."""
    return LayerParallelConfig(
        strategy="pipeline",
        micro_batches=config.micro_batches,
        schedule=config.schedule,
        ends=config.ends,
        increment_penalty=config.increment_penalty,
        cuda_graphs=config.cuda_graphs,
    )


def predicted_share(config: LayerParallelConfig, stacks: Sequence[StackShape], num_ranks: int) -> float:
    """Simulated time of a step of all stacks on `num_ranks` ranks over that of one rank, in unit costs, with the layers
    where they are.

    Raises ConfigurationError for more ranks than get a layer, or a grid that doesn't fit.
    """
    made = serial = 0.0
    for stack in stacks:
        owner = stack.owner(config, num_ranks)
        step = predict_step(config, owner, num_ranks=num_ranks, buffers=stack.buffers)
        made, serial = made + step.makespan, serial + step.serial
    return made / serial


def escalation(config: LayerParallelConfig, stacks: Sequence[StackShape] = ()) -> list[LayerParallelConfig]:
    """From `config` to the exact solve, each step more accurate and dearer: an exact forward (where a stack has steps
    of size 1), twice the iterations, Krylov acceleration, two levels, half the coarsening, the richest operator, exact.
    Steps that change nothing are left out.
    """
    forward = 0 if _are_large(stacks) else config.forward_iterations
    idle = config.coarse_operator == "identity" or not config.backward_iterations
    c = config.factors[0]
    changes = (
        {"forward_iterations": forward},
        {
            "forward_iterations": min(2 * forward, MOST_ITERATIONS),
            "backward_iterations": min(2 * config.backward_iterations, MOST_ITERATIONS),
        },
        {"acceleration": config.acceleration if idle else "krylov"},
        {"coarsening": c},
        {"coarsening": max(2, c // 2)},
        {"coarse_operator": "aggregate"},
    )
    steps = [config]
    for change in changes:
        following = dataclasses.replace(steps[-1], **change)
        if following != steps[-1]:
            steps.append(following)
    return [*steps, exact_settings(config)]


def cheapest_first(
    config: LayerParallelConfig, stacks: Sequence[StackShape], num_ranks: int
) -> list[LayerParallelConfig]:
    """MGRIT settings with the grid of `config` that beat the exact pipeline on `num_ranks` ranks, by predicted time,
    and the pipeline as the last.

    Where layers are dealt out, they beat it both there, where the last settings run, and on blocks, where one would
    train without MGRIT.

    Raises ConfigurationError where none does (there is nothing to choose from), or a rank would own nothing.
    """
    exact = exact_settings(config)
    blocks = [dataclasses.replace(stack, dealt=None) for stack in stacks]
    limit = min(predicted_share(exact, placed, num_ranks) for placed in (stacks, blocks))
    shares: dict[LayerParallelConfig, float] = {}
    for operator in OPERATORS:
        for forward, backward in dict.fromkeys((*_ITERATIONS, *_ACCELERATED)):
            candidate = dataclasses.replace(
                config,
                strategy="mgrit",
                coarse_operator=operator,
                forward_iterations=forward,
                backward_iterations=backward,
            )
            for acceleration in _accelerations(operator, forward, backward):
                made = dataclasses.replace(candidate, acceleration=acceleration)
                shares[made] = predicted_share(made, stacks, num_ranks)
    faster = sorted((c for c in shares if shares[c] < limit), key=lambda c: shares[c])
    if not faster:
        raise ConfigurationError(
            f"no MGRIT setting with coarsening={config.coarsening} is predicted to beat the exact "
            f"pipeline on {num_ranks} ranks; train with strategy='pipeline', or use more ranks (a controller "
            f"can plan for more than it runs on: controller_ranks)"
        )
    return [*faster, exact]


def _accelerations(operator: str, forward: int, backward: int) -> Iterator[Acceleration]:
    if (forward, backward) in _ITERATIONS:
        yield "none"
    if (forward, backward) in _ACCELERATED and operator != "identity":
        yield "krylov"


def first_offer(ladder: Sequence[LayerParallelConfig], stacks: Sequence[StackShape]) -> int:
    """The place in `ladder` to begin at. With steps of size 1 the forward is hard for MGRIT, and its error goes into
    loss and gradient alike: the first settings with an exact one. Else the first of all."""
    exact = (i for i, c in enumerate(ladder) if c.strategy == "mgrit" and not c.forward_iterations)
    return next(exact, 0) if _are_large(stacks) else 0


def _are_large(stacks: Sequence[StackShape]) -> bool:
    return any(stack.step_size == 1 for stack in stacks)
