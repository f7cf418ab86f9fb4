"""Running fits of what an interval does, for the coarse operators `mean` and `linear`.

Every training solve shows, for each interval, the states at both of its ends after the last relaxation. From these a
fit learns the interval's increment, by least squares over tokens and over the solves of the recent past:

    mean      x + m            the mean increment of every channel
    linear    x + W x + b      a matrix; in the adjoint sweep lam + W' lam, fitted to the adjoint's own increments

A fit is kept as the two moments of its normal equations, decayed exponentially. It lives on the rank that makes the
interval's end, and no other rank needs it. Until it has seen its interval, it is the identity.

Shapes: a state is `[B, T, D]` (any dimensions but the last count as tokens), W is `[D, D]`, m and b are `[D]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hf_layerpar.mgrit.plan import Direction
from hf_layerpar.parallel.executor import wide_dtype

Key = tuple[str, Direction, int, int]
"""(coarse operator, direction of the sweep, first layer of the interval, last layer + 1)."""

_DECAY = 0.9  # of the moments from one training solve to the next
_RIDGE = 1e-3  # relative to each regressor's own second moment
_TOKENS = 4  # observed per channel, of every micro-batch: more change a fit over several solves little, and cost


class RunningFits:
    """The fits of the intervals whose ends this rank makes.

    What a solve observes is used from the next training solve on (`commit`), so the forward and the adjoint of one
    solve run with the same fits, however often the backward is run.
    """

    def __init__(self) -> None:
        self._moments: dict[Key, tuple[Tensor, Tensor]] = {}  # sums of r r^T `[R, R]` and r d^T `[R, D]`
        self._observed: dict[Key, dict[int, tuple[Tensor, Tensor]]] = {}  # by micro-batch
        self._solutions: dict[Key, Tensor] = {}

    def apply(self, key: Key, x: Tensor) -> Tensor:
        """The fitted coarse step from x."""
        if key not in self._moments:
            return x
        if key not in self._solutions:
            self._solutions[key] = _solve(*(moment.to(x.device) for moment in self._moments[key]))
        solution = self._solutions[key]
        regressors = _regressors(key, x.to(solution.dtype))
        with torch.autocast(x.device.type, enabled=False):
            increment = solution[0] if regressors is None else regressors @ solution
        return (x + increment).to(x.dtype)

    def observe(self, key: Key, micro_batch: int, start: Tensor, end: Tensor) -> None:
        """The interval maps `start` to `end`."""
        chosen = _sample(start[..., 0].numel(), _TOKENS * start.shape[-1], start.device)
        wide = wide_dtype(start.dtype)
        x, y = (state.flatten(0, -2)[chosen].to(wide) for state in (start, end))
        regressors = _regressors(key, x)
        if regressors is None:
            regressors = torch.ones_like(x[:, :1])
        with torch.autocast(x.device.type, enabled=False):  # sums over many tokens
            moments = (regressors.T @ regressors, regressors.T @ (y - x))
        self._observed.setdefault(key, {})[micro_batch] = moments

    def commit(self) -> None:
        """What has been observed since the last call enters the fits."""
        for key, pieces in self._observed.items():
            # in the order of the micro-batches, as ranks may have observed them in any
            seconds, mixed = zip(*(pieces[m] for m in sorted(pieces)), strict=True)
            news = [torch.stack(moments).sum(0) for moments in (seconds, mixed)]
            # one solve that overflowed must not spoil the fit for good
            sound = torch.stack([new.isfinite().all() for new in news]).all()
            news = [torch.where(sound, new, torch.zeros_like(new)) for new in news]
            if key in self._moments:
                news = [_DECAY * old.to(new) + new for old, new in zip(self._moments[key], news, strict=True)]
            self._moments[key] = (news[0], news[1])
            self._solutions.pop(key, None)
        self._observed = {}

    def state_dict(self) -> dict[Key, tuple[Tensor, Tensor]]:
        """The moments on the CPU."""
        self.commit()
        return {key: (a.cpu(), b.cpu()) for key, (a, b) in self._moments.items()}

    def load_state_dict(self, state: Mapping[Any, tuple[Tensor, Tensor]]) -> None:
        self._moments = {key: (a.clone(), b.clone()) for key, (a, b) in state.items()}
        self._observed, self._solutions = {}, {}


@lru_cache(maxsize=16)
def _sample(tokens: int, most: int, device: torch.device) -> Tensor:
    """Indices of the tokens to observe: at random, as a regular choice could miss positions; always the same ones."""
    if tokens <= most:
        return torch.arange(tokens, device=device)
    return torch.randperm(tokens, generator=torch.Generator().manual_seed(0))[:most].sort().values.to(device)


def _regressors(key: Key, x: Tensor) -> Tensor | None:
    """What the increment is fitted to: the state and a constant, or (None) the constant alone. Adjoints are linear."""
    operator, direction, _, _ = key
    if operator == "mean":
        return None
    return x if direction == "backward" else torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)


def _solve(second: Tensor, mixed: Tensor) -> Tensor:
    """Ridge regression in units of each regressor, so that channels of any size count alike."""
    if second.shape[0] == 1:
        return mixed / second.clamp_min(torch.finfo(second.dtype).tiny)
    scale = second.diagonal().sqrt()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    normed = second / scale / scale[:, None]
    normed.diagonal().add_(_RIDGE)
    factor, _ = torch.linalg.cholesky_ex(normed)
    return torch.cholesky_solve(mixed / scale[:, None], factor) / scale[:, None]
