"""Coarse operators: what stands in for a run of fine steps on a coarser level.

Every operator has the form G(x) = x + sum_i w_i (S_i(x) - x), S_i being fine step i, so an operator only says which
fine steps it evaluates at the frozen state x and with which weight. The adjoint sweep uses the transpose of the same
form, linearised at the fine states: G^T(lam) = lam + sum_i w_i (S_i'^T lam - lam).
"""

from __future__ import annotations

from typing import Protocol


class CoarseOperator(Protocol):
    def terms(self, span: range) -> tuple[tuple[int, float], ...]:
        """(layer, weight) pairs for the layers in `span` (ascending, whatever the direction of the sweep)."""
        ...


class Rediscretize:
    """One Euler step of the interval's length with its first layer's weights: x + c h F_first(x). One evaluation.

    Source: arXiv 2601.09026 (the paper's coarse grid), after Günther et al., arXiv 1812.04352.
    """

    def terms(self, span: range) -> tuple[tuple[int, float], ...]:
        return ((span[0], float(len(span))),)


class Aggregate:
    """Every layer's increment at the same frozen state: x + h sum_i F_i(x). c independent evaluations."""

    def terms(self, span: range) -> tuple[tuple[int, float], ...]:
        return tuple((layer, 1.0) for layer in span)


class Identity:
    """G(x) = x: corrections become a prefix sum of increments (Picard; damped, the scan of arXiv 2501.17086). Free."""

    def terms(self, span: range) -> tuple[tuple[int, float], ...]:
        return ()


OPERATORS: dict[str, CoarseOperator] = {
    "rediscretize": Rediscretize(),
    "aggregate": Aggregate(),
    "identity": Identity(),
}
