"""A training run as plain records, read from the log history that the Trainer keeps in trainer_state.json.

What a check of the controller found stands in the history as an entry with keys `lp_check_*`; its setting is the one in
force from its step on, and its readings are of the setting before.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from hf_layerpar.errors import CheckpointError

STATE = "trainer_state.json"
UNKNOWN = "before the first check"
"""Stands for a setting that the history doesn't name."""
_PREFIX = "lp_check_"

Series = list[tuple[int, float]]
"""(training step, value), in the order of steps."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check; None and empty: not measured.

    name, setting: the setting in force from here on, and its place on the ladder, 0 being the cheapest.
    share: its predicted step time over that of serial training.
    reason: why it changed; empty where it did not.
    lipschitz: an estimate for every layer.
    """

    step: int
    rho_forward: float | None = None
    rho_backward: float | None = None
    cosine: float | None = None
    norm_ratio: float | None = None
    bias_to_noise: float | None = None
    name: str = ""
    setting: int | None = None
    share: float | None = None
    reason: str = ""
    lipschitz: tuple[float, ...] = ()


@dataclass(frozen=True)
class Span:
    """Steps start (exclusive) to end trained with one setting."""

    name: str
    setting: int | None
    start: int
    end: int


@dataclass(frozen=True)
class Run:
    """steps: the last step in the history. training, validation: losses. factors: largest convergence factor of the
    step that was logged, by direction ("forward", "backward"), where its sweep iterated."""

    name: str
    steps: int
    training: Series = field(default_factory=list)
    validation: Series = field(default_factory=list)
    factors: dict[str, Series] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)

    def series(self, name: str) -> Series:
        """The readings of that name of all checks that have one."""
        found = [(check.step, getattr(check, name)) for check in self.checks]
        return [(step, value) for step, value in found if value is not None]

    @property
    def spans(self) -> list[Span]:
        """The settings in force, in order. What came before the first check is known only if it changed nothing."""
        named = [check for check in self.checks if check.name]
        found: list[Span] = []
        if named and named[0].step > 0:
            first = named[0]
            known = (UNKNOWN, None) if first.reason else (first.name, first.setting)
            found.append(Span(*known, 0, first.step))
        for check, (start, end) in zip(named, pairwise([*(c.step for c in named), self.steps]), strict=True):
            if found and (found[-1].name, found[-1].setting) == (check.name, check.setting):
                found[-1] = Span(check.name, check.setting, found[-1].start, end)
            elif end > start:
                found.append(Span(check.name, check.setting, start, end))
        return found

    @property
    def switches(self) -> list[Check]:
        """The checks that changed the setting."""
        return [check for check in self.checks if check.reason]

    @property
    def shares(self) -> dict[str, float]:
        """Name of a setting -> the share of all steps that it trained, the longest first."""
        lengths: dict[str, int] = {}
        for span in self.spans:
            lengths[span.name] = lengths.get(span.name, 0) + span.end - span.start
        return {name: length / self.steps for name, length in sorted(lengths.items(), key=lambda item: -item[1])}

    @property
    def mean_share(self) -> float | None:
        """Predicted step time over serial, mean over the steps from the first check on."""
        known = [(check.step, check.share) for check in self.checks if check.share is not None]
        ends = pairwise([*(step for step, _ in known), self.steps])
        weighted = [(end - start, share) for (_, share), (start, end) in zip(known, ends, strict=True)]
        total = sum(steps for steps, _ in weighted)
        return sum(steps * share for steps, share in weighted) / total if total else None


def read_run(folder: Path | str) -> Run:
    """The run of a Trainer's output_dir, from its own trainer_state.json or that of its newest checkpoint-N, whichever
    went further.

    Raises CheckpointError where there is neither, or one that can't be read.
    """
    folder = Path(folder)
    checkpoints = [p for p in folder.glob(f"checkpoint-*/{STATE}") if p.parent.name.split("-")[-1].isdecimal()]
    newest = sorted(checkpoints, key=lambda p: int(p.parent.name.split("-")[-1]))[-1:]
    states = [p for p in (folder / STATE, *newest) if p.is_file()]
    if not states:
        raise CheckpointError(
            f"{folder} has no {STATE}, nor a checkpoint-N with one; give the output_dir of a training run that saved "
            "checkpoints, or call trainer.save_state() at its end"
        )
    found = []
    for path in states:
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            found.append((state["global_step"], state["log_history"]))
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is no state of a Trainer: {error!r}; delete it or copy it anew") from error
    return run_of(max(found, key=lambda entry: entry[0])[1], str(folder))


