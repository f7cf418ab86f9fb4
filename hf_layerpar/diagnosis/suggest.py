"""From readings to buffers, a setting and a verdict. Pure: no model, no torch.

Friendly is a setting whose gradient trains like the exact one. Noise averages out over steps while a bias returns in
each, so both the direction and the size of the bias against a batch's noise are bounded, in the worst of the batches.
recipes/benchmarks/diagnose_models.py checks the verdicts against short training runs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from hf_layerpar.config import Buffers, LayerParallelConfig, describe, gathered
from hf_layerpar.diagnosis.readings import (
    BufferTrial,
    LayerReading,
    Prediction,
    SettingReading,
    Suggestion,
)

LEAST_COSINE = 0.95
"""Of a friendly setting's gradient with the exact one, in the worst of the batches."""

MOST_BIAS_TO_NOISE = 0.5
"""Of a friendly setting, in the worst of the batches that have more than one row."""

WORTH = 0.95
"""An inexact setting must be predicted to take at most this share of the exact pipeline's step."""

OUTSTANDING = 3.0
"""A layer stands out when its increment or its Lipschitz estimate is this many times the median of its stack."""

BUFFER_SHARE = 4
"""At most one layer in so many becomes a buffer: buffers run one after the other."""

PROBE = LayerParallelConfig(
    strategy="mgrit", coarse_operator="aggregate", forward_iterations=0, backward_iterations=3, acceleration="krylov"
)
"""The setting that proposed buffers are tried with: if that is no good, no other is."""

TRIED = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Numbers of buffers that are tried, besides none."""

ENOUGH = 0.99
"""Cosine of a trial from which on more buffers aren't worth it."""


def is_friendly(reading: SettingReading) -> bool:
    """Whether training with this setting can be expected to follow exact training."""
    noise = reading.bias_to_noise
    return reading.cosine >= LEAST_COSINE and (noise is None or noise <= MOST_BIAS_TO_NOISE)


def standing_out(layers: Sequence[LayerReading]) -> list[int]:
    """Places, in one stack, of the layers that stand out (see `OUTSTANDING`), the one that does most first."""
    most = [0.0] * len(layers)
    for name in ("increment", "lipschitz", "adjoint"):
        values = [getattr(layer, name) for layer in layers]
        middle = statistics.median(values)
        for n, value in enumerate(values):
            times = value / middle if middle else math.inf if value else 1.0
            most[n] = max(most[n], math.inf if math.isnan(times) else times)
    return sorted((n for n, times in enumerate(most) if times > OUTSTANDING), key=lambda n: -most[n])


def proposed_buffers(layers: Sequence[LayerReading]) -> list[Buffers]:
    """Buffers to try, from none to a quarter of a stack, those layers first that stand out most.

    Several stacks share them: all have the larger numbers at their ends, and what any has between where all are as
    deep as each other.
    """
    stacks = [[layer for layer in layers if layer.stack == s] for s in dict.fromkeys(x.stack for x in layers)]
    hardest = [standing_out(own)[: len(own) // BUFFER_SHARE] for own in stacks]
    most = max(map(len, hardest), default=0)
    found: list[Buffers] = [(0, 0)]
    for count in sorted({most, *(number for number in TRIED if number < most)} - {0}):
        each = [
            gathered((0, *sorted(places[:count]), 0), len(own)) for places, own in zip(hardest, stacks, strict=True)
        ]
        opening, closing = max(b[0] for b in each), max(b[-1] for b in each)
        depth, *others = {len(own) for own in stacks}
        between = sorted({place for b in each for place in b[1:-1] if opening <= place < depth - closing})
        found.append((opening, *([] if others else between), closing))
    return list(dict.fromkeys(found))


def best_trial(trials: Sequence[BufferTrial]) -> Buffers:
    """The fewest buffers whose gradient is good enough, or about as good as any."""
    errors = [1.0 - trial.cosine if math.isfinite(trial.cosine) else 2.0 for trial in trials]
    limit = max(1.0 - ENOUGH, 2.0 * min(errors))
    return next(trial.buffers for trial, error in zip(trials, errors, strict=True) if error <= limit)


def suggest(
    settings: Sequence[SettingReading],
    predictions: Mapping[LayerParallelConfig, Prediction],
    pipeline: Prediction,
    layers: Sequence[LayerReading],
    buffers: Buffers,
    ranks: int,
) -> Suggestion:
    """The cheapest friendly setting that is worth it, else the exact pipeline, with the figures that decide it.

    predictions: of every setting, by its `config`.
    """
    worth = [s for s in settings if predictions[s.config].seconds <= WORTH * pipeline.seconds]
    friendly = [s for s in settings if is_friendly(s)]
    both = [s for s in friendly if s in worth]
    where = f"on {ranks} rank{'s' if ranks > 1 else ''}"
    exact = f"the exact pipeline ({describe(pipeline.config, pieces=True).removeprefix('pipeline, ')}, predicted step "
    exact += f"{pipeline.share:.2f} of serial {where})"
    if both:
        best = min(both, key=lambda s: predictions[s.config].seconds)
        found = predictions[best.config]
        around = f" with buffers {buffers}" if any(buffers) else ""
        verdict = (
            f"layer-parallel: {best.name}{around}{', interleaved' if found.split else ''}, predicted step "
            f"{found.share:.2f} of serial {where} ({pipeline.share:.2f} for the exact pipeline), {_accuracy(best)}."
        )
        return Suggestion(
            friendly=True, config=found.config, split=found.split, buffers=buffers, best=best, verdict=verdict
        )
    if friendly:
        best = min(friendly, key=lambda s: predictions[s.config].seconds)
        why = (
            f"the settings with a good gradient are not worth it, the fastest of them being {best.name} at a predicted "
            f"{predictions[best.config].share:.2f} of serial ({_accuracy(best)})"
        )
    elif settings:
        best = max(worth or settings, key=lambda s: s.cosine if math.isfinite(s.cosine) else -2.0)
        which = "that would be faster" if worth else "measured"
        why = (
            f"the best gradient of a setting {which} is that of {best.name}, {_accuracy(best)}, where training needs a "
            f"cosine of {LEAST_COSINE} and a bias of at most {MOST_BIAS_TO_NOISE} of the noise{_unruly(layers)}"
        )
    else:
        best, why = None, "the stack is too short for an interval of two layers between its buffers"
    return Suggestion(
        friendly=False,
        config=pipeline.config,
        split=None,
        buffers=buffers,
        best=best,
        verdict=f"{exact}: {why}.",
    )


def _accuracy(reading: SettingReading) -> str:
    noise = reading.bias_to_noise
    bias = "" if noise is None else f" and bias {noise:.2g} of the batch noise"
    return f"gradient cosine {reading.cosine:.3f}{bias}"


def _unruly(layers: Sequence[LayerReading]) -> str:
    """The layer that amplifies errors most, for a verdict that nothing converges."""
    if not layers:
        return ""
    most = max(layers, key=lambda layer: layer.lipschitz)
    return f"; layer {most.index} of {most.stack} has Lipschitz estimate {most.lipschitz:.3g}"
