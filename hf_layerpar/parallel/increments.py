"""The increments S_n(x_n) - x_n of a forward's final steps, and a penalty on them.

The penalty adds to the loss

    R = alpha/2 sum_n mean |d_n|^2,    d_n = S_n(x_n) - x_n,

the sum over the steps between the buffers and the mean over all entries of a state. It is the kinetic energy of the
trajectory (Finlay et al., arXiv 2002.02798) and keeps a network within reach of every coarse operator: identity is off
by an interval's increments, the others by how much a layer's increment changes along them. With s_n = dR/dd_n its
exact gradient makes each adjoint step affine: lam_n = J_n^T (lam_{n+1} + s_n) - s_n. So the penalty is part of the
steps themselves, for every strategy, coarse operator and number of ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_layerpar.parallel.executor import wide_dtype


class Increments:
    """The penalty of one forward.

    inner: the layers between the buffers. count: entries of the whole batch's state. alpha: the penalty's weight.
    loss_scale: what the loss is multiplied by before its backward; the penalty's gradient is scaled alike.
    """

    def __init__(self, inner: range, count: int, alpha: float, loss_scale: float) -> None:
        self.inner, self.count, self.alpha, self.loss_scale = inner, count, alpha, loss_scale
        self._squares: dict[tuple[int, int], Tensor] = {}

    def note(self, layer: int, micro_batch: int, x: Tensor, y: Tensor) -> None:
        """The final step of `layer` went from x to y."""
        if layer in self.inner:
            wide = wide_dtype(x.dtype)
            self._squares[layer, micro_batch] = torch.linalg.vector_norm(y.detach() - x.detach(), dtype=wide).square()

    def source(self, layer: int, x: Tensor, y: Tensor) -> Tensor | None:
        """s_n of the step from x to y; None where nothing is penalised."""
        if layer not in self.inner:
            return None
        return (y.detach() - x.detach()) * (self.alpha * self.loss_scale / self.count)

    def penalty(self, like: Tensor) -> Tensor:
        """R of the layers that this rank holds, a scalar."""
        total = like.new_zeros((), dtype=wide_dtype(like.dtype))
        for key in sorted(self._squares):
            total += self._squares[key]
        return total * (0.5 * self.alpha / self.count)
