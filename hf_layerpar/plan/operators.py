"""Coarse operators: what stands in for a run of fine steps on a coarser level.

An operator has the form G(x) = x + sum_i w_i (S_i(x) - x), S_i being fine step i: it says which fine steps it evaluates
at the frozen state x and with which weight (`terms`). The adjoint sweep uses the transpose of the same form, linearised
at the fine states: G^T(lam) = lam + sum_i w_i (S_i'^T lam - lam). An operator of another form writes its own tasks
(`emit`). What it costs follows from the tasks.

A new operator is one object: `OPERATORS["halves"] = Halves()`, and `coarse_operator="halves"` finds it.
"""

from __future__ import annotations

from collections.abc import Sequence

from hf_layerpar.plan.builder import PlanBuilder


class CoarseOperator:
    """One coarse step over the layers of an interval (or of several)."""

    def terms(self, span: range) -> tuple[tuple[int, float], ...]:
        """(layer, weight) pairs for the layers in `span` (ascending, whatever the direction of the sweep)."""
        raise NotImplementedError(f"{type(self).__name__} needs `terms`, or tasks of its own by `emit`")

    def emit(
        self,
        build: PlanBuilder,
        layers: Sequence[int],
        x: int,
        *,
        interleaved: bool,
        plus: Sequence[tuple[float, int]] = (),
    ) -> int:
        """The tasks of G(x) over `layers` (in the order of the sweep), and of terms to add to it; partial sums are
        formed where the layers live.

        interleaved: the ranks that hold these layers all need the result. It takes one all-reduce.
        """
        parts: dict[int, list[tuple[float, int]]] = {}
        for layer, weight in self.terms(range(min(layers), max(layers) + 1)):
            parts.setdefault(build.owner[layer], []).extend([(weight, build.step(layer, x)), (-weight, x)])
        if len(parts) > 1 and interleaved:
            if plus:
                parts.setdefault(build.home(plus[0][1]), []).extend(plus)
            return build.combine([(1.0, x), (1.0, build.all_reduce(parts))], *sorted(parts))
        rank = build.owner[layers[-1]]
        rank = rank if rank in parts else next(iter(parts), rank)
        terms = [(1.0, x), *parts.pop(rank, [])]
        terms += [(1.0, build.combine(part, other)) for other, part in parts.items()]
        y = build.combine(terms, rank)
        return build.combine([(1.0, y), *plus], build.home(plus[0][1])) if plus else y


class Rediscretize(CoarseOperator):
    """One Euler step of the interval's length with its first layer's weights: x + c h F_first(x). One evaluation.

    Source: arXiv 2601.09026 (the paper's coarse grid), after Günther et al., arXiv 1812.04352.
    """

    def terms(self, span: range) -> tuple[tuple[int, float], ...]:
        return ((span[0], float(len(span))),)


class Aggregate(CoarseOperator):
    """Every layer's increment at the same frozen state: x + h sum_i F_i(x). c independent evaluations."""

    def terms(self, span: range) -> tuple[tuple[int, float], ...]:
        return tuple((layer, 1.0) for layer in span)


class Identity(CoarseOperator):
    """G(x) = x: corrections become a prefix sum of increments (Picard; damped, the scan of arXiv 2501.17086). Free."""

    def terms(self, span: range) -> tuple[tuple[int, float], ...]:
        return ()


OPERATORS: dict[str, CoarseOperator] = {
    "rediscretize": Rediscretize(),
    "aggregate": Aggregate(),
    "identity": Identity(),
}
"""By the name that `coarse_operator` takes. Add yours here."""
