"""Runs one rank's part of a plan: its tasks in plan order, sends and receives beside them, nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_layerpar.mgrit.plan import EVERYWHERE, Plan, Task
from hf_layerpar.parallel.communicator import Communicator
from hf_layerpar.parallel.runs import Joint, join_runs

StepFunction = Callable[[Sequence[int], int, Tensor, bool], Tensor]
Fit = Callable[[tuple[int, int], Tensor], Tensor]
Observe = Callable[[tuple[int, int], int, Tensor, Tensor], None]


@dataclass(frozen=True)
class Evaluator:
    """What the tasks of a sweep do with a layer.

    step: (layers, micro-batch, state, final) -> state; forwards one after the other, or input-vjps.
    weights: (layer, micro-batch); the weight gradients that the layer's final vjp left to do.
    fit: (span, state) -> state; the running fit of an interval (first layer, last + 1).
    observe: (span, micro-batch, state, state); shows that fit both ends of its interval.
    wave: (layers, micro-batch, their states, final) -> their states; `step` of several layers in one evaluation. Only
        plans with waves ask for it.
    """

    step: StepFunction
    weights: Callable[[int, int], None]
    fit: Fit
    observe: Observe
    wave: Callable[[tuple[int, ...], int, Sequence[Tensor], bool], Sequence[Tensor]] | None = None


@dataclass(frozen=True)
class RankPart:
    """A plan as one rank sees it, worked out once and run many times.

    tasks: this rank's; of a run of steps (see `runs`) the last one, with the first one's input.
    groups: the tasks, those of a wave together. layers: those that groups[i] evaluates, in the direction of the sweep.
    receives: (value, source), in order of arrival per source. sends: value -> targets.
    dead_after: values that groups[i] is the last to need.
    """

    plan: Plan
    rank: int
    tasks: tuple[Task, ...]
    groups: tuple[tuple[Task, ...], ...]
    layers: tuple[tuple[int, ...], ...]
    receives: tuple[tuple[int, int], ...]
    sends: dict[int, tuple[int, ...]]
    dead_after: tuple[tuple[int, ...], ...]
    micro_batch_of: dict[int, int]

    @classmethod
    def of(cls, plan: Plan, rank: int, joints: Set[Joint] = frozenset()) -> RankPart:
        """joints: of those that `runs.joints` found, the ones to evaluate as one."""
        groups, layers = join_runs([group for group in plan.groups() if group[0].rank == rank], joints)
        tasks = tuple(task for group in groups for task in group)
        sends: dict[int, tuple[int, ...]] = {}
        receives = []
        for message in plan.messages():
            if message.source == rank:
                sends[message.value] = (*sends.get(message.value, ()), message.target)
            if message.target == rank:
                receives.append((message.value, message.source))
        last_use: dict[int, int] = {}
        for i, group in enumerate(groups):
            for task in group:
                for value in (*task.inputs, *(() if task.output is None else (task.output,))):
                    last_use[value] = i
        keep = set(plan.ends)
        dead: list[list[int]] = [[] for _ in groups]
        for value, i in last_use.items():
            if value not in keep:
                dead[i].append(value)
        micro_batch_of = dict(zip(plan.starts, range(plan.micro_batches), strict=True))
        micro_batch_of |= {t.output: t.micro_batch for t in plan.tasks if t.output is not None}
        return cls(plan, rank, tasks, groups, layers, tuple(receives), sends, tuple(map(tuple, dead)), micro_batch_of)


@dataclass
class Outcome:
    """Result of one solve on one rank.

    ends: the end state of every micro-batch, shape of its start, on every rank.
    residuals: sum of squares per iteration over this rank's intervals, `[iterations]` in float32 or wider;
        None for an exact plan.
    waited: seconds spent waiting for messages.
    """

    ends: list[Tensor]
    residuals: Tensor | None
    waited: float = 0.0


def execute(part: RankPart, starts: Sequence[Tensor], evaluate: Evaluator, communicator: Communicator) -> Outcome:
    """Works the tasks of `part` from `starts` (one state per micro-batch, alike on all ranks).

    Raises PeerLostError when another rank is gone. Collective over the communicator's ranks.
    """
    plan = part.plan
    values: dict[int, Tensor] = dict(zip(plan.starts, starts, strict=True))
    arriving: dict[int, tuple[Any, Tensor]] = {}
    for value, source in part.receives:
        buffer = torch.empty_like(starts[part.micro_batch_of[value]], memory_format=torch.contiguous_format)
        arriving[value] = (communicator.receive(buffer, source), buffer)
    wide = wide_dtype(starts[0].dtype)
    residuals = starts[0].new_zeros(plan.iterations, dtype=wide) if plan.iterations else None
    sending: list[tuple[Any, Tensor]] = []
    waited = 0.0
    for group, layers, dead in zip(part.groups, part.layers, part.dead_after, strict=True):
        task = group[0]
        if len(group) > 1:  # on one rank: nothing arrives and nothing is sent
            assert evaluate.wave is not None
            states = [values[t.inputs[0]] for t in group]
            results = evaluate.wave(layers, task.micro_batch, states, task.final)
            values.update(zip([t.output for t in group if t.output is not None], results, strict=True))
            for value in dead:
                del values[value]
            continue
        for value in task.inputs:
            if value not in values:
                handle, buffer = arriving.pop(value)
                began = time.perf_counter()
                communicator.wait(handle)
                waited += time.perf_counter() - began
                values[value] = buffer
        if task.kind == "step":
            result = evaluate.step(layers, task.micro_batch, values[task.inputs[0]], task.final)
        elif task.kind == "combine":
            result = _combine(task.coefficients, [values[v] for v in task.inputs])
        elif task.kind == "weights":
            evaluate.weights(task.layer, task.micro_batch)
            result = None
        elif task.kind == "fit":
            result = evaluate.fit(task.span, values[task.inputs[0]])
        elif task.kind == "observe":
            evaluate.observe(task.span, task.micro_batch, *(values[v] for v in task.inputs))
            result = None
        else:
            assert residuals is not None
            a, b = (values[v].to(wide) for v in task.inputs)
            residuals[task.iteration - 1] += torch.linalg.vector_norm(a - b).square()
            result = None
        if task.output is not None and result is not None:
            if task.output in part.sends:
                result = result.contiguous()
                sending += [(communicator.send(result, target), result) for target in part.sends[task.output]]
            values[task.output] = result
        for value in dead:
            del values[value]
    ends = [_everywhere(part, value, values, starts[m], communicator) for m, value in enumerate(plan.ends)]
    for handle, _ in sending:
        communicator.wait(handle)
    return Outcome(ends, residuals, waited)


def _everywhere(
    part: RankPart, value: int, values: dict[int, Tensor], like: Tensor, communicator: Communicator
) -> Tensor:
    """An end value on every rank: the ends of the model are replicated in the lp group."""
    home = part.plan.producer[value]
    if home == EVERYWHERE or communicator.size == 1:
        return values[value]
    if home == part.rank:
        tensor = values[value].contiguous()
    else:
        tensor = torch.empty_like(like, memory_format=torch.contiguous_format)
    communicator.broadcast(tensor, home)
    return tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to sum in: float32 for 16-bit states, whose differences are small, else the state's own."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _combine(coefficients: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    dtype = tensors[0].dtype
    wide = wide_dtype(dtype)
    total = tensors[0].to(wide) * coefficients[0] if coefficients[0] != 1 else tensors[0].to(wide)
    for coefficient, tensor in zip(coefficients[1:], tensors[1:], strict=True):
        total = torch.add(total, tensor.to(wide), alpha=coefficient)
    return total.to(dtype)
