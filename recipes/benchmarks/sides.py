"""The sides of the speed comparison on the bare stack: serial torch, what torch itself offers for several ranks, ours.

Every side does the same work: from the stack's input and the gradient at its end, the gradients of all its parameters
and of its input.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.plan.ownership import contiguous_owner, interleaved_owner
from hf_layerpar.plan.strategies import interval_points
from hf_layerpar.run.communicator import Communicator, GroupCommunicator, LocalCommunicator
from hf_layerpar.run.engine import StackEngine
from recipes.benchmarks.stack import BATCH, make_stack, make_state

OPERATORS = ("rediscretize", "aggregate", "identity")
COMPILED_UP_TO = 8  # compiling takes seconds a layer, on every rank
SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}


@dataclass
class Side:
    """One way to make the gradients, as one rank takes part in it.

    step: one forward and backward; collective. It leaves the gradients in `.grad`.
    trained: every tensor that gets a `.grad` on this rank.
    answers: of these, the parameters whose gradients are compared here, by name in the reference. Over all ranks each
        parameter of the model is answered for once.
    scale: factors of gradients whose parameter is a multiple of the reference's.
    """

    step: Callable[[], None]
    trained: list[Tensor]
    answers: Mapping[str, Tensor]
    threads: int = 1
    scale: Mapping[str, float] = field(default_factory=dict)

    def clear(self) -> None:
        for tensor in self.trained:
            tensor.grad = None

    def gradients(self) -> dict[str, Tensor]:
        """The gradients that this rank answers for. Raises RuntimeError where one was not made."""
        missing = [name for name, p in self.answers.items() if p.grad is None]
        if missing:
            raise RuntimeError(f"the step made no gradient for {len(missing)} parameters, such as {missing[0]}")
        return {n: p.grad * self.scale.get(n, 1.0) for n, p in self.answers.items()}  # type: ignore[operator]


@dataclass(frozen=True)
class Entry:
    """A side before it is made: its name in the table, what it is, and how it is made."""

    name: str
    settings: dict[str, Any]
    make: Callable[[], Side]


@dataclass(frozen=True)
class Place:
    """This rank among the ranks of the run."""

    rank: int
    size: int

    @classmethod
    def here(cls) -> Place:
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls(0, 1)

    @property
    def rows(self) -> slice:
        """This rank's rows of the batch, where ranks share it."""
        return slice(BATCH * self.rank // self.size, BATCH * (self.rank + 1) // self.size)

    def layers(self, num_layers: int) -> range:
        """This rank's layers of the even contiguous split."""
        owner = contiguous_owner(num_layers, self.size)
        return range(owner.index(self.rank), owner.index(self.rank) + owner.count(self.rank))


def init_ranks() -> None:
    """One thread, and the process group when there are several ranks."""
    torch.set_num_threads(1)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo", timeout=timedelta(seconds=120))


def only_first(place: Place, step: Callable[[], None]) -> Callable[[], None]:
    """The step on rank 0 while the others wait at the barrier."""
    return step if place.rank == 0 else lambda: None


_SLICED_TOO = (
    "ours pipeline M=1",
    "mgrit rediscretize 2 levels 1/1 M=1",
    "mgrit identity 2 levels 1/1 M=1",
)
"""Settings that are measured with replicated and with sliced ends."""


def our_configs(num_ranks: int, *, with_ends: bool = False) -> list[tuple[str, LayerParallelConfig]]:
    """The settings of ours to measure, with their names in the table. One rank: only what shows our own cost."""
    configs: list[tuple[str, LayerParallelConfig]] = []

    def mgrit(operator: str, forward: int, backward: int, levels: int = 2, micro_batches: int = 1) -> None:
        name = f"mgrit {operator} {levels} levels {forward or 'exact'}/{backward} M={micro_batches}"
        config = LayerParallelConfig(
            strategy="mgrit",
            levels=levels,
            coarsening=4,
            coarse_operator=operator,  # type: ignore[arg-type]
            forward_iterations=forward,
            backward_iterations=backward,
            micro_batches=micro_batches,
        )
        configs.append((name, config))

    if num_ranks == 1:
        configs.append(("ours serial", LayerParallelConfig(strategy="serial")))
        mgrit("rediscretize", 1, 1)
        return configs
    for m in (1, 4) if with_ends else (1, 2, 4, 8):
        configs.append((f"ours pipeline M={m}", LayerParallelConfig(strategy="pipeline", micro_batches=m)))
    for operator in OPERATORS:
        for levels in (2,) if with_ends else (2, 3):
            mgrit(operator, 1, 1, levels)
            mgrit(operator, 2, 1, levels)
        mgrit(operator, 0, 1)
        for m in (4,) if with_ends else (2, 4):
            mgrit(operator, 1, 1, micro_batches=m)
    if with_ends:
        configs += [
            (f"{name}, sliced ends", replace(config, sliced_ends=True))
            for name, config in configs
            if name in _SLICED_TOO
        ]
    return configs


def our_interleaved(num_ranks: int) -> list[tuple[str, LayerParallelConfig, bool]]:
    """The `aggregate` operator with every interval dealt out to all ranks: name, settings, and True."""
    if num_ranks == 1:
        return []
    config = LayerParallelConfig(strategy="mgrit", coarsening=num_ranks, coarse_operator="aggregate")
    return [(f"mgrit aggregate 2 levels 1/1 M=1 c={num_ranks} interleaved", config, True)]


def stack_sides(num_layers: int) -> tuple[list[Entry], dict[str, Tensor]]:
    """All sides on the bare stack, serial first, and the exact gradients by parameter name."""
    place = Place.here()
    stack, upstream = make_stack(num_layers), make_state(seed=2)
    reference = serial_side(place, stack, upstream, threads=1, everywhere=True)
    reference.step()
    exact = {name: p.grad.clone() for name, p in stack.named_parameters() if p.grad is not None}
    reference.clear()

    entries = [
        Entry(f"serial, {t} thread{'s' * (t > 1)}", {"method": "serial", "threads": t}, make)
        for t in (1, 2)
        for make in [partial(serial_side, place, stack, upstream, threads=t)]
    ]
    compiled = {"method": "serial", "threads": 1, "compiled": True}
    if num_layers <= COMPILED_UP_TO:
        entries.append(Entry("serial, compiled layers", compiled, partial(_serial_compiled, place, stack, upstream)))
    if place.size > 1:
        entries.append(Entry("ddp", {"method": "ddp"}, partial(_ddp, place, stack, upstream)))
        entries.append(Entry("tensor parallel", {"method": "tensor"}, partial(_tensor, place, stack, upstream)))
        for schedule, m in [
            ("gpipe", 1),
            ("gpipe", 2),
            ("gpipe", 4),
            ("gpipe", 8),
            ("1f1b", 2),
            ("1f1b", 4),
            ("1f1b", 8),
        ]:
            settings = {"method": schedule, "micro_batches": m}
            make = partial(_pipelining, place, stack, upstream, schedule, m)
            entries.append(Entry(f"{schedule} M={m}", settings, make))
    ours = copy.deepcopy(stack)  # the engine may change how its layers run, and torch's sides must not notice
    for name, config in our_configs(place.size):
        make = partial(our_side, place, ours, upstream, config, interleaved=False)
        entries.append(Entry(name, config.to_dict() | {"method": "ours", "ownership": "contiguous"}, make))
    for name, config, interleaved in our_interleaved(place.size):
        make = partial(our_side, place, ours, upstream, config, interleaved=interleaved)
        settings = config.to_dict() | {"method": "ours", "ownership": "interleaved"}
        entries.append(Entry(name, settings, make))
    if place.size > 1 and num_layers <= COMPILED_UP_TO:
        config = LayerParallelConfig(strategy="mgrit", coarse_operator="identity")
        make = partial(_ours_compiled, place, stack, upstream, config)
        settings = config.to_dict() | {"method": "ours", "ownership": "contiguous", "compiled": True}
        entries.append(Entry("mgrit identity 2 levels 1/1 M=1 compiled layers", settings, make))
    return entries, exact


def _leaf(upstream: Tensor, rows: slice = slice(None)) -> Tensor:
    """The stack's input, beside `upstream`. It requires grad in every side, as it does with an embedding below it."""
    return make_state(seed=1)[rows].to(upstream.device, copy=True).requires_grad_()


def with_compiled_layers(stack: nn.Sequential) -> nn.Sequential:
    """A copy whose layers are compiled when they are first run."""
    own = copy.deepcopy(stack)
    for block in own:
        block.compile()
    return own


def serial_side(
    place: Place, stack: nn.Sequential, upstream: Tensor, *, threads: int, everywhere: bool = False
) -> Side:
    x = _leaf(upstream)

    def step() -> None:
        stack(x).backward(upstream)

    answers = dict(stack.named_parameters()) if place.rank == 0 else {}
    return Side(step if everywhere else only_first(place, step), [x, *stack.parameters()], answers, threads)


def _serial_compiled(place: Place, stack: nn.Sequential, upstream: Tensor) -> Side:
    return serial_side(place, with_compiled_layers(stack), upstream, threads=1)


def _ddp(place: Place, stack: nn.Sequential, upstream: Tensor) -> Side:
    x = _leaf(upstream, place.rows)
    own = copy.deepcopy(stack)
    model = nn.parallel.DistributedDataParallel(own)
    given = upstream[place.rows] * place.size  # DDP averages over the ranks, the stack's gradient is a sum

    def step() -> None:
        model(x).backward(given)

    answers = dict(own.named_parameters()) if place.rank == 0 else {}
    return Side(step, [x, *own.parameters()], answers)


class _TensorSide(Side):
    def gradients(self) -> dict[str, Tensor]:
        """Collective: shards are gathered."""
        found = super().gradients()
        whole = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in found.items()}
        return whole if dist.get_rank() == 0 else {}


