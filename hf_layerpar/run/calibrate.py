"""Measures what the tasks of a plan cost on this machine, through the code that a step runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from hf_layerpar.compat.torch import autocast_of
from hf_layerpar.plan.costs import Costs
from hf_layerpar.run.clock import seconds_of
from hf_layerpar.run.gradients import gradients_aside
from hf_layerpar.run.held import Held
from hf_layerpar.run.layers import Common, Entry, LayerCall, Layers, kept_streams, sides_of
from hf_layerpar.run.step import combine
from hf_layerpar.run.transport import LocalTransport, Transport

_SAMPLED_LAYERS = 8
_PINGS = 20


def calibrate(
    calls: Sequence[LayerCall],
    x: Tensor,
    transport: Transport | None = None,
    *,
    layers: Sequence[int] | None = None,
    part: tuple[Sequence[LayerCall], Tensor] | None = None,
    ends: Callable[[], tuple[float, float, float, float]] | None = None,
    block: bool = False,
    seconds: float = 1.0,
) -> Costs:
    """The costs of a stack for the whole batch `x` `[B, T, D]`, in seconds and bytes: medians over a few layers.

    transport: the lp group, whose ranks all call this and get the same costs (means over them); messages are timed
        between neighbours. Without it a message costs nothing.
    layers: indices of layers that this rank holds (default all); at most eight of them, evenly spread, are evaluated.
    block: instead all of `layers` in a row, as a pipeline runs them, with two micro-batches in flight: what is kept for
        so long has left the caches, which makes weight gradients apart dearer than single layers show.
    part: calls and state of a micro-batch with fewer rows, at which `Costs.fixed_share` is read off; without it 0.
    ends: measures (front, front_backward, tail, arguments) of the whole batch.
    seconds: how long to measure the layers, roughly; each of them three times at least.

    The linear modules of the sampled layers are made deferrable, as in any step of several ranks.
    """
    transport = transport or LocalTransport()
    chosen = list(range(len(calls)) if layers is None else layers)
    if not block:
        chosen = [chosen[i * len(chosen) // _SAMPLED_LAYERS] for i in range(_SAMPLED_LAYERS)]
        chosen = list(dict.fromkeys(chosen))
    x = x.detach()
    with kept_streams(x.device):
        times = _layer_times(calls, x, chosen, block, seconds / (1 if part is None else 2))
        whole = times["graph_step"] + times["final_vjp"]
        fixed_share = 0.0
        if part is not None:
            piece = _layer_times(part[0], part[1].detach(), chosen, block, seconds / 2)
            # whole = fixed + rate B and piece = fixed + rate rows
            rate = (whole - piece["graph_step"] - piece["final_vjp"]) / (len(x) - len(part[1]))
            fixed_share = min(1.0, max(0.0, 1.0 - rate * len(x) / whole))
        combination, residual, overhead = _small_times(x)
        names = ("front", "front_backward", "tail", "arguments")
        prices = {
            **times,
            "combine": combination,
            "residual": residual,
            "overhead": overhead,
            "fixed_share": fixed_share,
            **dict(zip(names, (0.0,) * 4 if ends is None else ends(), strict=True)),
            **_layer_bytes(calls, x, list(range(len(calls)) if layers is None else layers), chosen[0]),
        }
    if transport.size == 1:
        return Costs(**prices, state_bytes=x.numel() * x.element_size())
    return _agreed(transport, prices, x)


def _layer_times(
    calls: Sequence[LayerCall], x: Tensor, chosen: Sequence[int], block: bool, seconds: float
) -> dict[str, float]:
    """Medians. The weight gradients are what a step with weight gradients apart takes beyond a forward and an
    input-only vjp; `final_vjp` is both in one backward."""
    common = Common(0 if any(call.layer.training for call in calls) else None)
    found: dict[str, list[float]] = {}
    lam = torch.ones_like(x, memory_format=torch.contiguous_format)
    trained = list(dict.fromkeys(p for n in chosen for p in calls[n].layer.parameters()))

    runs = [tuple(chosen)] if block else [(n,) for n in chosen]

    def timed(name: str, run: tuple[int, ...], work: Callable[[tuple[int, ...]], object]) -> None:
        found.setdefault(name, []).append(seconds_of(lambda: work(run), x.device) / len(run))

    def measure() -> None:
        # first all forwards, then all backwards, then all weight gradients, as a step does it: by then what they need
        # has left the caches
        for split in (True, False):
            in_flight = [_layers_of(calls, x, common) for _ in range(2 if block else 1)]
            for layers in in_flight:
                for r in runs:
                    timed(f"forward {split}", r, partial(layers.forward, x=x, final=True, split=split))
            for layers in in_flight:
                for r in reversed(runs):
                    timed(f"final {split}", r[::-1], partial(layers.backward, lam=lam, final=True, split=split))
                for r in reversed(runs) if split else ():
                    timed("weights", r, layers.weights)
        layers = _layers_of(calls, x, common)
        for n in chosen[:_SAMPLED_LAYERS]:
            timed("step", (n,), partial(layers.forward, x=x))
            layers.forward((n,), x, final=True)
        for n in reversed(chosen[:_SAMPLED_LAYERS]):
            timed("vjp", (n,), partial(layers.backward, lam=lam))

    with gradients_aside(trained):
        measure()  # warms up
        found.clear()
        began, rounds = time.perf_counter(), 0
        while rounds < 3 or time.perf_counter() - began < seconds:
            measure()
            rounds += 1
    medians = {name: statistics.median(values) for name, values in found.items()}
    # what taking the weight gradients apart costs in the other two halves is theirs
    apart = medians["forward True"] + medians["final True"] + medians["weights"]
    return {
        "step": medians["step"],
        "graph_step": medians["forward False"],
        "vjp": medians["vjp"],
        "weights": max(0.0, apart - medians["forward False"] - medians["vjp"]),
        "final_vjp": medians["final False"],
    }


def _layers_of(calls: Sequence[LayerCall], x: Tensor, common: Common) -> Layers:
    layers = Layers(Entry(x, calls, sides_of(calls), autocast_of(x)), common, 0, 0)
    layers.sides = [side.detach() for side in layers.entry.sources]
    return layers


def _small_times(x: Tensor) -> tuple[float, float, float]:
    """A term of a combination, a residual, and what a task takes beside its work."""

    def median(work: Callable[[], object], repeats: int = 8) -> float:
        return statistics.median([seconds_of(work, x.device) for _ in range(repeats)][1:])

    combination = median(lambda: combine((1.0, 1.0, -1.0), [x, x, x])) / 3
    residual = median(lambda: torch.linalg.vector_norm(x - x).square())
    return combination, residual, median(lambda: combine((1.0,), [x[:0]]))


def _layer_bytes(calls: Sequence[LayerCall], x: Tensor, own: Sequence[int], sample: int) -> dict[str, float]:
    """Parameters of a layer, the mean over this rank's, and the share that is trained; and what the graph of `sample`
    keeps, and what its evaluation and its vjp take beside."""
    sizes = [(p.numel() * p.element_size(), p.requires_grad) for n in own for p in calls[n].layer.parameters()]
    total = sum(size for size, _ in sizes)
    graph = _graph_bytes(calls, x, sample)
    added = max((size for size, trained in sizes if trained), default=0)
    most, vjp, pending = _held_bytes(calls, x, sample)
    return {
        "layer_bytes": total / len(own),
        "trained_share": sum(size for size, trained in sizes if trained) / total if total else 1.0,
        "graph_bytes": graph,
        "work_bytes": max(0.0, most - graph - added),
        "vjp_bytes": max(0.0, vjp - graph),
        "added_bytes": added,
        "pending_bytes": pending,
    }


def _held_bytes(calls: Sequence[LayerCall], x: Tensor, layer: int) -> tuple[float, float, float]:
    """The most that is held from the evaluation of a layer to the end of its final vjp, its gradients not; during an
    input-only vjp; and what is still held behind a vjp that leaves the weight gradients."""
    params = [p for p in calls[layer].layer.parameters() if p.requires_grad]
    lam = torch.ones_like(x, memory_format=torch.contiguous_format)
    with gradients_aside(params):
        for p in params:
            p.grad = torch.zeros_like(p)
        layers = _layers_of(calls, x, Common(0))
        there = [x, lam, *params, *(p.grad for p in params if p.grad is not None)]
        with Held(there) as whole:
            layers.forward((layer,), x, final=True)
            layers.backward((layer,), lam, final=True)
        with Held(there) as inputs:
            layers.forward((layer,), x, final=True)
            layers.backward((layer,), lam)
        layers.backward((layer,), lam, final=True)
        with Held(there) as split:
            layers.forward((layer,), x, final=True, split=True)
            lam = layers.backward((layer,), lam, final=True, split=True)
            pending = split.now - lam.untyped_storage().nbytes()
        layers.weights((layer,))
        return float(whole.most), float(inputs.most), max(0.0, float(pending))


def _graph_bytes(calls: Sequence[LayerCall], x: Tensor, layer: int) -> float:
    """Storage that the graph of one step keeps alive, its result included, parameters not."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    layers = _layers_of(calls, x, Common(0))
    with saved_tensors_hooks(note, lambda tensor: tensor):
        note(layers.forward((layer,), x, final=True))
    for parameter in calls[layer].layer.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    return float(sum(kept.values()))


