"""Layer stacks with known solutions, and the serial oracle, for tests of the solver without any transformer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.plan.ownership import contiguous_owner
from hf_layerpar.run.communicator import GroupCommunicator, LocalCommunicator
from hf_layerpar.run.engine import StackEngine

F64 = torch.float64


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
    cached_tokens: int | None = None
    loss_scale: float = 1.0


def blocks(num_layers: int, dim: int = 6, h: float = 0.25, dropout: float = 0.0, seed: int = 0) -> nn.ModuleList:
    torch.manual_seed(seed)
    return nn.ModuleList(Block(dim, h, dropout) for _ in range(num_layers)).to(F64)


def state(batch: int = 3, tokens: int = 4, dim: int = 6, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, dim, dtype=F64, generator=generator).requires_grad_()


def engine(
    config: LayerParallelConfig,
    num_layers: int,
    *,
    buffers: tuple[int, int] = (0, 0),
    recompute: bool = False,
    split: tuple[int, ...] | None = None,
    owner: tuple[int, ...] | None = None,
) -> StackEngine:
    """An engine on the default process group, or on this process alone."""
    ranked = torch.distributed.is_initialized()
    communicator = GroupCommunicator(torch.distributed.group.WORLD) if ranked else LocalCommunicator()
    owner = owner or contiguous_owner(num_layers, communicator.size, split=split)
    flags = Fixed(config, recompute)
    return StackEngine(communicator, owner, buffers, flags, flags)


def solve(layers: nn.ModuleList, x: Tensor, solver: StackEngine, side: Tensor | None = None) -> Tensor:
    args = () if side is None else (side,)
    return solver([Call(layer, args) for layer in layers], x)


def serial(layers: nn.ModuleList, x: Tensor, side: Tensor | None = None) -> Tensor:
    for layer in layers:
        x = layer(x, *(() if side is None else (side,)))
    return x


def loss_of(y: Tensor) -> Tensor:
    """A loss whose gradient differs in every entry."""
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
    return (weights * y).sum() + (y**2).mean()


def gradients(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss_of(y), inputs))


def relative(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm() / b.norm().clamp_min(1e-300)).detach())
