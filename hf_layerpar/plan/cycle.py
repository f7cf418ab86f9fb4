"""The MGRIT cycle, written once for both directions on the symbolic values of a `PlanBuilder`.

Level l has unknowns u_0 ... u_N and equations u_{s+1} = step_s(u_s) + tau_s. Full approximation scheme (FAS): with the
C-points C_j of a level and the ends E_j of its relaxed intervals, the next coarser level solves

    v_{j+1} = E_j + G_j(v_j) - G_j(C_j),    v_0 = C_0,

which is kept in this form, rather than with a right-hand side tau_j = E_j - G_j(C_j), because then v_j = C_j gives
v_{j+1} = E_j without rounding. Source: Falgout et al., SIAM J. Sci. Comput. 36 (2014); arXiv 2601.09026, section 3.

An adjoint sweep is affine in its unknowns, so weights that add up to 1 and combine the C-points of several iterations
combine their residuals E_j - C_{j+1} too. Krylov acceleration takes the weights of the smallest residual. MGRIT being a
preconditioned Richardson iteration, that is what GMRES finds with it as preconditioner (reduced rank extrapolation:
Sidi, J. Comput. Appl. Math. 22 (1988)), and the sweeps stay what they are.
"""

from __future__ import annotations

from collections.abc import Sequence

from hf_layerpar.plan.builder import PlanBuilder
from hf_layerpar.plan.grid import Grid
from hf_layerpar.plan.operators import CoarseOperator

Correction = tuple[int, int, int]
"""(C_j, E_j, G_j(C_j)): what a coarse step needs besides its own G_j(v_j)."""


