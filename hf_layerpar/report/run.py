"""A training run as plain records, read from the log history that the Trainer keeps in trainer_state.json.

What a check of the controller found stands in the history as an entry with keys `lp_check_*`; its setting is the one in
force from its step on, and its readings are of what it measured: the setting before, and those that it tried.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from hf_layerpar.config import MOST, shown
from hf_layerpar.errors import CheckpointError

STATE = "trainer_state.json"
UNKNOWN = "before the first check"
"""Stands for a setting that the history doesn't name."""
_PREFIX = "lp_check_"
READINGS = ("rho_forward", "rho_backward", "cosine", "norm_ratio", "bias_to_noise", "bias")
"""Names of what a check measures of a setting."""

Series = list[tuple[int, float]]
"""(training step, value), in the order of steps."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a check read of one setting (see `READINGS`); None: not measured. setting: its place on the ladder."""

    name: str = ""
    setting: int | None = None
    rho_forward: float | None = None
    rho_backward: float | None = None
    cosine: float | None = None
    norm_ratio: float | None = None
    bias_to_noise: float | None = None
    bias: float | None = None

    @property
    def values(self) -> dict[str, float]:
        return {name: value for name in READINGS if (value := getattr(self, name)) is not None}


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check; None and empty: not measured.

    readings: of the setting in force until then, and of those that were tried; where the exact solve was in force, of
        the tried ones alone.
    bound: on the bias.
    before: the setting in force until then.
    name, setting: the one in force from here on, and its place on the ladder, 0 being the cheapest.
    share: its predicted step time over that of serial training.
    reason: why it changed; empty where it did not.
    lipschitz: an estimate for every layer.
    """

    step: int
    readings: tuple[Measured, ...] = ()
    bound: float | None = None
    before: str = ""
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

    def series(self, name: str) -> list[tuple[str, Series]]:
        """(setting, its readings of that name) of the first setting that each check measured, anew whenever that is
        another one than in the check before."""
        found: list[tuple[str, Series]] = []
        for check in self.checks:
            for one in check.readings[:1]:
                if (value := getattr(one, name)) is not None:
                    if not found or found[-1][0] != one.name:
                        found.append((one.name, []))
                    found[-1][1].append((check.step, value))
        return found

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
            step, log = state["global_step"], state["log_history"]
            if _step(step) is None or not isinstance(log, list):
                raise ValueError(f"global_step is {shown(step)}, log_history a {type(log).__name__}")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{path} is no state of a Trainer: {error!r}; delete it or copy it anew") from error
        found.append((step, log))
    return run_of(max(found, key=lambda entry: entry[0])[1], str(folder))


def run_of(log_history: Sequence[Any], name: str) -> Run:
    """The records in a Trainer's `state.log_history`; entries, keys and values of other kinds are left alone."""
    entries = [(step, e) for e in log_history if isinstance(e, Mapping) and (step := _step(e.get("step"))) is not None]
    run = Run(name, max((step for step, _ in entries), default=0))
    series = {"loss": run.training, "eval_loss": run.validation}
    for step, entry in entries:
        for direction in ("forward", "backward"):
            if _number(entry.get(key := f"lp_{direction}_factor")) is not None:
                series[key] = run.factors.setdefault(direction, [])
        for key, values in series.items():
            if (value := _number(entry.get(key))) is not None:
                values.append((step, value))
        if any(str(key).startswith(_PREFIX) for key in entry):
            run.checks.append(_check(step, entry, run.checks[-1].name if run.checks else ""))
    return run


def _check(step: int, entry: Mapping[str, Any], before: str) -> Check:
    """before: the setting in force until then, empty where it isn't known."""
    found = {str(key).removeprefix(_PREFIX): value for key, value in entry.items() if str(key).startswith(_PREFIX)}
    name, reason = _text(found.get("name")), _text(found.get("reason"))
    before = before or ("" if reason else name)
    listed = found.get("readings")
    if isinstance(listed, list):
        readings = tuple(_measured(one) for one in listed if isinstance(one, Mapping))
        before = before or (readings[0].name if readings else "")
    else:  # of an older run: which setting the exact solve tried is not known
        of = before if before.startswith("mgrit") else ""
        readings = tuple(one for one in [_measured({**found, "name": of, "setting": None})] if one.values)
    lipschitz = found.get("lipschitz")
    lipschitz = [_number(value) for value in lipschitz] if isinstance(lipschitz, list) else []
    return Check(
        step=step,
        readings=readings,
        bound=_number(found.get("bound")),
        before=before,
        name=name,
        setting=_step(found.get("setting")),
        share=_number(found.get("share")),
        reason=reason,
        lipschitz=tuple(math.nan if value is None else value for value in lipschitz),
    )


