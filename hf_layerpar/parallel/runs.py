"""Runs: final steps that one rank works one right after the other, and may evaluate as one.

A run has one autograd graph instead of one for every layer, and its vjp is one backward: as in the plain model, with no
Python between the layers. Nothing else may need a state inside a run, in the forward or in the backward.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence, Set
from itertools import pairwise

from hf_layerpar.mgrit.plan import Plan, Task

Joint = tuple[int, int]
"""(layer, micro-batch): between this layer and the next one in layer order."""


def joints(plan: Plan, rank: int) -> set[Joint]:
    """Where two final steps of `rank` follow each other in its order and nothing but the second uses the state between.

    Plans whose weight gradients are tasks of their own have none: these are the smaller the better.
    """
    if plan.split_weights:
        return set()
    uses: Counter[int | None] = Counter(v for t in plan.tasks for v in t.inputs)
    uses.update(plan.ends)
    mine = [t for t in plan.tasks if t.rank == rank]
    apart: set[Joint] = set()
    if plan.direction == "backward":  # vjps of the coarse sweeps go through the graphs of single layers
        again = {(t.layer, t.micro_batch) for t in mine if t.kind == "step" and not t.final}
        apart = again | {(layer - 1, m) for layer, m in again}
    found = {
        (min(a.layer, b.layer), a.micro_batch)
        for a, b in pairwise(mine)
        if a.final and b.final and b.inputs == (a.output,) and uses[a.output] == 1
    }
    return found - apart


def join_runs(
    groups: Sequence[tuple[Task, ...]], joints: Set[Joint]
) -> tuple[tuple[tuple[Task, ...], ...], tuple[tuple[int, ...], ...]]:
    """One rank's tasks (`Plan.groups`) with those at the joints made one; and the layers of each group."""
    joined: list[tuple[Task, ...]] = []
    layers: list[tuple[int, ...]] = []
    for group in groups:
        task, before = group[0], joined[-1][0] if joined else None
        if (
            before is not None
            and task.final
            and task.inputs == (before.output,)
            and (min(before.layer, task.layer), task.micro_batch) in joints
        ):
            joined[-1] = (dataclasses.replace(task, inputs=before.inputs),)
            layers[-1] += (task.layer,)
        else:
            joined.append(group)
            layers.append(tuple(t.layer for t in group))
    return tuple(joined), tuple(layers)