class Cycle:
    """MGRIT over `layers` (in the order of the sweep) from the value `start`."""

    def __init__(
        self,
        builder: PlanBuilder,
        layers: Sequence[int],
        grid: Grid,
        operator: CoarseOperator,
        relaxation: str,
        start: int,
        *,
        krylov: bool = False,
    ) -> None:
        self.builder, self.layers, self.grid = builder, layers, grid
        self.operator, self.relaxation, self.start, self.krylov = operator, relaxation, start, krylov
        owners = [builder.owner[layer] for layer in layers]
        self.interleaved = owners not in (sorted(owners), sorted(owners, reverse=True))

    def solve(self, iterations: int) -> int:
        """The end value after `iterations`: the nested start and one F-relaxation, then a correction each."""
        c_points = self._nested(1)
        tried: list[tuple[list[int], list[int]]] = []
        for iteration in range(1, iterations):
            _, ends = self._relax(0, c_points, None)
            self._residuals(c_points, ends, iteration)
            tried.append((c_points, ends))
            c_points, ends = self._c_relax(0, c_points, ends, None)
            c_points = self._correct(0, c_points, ends)
        if self.krylov and tried:
            tried.append((c_points, self._relax(0, c_points, None)[1]))
            c_points = self._combined(tried)
        _, ends = self._relax(0, c_points, None, final=True)
        self._residuals(c_points, ends, iterations)
        return ends[-1]

    def _nested(self, level: int) -> list[int]:
        """First guess at the points of `level`: the coarsest level solved serially, each finer one relaxed once."""
        if level == self.grid.coarsest:
            return self._serial(level, self.start, None)
        return self._relax(level, self._nested(level + 1), None)[0]

    def _coarse_solve(self, level: int, guess: list[int], corrections: list[Correction]) -> list[int]:
        """The points of a coarse level: serial if it is the coarsest, else one V-cycle from `guess`."""
        if level == self.grid.coarsest:
            return self._serial(level, guess[0], corrections)
        c_points = [guess[self.grid.interval(level, j)[0]] for j in range(self.grid.num_steps(level + 1))]
        _, ends = self._relax(level, c_points, corrections)
        c_points, ends = self._c_relax(level, c_points, ends, corrections)
        return self._relax(level, self._correct(level, c_points, ends), corrections)[0]

    def _correct(self, level: int, c_points: list[int], ends: list[int]) -> list[int]:
        self.builder.wave = self.builder.open_waves()
        befores = [self._coarse_step(level + 1, j, x) for j, x in enumerate(c_points)]
        corrections = list(zip(c_points, ends, befores, strict=True))
        return self._coarse_solve(level + 1, c_points, corrections)

    def _serial(self, level: int, x: int, corrections: list[Correction] | None) -> list[int]:
        points = [x]
        for s in range(self.grid.num_steps(level) - 1):  # the last point is the end: only the fine level needs it
            self.builder.wave = self.builder.open_waves()
            points.append(self._advance(level, s, points[-1], corrections))
        return points

    def _relax(
        self, level: int, c_points: list[int], corrections: list[Correction] | None, *, final: bool = False
    ) -> tuple[list[int], list[int]]:
        """F-relaxation: every interval propagated from its C-point. Returns all points and the interval ends.

        Layers at the same place of their intervals make a wave, counted from the first layer in both directions: so a
        short interval changes nothing in which layers the final waves of the two sweeps hold.
        """
        intervals = [self.grid.interval(level, j) for j in range(len(c_points))]
        longest = max(map(len, intervals))
        wave = self.builder.open_waves(longest)
        points, ends = [], []
        for x, interval in zip(c_points, intervals, strict=True):
            late = 0 if self.builder.direction == "forward" else longest - len(interval)
            for place, s in enumerate(interval, late):
                self.builder.wave = wave + place
                points.append(x)
                x = self._advance(level, s, x, corrections, final=final)
            ends.append(x)
        return points, ends

    def _c_relax(
        self, level: int, c_points: list[int], ends: list[int], corrections: list[Correction] | None
    ) -> tuple[list[int], list[int]]:
        """The C and second F of FCF-relaxation (nothing for F-relaxation)."""
        if self.relaxation == "F":
            return c_points, ends
        c_points = [c_points[0], *ends[:-1]]
        return c_points, self._relax(level, c_points, corrections)[1]

    def _advance(self, level: int, s: int, x: int, corrections: list[Correction] | None, *, final: bool = False) -> int:
        if level == 0:
            return self.builder.step(self.layers[s], x, final=final)
        if corrections is None:
            return self._coarse_step(level, s, x)
        point, end, before = corrections[s]
        return end if x == point else self._coarse_step(level, s, x, [(1.0, end), (-1.0, before)])

    def _coarse_step(self, level: int, s: int, x: int, plus: Sequence[tuple[float, int]] = ()) -> int:
        layers = [self.layers[i] for i in self.grid.span(level, s)]
        if self.grid.is_exact(level, s):  # E_j and G_j(C_j) are one value then, and cancel
            y = self.builder.step(layers[0], x)
            return self.builder.combine([(1.0, y), *plus], self.builder.home(y))
        return self.operator.emit(self.builder, layers, x, interleaved=self.interleaved, plus=plus)

    def _combined(self, tried: list[tuple[list[int], list[int]]]) -> list[int]:
        """The C-points with the smallest residual among the affine combinations of (C-points, ends) of iterations."""
        points, ends = zip(*tried, strict=True)
        if all(end == x for end, x in zip(ends[-1], points[-1][1:], strict=False)):
            return points[-1]  # exact
        # the rank that each is needed on: that of the first layer behind it
        places = [self.grid.interval(0, j)[0] for j in range(len(points[0]))]
        ranks = [self.builder.owner[self.layers[s]] for s in places]
        residuals = [[(end[j], x[j + 1]) for x, end in tried] for j in range(len(places) - 1)]
        made = self.builder.least([list(of) for of in zip(*points, strict=True)][1:], residuals, ranks[1:])
        return [self.start, *made]

    def _residuals(self, c_points: list[int], ends: list[int], iteration: int) -> None:
        """C-point residuals of the fine level; at F-points a relaxed state has none."""
        for end, x in zip(ends, c_points[1:], strict=False):
            self.builder.residual(end, x, iteration)
