"""Draws the predicted time line of a step: one row a rank, as a picture or as text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from hf_layerpar.plan.simulate import Timeline
from hf_layerpar.plan.tasks import Plan, Task
from hf_layerpar.report.drawing import check_picture, matplotlib_classes

KINDS: dict[str, tuple[str, str]] = {
    "front": ("E", "#2c7a7b"),
    "middle": ("M", "#b83280"),
    "forward step": ("F", "#2b6cb0"),
    "coarse or early step": ("f", "#8ec5ee"),
    "tail, both ways": ("T", "#d69e2e"),
    "final vjp": ("B", "#dd6b20"),
    "final vjp and weight gradients": ("X", "#9c4221"),
    "coarse or early vjp": ("b", "#fbd38d"),
    "weight gradients": ("W", "#6b8e4e"),
    "middle backward": ("m", "#f687b3"),
    "front backward": ("e", "#81e6d9"),
    "combine, residual": ("+", "#805ad5"),
}
"""What a task is drawn as: its letter in text and its colour in pictures. Idle is "." and grey."""

_IDLE = "#edf0f3"


def kind_of(task: Task, plan: Plan) -> str:
    forward = task.direction == "forward"
    if task.kind == "weights":
        return "weight gradients"
    if task.kind == "phase":
        if task.place == len(plan.passes):
            return "tail, both ways"
        return ("middle" if task.place else "front") + ("" if forward else " backward")
    if task.kind != "step":
        return "combine, residual"
    if not task.final:
        return "coarse or early step" if forward else "coarse or early vjp"
    if forward:
        return "forward step"
    return "final vjp" if plan.is_split(task) else "final vjp and weight gradients"


def bars(step: Timeline) -> Iterator[tuple[int, str, int, float, float]]:
    """(rank, kind, micro-batch, start, end) of every task that takes time."""
    for task, (start, end) in zip(step.plan.tasks, step.spans, strict=True):
        if end > start:
            yield task.rank, kind_of(task, step.plan), task.micro_batch, start, end


def as_text(step: Timeline, width: int = 96, max_rows: int = 32) -> str:
    """One line a rank (of more than `max_rows`, every k-th) and `width` columns of time; a column shows what its rank
    does for most of it."""
    num_ranks = step.plan.num_ranks
    drawn = range(0, num_ranks, -(-num_ranks // max_rows))
    shares: dict[int, list[dict[str, float]]] = {rank: [{} for _ in range(width)] for rank in drawn}
    seen = set()
    for rank, kind, _, start, end in bars(step):
        seen.add(kind)
        if rank not in shares:
            continue
        letter, a, b = KINDS[kind][0], width * (start / step.makespan), width * (end / step.makespan)
        for column in range(int(a), min(width, math.ceil(b))):
            cell = shares[rank][column]
            cell[letter] = cell.get(letter, 0.0) + min(b, column + 1) - max(a, column)
    lines = []
    for rank in drawn:
        letters = ["." if sum(c.values()) < 0.5 else max(c, key=lambda k, c=c: c[k]) for c in shares[rank]]
        lines.append(f"rank {rank:>{len(str(num_ranks - 1))}} |{''.join(letters)}|")
    legend = ", ".join(f"{letter} {kind}" for kind, (letter, _) in KINDS.items() if kind in seen)
    return "\n".join([*lines, f"{legend}, . idle"])


def draw(steps: Mapping[str, Timeline], path: Path | str, *, unit: str = "layer forwards of the whole batch") -> None:
    """Writes a PNG with one panel a step, titled by its name, all on one time axis.

    Micro-batches of a kind differ in shade.

    Raises LayerParallelError when matplotlib is missing, ConfigurationError for a file name of no known format.
    """
    check_picture(path)
    figure_class, patch = matplotlib_classes()
    ranks = [step.plan.num_ranks for step in steps.values()]
    heights = [max(0.9, min(0.26 * n, 6.0)) for n in ranks]  # inches; rows get thinner where there are many
    figure = figure_class(figsize=(10.0, sum(heights) + 0.62 * len(steps) + 0.9), dpi=150, layout="constrained")
    panels = figure.subplots(len(steps), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    longest = max(step.makespan for step in steps.values())
    seen: set[str] = set()
    for axes, (name, step), num_ranks in zip(panels, steps.items(), ranks, strict=True):
        micro_batches = step.plan.micro_batches
        axes.barh(range(num_ranks), step.makespan, height=0.86, color=_IDLE, linewidth=0)
        rows: dict[tuple[int, str, int], list[tuple[float, float]]] = {}
        for rank, kind, micro_batch, start, end in bars(step):
            rows.setdefault((rank, kind, micro_batch), []).append((start, end - start))
            seen.add(kind)
        thin = longest / 250  # bars narrower than this get no white edge, which would hide them
        for (rank, kind, micro_batch), spans in rows.items():
            colour = _shade(KINDS[kind][1], 0.45 * micro_batch / max(1, micro_batches - 1))
            edge = 0.35 if min(length for _, length in spans) > thin else 0.0
            axes.broken_barh(spans, (rank - 0.43, 0.86), facecolor=colour, edgecolor="white", linewidth=edge)
        axes.set_title(name, loc="left", fontsize=10, fontweight="bold")
        figures = [f"idle {100 * step.idle_share:.0f} %"]
        if step.share:  # nothing to compare with where the time on one rank isn't known
            figures.insert(0, f"predicted {100 * step.share:.0f} % of serial ({1 / step.share:.2f}x)")
        axes.set_title(", ".join(figures), loc="right", fontsize=9, color="#4a5568")
        axes.set_ylim(num_ranks - 0.4, -0.6)
        every = max(1, -(-num_ranks // 8))
        axes.set_yticks(range(0, num_ranks, every), [f"rank {r}" for r in range(0, num_ranks, every)], fontsize=8)
        axes.tick_params(length=0, labelsize=8)
        axes.spines[:].set_visible(False)
        axes.set_xlim(0.0, longest or 1.0)
    panels[-1].spines["bottom"].set_visible(True)
    panels[-1].tick_params(axis="x", length=3)
    panels[-1].set_xlabel(f"time in {unit}", fontsize=9)
    legend = [patch(color=colour, label=kind) for kind, (_, colour) in KINDS.items() if kind in seen]
    legend.append(patch(color=_IDLE, label="idle"))
    figure.legend(handles=legend, loc="outside lower center", ncols=min(7, len(legend)), frameon=False, fontsize=8)
    figure.savefig(path)


def _shade(colour: str, amount: float) -> tuple[float, ...]:
    """The colour with a share of white mixed in."""
    return tuple(v + (1.0 - v) * amount for v in (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)))
