"""The affine combination of several tries at an adjoint whose residual is smallest, for each row of the batch.

Rows don't depend on each other, so each has weights of its own: the smallest residual that there is, and the same
however the batch is cut into micro-batches. (Where layers mix rows, the combination is still a valid guess.)

Shapes: B rows, T tokens, D hidden, K tries, J places (C-points); a state is `[B, T, D]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from hf_layerpar.run.increments import wide_dtype

_LEAST_SHARE = 1e-14
"""Of the largest eigenvalue of products in float64: what is smaller is rounding."""


def products(tries: Sequence[Tensor], slots: Sequence[int], shape: Sequence[int]) -> Tensor:
    """`[B, *shape]` in float64, shape being (J, 2 K - 1, 2 K - 1), with the inner products of this rank's places in
    their `slots` and zeros elsewhere: of the residuals r_1 ... r_K and of their differences r_2 - r_1, ..., which can't
    be had from the former without cancellation. Each place's are over the squared norm of its first try, so that no
    place counts for more because its adjoint is larger.

    tries: for each slot, K pairs (end of the interval before, state at the place) in turn.
    """
    found = torch.zeros(len(tries[0]), *shape, dtype=torch.float64, device=tries[0].device)
    each = shape[1] + 1  # tensors of a place
    for i, slot in enumerate(slots):
        own = [t.to(wide_dtype(t.dtype)).flatten(1) for t in tries[i * each : (i + 1) * each]]
        square = own[1].square().sum(1, dtype=torch.float64)
        scale = torch.where(square > 0, square, torch.ones_like(square)).reciprocal()
        residuals = [end - x for end, x in zip(own[::2], own[1::2], strict=True)]
        vectors = [*residuals, *(b - a for a, b in pairwise(residuals))]
        for m, a in enumerate(vectors):
            for n, b in enumerate(vectors[: m + 1]):
                found[:, slot, m, n] = found[:, slot, n, m] = (a * b).sum(1, dtype=torch.float64) * scale
    return found


def weights(gram: Tensor, dtype: torch.dtype) -> Tensor:
    """`[B, K]`, each row adding up to 1, from the `products` `[B, 2 K - 1, 2 K - 1]` summed over the places.

    Starts at the try with the smallest residual, so that none is better than the result. dtype: of the states; what
    differences have in common up to its precision isn't told apart. NaN for a row of which a try is no number.
    """
    size = gram.shape[-1]
    tries = (size + 1) // 2
    sound = gram.isfinite().all(-1).all(-1)
    gram = torch.where(sound[:, None, None], gram, torch.eye(size, dtype=gram.dtype, device=gram.device))
    best = gram.diagonal(dim1=1, dim2=2)[:, :tries].argmin(1)
    rows = torch.arange(len(gram), device=gram.device)
    steps = gram[:, tries:, tries:]
    norms = steps.diagonal(dim1=1, dim2=2).sqrt()
    norms = torch.where(norms > 0, norms, torch.ones_like(norms))
    # the smallest |r_best + sum_i y_i (r_i+1 - r_i)|, in differences of length 1
    least = max(torch.finfo(dtype).eps ** 2, _LEAST_SHARE)
    inverse = torch.linalg.pinv(steps / (norms[:, :, None] * norms[:, None, :]), rtol=least, hermitian=True)
    y = -(inverse @ (gram[rows, tries:, best] / norms)[:, :, None])[:, :, 0] / norms
    found = torch.zeros(len(gram), tries, dtype=gram.dtype, device=gram.device)
    found[rows, best] = 1.0
    found[:, 1:] += y
    found[:, :-1] -= y
    return torch.where(sound[:, None], found, torch.full_like(found, torch.nan))


def combinations(found: Tensor, states: Sequence[Tensor]) -> list[Tensor]:
    """Of each place the combination of its tries. found: `products` of all places. states: K of each place in turn."""
    tries = (found.shape[-1] + 1) // 2
    dtype = states[0].dtype
    wide = wide_dtype(dtype)
    by_row = weights(found.sum(1), dtype).to(wide)
    made = []
    for start in range(0, len(states), tries):
        of = [w.view(-1, *[1] * (states[start].ndim - 1)) for w in by_row.unbind(1)]
        total = states[start].to(wide) * of[0]
        for weight, state in zip(of[1:], states[start + 1 : start + tries], strict=True):
            total = total + state.to(wide) * weight
        made.append(total.to(dtype))
    return made
