"""The grids of the multigrid hierarchy: which states each level keeps."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from hf_layerpar.errors import ConfigurationError


@dataclass(frozen=True)
class Grid:
    """Points of every level, as fine-step indices in the order of the sweep.

    `levels[0]` is 0, 1, ..., N; each coarser level keeps a subset that contains 0 and N. A step of level l + 1 spans
    one interval of level l: the C-point it starts at and the F-points up to the next C-point. Interval lengths need
    not be equal, so N need not be divisible by the coarsening factors.
    """

    levels: tuple[tuple[int, ...], ...]

    @classmethod
    def coarsened(cls, num_steps: int, factors: Sequence[int]) -> Grid:
        """Every `factors[l]`-th point of level l becomes a point of level l + 1.

        Raises ConfigurationError when a level that already has a single step would be coarsened again.
        """
        levels = [tuple(range(num_steps + 1))]
        for level, factor in enumerate(factors):
            fine = levels[-1]
            if len(fine) <= 2:
                raise ConfigurationError(
                    f"coarsening={tuple(factors)} is too deep for {num_steps} steps: level {level} has a single step "
                    f"left; use {level} factors or smaller ones"
                )
            points = fine[::factor]
            levels.append(points if points[-1] == num_steps else (*points, num_steps))
        return cls(tuple(levels))

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

    def reversed(self) -> Grid:
        """The same intervals met from the other end: the grid of the adjoint sweep."""
        last = self.levels[0][-1]
        return Grid(tuple(tuple(last - p for p in points[::-1]) for points in self.levels))