def run_of(log_history: Sequence[Mapping[str, Any]], name: str) -> Run:
    """The records in a Trainer's `state.log_history`; entries and keys of other kinds are left alone."""
    run = Run(name, max((entry["step"] for entry in log_history), default=0))
    for entry in log_history:
        step = entry["step"]
        if "loss" in entry:
            run.training.append((step, entry["loss"]))
        if "eval_loss" in entry:
            run.validation.append((step, entry["eval_loss"]))
        for direction in ("forward", "backward"):
            if (factor := entry.get(f"lp_{direction}_factor")) is not None:
                run.factors.setdefault(direction, []).append((step, factor))
        if any(key.startswith(_PREFIX) for key in entry):
            run.checks.append(_check(entry))
    return run


def _check(entry: Mapping[str, Any]) -> Check:
    known = {f.name: entry.get(_PREFIX + f.name) for f in fields(Check) if f.name != "step"}
    values = {name: value for name, value in known.items() if value is not None}
    if "setting" in values:
        values["setting"] = int(values["setting"])  # trackers take floats
    if "lipschitz" in values:
        values["lipschitz"] = tuple(values["lipschitz"])
    return Check(step=entry["step"], **values)


def summary(run: Run, against: Sequence[Run] = ()) -> dict[str, Any]:
    """What the report says of a run, as JSON: its settings, switches and losses, and those of the runs beside it."""
    return {
        "run": run.name,
        "steps": run.steps,
        "losses": _losses(run),
        "against": [{"run": other.name, "losses": _losses(other)} for other in against],
        "settings": run.shares,
        "switches": [{"step": c.step, "to": c.name, "reason": c.reason} for c in run.switches],
        "mean_predicted_share": run.mean_share,
        "checks": len(run.checks),
        "last_readings": {
            name: values[-1][1]
            for name in ("rho_forward", "rho_backward", "cosine", "norm_ratio", "bias_to_noise")
            if (values := run.series(name))
        },
    }


def _losses(run: Run) -> dict[str, float | None]:
    """The last ones logged; None where there are none or a loss is no finite number."""
    both = {"training": run.training, "validation": run.validation}
    last = {kind: values[-1][1] for kind, values in both.items() if values}
    return {kind: value if math.isfinite(value) else None for kind, value in last.items()}


def as_text(run: Run, against: Sequence[Run] = ()) -> str:
    """The summary for a terminal."""
    found = summary(run, against)
    lines = [f"{run.name}: {run.steps} steps, {_loss_text(found['losses'])}"]
    for other in found["against"]:
        theirs = other["losses"]
        lines.append(f"against {other['run']}: {_loss_text(theirs)}{_difference(found['losses'], theirs)}")
    lines += [f"{100 * share:5.1f} % of the steps with {name}" for name, share in found["settings"].items()]
    if run.mean_share is not None:
        lines.append(f"predicted step time, mean: {run.mean_share:.3f} of serial ({1 / run.mean_share:.2f}x)")
    if found["last_readings"]:
        lines.append("last readings: " + ", ".join(f"{k} {v:.3g}" for k, v in found["last_readings"].items()))
    if run.checks:
        lines.append(f"{len(run.switches)} switches in {len(run.checks)} checks" + (":" if run.switches else ""))
    lines += [f"  step {s['step']}: to {s['to'] or 'unnamed settings'}: {s['reason']}" for s in found["switches"]]
    return "\n".join(lines)


def _loss_text(losses: Mapping[str, float | None]) -> str:
    said = [f"{kind} loss {'not finite' if value is None else f'{value:.4f}'}" for kind, value in losses.items()]
    return ", ".join(said) or "no losses"


def _difference(ours: Mapping[str, float | None], theirs: Mapping[str, float | None]) -> str:
    for kind in ("validation", "training"):
        a, b = ours.get(kind), theirs.get(kind)
        if a is not None and b is not None:
            return f" ({kind}: this run {a - b:+.4f})"
    return ""
