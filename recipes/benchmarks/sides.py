"""The sides of the speed comparison on the bare stack: serial torch, what torch itself offers for several ranks, ours.

Every side does the same work: from the stack's input and the gradient at its end, the gradients of all its parameters
and of its input.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.plan.ownership import INTERLEAVED, V, contiguous_owner, interleaved_owner, two_blocks_owner
from hf_layerpar.plan.part import RankPart
from hf_layerpar.plan.planner import Split, plan_step
from hf_layerpar.plan.simulate import simulate
from hf_layerpar.plan.step import interval_points
from hf_layerpar.run.transport import GroupTransport, LocalTransport, Transport
from recipes.benchmarks.bare import BareStack
from recipes.benchmarks.prediction import Prices, measured_prices
from recipes.benchmarks.stack import BATCH, make_stack, make_state
from recipes.benchmarks.torch_pipelines import pipelining, variants

OPERATORS = ("rediscretize", "aggregate", "identity")
MICRO_BATCHES = (1, 2, 4, 8)
COMPILED_UP_TO = 8  # compiling takes seconds a layer, on every rank


@dataclass
class Side:
    """One way to make the gradients, as one rank takes part in it.

    step: one forward and backward; collective. It leaves the gradients in `.grad`.
    trained: every tensor that gets a `.grad` on this rank.
    answers: of these, the parameters whose gradients are compared here, by name in the reference. Over all ranks each
        parameter of the model is answered for once.
    scale: factors of gradients whose parameter is a multiple of the reference's.
    predict: seconds of a step by the simulator, where it knows the side; asked when steps were made.
    """

    step: Callable[[], None]
    trained: list[Tensor]
    answers: Mapping[str, Tensor]
    threads: int = 1
    scale: Mapping[str, float] = field(default_factory=dict)
    predict: Callable[[], float] | None = None

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
class Table:
    """What stands in a table: its sides, the first one being what the others' times are divided by.

    exact: gradients by parameter name. prices: what the settings were picked by, on several ranks.
    """

    entries: list[Entry]
    exact: dict[str, Tensor]
    prices: Prices | None = None


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


@dataclass(frozen=True)
class Setting:
    """One of ours: its name in the table, and what `parallelize` takes."""

    name: str
    config: LayerParallelConfig
    split: Split | None = None

    @property
    def facts(self) -> dict[str, Any]:
        return self.config.to_dict() | {"method": "ours", "split": self.split}


def picked_settings(num_layers: int, num_ranks: int, prices: Prices) -> list[Setting]:
    """For each number of micro-batches the exact setting that the planner predicts to be fastest."""
    found = []
    for m in MICRO_BATCHES:
        choices = plan_step(
            num_layers, num_ranks, prices.blocks, accuracy="exact", micro_batches=(m,), interleaved=True
        )
        choice = choices[0]
        found.append(Setting(f"ours M={m}", choice.config, choice.split))
    return found


def placed_settings() -> list[Setting]:
    """Exact settings with one block a rank, and with two."""
    placements: tuple[tuple[str, Split | None], ...] = (("blocks", None), (INTERLEAVED, INTERLEAVED), (V, V))
    return [
        Setting(f"ours {name} M={m}", LayerParallelConfig(micro_batches=m), split)
        for name, split in placements
        for m in MICRO_BATCHES
    ]


def mgrit_settings(*, with_ends: bool = False) -> list[Setting]:
    """MGRIT's settings on several ranks."""
    found: list[Setting] = []

    def add(operator: str, forward: int, backward: int, levels: int = 2, m: int = 1, **more: Any) -> None:
        name = f"mgrit {operator} {levels} levels {forward or 'exact'}/{backward} M={m}"
        config = LayerParallelConfig(
            strategy="mgrit",
            coarsening=(4,) * (levels - 1),
            coarse_operator=operator,
            forward_iterations=forward,
            backward_iterations=backward,
            micro_batches=m,
            **more,
        )
        found.append(Setting(name + "".join(f" {value}" for value in more.values()), config))

    for operator in OPERATORS:
        for levels in (2,) if with_ends else (2, 3):
            add(operator, 1, 1, levels)
            add(operator, 2, 1, levels)
        add(operator, 0, 1)
        if operator != "aggregate":
            add(operator, 1, 1, m=4)
    if with_ends:
        add("identity", 1, 1, ends="spread")
    return found


def interleaved_setting(num_ranks: int) -> Setting:
    """The `aggregate` operator with every interval dealt out to all ranks."""
    config = LayerParallelConfig(strategy="mgrit", coarsening=num_ranks, coarse_operator="aggregate")
    return Setting(f"mgrit aggregate 2 levels 1/1 M=1 c={num_ranks} interleaved", config, INTERLEAVED)


def lone_settings() -> list[Setting]:
    """On one rank: what shows our own cost."""
    mgrit = LayerParallelConfig(strategy="mgrit", coarse_operator="rediscretize")
    return [Setting("ours M=1", LayerParallelConfig()), Setting("mgrit rediscretize 2 levels 1/1 M=1", mgrit)]