def _agreed(transport: Transport, prices: dict[str, float], x: Tensor) -> Costs:
    """Means over the ranks (of the ends: what the rank that has them takes), with the costs of messages between
    neighbours (ranks 0 and 1, 2 and 3, ...)."""
    peer = transport.rank ^ 1
    paired = peer < transport.size
    transport.open([(rank, rank + 1) for rank in range(0, transport.size - 1, 2)], x.device)
    small, large, send = (0.0, 0.0, 0.0)
    if paired:
        small, _ = _ping(transport, peer, x.new_zeros(1))
        large, send = _ping(transport, peer, torch.zeros_like(x, memory_format=torch.contiguous_format))
    sums = torch.tensor([*prices.values(), small, large, send, float(paired)], device=x.device, dtype=torch.float64)
    transport.all_reduce(sums)
    *means, small, large, send, pairs = sums.tolist()
    state_bytes = x.numel() * x.element_size()
    latency, transfer = small / pairs, max(0.0, large - small) / pairs
    once = ("front", "front_backward", "tail")
    return Costs(
        **{n: total / (1 if n in once else transport.size) for n, total in zip(prices, means, strict=True)},
        latency=latency,
        bandwidth=state_bytes / transfer if transfer else float("inf"),
        send=send / pairs,
        state_bytes=state_bytes,
    )


def _ping(transport: Transport, peer: int, tensor: Tensor) -> tuple[float, float]:
    """Seconds that `tensor` travels to a neighbour, and processor seconds that a message takes on this rank."""
    buffer, trips, processor = torch.empty_like(tensor), [], 0.0

    def there_and_back() -> None:
        if transport.rank < peer:
            sent = transport.send(tensor, peer)
            transport.wait(transport.receive(buffer, peer))
        else:
            transport.wait(transport.receive(buffer, peer))
            sent = transport.send(tensor, peer)
        transport.wait(sent)

    for ping in range(_PINGS + 3):  # the first ones warm up
        worked = time.process_time()
        seconds = seconds_of(there_and_back, tensor.device)
        if ping >= 3:
            trips.append(seconds)
            processor += time.process_time() - worked
    return statistics.median(trips) / 2, processor / (2 * _PINGS)
