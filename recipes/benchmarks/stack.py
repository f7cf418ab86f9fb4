"""The stack that speed is measured on: N pre-LN transformer layers of plain torch, each one Euler step of h = 1/N.

Sizes are those TorchBraid was measured with: D = 128, 4 heads, feed-forward 512, T = 64 tokens, B = 8, no dropout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

DIM, HEADS, FEED_FORWARD = 128, 4, 512
BATCH, TOKENS = 8, 64


@dataclass(frozen=True)
class Shape:
    """Sizes of a stack: D, heads, feed-forward, B and T."""

    dim: int = DIM
    heads: int = HEADS
    feed_forward: int = FEED_FORWARD
    batch: int = BATCH
    tokens: int = TOKENS

    @property
    def state(self) -> tuple[int, int, int]:
        return self.batch, self.tokens, self.dim


SHAPE = Shape()
SIZES = dataclasses.asdict(SHAPE) | {"h": "1/layers"}


class Block(nn.Module):
    """x `[B, T, D]` -> x + h attention(norm(x)), then x + h mlp(norm(x)). Causal."""

    def __init__(self, h: float, shape: Shape) -> None:
        super().__init__()
        dim = shape.dim
        self.h, self.head = h, dim // shape.heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, shape.feed_forward), nn.Linear(shape.feed_forward, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        # q, k and v of a head lie together, so that half the columns of `qkv` are half the heads (tensor parallel)
        heads = self.qkv(self.norm1(x)).view(batch, tokens, -1, 3, self.head)
        q, k, v = heads.permute(3, 0, 2, 1, 4).unbind(0)
        attended = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, tokens, -1)
        x = x + self.h * self.proj(attended)
        return x + self.h * self.down(gelu(self.up(self.norm2(x))))


def make_stack(num_layers: int, shape: Shape = SHAPE) -> nn.Sequential:
    """The same weights on every rank."""
    torch.manual_seed(0)
    return nn.Sequential(*(Block(1 / num_layers, shape) for _ in range(num_layers)))


def make_state(seed: int, shape: Sequence[int] = SHAPE.state) -> Tensor:
    """A state `[B, T, D]`: the stack's input, or the gradient given at its end."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