def stack_sides(num_layers: int, cost_seconds: float = 4.0) -> Table:
    """All sides on the bare stack, serial first. Collective. cost_seconds: how long to measure costs, roughly."""
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
    # ours may change how layers run, and torch's sides must not notice
    ours = partial(our_side, place, copy.deepcopy(stack), upstream)
    if place.size == 1:
        return Table([*entries, *(Entry(s.name, s.facts, partial(ours, s)) for s in lone_settings())], exact)
    entries.append(Entry("ddp", {"method": "ddp"}, partial(_ddp, place, stack, upstream)))
    entries.append(Entry("tensor parallel", {"method": "tensor"}, partial(_tensor, place, stack, upstream)))
    for schedule, m in variants(MICRO_BATCHES):
        settings = {"method": schedule, "micro_batches": m}
        make = partial(_pipelining, place, stack, upstream, schedule, m)
        entries.append(Entry(f"{schedule} M={m}", settings, make))
    prices = stack_prices(place, copy.deepcopy(stack).eval(), cost_seconds)
    settings_of_ours = [*picked_settings(num_layers, place.size, prices), *placed_settings(), *mgrit_settings()]
    settings_of_ours.append(interleaved_setting(place.size))
    entries += [Entry(s.name, s.facts, partial(ours, s, prices=prices)) for s in settings_of_ours]
    if num_layers <= COMPILED_UP_TO:
        config = LayerParallelConfig(strategy="mgrit", coarse_operator="identity")
        setting = Setting("mgrit identity 2 levels 1/1 M=1 compiled layers", config)
        make = partial(_ours_compiled, place, stack, upstream, setting)
        entries.append(Entry(setting.name, setting.facts | {"compiled": True}, make))
    return Table(entries, exact, prices)


def _leaf(upstream: Tensor, rows: slice = slice(None)) -> Tensor:
    """The stack's input, beside `upstream`. It requires grad in every side, as it does with an embedding below it."""
    return make_state(1, upstream.shape)[rows].to(upstream, copy=True).requires_grad_()


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


def _pipelining(place: Place, stack: nn.Sequential, upstream: Tensor, schedule: str, micro_batches: int) -> Side:
    x = _leaf(upstream)

    def stage(layers: range) -> nn.Module:
        return stack[layers.start : layers.stop]

    def inner_product(y: Tensor, given: Tensor) -> Tensor:
        return (y * given).sum()  # its gradient is the one given

    made = pipelining(
        schedule,
        micro_batches,
        place.rank,
        place.size,
        len(stack),
        stage,
        inner_product,
        x,
        upstream,
        scale_grads=False,
    )
    return Side(made.step, [x, *made.modules.parameters()], _of_layers(stack, made.layers))


@dataclass
class Call:
    """A recorded layer call, as `hf_layerpar.run.layers.LayerCall` asks for."""

    layer: nn.Module
    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def step(self, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        return self.layer(x, *args, **kwargs)


def local_transport() -> Transport:
    return GroupTransport(dist.group.WORLD) if dist.is_initialized() else LocalTransport()  # type: ignore[arg-type]


def owner_of(
    config: LayerParallelConfig, num_layers: int, num_ranks: int, split: Split | None = None
) -> tuple[int, ...]:
    """As `parallelize` shares the layers."""
    boundaries = interval_points(config, num_layers, (0, 0))
    if not isinstance(split, str):
        return contiguous_owner(num_layers, num_ranks, boundaries=boundaries, split=split)
    if config.strategy == "pipeline":
        return two_blocks_owner(num_layers, num_ranks, split)
    return interleaved_owner(num_layers, num_ranks, boundaries)


def our_calls(stack: nn.Sequential, owner: tuple[int, ...], rank: int) -> list[Call]:
    """The calls as one rank records them: layers of other ranks have no parameters here."""
    return [Call(layer if home == rank else nn.Module().eval()) for layer, home in zip(stack, owner, strict=True)]


def stack_prices(place: Place, stack: nn.Sequential, seconds: float) -> Prices:
    """What layers and messages take here. Collective."""
    x = make_state(seed=1)
    calls = our_calls(stack, contiguous_owner(len(stack), place.size), place.rank)
    layers, part = list(place.layers(len(stack))), (calls, x[: BATCH // 8])
    return measured_prices(calls, x, transport=local_transport(), layers=layers, part=part, seconds=seconds)


def our_side(
    place: Place, stack: nn.Sequential, upstream: Tensor, setting: Setting, *, prices: Prices | None = None
) -> Side:
    """prices: to schedule and predict by."""
    config = setting.config
    owner = owner_of(config, len(stack), place.size, setting.split)
    x = _leaf(upstream)
    bare = BareStack(our_calls(stack, owner, place.rank), x, inner_product_with(upstream))
    piece = None if prices is None else prices.of(config).cut(config.micro_batches)
    plan, transport = bare.plan(config, owner, place.size, costs=piece), local_transport()
    part = RankPart.of(plan, place.rank)

    def step() -> None:
        bare.step(plan, transport, config=config, part=part)

    answers = _of_layers(stack, [n for n, home in enumerate(owner) if home == place.rank])
    predict = None if piece is None else lambda: simulate(plan, piece).makespan
    return Side(step, [x, *answers.values()], answers, predict=predict)


def inner_product_with(upstream: Tensor) -> Callable[[Tensor, slice], Tensor]:
    """A loss whose gradient is the one given."""
    return lambda y, rows: (y * upstream[rows]).sum()


def _ours_compiled(place: Place, stack: nn.Sequential, upstream: Tensor, setting: Setting) -> Side:
    return our_side(place, with_compiled_layers(stack), upstream, setting)


def _of_layers(stack: nn.Sequential, layers: Iterable[int]) -> dict[str, Tensor]:
    return {f"{n}.{name}": p for n in layers for name, p in stack[n].named_parameters()}
