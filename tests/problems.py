"""Layer stacks with known solutions, and the serial oracle, for tests of a step without any transformer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_layerpar.config import Buffers, LayerParallelConfig
from hf_layerpar.plan.ownership import contiguous_owner
from hf_layerpar.plan.step import Anatomy, Pass, build_step
from hf_layerpar.plan.tasks import Direction, Plan
from hf_layerpar.run.layers import Common, Layers
from hf_layerpar.run.stackable import OneDevice
from hf_layerpar.run.step import LayersOf, Outcome
from hf_layerpar.run.transport import GroupTransport, LocalTransport, Transport
from recipes.benchmarks.bare import BareStack

F64 = torch.float64

Loss = Callable[[Tensor, slice, int], Tensor]
"""Of an end state, the rows of the batch that it holds, and the number of rows of the batch. Parts add up."""

Sides = Tensor | Sequence[Tensor] | None
"""What layers are given beside the state: one for all of them, or one for each."""


class Linear(nn.Module):
    """x + h x A. For one symmetric A, N steps give x (I + h A)^N, known in closed form by the eigenvalues of A."""

    def __init__(self, matrix: Tensor, h: float) -> None:
        super().__init__()
        self.matrix, self.h = nn.Parameter(matrix.clone()), h

    def forward(self, x: Tensor) -> Tensor:
        return x + self.h * x @ self.matrix


class Block(nn.Module):
    """A nonlinear residual layer with weights of its own: x + h W2 tanh(W1 x), dropout inside, optional side input."""

    def __init__(self, dim: int, h: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.dropout, self.h = nn.Dropout(dropout), h

    def forward(self, x: Tensor, side: Tensor | None = None) -> Tensor:
        hidden = torch.tanh(self.inner(x))
        if side is not None:
            hidden = hidden * side
        return x + self.h * self.dropout(self.outer(hidden))


@dataclass
class Call:
    """A recorded layer call, as `hf_layerpar.run.layers.LayerCall` asks for."""

    layer: nn.Module
    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def step(self, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        return self.layer(x, *args, **kwargs)


def blocks(num_layers: int, dim: int = 6, h: float = 0.25, dropout: float = 0.0, seed: int = 0) -> nn.ModuleList:
    torch.manual_seed(seed)
    return nn.ModuleList(Block(dim, h, dropout) for _ in range(num_layers)).to(F64)


def state(batch: int = 3, tokens: int = 4, dim: int = 6, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, dim, dtype=F64, generator=generator).requires_grad_()


# ---- losses
def loss_of(y: Tensor, rows: slice = slice(None), batch: int | None = None) -> Tensor:
    """A loss whose gradient differs in every entry."""
    shape = (len(y) if batch is None else batch, *y.shape[1:])
    weights = torch.linspace(-1, 1, math.prod(shape), dtype=y.dtype, device=y.device).view(shape)[rows]
    return (weights * y).sum() + (y**2).sum() / math.prod(shape)


def seeded_with(lam: Tensor) -> Loss:
    """The loss whose gradient by the end state is `lam`."""
    return lambda y, rows, batch: (lam.detach()[rows] * y).sum()


# ---- the serial oracle
def serial(layers: nn.ModuleList, x: Tensor, side: Sides = None) -> Tensor:
    for layer, args in zip(layers, _arguments(side, len(layers)), strict=True):
        x = layer(x, *args)
    return x


def serial_results(layers: nn.ModuleList, x: Tensor, side: Sides = None, loss: Loss = loss_of) -> dict[str, Tensor]:
    """The end state "y" and the gradients of `leaves_of`, by plain autograd."""
    leaves = leaves_of(layers, x, side)
    y = serial(layers, x, side)
    grads = torch.autograd.grad(loss(y, slice(0, len(x)), len(x)), list(leaves.values()))
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def leaves_of(layers: nn.ModuleList, x: Tensor, side: Sides = None) -> dict[str, Tensor]:
    """The leaves that have a gradient: "x", "side" (or "side 0", ...), and parameters ("0.inner.weight")."""
    sides = {"side": side} if isinstance(side, Tensor) else {f"side {n}": t for n, t in enumerate(side or ())}
    tensors = {"x": x, **sides, **dict(layers.named_parameters())}
    return {name: t for name, t in tensors.items() if t.requires_grad and t.is_leaf}


# ---- a step
@dataclass(frozen=True)
class Solved:
    """What a step brought out on this rank.

    results: as of `serial_results`, as far as this rank has them. loss: of the micro-batches that ended here.
    """

    results: dict[str, Tensor]
    loss: float
    outcome: Outcome
    plan: Plan

    def residuals(self, direction: Direction) -> list[float]:
        """Residual norm of each iteration (of this rank's intervals)."""
        found = self.outcome.residuals.get((0, direction))
        return [] if found is None else found.sqrt().tolist()

    @property
    def stacked(self) -> list[bool]:
        """Whether layers were evaluated together, forward and backward."""
        return [any(t.wave >= 0 for t in self.plan.tasks if t.direction == d) for d in ("forward", "backward")]

    @property
    def penalty(self) -> float | None:
        """The increment penalty of this rank's layers."""
        return float(self.outcome.penalties[0]) if self.outcome.penalties else None


def gradients_of(
    config: LayerParallelConfig,
    layers: nn.ModuleList,
    x: Tensor,
    side: Sides = None,
    *,
    owner: Sequence[int] | None = None,
    split: Sequence[int] | None = None,
    buffers: Buffers = (0, 0),
    recompute: bool | Callable[[nn.Module], bool] = False,
    seed: int | None = None,
    loss: Loss = loss_of,
    added: bool = False,
    device: OneDevice | None = None,
) -> Solved:
    """One step of a bare stack on the default process group, or on this process alone.

    owner: of every layer; by default as even as it goes, or as `split` says. seed: of dropout. added: to the gradients
    that are there. device: what evaluates layers together where `config.stacked` wants it and they can be.
    """
    transport = world()
    owner = owner or contiguous_owner(len(layers), transport.size, split=split)
    leaves = leaves_of(layers, x, side)
    for leaf in () if added else leaves.values():
        leaf.grad = None
    ends: dict[int, Tensor] = {}

    def watched(y: Tensor, rows: slice) -> Tensor:
        ends[rows.start] = y.detach()
        return loss(y, rows, len(x))

    stack = BareStack(calls_of(layers, side), x, watched)
    make_layers: LayersOf = Layers
    plan = stack.plan(dataclasses.replace(config, stacked=False), owner, transport.size, buffers=buffers)
    if device is not None and config.stacked:
        run = Pass(tuple(owner), buffers, bool(stack.sides))
        anatomy = Anatomy((run,), (0, 0), ((), (0,)))
        build = partial(build_step, anatomy=anatomy, num_ranks=1, micro_batches=plan.micro_batches)
        entry = stack.enter(0, 0, [], real=False)
        found = device.plan(config, build, [Layers(entry, Common(seed, recompute), 0, 0)])
        plan, make_layers = found or (plan, make_layers)
    outcome = stack.step(
        plan, transport, config=config, buffers=buffers, seed=seed, recompute=recompute, make_layers=make_layers
    )
    grads = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    end = {"y": torch.cat([ends[start] for start in sorted(ends)])} if ends else {}
    return Solved(end | grads, float(sum(outcome.losses.values())), outcome, plan)


def world() -> Transport:
    return GroupTransport(dist.group.WORLD) if dist.is_initialized() else LocalTransport()  # type: ignore[arg-type]


def calls_of(layers: nn.ModuleList, side: Sides = None) -> list[Call]:
    return [Call(layer, args) for layer, args in zip(layers, _arguments(side, len(layers)), strict=True)]


def _arguments(side: Sides, num_layers: int) -> list[tuple]:
    if side is None:
        return [()] * num_layers
    return [(side,)] * num_layers if isinstance(side, Tensor) else [(t,) for t in side]


# ---- comparing
def relative(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm() / b.norm().clamp_min(1e-300)).detach())


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], bound: float = 0.0) -> None:
    """All of `expected` is there, up to `bound` relative; bit for bit by default."""
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        if bound:
            assert relative(found[name], tensor) < bound, name
        else:
            assert torch.equal(found[name], tensor), name
