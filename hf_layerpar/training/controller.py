"""The controller: which settings train, decided from what checks measured. No model, no processes: only records.

The gradient of few MGRIT iterations is biased, and the bias grows as training goes on (arXiv 2601.09026, section 4). A
check looks at the settings in force on the batch of the moment; the policy says what follows. "Exact" always means the
pipeline, in which every rank works.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from hf_layerpar.config import LayerParallelConfig, describe

Policy = Literal["off", "paper", "raise", "adaptive"]
"""off: nothing is checked. paper: exact for good once a convergence factor passes 1. raise: then one step up from the
given settings (exact forward, more iterations, Krylov acceleration, fewer levels, smaller intervals, richer operator,
exact). adaptive: the cheapest settings whose bias stays under a bound, moving both ways."""

RETURN = 0.5
"""`adaptive` goes down to cheaper settings at this share of the bound, so that it doesn't swing."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a check measured of one setting on one batch; None: not measured, or there is nothing to measure.

    rho_forward, rho_backward: the last convergence factor ||r^(k+1)|| / ||r^(k)|| with twice the iterations, of those
        before the solve is exact (on few intervals none is).
    cosine, norm_ratio: of the setting's gradient with the exact one.
    bias_to_noise: ||setting's gradient - exact|| over the standard deviation that the step's exact gradient has from
        the choice of its batch.
    bias: the same over the root mean square of the step's exact gradient, signal and noise. When noise is most of a
        gradient, as later in training, both are alike; where it is not (a new network), this one asks for a direction
        that is right and not for less error than there is noise.
    """

    rho_forward: float | None = None
    rho_backward: float | None = None
    cosine: float | None = None
    norm_ratio: float | None = None
    bias_to_noise: float | None = None
    bias: float | None = None

    @property
    def rho(self) -> float | None:
        """The worse of both directions."""
        return max((r for r in (self.rho_forward, self.rho_backward) if r is not None), default=None)


class Measure(Protocol):
    def __call__(self, settings: LayerParallelConfig, *, factors: bool) -> Reading:
        """factors: whether the convergence factors are wanted too."""
        ...


class Controller:
    """Moves through `ladder`, whose first settings are the cheapest and whose last are exact, from place `start` on.

    A reading is good if no convergence factor is above 1 (`paper`), if besides the bias, where it was measured, is at
    most `bound` (`raise`), or if the bias is (`adaptive`: factors say how fast a solve converges, not how far off it
    is).

    readings: (place on the ladder, reading) of everything that the last check measured, in that order.
    """

    def __init__(self, policy: Policy, ladder: Sequence[LayerParallelConfig], *, bound: float, start: int = 0) -> None:
        self.policy, self.ladder, self.bound = policy, tuple(ladder), bound
        self.place = start
        self.readings: list[tuple[int, Reading]] = []
        self._trial = 0  # the cheaper settings that were tried last
        self._biases: dict[int, float] = {}  # by place, as last measured

    @property
    def settings(self) -> LayerParallelConfig:
        """The settings in force."""
        return self.ladder[self.place]

    @property
    def is_exact(self) -> bool:
        return self.place == len(self.ladder) - 1

    @property
    def is_done(self) -> bool:
        """Whether nothing can change any more, so that there is nothing to check."""
        return self.policy == "off" or (self.policy != "adaptive" and self.is_exact)

    def check(self, measure: Measure) -> tuple[Reading, str | None]:
        """Measures the settings in force, and others where it has to choose. Returns their reading (where the exact
        ones are in force, that of those it tried), and why the settings changed (None: they didn't)."""
        self.readings = []
        if self.is_exact:
            return self._try_cheaper(measure, Reading())
        reading = self._measured(measure, self.place, factors=True)
        if self._is_good(reading):
            return reading, self._try_cheaper(measure, reading)[1]
        fault = self._fault(reading)
        self.place = len(self.ladder) - 1 if self.policy == "paper" else self.place + 1
        if self.policy == "adaptive":
            while not self.is_exact and not self._is_good(self._measured(measure, self.place, factors=False)):
                self.place += 1
        return reading, fault

    def _try_cheaper(self, measure: Measure, reading: Reading) -> tuple[Reading, str | None]:
        """`adaptive` tries one of the cheaper settings at each check: in turn, as nobody knows which of them are more
        accurate; from the exact ones the least biased on record. It takes what is well inside the bound."""
        if self.policy != "adaptive" or self.place == 0:
            return reading, None
        if self.is_exact:
            self._trial = min(range(self.place), key=lambda p: (self._biases.get(p, math.inf), -p))
        else:
            self._trial = self._trial - 1 if 0 < self._trial <= self.place else self.place - 1
        limit = RETURN * self.bound
        tried = self._measured(measure, self._trial, factors=self.is_exact)
        if self.is_exact:
            reading = tried
        bias = tried.bias
        if bias is None or not bias <= limit:
            return reading, None
        self.place = self._trial
        return reading, f"bias {bias:.3g} <= {limit:g} with cheaper settings"

    def _measured(self, measure: Measure, place: int, *, factors: bool) -> Reading:
        reading = measure(self.ladder[place], factors=factors)
        self.readings.append((place, reading))
        if reading.bias is not None:
            # what is no number is the worst there is, and sorts so
            self._biases[place] = reading.bias if reading.bias < math.inf else math.inf
        return reading

    def _is_good(self, reading: Reading) -> bool:
        """What is no number (a solve that overflowed) is not good."""
        converges = reading.rho is None or reading.rho <= 1
        unbiased = reading.bias is None or reading.bias <= self.bound
        return {"paper": converges, "raise": converges and unbiased, "adaptive": unbiased}[self.policy]

    def _fault(self, reading: Reading) -> str:
        if self.policy != "adaptive" and reading.rho is not None and not reading.rho <= 1:
            return f"convergence factor {reading.rho:.3g} > 1"
        return f"bias {reading.bias:.3g} > {self.bound:g}"

    # ---- checkpoints
    def state_dict(self) -> dict[str, Any]:
        """Plain data that JSON holds."""
        return {
            "settings": self.ladder[self.place].to_dict(),
            "trial": self._trial,
            "biases": sorted(self._biases.items()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where another controller stood. On a ladder without its settings (other options, another number of
        ranks) it starts from the exact ones, which are never wrong."""
        stored = LayerParallelConfig.from_dict(state["settings"])
        places = [i for i, settings in enumerate(self.ladder) if settings == stored]
        self.place = places[0] if places else len(self.ladder) - 1
        self._trial, self._biases = (state["trial"], dict(state["biases"])) if places else (0, {})

    def __str__(self) -> str:
        return f"{self.policy}: {describe(self.settings)} (step {self.place + 1} of {len(self.ladder)})"
