"""Measures what the tasks of a plan cost on this machine, through the code that the engine runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from hf_layerpar.mgrit.plan import Plan, PlanBuilder
from hf_layerpar.mgrit.simulate import Costs
from hf_layerpar.parallel.communicator import Communicator, LocalCommunicator
from hf_layerpar.parallel.deferral import make_deferrable
from hf_layerpar.parallel.executor import Evaluator, RankPart, execute
from hf_layerpar.parallel.program import LayerCall, Program

_SAMPLED_LAYERS = 8
_CHAIN = 32  # tasks of a plan that times the executor
_PINGS = 20


def calibrate(
    calls: Sequence[LayerCall],
    x: Tensor,
    communicator: Communicator | None = None,
    *,
    layers: Sequence[int] | None = None,
    micro_batches: int = 4,
    seconds: float = 1.0,
) -> Costs:
    """The costs of a stack for the whole batch `x` `[B, T, D]`, in seconds and bytes: medians over a few layers.

    communicator: the lp group, whose ranks all call this and get the same costs (means over them); messages are timed
        between neighbours. Without it a message costs nothing.
    layers: indices of layers that this rank holds (default all); at most eight of them, evenly spread, are evaluated.
    micro_batches: the cut at which `Costs.fixed_share` is read off; 1 leaves it 0.
    seconds: how long to measure the layers, roughly; each of them three times at least.

    The linear modules of the sampled layers are made deferrable, as on any engine of several ranks.
    Raises ConfigurationError when a layer argument can't be cut into micro-batches (use micro_batches=1).
    """
    chosen = list(range(len(calls)) if layers is None else layers)
    chosen = [chosen[i * len(chosen) // _SAMPLED_LAYERS] for i in range(_SAMPLED_LAYERS)]
    chosen = list(dict.fromkeys(chosen))
    for layer in chosen:
        make_deferrable(calls[layer].layer)
    x = x.detach()
    overhead, combine, residual = _executor_times(x)
    times = _layer_times(calls, x, chosen, 1, seconds / 2)
    whole = times["graph_step"] + times["final_vjp"]
    fixed_share = 0.0
    pieces = min(micro_batches, x.shape[0])
    if pieces > 1:
        rows = x.shape[0] // pieces
        piece = _layer_times(calls, x, chosen, pieces, seconds / 2)
        # whole = fixed + rate B and piece = fixed + rate rows
        rate = (whole - piece["graph_step"] - piece["final_vjp"]) / (x.shape[0] - rows)
        fixed_share = min(1.0, max(0.0, 1.0 - rate * x.shape[0] / whole))
    prices = {
        **times,
        "combine": combine,
        "residual": residual,
        "overhead": overhead,
        "fixed_share": fixed_share,
        "graph_bytes": _graph_bytes(calls, x, chosen[0]),
    }
    state_bytes = x.numel() * x.element_size()
    if communicator is None or communicator.size == 1:
        return Costs(**prices, state_bytes=state_bytes)
    return _agreed(communicator, prices, x)


def _layer_times(
    calls: Sequence[LayerCall], x: Tensor, layers: Sequence[int], micro_batches: int, seconds: float
) -> dict[str, float]:
    """Medians for the first micro-batch. The weight gradients are what a final vjp and its "weights" task take beyond
    an input-only vjp; `final_vjp` is both in one backward, as on one rank."""
    seed = 0 if any(call.layer.training for call in calls) else None
    found: dict[str, list[float]] = {}
    programs = {
        split: Program(calls, x, micro_batches=micro_batches, seed=seed, recompute=False, split_weights=split)
        for split in (True, False)
    }
    state = programs[True].split(x)[0]
    lam = torch.ones_like(state, memory_format=torch.contiguous_format)

    def timed(name: str, work: Callable[[], object]) -> None:
        began = _now(x.device)
        work()
        found.setdefault(name, []).append(_now(x.device) - began)

    def measure() -> None:
        # first all forwards, then all backwards, as a solve does it: by then a graph has left the caches
        for split, program in programs.items():
            program.begin_backward()
            with program.running(keep_graphs=True):
                for n in layers:
                    if split:
                        timed("step", lambda n=n, p=program: p.forward_step((n,), 0, state, False))
                        timed("graph_step", lambda n=n, p=program: p.forward_step((n,), 0, state, True))
                    else:
                        program.forward_step((n,), 0, state, True)
                for n in reversed(layers):
                    if not split:
                        timed("final_vjp", lambda n=n, p=program: p.backward_step((n,), 0, lam, True))
                        continue
                    timed("vjp", lambda n=n, p=program: p.backward_step((n,), 0, lam, False))
                    timed("final", lambda n=n, p=program: p.backward_step((n,), 0, lam, True))
                    timed("weights", lambda n=n, p=program: p.weights(n, 0))

    measure()  # warms up
    found.clear()
    began, rounds = time.perf_counter(), 0
    while rounds < 3 or time.perf_counter() - began < seconds:
        measure()
        rounds += 1
    medians = {name: statistics.median(values) for name, values in found.items()}
    medians["weights"] = max(0.0, medians["weights"] + medians.pop("final") - medians["vjp"])
    return medians


def _executor_times(x: Tensor) -> tuple[float, float, float]:
    """What a task takes beside its work; and above that, one term of a combination, and one residual."""

    no_work = Evaluator(
        step=lambda layers, micro_batch, state, final: state,
        weights=lambda layer, micro_batch: None,
        fit=lambda span, state: state,
        observe=lambda span, micro_batch, start, end: None,
    )

    def plan_of(kind: str) -> Plan:
        builder = PlanBuilder("forward", [0] * _CHAIN)
        start = builder.start()
        a, b = builder.step(0, start), builder.step(1, start)
        v = a
        for n in range(2, _CHAIN):
            if kind == "step":
                v = builder.step(n, v)
            elif kind == "combine":
                v = builder.combine([(1.0, v), (0.5, a), (-0.5, b)], 0)
            else:
                builder.iterations = 1
                builder.residual(a, b, 1)
        builder.end(v)
        return builder.build(1)

    def seconds_of(kind: str) -> float:
        part = RankPart.of(plan_of(kind), 0)
        runs = []
        for _ in range(6):
            began = _now(x.device)
            execute(part, [x], no_work, LocalCommunicator())
            runs.append(_now(x.device) - began)
        return statistics.median(runs[1:]) / len(part.tasks)

    overhead, combine, residual = (seconds_of(kind) for kind in ("step", "combine", "residual"))
    return overhead, max(0.0, combine - overhead) / 3, max(0.0, residual - overhead)


def _graph_bytes(calls: Sequence[LayerCall], x: Tensor, layer: int) -> float:
    """Storage that the graph of one step keeps alive, its result included, parameters not."""
    program = Program(calls, x, micro_batches=1, seed=None, recompute=False)
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with program.running(keep_graphs=True), torch.random.fork_rng(), saved_tensors_hooks(note, lambda tensor: tensor):
        note(program.forward_step((layer,), 0, x, True))
        for parameter in calls[layer].layer.parameters():
            kept.pop(parameter.untyped_storage().data_ptr(), None)
    return float(sum(kept.values()))


def _agreed(communicator: Communicator, prices: dict[str, float], x: Tensor) -> Costs:
    """Means over the ranks, with the costs of messages between neighbours (ranks 0 and 1, 2 and 3, ...)."""
    peer = communicator.rank ^ 1
    paired = peer < communicator.size
    small, large, send = (0.0, 0.0, 0.0)
    if paired:
        small, _ = _ping(communicator, peer, x.new_zeros(1))
        large, send = _ping(communicator, peer, torch.zeros_like(x, memory_format=torch.contiguous_format))
    sums = torch.tensor([*prices.values(), small, large, send, float(paired)], device=x.device)
    communicator.all_reduce(sums)
    *means, small, large, send, pairs = sums.tolist()
    state_bytes = x.numel() * x.element_size()
    latency, transfer = small / pairs, max(0.0, large - small) / pairs
    return Costs(
        **{name: mean / communicator.size for name, mean in zip(prices, means, strict=True)},
        latency=latency,
        bandwidth=state_bytes / transfer if transfer else float("inf"),
        send=send / pairs,
        state_bytes=state_bytes,
    )


def _ping(communicator: Communicator, peer: int, tensor: Tensor) -> tuple[float, float]:
    """Seconds that `tensor` travels to a neighbour, and processor seconds that a message takes on this rank."""
    buffer, trips, processor = torch.empty_like(tensor), [], 0.0
    for ping in range(_PINGS + 3):  # the first ones warm up
        began, worked = _now(tensor.device), time.process_time()
        if communicator.rank < peer:
            sent = communicator.send(tensor, peer)
            communicator.wait(communicator.receive(buffer, peer))
        else:
            communicator.wait(communicator.receive(buffer, peer))
            sent = communicator.send(tensor, peer)
        communicator.wait(sent)
        if ping >= 3:
            trips.append(_now(tensor.device) - began)
            processor += time.process_time() - worked
    return statistics.median(trips) / 2, processor / (2 * _PINGS)


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
    return time.perf_counter()
