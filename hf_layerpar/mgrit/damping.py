"""Damping chosen by the residuals that a sweep reports.

Take one mode of a linear problem on which an interval acts as phi and the coarse operator as g. With omega = 1 - gamma
a correction is v_{j+1} = E_j + omega g (v_j - C_j), so a residual r that is the same at every C-point (as after the
nested start) gives v_j - C_j = s_j r with s_0 = 0, s_{j+1} = 1 + omega g s_j, and leaves the residual

    r'_{j+1} = (phi - omega g) s_j r        for j = 0 ... n - 2 on n intervals.

Assumptions: coarse steps neither damp nor amplify (g = 1: near the identity, as those of residual networks are), and
they overshoot: phi = 1 - kappa with kappa in [0, K]. Then phi - omega = gamma - kappa, and with the gain
S(gamma) = rms_j s_j = rms_j (1 - omega^j) / gamma the first convergence factor is at most

    rho(gamma) = max(K - gamma, gamma) S(gamma).

Its two branches meet at its minimum gamma = K / 2, where rho = rms_j (1 - omega^j) < 1: the residual shrinks, however
large the undamped factor K S(0) is. A measured factor rho at damping gamma_0 gives K = gamma_0 + rho / S(gamma_0).
Where coarse steps undershoot instead, damping makes a correction worse, so a sweep that would converge undamped is left
alone; and where they amplify, K comes out larger.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from hf_layerpar.errors import ConfigurationError

LARGEST = 0.95
"""The largest suggestion; what needs more is a sweep whose corrections are worth nothing (use another operator)."""


def suggest_damping(residuals: Sequence[float], intervals: int, damping: float = 0.0) -> float:
    """The damping gamma for the next solves, in [0, LARGEST]; 0 where an undamped sweep is expected to converge.

    residuals: of one sweep with F-relaxation from its nested start (`SweepReport.residuals`), after at least two
        iterations; only the first two count, as later ones are shaped by the corrections before them.
    intervals: of the fine level. damping: what the sweep ran with.
    Raises ConfigurationError for fewer than two residuals or no interval.
    """
    if len(residuals) < 2 or intervals < 1:
        raise ConfigurationError(
            f"damping can't be chosen from {len(residuals)} residuals on {intervals} intervals; it takes those of two "
            "iterations on at least one interval (set iterations to 2 or more on the steps that measure)"
        )
    before, after = residuals[:2]
    if not (math.isfinite(before) and math.isfinite(after)):
        return LARGEST
    if intervals < 3 or before == 0:  # two intervals are solved exactly by one correction
        return 0.0
    overshoot = damping + after / before / _gain(damping, intervals)
    return 0.0 if overshoot * _gain(0.0, intervals) <= 1 else min(overshoot / 2, LARGEST)


def _gain(damping: float, intervals: int) -> float:
    """S(gamma)."""
    s, squares = 0.0, 0.0
    for _ in range(intervals - 1):
        squares += s * s
        s = 1.0 + (1.0 - damping) * s
    return math.sqrt(squares / (intervals - 1))
