"""How far a gradient is from the exact one, and how far the exact ones of other batches would be."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def gradients_aside(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """They have no gradients at first, and afterwards those that they had."""
    before = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in zip(parameters, before, strict=True):
            p.grad = grad


def products(gradient: Tensor, exact: Tensor) -> Tensor:
    """`[4]` in float64: <g, e>, <g, g>, <e, e> and <g - e, g - e>, to be added up over parameters and ranks."""
    g, e = gradient.double().flatten(), exact.double().flatten()
    return torch.stack([g @ e, g @ g, e @ e, (g - e) @ (g - e)])


@dataclass(frozen=True)
class Agreement:
    """A gradient against the exact one, from the sums of `products`."""

    dot: float
    square: float
    exact_square: float
    difference: float

    @property
    def cosine(self) -> float:
        """0 where one of them is nothing, nan where one is not finite."""
        product = (self.square * self.exact_square) ** 0.5
        if not (math.isfinite(product) and math.isfinite(self.dot)):
            return math.nan
        return max(-1.0, min(1.0, self.dot / product)) if product else 0.0

    @property
    def norm_ratio(self) -> float:
        """Of the gradient over the exact one."""
        return (self.square / self.exact_square) ** 0.5 if self.exact_square else math.inf

    @property
    def bias(self) -> float:
        return self.difference**0.5

    @property
    def exact_norm(self) -> float:
        return self.exact_square**0.5


def first_half(inputs: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The first `rows // 2` of a batch of `rows`; what has no row for each is left as it is."""
    return {
        name: value[: rows // 2] if isinstance(value, Tensor) and value.ndim and len(value) == rows else value
        for name, value in inputs.items()
    }


def batch_noise(of_half: Agreement, rows: int) -> float:
    """Standard deviation of the gradient g of a batch that comes from the choice of its rows, as a norm.

    With g_a and g_b of the batch's halves, ||g_a - g_b|| / 2 estimates it. of_half: g_a against g, as g_a - g is
    (1 - share) (g_a - g_b) with the share of the rows that the first half has (where a loss is a mean over tokens, of
    which the halves have about as many).
    """
    return of_half.bias / (2 * (1 - rows // 2 / rows))
