"""Strategies are plan builders: from settings, ownership and micro-batches to the plan of one sweep."""

from __future__ import annotations

from collections.abc import Sequence

from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.errors import ConfigurationError
from hf_layerpar.mgrit.coarse import OPERATORS
from hf_layerpar.mgrit.cycle import Cycle
from hf_layerpar.mgrit.grid import Grid
from hf_layerpar.mgrit.plan import Direction, Plan, PlanBuilder
from hf_layerpar.mgrit.schedule import in_schedule_order
from hf_layerpar.mgrit.simulate import Costs, simulate
from hf_layerpar.mgrit.waves import in_waves

_APART = Costs(vjp=1.4, weights=0.8)
"""What a backward costs in two halves: a tenth more than in one, and the input half is the larger, as all of attention
and the activations is in it. So weight gradients are taken apart only where the gaps they fill are worth it."""


def build_plan(
    config: LayerParallelConfig,
    direction: Direction,
    owner: Sequence[int],
    *,
    num_ranks: int,
    micro_batches: int = 1,
    buffers: tuple[int, int] = (0, 0),
    kinds: Sequence[int] | None = None,
) -> Plan:
    """The validated plan of one sweep over a stack.

    owner: the lp rank of every layer. buffers: open and close layers, which are always solved exactly.
    kinds: of a stacked sweep, a number for each layer, equal for those that can share a wave; by default all can.
    Serial and pipeline are the same exact chain; what differs is the number of micro-batches. Between several ranks
    weight gradients become tasks of their own where that makes the backward shorter.
    Raises ConfigurationError when the grid doesn't fit the stack.
    """
    check_stacked(config, num_ranks)
    builder = PlanBuilder(direction, owner, stacked=config.stacked)
    for _ in range(micro_batches):
        builder.end(_sweep(builder, config, buffers))
    if config.stacked:
        plan = in_waves(builder.build(num_ranks), kinds or [0] * len(owner))
        plan.validate()
        return plan
    plan = in_schedule_order(builder.build(num_ranks))
    if direction == "backward" and num_ranks > 1:
        split = in_schedule_order(builder.build(num_ranks, split_weights=True), _APART)
        plan = min(plan, split, key=lambda p: simulate(p, _APART).makespan)
    plan.validate()
    return plan


def check_stacked(config: LayerParallelConfig, num_ranks: int) -> None:
    """Raises ConfigurationError for stacked layers on several lp ranks."""
    if config.stacked and num_ranks > 1:
        raise ConfigurationError(
            f"stacked=True with lp_size={num_ranks}: layers are evaluated together on one device, and here they are "
            f"spread over several; use stacked=False or lp_size=1"
        )


def inner_grid(config: LayerParallelConfig, num_layers: int, buffers: tuple[int, int]) -> Grid:
    """The grid over the layers between the buffers, in layer order."""
    inner = num_layers - sum(buffers)
    if inner < 1:
        raise ConfigurationError(
            f"buffers={buffers} leave {inner} of {num_layers} layers to MGRIT; use fewer buffer layers"
        )
    return Grid.coarsened(inner, config.factors)


def interval_points(config: LayerParallelConfig, num_layers: int, buffers: tuple[int, int]) -> list[int]:
    """The places in the stack where intervals of the finest grid begin or end; none without MGRIT."""
    if config.strategy != "mgrit":
        return []
    return [buffers[0] + p for p in inner_grid(config, num_layers, buffers).levels[1]]


def _sweep(builder: PlanBuilder, config: LayerParallelConfig, buffers: tuple[int, int]) -> int:
    forward = builder.direction == "forward"
    iterations = config.forward_iterations if forward else config.backward_iterations
    layers = range(len(builder.owner))
    x = builder.start()
    if config.strategy != "mgrit" or iterations == 0:
        return _chain(builder, layers if forward else layers[::-1], x)
    grid = inner_grid(config, len(layers), buffers)
    head, body, tail = (
        layers[: buffers[0]],
        layers[buffers[0] : len(layers) - buffers[1]],
        layers[len(layers) - buffers[1] :],
    )
    if not forward:
        head, body, tail, grid = tail[::-1], body[::-1], head[::-1], grid.reversed()
    x = _chain(builder, head, x)
    operator = OPERATORS[config.coarse_operator]
    x = Cycle(builder, body, grid, operator, config.relaxation, config.damping, x).solve(iterations)
    return _chain(builder, tail, x)


def _chain(builder: PlanBuilder, layers: Sequence[int], x: int) -> int:
    for layer in layers:
        builder.wave = builder.open_waves()
        x = builder.step(layer, x, final=True)
    return x
