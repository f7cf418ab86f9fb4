"""A diagnosis for people: tables in the terminal, and a picture."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import TextIO

from rich import box
from rich.console import Console
from rich.table import Table

from hf_layerpar.config import buffer_places, describe, sweeps
from hf_layerpar.diagnosis.readings import Diagnosis, LayerReading, SettingReading
from hf_layerpar.diagnosis.suggest import LEAST_COSINE, PROBE, is_friendly, standing_out
from hf_layerpar.plan.memory import size_text
from hf_layerpar.report.drawing import check_picture, matplotlib_classes

_WIDTH = 140
"""Least columns: what the tables need."""

OPERATOR_COLOURS = {"rediscretize": "#2b6cb0", "aggregate": "#6b8e4e", "identity": "#c05621"}
_OTHER_COLOUR = "#805ad5"  # of operators that users add
ITERATION_MARKS = {(1, 1): "o", (2, 1): "s", (2, 2): "D", (0, 1): "^", (0, 2): "v", (0, 3): "P"}


def print_diagnosis(diagnosis: Diagnosis, file: TextIO | None = None) -> None:
    """The layers, the settings and the verdict, as tables fitted to the terminal (or to a file)."""
    target: TextIO = file or sys.stdout
    console = Console(file=target, highlight=False)
    console = Console(file=target, width=max(console.width, _WIDTH), highlight=False)
    d = diagnosis
    console.print(
        f"{d.model}: {d.batches} batch{'es' if d.batches > 1 else ''} of {d.rows} x {d.tokens}, "
        f"{'training' if d.training else 'evaluation'} mode, loss {d.loss:.4g}"
        + ("" if d.noise is None else f", batch noise {d.noise:.3g} of the gradient")
    )
    console.print(_layer_table(d))
    if d.trials:
        tried = ", ".join(f"{trial.buffers} {trial.cosine:.4f}" for trial in d.trials)
        console.print(f"buffers tried, and the cosine that they give {describe(PROBE)}: {tried}")
    console.print(_setting_table(d))
    console.print(
        f"predicted for {d.ranks} ranks; exact pipeline: {describe(d.pipeline.config, pieces=True)}, "
        f"{d.pipeline.share:.3f} of serial. Messages cost nothing in these predictions."
    )
    if d.pipeline.bytes:
        console.print(
            f"memory of the fullest rank, with AdamW: {size_text(d.pipeline.bytes)} with the exact pipeline"
            + "".join(f", {size_text(most)} with MGRIT at most" for most in _most_bytes(d))
        )
    console.print(f"buffers {d.buffers}. {d.verdict[0].upper()}{d.verdict[1:]}", style="bold")


def _most_bytes(diagnosis: Diagnosis) -> list[float]:
    sizes = [prediction.bytes for prediction in diagnosis.predictions]
    return [max(sizes)] if sizes else []


def _layer_table(diagnosis: Diagnosis) -> Table:
    table = Table(title="layers", title_justify="left", box=box.SIMPLE, pad_edge=False)
    for name in ("layer", "h", "increment", "Lipschitz", "growth", "adjoint growth", "outlier token", ""):
        table.add_column(name, justify="left" if name in ("layer", "") else "right")
    for path, own in _stacks(diagnosis).items():
        outstanding = standing_out(own)
        buffers = buffer_places(diagnosis.buffers, len(own))
        for n, layer in enumerate(own):
            notes = ["buffer"] if n in buffers else []
            notes += ["stands out"] if n in outstanding else []
            figures = (layer.increment, layer.lipschitz, layer.growth, layer.adjoint, layer.outlier)
            table.add_row(f"{path}.{n}", f"{layer.step_size:.4g}", *(f"{v:.3g}" for v in figures), ", ".join(notes))
    return table


def _setting_table(diagnosis: Diagnosis) -> Table:
    title = "settings: state and loss error; the gradient's cosine, norm and bias over batch noise; step of serial"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    names = ("setting", "state", "loss", "cosine", "norm", "bias", "rho fwd", "rho bwd", "step", "")
    for name in names:
        left = name in ("setting", "")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for reading, prediction in zip(diagnosis.settings, diagnosis.predictions, strict=True):
        notes = ["friendly"] if is_friendly(reading) else []
        notes += ["faster"] if prediction.seconds < diagnosis.pipeline.seconds else []
        notes += ["all batches"] if 1 < reading.batches == diagnosis.batches else []
        table.add_row(
            reading.name,
            f"{reading.state_error:.2g}",
            f"{reading.loss_error:.2g}",
            f"{reading.cosine:.4f}",
            f"{reading.norm_ratio:.3f}",
            *("-" if v is None else f"{v:.2g}" for v in _optional(reading)),
            f"{prediction.share:.3f}",
            ", ".join(notes),
        )
    return table


def _optional(reading: SettingReading) -> tuple[float | None, ...]:
    return reading.bias_to_noise, reading.forward_factor, reading.backward_factor


def draw_diagnosis(diagnosis: Diagnosis, path: Path | str) -> None:
    """Writes a PNG: every layer's readings above, every setting's accuracy against its predicted step below.

    Raises LayerParallelError when matplotlib is missing, ConfigurationError for a file name of no known format.
    """
    check_picture(path)
    d = diagnosis
    figure_class, _ = matplotlib_classes()
    figure = figure_class(figsize=(10.0, 7.2), dpi=150, layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=(1.0, 1.25))
    offset = 0
    colours = {"increment": "#1a202c", "lipschitz": "#c05621", "growth": "#2b6cb0", "outlier": "#a0aec0"}
    colours |= {"adjoint": "#6b8e4e"}
    labels = {
        "increment": "increment, |S(x) - x| / |x|",
        "lipschitz": "Lipschitz estimate of S - id",
        "growth": "growth of the state",
        "outlier": "outlier token, largest / median norm",
        "adjoint": "growth of the adjoint",
    }
    for number, (stack, own) in enumerate(_stacks(d).items()):
        places = [offset + n for n in range(len(own))]
        for name, colour in colours.items():
            label = labels[name] if number == 0 else None
            upper.plot(places, [getattr(x, name) for x in own], color=colour, marker=".", linewidth=1.2, label=label)
        for place in buffer_places(d.buffers, len(own)):
            upper.axvspan(offset + place - 0.5, offset + place + 0.5, color="#edf0f3", linewidth=0, zorder=0)
        if offset:
            upper.axvline(offset - 0.5, color="#718096", linewidth=0.8)
            upper.annotate(stack, (offset, 0.97), xycoords=("data", "axes fraction"), fontsize=8, va="top")
        offset += len(own)
    upper.set_yscale("log")
    upper.set_xlabel("layer (grey: buffers)", fontsize=9)
    upper.set_title(f"{d.model}: layers", loc="left", fontsize=10, fontweight="bold")
    upper.legend(frameon=False, fontsize=8, ncols=2)

    for reading, prediction in zip(d.settings, d.predictions, strict=True):
        config = reading.config
        iterations = (config.forward_iterations, config.backward_iterations)
        lower.plot(
            [prediction.share],
            [_distance(reading.cosine)],
            marker=ITERATION_MARKS[iterations],
            color=OPERATOR_COLOURS.get(config.coarse_operator, _OTHER_COLOUR),
            markersize=4 + config.factors[0] / 2,
            markeredgecolor="white" if config.acceleration == "none" else "#1a202c",
            linestyle="none",
        )
    lower.axhline(1.0 - LEAST_COSINE, color="#1a202c", linewidth=0.9, linestyle=(0, (3, 2)))
    lower.axvline(d.pipeline.share, color="#718096", linewidth=0.9, linestyle=(0, (3, 2)))
    lower.annotate(
        "exact pipeline", (d.pipeline.share, 0.02), xycoords=("data", "axes fraction"), fontsize=8, rotation=90
    )
    lower.annotate(
        f"cosine {LEAST_COSINE}",
        (0.01, 1.0 - LEAST_COSINE),
        xycoords=("axes fraction", "data"),
        fontsize=8,
        va="bottom",
    )
    lower.set_yscale("log")
    lower.set_xlabel(f"predicted step on {d.ranks} ranks, share of serial", fontsize=9)
    lower.set_ylabel("1 - cosine of the gradient", fontsize=9)
    lower.set_title(
        "settings (larger mark: larger coarsening; black edge: Krylov)", loc="left", fontsize=10, fontweight="bold"
    )
    for operator in dict.fromkeys(reading.config.coarse_operator for reading in d.settings):
        lower.plot(
            [], [], marker="o", color=OPERATOR_COLOURS.get(operator, _OTHER_COLOUR), linestyle="none", label=operator
        )
    for (forward, backward), mark in ITERATION_MARKS.items():
        lower.plot([], [], marker=mark, color="#718096", linestyle="none", label=sweeps(forward, backward))
    lower.legend(frameon=False, fontsize=8, ncols=2, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(textwrap.fill(d.verdict, 130), fontsize=9, x=0.01, ha="left")
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    figure.savefig(path)


def _stacks(diagnosis: Diagnosis) -> dict[str, list[LayerReading]]:
    found: dict[str, list[LayerReading]] = {}
    for layer in diagnosis.layers:
        found.setdefault(layer.stack, []).append(layer)
    return found


def _distance(cosine: float) -> float:
    """1 - cosine, kept on a logarithmic axis: an exact gradient at the lower end, none at all at the upper."""
    return min(2.0, max(1e-7, 1.0 - cosine)) if cosine == cosine else 2.0
