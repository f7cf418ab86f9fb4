"""What the layers and the ends of a model cost in these processes: what settings are picked and predicted by."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.ode.phases import ModelPhases
from hf_layerpar.ode.rehearsal import cut_rows, rehearse
from hf_layerpar.plan.costs import Costs
from hf_layerpar.run.calibrate import calibrate
from hf_layerpar.run.clock import seconds_of
from hf_layerpar.run.layers import Entry, LayerCall, kept_streams
from hf_layerpar.run.transport import GroupTransport, LocalTransport
from hf_layerpar.sharding import parallelize

REPEATS = 9


@dataclass(frozen=True)
class Prices:
    """Costs of the whole batch.

    blocks: of all layers of a rank in a row, as a pipeline runs them. layers: of single ones, as MGRIT does.
    """

    blocks: Costs
    layers: Costs

    def of(self, config: LayerParallelConfig) -> Costs:
        return self.layers if config.strategy == "mgrit" else self.blocks


def measured_prices(calls: Sequence[LayerCall], x: Tensor, **more: Any) -> Prices:
    """Collective: all ranks work while costs are measured, as in a step. more: as `calibrate` takes it."""
    return Prices(calibrate(calls, x, block=True, **more), calibrate(calls, x, **more))


def model_prices(model: Any, batch: dict[str, Tensor], *, parts: int = 8, seconds: float = 4.0) -> Prices:
    """Those of a converted model with one stack. Collective; the model is used up.

    parts: pieces of the batch that costs are measured of too, for `Costs.fixed_share`.
    """
    rows = len(next(iter(batch.values())))
    handle = parallelize(model, LayerParallelConfig())
    (stack,) = handle.stacks
    ends, device = handle.stepper.ends, handle.device

    def closure(batch: Any) -> Tensor:
        return model(**batch).loss

    with kept_streams(device):
        rehearsed = rehearse(closure, batch, handle.stacks, ends, loss=True)

    def phases_of(part: Any) -> ModelPhases:
        count = len(next(iter(part.values())))
        return ModelPhases(closure, [part], [count], handle.stacks, ends, rehearsed, Entry, terms=None, trains=True)

    whole, piece = phases_of(batch), phases_of(cut_rows(batch, rows, parts)[0])
    entry, small = (p.enter(0, 0, [], real=False) for p in (whole, piece))

    def timed(work: Callable[[], object]) -> float:
        return seconds_of(work, device)

    def ends_times() -> tuple[float, float, float, float]:
        times: dict[str, list[float]] = {"front": [], "front_backward": [], "tail": [], "arguments": []}
        lam, owners = torch.randn_like(entry.x), handle.stepper.owners[0]
        for _ in range(REPEATS):
            if handle.lp_rank == owners[0]:
                found: list[Any] = []
                times["front"].append(timed(lambda: found.append(whole.enter(0, 0, [], real=True))))  # noqa: B023
                times["front_backward"].append(timed(lambda: found[0].x.backward(lam)))  # noqa: B023
            if handle.lp_rank == owners[-1]:
                end = torch.randn_like(entry.x).requires_grad_()
                times["tail"].append(timed(lambda: whole.finish(0, (0, 1), [end]).backward()))  # noqa: B023
            times["arguments"].append(timed(lambda: whole.enter(0, 0, [], real=False)))
        model.zero_grad()
        return tuple(statistics.median(values) if values else 0.0 for values in times.values())  # type: ignore

    x = torch.randn_like(entry.x)  # ranks without the embeddings have none of their own
    own = [n for n in range(len(stack.layers)) if n not in stack.foreign]
    transport = LocalTransport() if handle.group is None else GroupTransport(handle.group)
    part = (small.calls, x[: len(small.x)])
    more = {"transport": transport, "layers": own, "part": part, "ends": ends_times, "seconds": seconds}
    return measured_prices(entry.calls, x, **more)
