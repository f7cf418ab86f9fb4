"""The order of a plan for one device: independent steps side by side in waves, each evaluated as one layer would be.

A device that spends its time on launches takes for a wave of many layers about what it takes for one. MGRIT offers two
kinds of waves: the layers at one place of all intervals, in a relaxation, and the layers of an interval at one frozen
state, in a coarse step of `aggregate`. With N layers in intervals of c the nested start and one relaxation are
N/c - 1 and c waves instead of N (`rediscretize`, `identity`) or 2 N (`aggregate`) evaluations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from hf_layerpar.plan.tasks import Plan, Task


def in_waves(plan: Plan, kinds: Sequence[Sequence[int]] | None = None) -> Plan:
    """The plan of one rank, written by a stacked `PlanBuilder`, wave after wave, every other task as soon as its inputs
    are made.

    kinds: by pass, a number for each layer; a wave is cut into one for each kind in it. A step that is left alone has
    no wave.
    """
    made: dict[int, int] = {}  # value -> the wave after which it is there
    latest = -1
    slots: list[tuple] = []
    for i, task in enumerate(plan.tasks):
        if task.kind == "step":
            (layer,) = task.layers
            latest = max(latest, task.wave)
            slots.append((task.wave, 0, task.final, 0 if kinds is None else kinds[task.place][layer], layer, i))
        else:
            slots.append((max((made[v] for v in task.inputs), default=latest), 1, i))
        for value in task.outputs:
            made[value] = slots[-1][0]
    order = sorted(range(len(plan.tasks)), key=slots.__getitem__)
    groups: dict[tuple, list[int]] = {}
    for i in order:
        groups.setdefault(slots[i][:4] if plan.tasks[i].kind == "step" else (i,), []).append(i)
    tasks: list[Task] = []
    for wave, group in enumerate(groups.values()):
        number = wave if len(group) > 1 else -1
        tasks += [dataclasses.replace(plan.tasks[i], wave=number) for i in group]
    return dataclasses.replace(plan, tasks=tuple(tasks))
