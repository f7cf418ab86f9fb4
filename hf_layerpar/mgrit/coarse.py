"""Coarse operators: what stands in for a run of fine steps on a coarser level.

An operator made of the layers has the form G(x) = x + sum_i w_i (S_i(x) - x), S_i being fine step i, so it only says
which fine steps it evaluates at the frozen state x and with which weight. The adjoint sweep uses the transpose of the
same form, linearised at the fine states: G^T(lam) = lam + sum_i w_i (S_i'^T lam - lam).

A fitted operator evaluates no layer: it is a running fit of what each interval did in earlier solves
(`hf_layerpar.parallel.fits`). A coarse step over several intervals is their fits one after the other.
"""

from __future__ import annotations

from typing import Protocol

from hf_layerpar.mgrit.plan import Direction


class CoarseOperator(Protocol):
    def terms(self, span: range) -> tuple[tuple[int, float], ...]:
        """(layer, weight) pairs for the layers in `span` (ascending, whatever the direction of the sweep)."""
        ...

    def fitted(self, direction: Direction, correcting: bool) -> bool:
        """Whether coarse steps (in a correction, or in the nested start) are the intervals' fits and not the terms."""
        ...


class _OfLayers:
    def fitted(self, direction: Direction, correcting: bool) -> bool:
        return False


class Rediscretize(_OfLayers):
    """One Euler step of the interval's length with its first layer's weights: x + c h F_first(x). One evaluation.

    Source: arXiv 2601.09026 (the paper's coarse grid), after Günther et al., arXiv 1812.04352.
    """

    def terms(self, span: range) -> tuple[tuple[int, float], ...]:
        return ((span[0], float(len(span))),)


class Aggregate(_OfLayers):
    """Every layer's increment at the same frozen state: x + h sum_i F_i(x). c independent evaluations."""

    def terms(self, span: range) -> tuple[tuple[int, float], ...]:
        return tuple((layer, 1.0) for layer in span)


class Identity(_OfLayers):
    """G(x) = x: corrections become a prefix sum of increments (Picard; damped, the scan of arXiv 2501.17086). Free."""

    def terms(self, span: range) -> tuple[tuple[int, float], ...]:
        return ()


class Mean(Identity):
    """G(x) = x + m, the running mean of the interval's increment per channel. A constant cancels in corrections, and
    the adjoint has none, so it differs from the identity in the forward's nested start only. Free."""

    def fitted(self, direction: Direction, correcting: bool) -> bool:
        return direction == "forward" and not correcting


class Linear(Identity):
    """G(x) = x + W x + b, the running linear regression of the interval's increment on the state it starts from; in the
    adjoint sweep G(lam) = lam + W' lam, regressed on the adjoint's own increments. One D x D product a coarse step.

    A least-squares fit of a linear propagator to states is the dynamic mode decomposition (Schmid, J. Fluid Mech. 656
    (2010)).
    """

    def fitted(self, direction: Direction, correcting: bool) -> bool:
        return True


OPERATORS: dict[str, CoarseOperator] = {
    "rediscretize": Rediscretize(),
    "aggregate": Aggregate(),
    "identity": Identity(),
    "mean": Mean(),
    "linear": Linear(),
}

OF_LAYERS = tuple(name for name, operator in OPERATORS.items() if not operator.fitted("forward", False))
"""Those made of the layers alone: fitted ones know nothing before some training."""
