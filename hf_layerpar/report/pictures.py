"""Draws a training run: losses beside those of other runs, what the checks read, and the settings in force."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from hf_layerpar.report.drawing import check_picture, matplotlib_classes
from hf_layerpar.report.run import UNKNOWN, Run, Series

RUN = "#2b6cb0"
OTHERS = ("#718096", "#dd6b20", "#6b8e4e", "#805ad5", "#b83280")
FORWARD, BACKWARD = "#2b6cb0", "#dd6b20"
SETTINGS = ("#2b6cb0", "#38a169", "#d69e2e", "#dd6b20", "#805ad5", "#b83280", "#319795", "#9c4221")
"""Colours of MGRIT settings, from the cheapest on."""
EXACT = "#a0aec0"
_UNKNOWN = "#e2e8f0"
_SWITCH = "#1a202c"
_BOUND = "#c53030"

Panel = tuple[float, Callable[[Any, Any], None]]
"""(height in inches, what draws it on (figure, axes))"""


def draw_run(run: Run, path: Path | str, against: Sequence[Run] = ()) -> None:
    """Writes a PNG of stacked panels over the training step, each switch of settings a dashed line through all of them.

    Losses of the run and of the runs `against`; convergence factors with the line at 1, above which iterations diverge;
    gradient cosine and bias to noise; the bias of every setting that a check measured, in its colour, and its bound;
    the setting in force; the Lipschitz estimate of every layer. Curves of readings break where another setting is
    measured. A panel without data is left out.

    Raises LayerParallelError when matplotlib is missing, ConfigurationError for a file name of no known format.
    """
    check_picture(path)
    figure_class, _ = matplotlib_classes()
    panels = [
        panel for make in (_losses, _factors, _gradient, _bias, _settings, _lipschitz) if (panel := make(run, against))
    ]
    heights = [height for height, _ in panels]
    figure = figure_class(figsize=(10.0, sum(heights) + 0.9), dpi=150, layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for one, (_, draw) in zip(axes, panels, strict=True):
        draw(figure, one)
        one.tick_params(labelsize=8)
        one.spines[["top", "right"]].set_visible(False)
        for check in run.switches:
            one.axvline(check.step, color=_SWITCH, linewidth=0.9, linestyle=(0, (3, 2)), zorder=3)
    axes[-1].set_xlim(0, max(1, run.steps, *(other.steps for other in against)))
    axes[-1].set_xlabel("training step", fontsize=9)
    axes[0].set_title(run.name, loc="left", fontsize=10, fontweight="bold")
    figure.savefig(path)


def _losses(run: Run, against: Sequence[Run]) -> Panel:
    def draw(figure: Any, axes: Any) -> None:
        runs = [(run, RUN), *((other, OTHERS[i % len(OTHERS)]) for i, other in enumerate(against))]
        for one, colour in reversed(runs):
            _line(axes, one.training, colour, linewidth=0.7, alpha=0.45 if one.validation else 1.0)
            _line(axes, one.validation, colour, linewidth=1.6)
            axes.plot([], [], color=colour, label=one.name)
        axes.set_ylabel("loss (bold: validation)", fontsize=9)
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles[::-1], labels[::-1], frameon=False, fontsize=8)

    return 2.8, draw


def _factors(run: Run, against: Sequence[Run]) -> Panel | None:
    series = {}
    for direction, colour in (("forward", FORWARD), ("backward", BACKWARD)):
        logged = [("", run.factors[direction])] if direction in run.factors else []
        series[direction, colour] = run.series(f"rho_{direction}") or logged
    if not any(series.values()):
        return None

    def draw(figure: Any, axes: Any) -> None:
        for (direction, colour), pieces in series.items():
            if pieces:
                _pieces(axes, pieces, colour, label=direction)
        axes.axhline(1.0, color=_BOUND, linewidth=0.9)
        axes.set_ylabel("convergence factor ρ", fontsize=9)
        axes.legend(frameon=False, fontsize=8)

    return 1.6, draw


def _gradient(run: Run, against: Sequence[Run]) -> Panel | None:
    cosine, bias = run.series("cosine"), run.series("bias_to_noise")
    if not cosine and not bias:
        return None

    def draw(figure: Any, axes: Any) -> None:
        if cosine:
            _pieces(axes, cosine, FORWARD)
            axes.set_ylabel("gradient cosine", fontsize=9, color=FORWARD)
        if bias:
            other = axes.twinx() if cosine else axes
            _pieces(other, bias, BACKWARD)
            other.set_ylabel("bias to noise", fontsize=9, color=BACKWARD)
            other.tick_params(labelsize=8)
            other.spines["top"].set_visible(False)

    return 1.6, draw


def _bias(run: Run, against: Sequence[Run]) -> Panel | None:
    by_setting: dict[str, Series] = {}
    for check in run.checks:
        for one in check.readings:
            if one.bias is not None:
                by_setting.setdefault(one.name, []).append((check.step, one.bias))
    if not by_setting:
        return None
    bounds = [(check.step, check.bound) for check in run.checks if check.bound is not None]
    colours = _colours(run)

    def draw(figure: Any, axes: Any) -> None:
        for name in sorted(by_setting, key=list(colours).index):
            steps, values = zip(*by_setting[name], strict=True)
            axes.plot(steps, values, color=colours[name], marker="o", markersize=4, linestyle="none", label=name)
        if bounds:
            steps, values = zip(*[*bounds, (run.steps, bounds[-1][1])], strict=True)
            axes.step(steps, values, where="post", color=_BOUND, linewidth=0.9, label="bound")
        axes.set_ylabel("bias of the gradient", fontsize=9)
        axes.legend(frameon=False, fontsize=7, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=4)

    return 1.6, draw


def _colours(run: Run) -> dict[str, str]:
    """Of every setting that was in force or measured, the cheapest first."""
    seen = [(s.setting, s.name) for s in run.spans] + [(m.setting, m.name) for c in run.checks for m in c.readings]
    place: dict[str, int] = {}
    for setting, name in seen:  # what was in force before the first check, if unknown, below all
        place[name] = max(place.get(name, -1), -1 if setting is None else setting)
    names = sorted(place, key=lambda name: (place[name], name))
    mgrit = [name for name in names if name.startswith("mgrit")]
    colours = {name: SETTINGS[i % len(SETTINGS)] for i, name in enumerate(mgrit)}
    return {name: colours.get(name, _UNKNOWN if name in ("", UNKNOWN) else EXACT) for name in names}


def _settings(run: Run, against: Sequence[Run]) -> Panel | None:
    spans = run.spans
    if not spans:
        return None
    # cheapest at the bottom, as the ladder; what was in force before the first check, if unknown, below all
    rows = sorted({(-1 if s.setting is None else s.setting, s.name) for s in spans})
    colours = _colours(run)

    def draw(figure: Any, axes: Any) -> None:
        for place, (setting, name) in enumerate(rows):
            mine = [s for s in spans if s.name == name and setting in (s.setting, -1)]
            bars = [(s.start, s.end - s.start) for s in mine]
            axes.broken_barh(bars, (place - 0.4, 0.8), facecolor=colours[name], linewidth=0)
        axes.set_yticks(range(len(rows)), [name for _, name in rows], fontsize=8)
        axes.set_ylim(-0.6, len(rows) - 0.4)

    return 0.5 + 0.28 * len(rows), draw


def _lipschitz(run: Run, against: Sequence[Run]) -> Panel | None:
    readings = [(check.step, check.lipschitz) for check in run.checks if check.lipschitz]
    if not readings:
        return None
    steps = [step for step, _ in readings]
    layers = max(len(values) for _, values in readings)
    # a reading's column reaches halfway to its neighbours
    middles = [(a + b) / 2 for a, b in pairwise(steps)]
    edges = [min(0, steps[0]), *middles, max(run.steps, steps[-1] + 1)]
    table = [[values[i] if i < len(values) else float("nan") for _, values in readings] for i in range(layers)]

    def draw(figure: Any, axes: Any) -> None:
        mesh = axes.pcolormesh(edges, [i - 0.5 for i in range(layers + 1)], table, cmap="viridis")
        axes.set_ylabel("layer", fontsize=9)
        axes.yaxis.get_major_locator().set_params(integer=True)
        bar = figure.colorbar(mesh, ax=axes, pad=0.01)
        bar.set_label("Lipschitz estimate", fontsize=8)
        bar.ax.tick_params(labelsize=8)

    return 2.0, draw


def _pieces(axes: Any, pieces: Sequence[tuple[str, Series]], colour: str, label: str | None = None) -> None:
    """A curve that breaks where it goes on with another setting."""
    for number, (_, series) in enumerate(pieces):
        _line(axes, series, colour, **({} if number else {"label": label}))


def _line(axes: Any, series: Series, colour: str, **style: Any) -> None:
    marker = "o" if len(series) < 60 else None
    settings = {"linewidth": 1.2, "marker": marker, "markersize": 2.5, **style}
    axes.plot([step for step, _ in series], [value for _, value in series], color=colour, **settings)
