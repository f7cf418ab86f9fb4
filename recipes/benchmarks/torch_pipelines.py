"""A step of each of torch.distributed.pipelining's schedules, on layers that are shared out evenly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from hf_layerpar.plan.ownership import contiguous_owner


@dataclass(frozen=True)
class Pipeline:
    """One of torch's schedules.

    placement: which stages a rank holds: one; two, in the ranks' order each; or two, there and back.
    least: micro-batches that it needs at least, on two ranks.
    """

    kind: Callable[..., Any]
    placement: Literal["blocks", "interleaved", "v"]
    least: int = 1

    def stages(self, rank: int, size: int) -> tuple[list[int], int]:
        """Numbers of a rank's stages, and how many there are on all ranks."""
        if self.placement == "blocks":
            return [rank], size
        return [rank, size + rank if self.placement == "interleaved" else 2 * size - 1 - rank], 2 * size


PIPELINES = {
    "gpipe": Pipeline(ScheduleGPipe, "blocks"),
    "1f1b": Pipeline(Schedule1F1B, "blocks", least=2),
    "interleaved 1f1b": Pipeline(ScheduleInterleaved1F1B, "interleaved"),
    "interleaved zero bubble": Pipeline(ScheduleInterleavedZeroBubble, "interleaved"),
    "zbv zero bubble": Pipeline(ScheduleZBVZeroBubble, "v"),
}
"""By the name in the tables."""


def variants(micro_batches: tuple[int, ...]) -> list[tuple[str, int]]:
    """(schedule, micro-batches) of all that can run."""
    return [(name, m) for name, pipeline in PIPELINES.items() for m in micro_batches if m >= pipeline.least]


@dataclass(frozen=True)
class Pipelining:
    """This rank's part in a pipeline. modules: its stages. layers: those in them."""

    step: Callable[[], None]
    modules: nn.ModuleList
    layers: list[int]


def pipelining(
    schedule: str,
    micro_batches: int,
    rank: int,
    size: int,
    num_layers: int,
    make_stage: Callable[[range], nn.Module],
    loss: Callable[..., Tensor],
    x: Tensor,
    target: Tensor,
    **more: Any,
) -> Pipelining:
    """make_stage: the module of some layers, with the ends beside the first and the last of all. more: options of the
    schedule."""
    pipeline = PIPELINES[schedule]
    mine, count = pipeline.stages(rank, size)
    stage_of = contiguous_owner(num_layers, count)
    ranges = [range(stage_of.index(stage), stage_of.index(stage) + stage_of.count(stage)) for stage in mine]
    modules = nn.ModuleList(map(make_stage, ranges))
    device = torch.device("cpu")
    stages = [PipelineStage(module, stage, count, device) for module, stage in zip(modules, mine, strict=True)]
    runner = pipeline.kind(stages if count > size else stages[0], micro_batches, loss_fn=loss, **more)
    inputs = (x,) if 0 in mine else ()
    targets = {"target": target} if count - 1 in mine else {}

    def step() -> None:
        runner.step(*inputs, return_outputs=False, **targets)

    return Pipelining(step, modules, [layer for layers in ranges for layer in layers])