def _measured(values: Mapping[str, Any]) -> Measured:
    numbers = {name: _number(values.get(name)) for name in READINGS}
    return Measured(name=_text(values.get("name")), setting=_step(values.get("setting")), **numbers)


def _number(value: Any) -> float | None:
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
    except OverflowError:
        return math.inf


def _step(value: Any) -> int | None:
    """A whole number from 0 on; trackers make floats of it."""
    number = _number(value)
    return int(number) if number is not None and 0 <= number <= MOST and number == int(number) else None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def summary(run: Run, against: Sequence[Run] = ()) -> dict[str, Any]:
    """What the report says of a run, as JSON: its settings, switches and losses, and those of the runs beside it."""
    return {
        "run": run.name,
        "steps": run.steps,
        "losses": _losses(run),
        "against": [{"run": other.name, "losses": _losses(other)} for other in against],
        "settings": run.shares,
        "switches": [
            {"step": c.step, "from": c.before, "to": c.name, "reason": c.reason, **_readings(c)} for c in run.switches
        ],
        "mean_predicted_share": run.mean_share,
        "checks": len(run.checks),
        "last_readings": next(({"step": c.step, **_readings(c)} for c in run.checks[::-1] if c.readings), None),
    }


def _readings(check: Check) -> dict[str, Any]:
    """What a check measured, each under the name of its setting, and the bound on the bias."""
    measured = [
        {"setting": one.name} | {name: value if math.isfinite(value) else None for name, value in one.values.items()}
        for one in check.readings
    ]
    return {"measured": measured} | ({} if check.bound is None else {"bound": check.bound})


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
    if run.mean_share:
        lines.append(f"predicted step time, mean: {run.mean_share:.3f} of serial ({1 / run.mean_share:.2f}x)")
    if (last := found["last_readings"]) is not None:
        lines.append(f"last readings, at step {last['step']}: {_reading_text(last)}")
    if run.checks:
        lines.append(f"{len(run.switches)} switches in {len(run.checks)} checks" + (":" if run.switches else ""))
    for s in found["switches"]:
        origin = f"from {s['from']} " if s["from"] else ""
        lines.append(f"  step {s['step']}: {origin}to {s['to'] or 'unnamed settings'}: {s['reason']}")
        if biases := _reading_text(s, ("bias",)):
            lines.append(f"    {biases}")
    return "\n".join(lines)


def _reading_text(found: Mapping[str, Any], names: Sequence[str] = READINGS) -> str:
    """As in "mgrit identity 1/1 c=4: bias 0.6 (bound 0.3); mgrit aggregate 1/1 c=4: bias 0.1 (bound 0.3)"."""
    said = []
    for one in found["measured"]:
        values = []
        for name in names:
            if name in one:
                number = "not finite" if one[name] is None else f"{one[name]:.3g}"
                bound = f" (bound {found['bound']:.3g})" if name == "bias" and "bound" in found else ""
                values.append(f"{name} {number}{bound}")
        if values:
            said.append(f"{one['setting'] or 'unnamed settings'}: {', '.join(values)}")
    return "; ".join(said)


def _loss_text(losses: Mapping[str, float | None]) -> str:
    said = [f"{kind} loss {'not finite' if value is None else f'{value:.4f}'}" for kind, value in losses.items()]
    return ", ".join(said) or "no losses"


def _difference(ours: Mapping[str, float | None], theirs: Mapping[str, float | None]) -> str:
    for kind in ("validation", "training"):
        a, b = ours.get(kind), theirs.get(kind)
        if a is not None and b is not None:
            return f" ({kind}: this run {a - b:+.4f})"
    return ""
