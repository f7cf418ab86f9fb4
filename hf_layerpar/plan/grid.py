"""The grids of the multigrid hierarchy: which states each level keeps."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from hf_layerpar.errors import ConfigurationError


@dataclass(frozen=True)
class Grid:
    """Points of every level, as fine-step indices in the order of the sweep.

    `levels[0]` is 0, 1, ..., N; each coarser level keeps a subset that contains 0 and N. A step of level l + 1 spans
    one interval of level l: the C-point it starts at and the F-points up to the next C-point. Interval lengths need
    not be equal, so N need not be divisible by the coarsening factors.

    exact: fine steps that are intervals of their own on every level, as coarse steps of which they serve themselves.
    """

    levels: tuple[tuple[int, ...], ...]
    exact: frozenset[int] = frozenset()

    @classmethod
    def coarsened(cls, num_steps: int, factors: Sequence[int], exact: Collection[int] = ()) -> Grid:
        """Every `factors[l]`-th point of level l becomes a point of level l + 1, counted anew behind an exact step.

        Raises ConfigurationError when a level that has nothing left to coarsen would be coarsened again.
        """
        around = {n + side for n in exact for side in (0, 1)}
        levels = [tuple(range(num_steps + 1))]
        for level, factor in enumerate(factors):
            fine = levels[-1]
            points, since = [0], 0
            for point in fine[1:]:
                since += 1
                if since == factor or point in around or point == num_steps:
                    points.append(point)
                    since = 0
            if len(points) == len(fine):
                raise ConfigurationError(
                    f"coarsening={tuple(factors)} is too deep for {num_steps} steps"
                    f"{f', {len(exact)} of them exact' if exact else ''}: level {level} has no two steps to take "
                    f"together; use {level} factors or smaller ones"
                )
            levels.append(tuple(points))
        return cls(tuple(levels), frozenset(exact))

    @property
    def coarsest(self) -> int:
        return len(self.levels) - 1

    def num_steps(self, level: int) -> int:
        return len(self.levels[level]) - 1

    def span(self, level: int, step: int) -> range:
        """The fine steps that a step of `level` stands for."""
        return range(self.levels[level][step], self.levels[level][step + 1])

    def interval(self, level: int, j: int) -> range:
        """The steps of `level` inside interval j, that is inside step j of the next coarser level."""
        points, coarse = self.levels[level], self.levels[level + 1]
        return range(bisect_left(points, coarse[j]), bisect_left(points, coarse[j + 1]))

    def is_exact(self, level: int, step: int) -> bool:
        return self.levels[level][step] in self.exact

    def reversed(self) -> Grid:
        """The same intervals met from the other end: the grid of the adjoint sweep."""
        last = self.levels[0][-1]
        levels = tuple(tuple(last - p for p in points[::-1]) for points in self.levels)
        return Grid(levels, frozenset(last - 1 - n for n in self.exact))
