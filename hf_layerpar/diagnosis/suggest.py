"""From readings to buffers, a setting and a verdict. Pure: no model, no torch.

Friendly is a setting whose gradient trains like the exact one. Noise averages out over steps while a bias returns in
each, so both the direction and the size of the bias against a batch's noise are bounded, in the worst of the batches.
recipes/benchmarks/diagnose_models.py checks the verdicts against short training runs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.diagnosis.readings import LayerReading, Prediction, SettingReading, Suggestion, setting_name

LEAST_COSINE = 0.95
"""Of a friendly setting's gradient with the exact one, in the worst of the batches."""

MOST_BIAS_TO_NOISE = 0.5
"""Of a friendly setting, in the worst of the batches that have more than one row."""

WORTH = 0.95
"""An inexact setting must be predicted to take at most this share of the exact pipeline's step."""

OUTSTANDING = 3.0
"""A layer stands out when its increment or its Lipschitz estimate is this many times the median of its stack."""

BUFFER_SHARE = 4
"""At most one layer in so many becomes a buffer at each end: buffers run one after the other."""


def is_friendly(reading: SettingReading) -> bool:
    """Whether training with this setting can be expected to follow exact training."""
    noise = reading.bias_to_noise
    return reading.cosine >= LEAST_COSINE and (noise is None or noise <= MOST_BIAS_TO_NOISE)


def standing_out(layers: Sequence[LayerReading]) -> list[int]:
    """Places, in one stack, of the layers that stand out (see `OUTSTANDING`)."""
    found = set()
    for name in ("increment", "lipschitz"):
        values = [getattr(layer, name) for layer in layers]
        middle = statistics.median(values)
        found |= {n for n, value in enumerate(values) if not value <= OUTSTANDING * middle}
    return sorted(found)


def suggest_buffers(layers: Sequence[LayerReading]) -> tuple[int, int]:
    """The fewest open and close layers that leave out every layer of the first and last quarter that stands out.

    What stands out between the quarters can't be left out. Of several stacks the larger numbers: they share them.
    """
    opening = closing = 0
    for stack in dict.fromkeys(layer.stack for layer in layers):
        own = [layer for layer in layers if layer.stack == stack]
        reach = len(own) // BUFFER_SHARE
        for n in standing_out(own):
            if n < reach:
                opening = max(opening, n + 1)
            elif n >= len(own) - reach:
                closing = max(closing, len(own) - n)
    return opening, closing


def suggest(
    settings: Sequence[SettingReading],
    predictions: Mapping[LayerParallelConfig, Prediction],
    pipeline: Prediction,
    layers: Sequence[LayerReading],
    buffers: tuple[int, int],
    ranks: int,
) -> Suggestion:
    """The cheapest friendly setting that is worth it, else the exact pipeline, with the figures that decide it.

    predictions: of every setting, by its `config`.
    """
    worth = [s for s in settings if predictions[s.config].seconds <= WORTH * pipeline.seconds]
    friendly = [s for s in settings if is_friendly(s)]
    both = [s for s in friendly if s in worth]
    where = f"on {ranks} rank{'s' if ranks > 1 else ''}"
    exact = f"the exact pipeline ({setting_name(pipeline.config).removeprefix('pipeline, ')}, predicted step "
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
