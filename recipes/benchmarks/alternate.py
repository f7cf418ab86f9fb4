"""Measures sides in alternation: one step of each in every round, in an order drawn anew, all ranks together.

Before the rounds every side makes one step for its accuracy and its memory, and in each round one more before the step
that is timed.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_layerpar.run.gradients import products
from recipes.benchmarks.resident import resident_growth
from recipes.benchmarks.sides import Entry, Side


def measure(entries: Sequence[Entry], exact: dict[str, Tensor], rounds: int) -> dict[str, dict[str, Any]]:
    """What the sides take, by name; the first entry is what the others' times are divided by. Collective.

    A side that can't be made or run on some rank has its error's text instead, which hides nothing of the others.
    """
    results: dict[str, dict[str, Any]] = {}
    sides: dict[str, Side] = {}
    for entry in entries:
        found = _first_steps(entry, exact)
        results[entry.name] = {"settings": entry.settings} | found.result
        if found.side is not None:
            sides[entry.name] = found.side
    gc.collect()
    gc.freeze()  # what is alive now needs no search for garbage during the steps
    times: dict[str, list[float]] = {name: [] for name in sides}
    order, draw = list(sides), random.Random(0)  # the same order on every rank
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            _timed(sides[name])  # as in training, the step before was of the same kind: memory and caches are its own
            times[name].append(_timed(sides[name]))
    gc.unfreeze()
    base = times.get(entries[0].name)
    for name, seconds in times.items():
        results[name] |= _statistics(seconds, base)
        predict = sides[name].predict
        if predict is not None:
            predicted = predict()
            results[name] |= {
                "predicted_seconds": predicted,
                "predicted_over_measured": predicted / results[name]["seconds"]["median"],
            }
    return results


@dataclass
class _Found:
    result: dict[str, Any]
    side: Side | None


def _first_steps(entry: Entry, exact: dict[str, Tensor]) -> _Found:
    """The side, its accuracy and its memory; or its error."""
    side, failure, growth = None, None, 0
    try:
        side = entry.make()
        growth = _memory_growth(side)
    except Exception as error:  # whatever a library raises where it can't do this: it is the result
        failure = "".join(traceback.format_exception_only(error)).strip()
    failures = [text for text in _from_all(failure) if text is not None]
    if side is None or failures:
        return _Found({"error": failures[0]}, None)
    gradient = accuracy(side.gradients(), exact)
    side.clear()
    return _Found({"gradient": gradient, "memory_growth_bytes": _from_all(growth)}, side)


def _timed(side: Side) -> float:
    """Seconds of one step on the rank that takes longest. The gradients are made anew."""
    side.clear()
    before = torch.get_num_threads()
    torch.set_num_threads(side.threads)
    if dist.is_initialized():
        dist.barrier()
    began = time.perf_counter()
    side.step()
    if side.trained[0].is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    torch.set_num_threads(before)
    if any(p.grad is None for p in side.answers.values()):
        raise RuntimeError("a timed step made no gradients")
    if not dist.is_initialized():
        return seconds
    slowest = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)


def accuracy(gradients: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Over all parameters of all ranks. Collective; raises RuntimeError unless each parameter is there exactly once."""
    sums = torch.zeros(5, dtype=torch.float64)
    for name, gradient in gradients.items():
        sums[:4] += products(gradient.detach(), exact[name].to(gradient.device)).cpu()
        sums[4] += gradient.numel()
    if dist.is_initialized():
        dist.all_reduce(sums)
    dot, square, exact_square, error_square, count = sums.tolist()
    expected = sum(t.numel() for t in exact.values())
    if count != expected:
        raise RuntimeError(f"the ranks answer for {count:.0f} gradient entries, the model has {expected}")
    return {
        "cosine": dot / (square * exact_square) ** 0.5,
        "relative_error": (error_square / exact_square) ** 0.5,
        "norm_ratio": (square / exact_square) ** 0.5,
    }


def _memory_growth(side: Side) -> int:
    """Bytes by which this rank's resident memory grows at most during its first step, gradients included; on a GPU, the
    memory allocated there."""
    gc.collect()
    device = side.trained[0].device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        _timed(side)
        return torch.cuda.max_memory_allocated(device) - before
    return resident_growth(lambda: _timed(side))


def _from_all(value: Any) -> list[Any]:
    """Every rank's value. Collective."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _statistics(seconds: list[float], base: list[float] | None) -> dict[str, Any]:
    found: dict[str, Any] = {"seconds": {"median": statistics.median(seconds), "quartiles": _quartiles(seconds)}}
    found["seconds"] |= {"least": min(seconds), "most": max(seconds), "all": seconds}
    if base is not None:
        found["ratio"] = statistics.median(seconds) / statistics.median(base)
        # round by round, so that a machine that slows down for a while moves both
        found["ratio_quartiles"] = _quartiles([a / b for a, b in zip(seconds, base, strict=True)])
    return found


def _quartiles(values: list[float]) -> list[float]:
    if len(values) == 1:
        return values * 2
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [first, third]