def _tensor(place: Place, stack: nn.Sequential, upstream: Tensor) -> Side:
    x = _leaf(upstream)
    own = copy.deepcopy(stack)
    mesh = init_device_mesh("cpu", (place.size,))
    for block in own:
        plan = {"qkv": ColwiseParallel(), "proj": RowwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(block, mesh, plan)

    def step() -> None:
        own(x).backward(upstream)

    return _TensorSide(step, [x, *own.parameters()], dict(own.named_parameters()))


def pipelining_step(
    place: Place,
    stage: nn.Module,
    schedule: str,
    micro_batches: int,
    loss: Callable,
    x: Tensor,
    target: Tensor,
    **more: Any,
) -> Callable[[], None]:
    """A step of torch.distributed.pipelining with one stage a rank."""
    wrapped = PipelineStage(stage, place.rank, place.size, torch.device("cpu"))
    runner = SCHEDULES[schedule](wrapped, micro_batches, loss_fn=loss, **more)
    inputs = (x,) if place.rank == 0 else ()
    targets = {"target": target} if place.rank == place.size - 1 else {}

    def step() -> None:
        runner.step(*inputs, return_outputs=False, **targets)

    return step


def _pipelining(place: Place, stack: nn.Sequential, upstream: Tensor, schedule: str, micro_batches: int) -> Side:
    x = _leaf(upstream)
    here = place.layers(len(stack))
    stage = stack[here.start : here.stop]

    def inner_product(y: Tensor, given: Tensor) -> Tensor:
        return (y * given).sum()  # its gradient is the one given

    step = pipelining_step(place, stage, schedule, micro_batches, inner_product, x, upstream, scale_grads=False)
    return Side(step, [x, *stage.parameters()], _of_layers(stack, here))


@dataclass
class Call:
    """A recorded layer call, as `hf_layerpar.run.program.LayerCall` asks for."""

    layer: nn.Module
    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def step(self, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        return self.layer(x, *args, **kwargs)


@dataclass
class Fixed:
    """Settings and stack flags of an engine, held still."""

    next_config: LayerParallelConfig
    needs_recompute: bool = False
    loss_scale: float = 1.0
    cached_tokens: int | None = None


def local_communicator() -> Communicator:
    return GroupCommunicator(dist.group.WORLD) if dist.is_initialized() else LocalCommunicator()  # type: ignore[arg-type]


def owner_of(config: LayerParallelConfig, num_layers: int, num_ranks: int, *, interleaved: bool) -> tuple[int, ...]:
    """As `parallelize` shares the layers."""
    boundaries = interval_points(config, num_layers, (0, 0))
    if interleaved:
        return interleaved_owner(num_layers, num_ranks, boundaries, (0, 0))
    return contiguous_owner(num_layers, num_ranks, boundaries=boundaries)


def our_calls(stack: nn.Sequential, owner: tuple[int, ...], rank: int) -> list[Call]:
    """The calls as one rank records them: layers of other ranks have no parameters here."""
    return [Call(layer if home == rank else nn.Module()) for layer, home in zip(stack, owner, strict=True)]


def our_side(
    place: Place, stack: nn.Sequential, upstream: Tensor, config: LayerParallelConfig, *, interleaved: bool
) -> Side:
    owner = owner_of(config, len(stack), place.size, interleaved=interleaved)
    flags = Fixed(config)
    engine = StackEngine(local_communicator(), owner, (0, 0), flags, flags)
    calls, x = our_calls(stack, owner, place.rank), _leaf(upstream)

    def step() -> None:
        engine(calls, x).backward(upstream)

    answers = _of_layers(stack, [n for n, home in enumerate(owner) if home == place.rank])
    return Side(step, [x, *answers.values()], answers)


def _ours_compiled(place: Place, stack: nn.Sequential, upstream: Tensor, config: LayerParallelConfig) -> Side:
    return our_side(place, with_compiled_layers(stack), upstream, config, interleaved=False)


def _of_layers(stack: nn.Sequential, layers: Iterable[int]) -> dict[str, Tensor]:
    return {f"{n}.{name}": p for n in layers for name, p in stack[n].named_parameters()}
