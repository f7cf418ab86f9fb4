"""The increments d_n = S_n(x_n) - x_n of a forward's final steps, and a penalty on them.

The penalty adds to the loss

    R = alpha/2 sum_n mean_t |d_n,t|^2 / |x_n,t|^2,

the sum over the steps between the buffers, the mean over all tokens t, and |x_n,t|^2 held fixed in its gradient (or the
state could grow instead of the increments shrinking). It is the kinetic energy of the trajectory (Finlay et al.,
arXiv 2002.02798) relative to the state, because layers that normalise their input don't notice its scale. It keeps a
network within reach of every coarse operator: identity is off by an interval's increments, the others by how much a
layer's increment changes along them.

With s_n = alpha d_n / (|x_n,t|^2 tokens) its exact gradient makes each adjoint step affine,
lam_n = J_n^T (lam_{n+1} + s_n) - s_n. So the penalty is part of the steps themselves, for every strategy, coarse
operator and number of ranks.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to sum in: float32 for 16-bit states, whose differences are small, else the state's own."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


class Increments:
    """The penalty of one forward.

    inner: the layers between the buffers. rows: of every micro-batch; the mean is over the tokens of all. alpha: the
    penalty's weight.
    loss_scale: what the loss is multiplied by before its backward; the penalty's gradient is scaled alike.
    """

    def __init__(self, inner: Collection[int], rows: Sequence[int], alpha: float, loss_scale: float) -> None:
        self.inner, self.rows, self.alpha, self.loss_scale = inner, sum(rows), alpha, loss_scale
        self._sums: dict[tuple[int, int], Tensor] = {}

    def note(self, layer: int, micro_batch: int, x: Tensor, y: Tensor) -> None:
        """The final step of `layer` went from x to y, both `[B, T, D]`."""
        if layer in self.inner:
            d, weights = _relative(x, y)
            # T is the same for all micro-batches: what is longer is padded
            self._sums[layer, micro_batch] = (d.square() * weights).sum() / (self.rows * x[0, ..., 0].numel())

    def source(self, layer: int, x: Tensor, y: Tensor) -> Tensor | None:
        """s_n of the step from x to y; None where nothing is penalised."""
        if layer not in self.inner:
            return None
        d, weights = _relative(x, y)
        tokens = self.rows * x[0, ..., 0].numel()
        return (d * (weights * (self.alpha * self.loss_scale / tokens))).to(x.dtype)

    def penalty(self, device: torch.device) -> Tensor:
        """R of the layers that this rank holds, a scalar."""
        total = torch.zeros((), dtype=torch.float64, device=device)
        for key in sorted(self._sums):
            total += self._sums[key].double()
        return total * (0.5 * self.alpha)


def _relative(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The increment, and 1 / |x_t|^2 for every token (0 where the state is 0), `[B, T, 1]`."""
    wide = wide_dtype(x.dtype)
    x, y = x.detach().to(wide), y.detach().to(wide)
    squares = x.square().sum(-1, keepdim=True)
    return y - x, torch.where(squares > 0, squares.reciprocal(), torch.zeros_like(squares))
