"""How much of a step is spent outside the layers: combining states, posting messages, Python.

    python recipes/benchmarks/overhead.py [--layers 32] [--steps 10]

Every layer forward, every backward, every weight gradient taken later and every blocking call to another rank is timed
where a step makes it; what is left of the step is its own. Waiting for others is counted apart: it belongs to the
schedule. On one rank nothing waits, so there the share is exact. Written to recipes/benchmarks/results/overhead.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that a checkout runs without being installed

import torch
import torch.distributed as dist
from torch import Tensor

from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.plan.part import RankPart
from hf_layerpar.run.layers import Layers
from hf_layerpar.run.transport import Transport
from recipes.benchmarks.bare import BareStack
from recipes.benchmarks.launch import RESULTS, found_by_rank
from recipes.benchmarks.sides import (
    Call,
    Place,
    init_ranks,
    inner_product_with,
    local_transport,
    our_calls,
    owner_of,
)
from recipes.benchmarks.stack import SIZES, make_stack, make_state
from recipes.results import print_table, versions, write_json

TARGET = 0.03
CONFIGS = {
    "exact": LayerParallelConfig(),
    "exact M=4": LayerParallelConfig(micro_batches=4),
    "mgrit rediscretize 1/1": LayerParallelConfig(strategy="mgrit", coarse_operator="rediscretize"),
    "mgrit aggregate 2/1": LayerParallelConfig(strategy="mgrit", coarse_operator="aggregate", forward_iterations=2),
    "mgrit identity 1/1": LayerParallelConfig(strategy="mgrit", coarse_operator="identity"),
}


@dataclass
class Clock:
    """Seconds in layers and in waiting, since the last reset."""

    layers: float = 0.0
    waiting: float = 0.0
    evaluations: int = 0

    def reset(self) -> None:
        self.layers, self.waiting, self.evaluations = 0.0, 0.0, 0


@dataclass
class TimedCall(Call):
    clock: Clock = field(default_factory=Clock)

    def step(self, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        began = time.perf_counter()
        y = super().step(x, args, kwargs)
        self.clock.layers += time.perf_counter() - began
        self.clock.evaluations += 1
        return y


class TimedTransport:
    """A transport whose blocking calls are timed; posting a message stays the step's own work."""

    def __init__(self, inner: Transport, clock: Clock) -> None:
        self._inner, self._clock = inner, clock

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if not callable(found) or name in ("send", "receive", "is_done"):
            return found

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = found(*args, **kwargs)
            self._clock.waiting += time.perf_counter() - began
            return result

        return timed


@contextmanager
def timed_gradients(clock: Clock) -> Iterator[None]:
    """Times all backwards (`backward` and `grad` both go through one function) and the weight gradients that were left
    for later."""
    run: Callable[..., Any] = torch.autograd._engine_run_backward  # type: ignore[attr-defined]
    weights = Layers.weights

    def timed_run(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return run(*args, **kwargs)
        finally:
            clock.layers += time.perf_counter() - began
            clock.evaluations += 1

    def timed_weights(of: Layers, layers: Sequence[int]) -> None:
        began = time.perf_counter()
        weights(of, layers)
        clock.layers += time.perf_counter() - began

    torch.autograd._engine_run_backward = timed_run  # type: ignore[attr-defined]
    Layers.weights = timed_weights  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autograd._engine_run_backward = run  # type: ignore[attr-defined]
        Layers.weights = weights  # type: ignore[method-assign]


def measure(config: LayerParallelConfig, num_layers: int, steps: int) -> dict[str, Any]:
    """Medians over the steps of this rank's shares, after one step to warm up. Collective."""
    place, clock = Place.here(), Clock()
    stack, x = make_stack(num_layers), make_state(seed=1).requires_grad_()
    owner = owner_of(config, num_layers, place.size)
    transport: Any = TimedTransport(local_transport(), clock)
    calls = [TimedCall(call.layer, clock=clock) for call in our_calls(stack, owner, place.rank)]
    bare = BareStack(calls, x, inner_product_with(make_state(seed=2)))
    plan = bare.plan(config, owner, place.size)
    part = RankPart.of(plan, place.rank)
    shares: list[tuple[float, float, float]] = []
    with timed_gradients(clock):
        for _ in range(steps + 1):
            x.grad = None
            stack.zero_grad()
            if dist.is_initialized():
                dist.barrier()
            clock.reset()
            began = time.perf_counter()
            bare.step(plan, transport, config=config, part=part)
            seconds = time.perf_counter() - began
            own = seconds - clock.layers - clock.waiting
            shares.append((own / seconds, clock.waiting / seconds, own / clock.evaluations))
    overhead, waiting, each = (statistics.median(column) for column in zip(*shares[1:], strict=True))
    return {
        "overhead_share": overhead,
        "waiting_share": waiting,
        "overhead_seconds_per_evaluation": each,
        "evaluations": clock.evaluations,
    }


def run_rank(options: argparse.Namespace) -> None:
    """What each started process does."""
    init_ranks()
    place = Place.here()
    found = {
        name: measure(config, options.layers, options.steps)
        for name, config in CONFIGS.items()
        if place.size > 1 or config.micro_batches == 1
    }
    write_json(options.rank_folder / f"{place.rank}.json", found)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", type=Path, default=RESULTS / "overhead.json")
    parser.add_argument("--rank_folder", type=Path, help=argparse.SUPPRESS)  # given to the ranks this script starts
    options = parser.parse_args()
    if options.rank_folder is not None:
        run_rank(options)
        return

    arguments = ["--layers", str(options.layers), "--steps", str(options.steps)]
    ranks = {str(processes): found_by_rank(processes, Path(__file__), arguments) for processes in (1, 2)}
    settings = {"layers": options.layers, "steps": options.steps, "sizes": SIZES}
    result = {"settings": settings, "target_share": TARGET, "ranks": ranks, "versions": versions()}
    write_json(options.output, result)
    rows = [
        (
            f"{n} rank(s), rank {r}, {name}",
            f"overhead {found['overhead_share']:.2%}, waiting {found['waiting_share']:.2%}, "
            f"{found['overhead_seconds_per_evaluation'] * 1e6:.0f} us for each of {found['evaluations']} evaluations",
        )
        for n, of_ranks in ranks.items()
        for r, by_name in enumerate(of_ranks)
        for name, found in by_name.items()
    ]
    print_table(rows)


if __name__ == "__main__":
    main()
