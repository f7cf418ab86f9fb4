"""What the records, the summary and the text say of a made-up log history."""

from __future__ import annotations

import json
import math

import pytest

from hf_layerpar.errors import CheckpointError
from hf_layerpar.report.run import UNKNOWN, Span, as_text, read_run, run_of, summary
from tests.report.logs import CHEAP, EXACT, RICH, history, older, write_run


def test_records_of_a_history():
    run = run_of(history(), "here")
    assert (run.name, run.steps, len(run.training), len(run.checks)) == ("here", 100, 10, 4)
    assert run.training[0] == (10, pytest.approx(4.8))
    assert run.validation == [(50, pytest.approx(4.1)), (100, pytest.approx(3.1))]
    assert run.factors == {"forward": [(step, 0.3) for step in range(10, 101, 10)]}
    assert run.series("cosine") == [(CHEAP, [(20, 0.98), (40, 0.96)]), (RICH, [(60, 0.94), (80, 0.92)])]
    assert run.checks[1].setting == 1
    assert run.checks[1].lipschitz == (1.0, 1.4, 1.8, pytest.approx(2.2))


def test_settings_switches_and_shares():
    run = run_of(history(), "here")
    assert run.spans == [Span(CHEAP, 0, 0, 40), Span(RICH, 1, 40, 80), Span(EXACT, 2, 80, 100)]
    assert [(c.step, c.before, c.name, c.reason[:4]) for c in run.switches] == [
        (40, CHEAP, RICH, "bias"),
        (80, RICH, EXACT, "conv"),
    ]
    assert run.shares == {CHEAP: 0.4, RICH: 0.4, EXACT: 0.2}
    assert run.mean_share == pytest.approx((20 * 0.3 + 40 * 0.5 + 20 * 0.8) / 80)


def test_a_first_check_that_switches_leaves_the_setting_before_it_unknown():
    log = [entry for entry in history() if entry["step"] >= 40]
    assert run_of(log, "here").spans[0] == Span(UNKNOWN, None, 0, 40)


def test_coming_back_to_a_setting_is_another_span():
    log = history()
    log.append({"step": 90, "lp_check_name": CHEAP, "lp_check_setting": 0, "lp_check_reason": "it pays again"})
    run = run_of(log, "here")
    assert run.spans[-2:] == [Span(EXACT, 2, 80, 90), Span(CHEAP, 0, 90, 100)]
    assert run.shares == {CHEAP: 0.5, RICH: 0.4, EXACT: 0.1}


def test_summary_and_text():
    run, serial = run_of(history(), "runs/lp"), run_of(history(-0.25)[:12], "runs/serial")
    found = summary(run, [serial])
    json.dumps(found, allow_nan=False)
    first = found["switches"][0]
    assert [first[key] for key in ("step", "from", "to", "reason", "bound")] == [40, CHEAP, RICH, "bias 0.6 > 0.5", 0.5]
    assert [(m["setting"], m["bias"]) for m in first["measured"]] == [(CHEAP, 0.6), (RICH, 0.1)]
    assert found["losses"] == {"training": pytest.approx(3.0), "validation": pytest.approx(3.1)}
    assert found["last_readings"]["step"] == 80
    (last,) = found["last_readings"]["measured"]
    assert (last["setting"], last["rho_forward"]) == (RICH, pytest.approx(80 / 60))
    lines = as_text(run, [serial]).splitlines()
    assert lines[0] == "runs/lp: 100 steps, training loss 3.0000, validation loss 3.1000"
    assert lines[1].startswith("against runs/serial: ")
    assert lines[1].endswith("(validation: this run +0.2500)")
    assert lines[2:5] == [f" {p}.0 % of the steps with {n}" for p, n in ((40, CHEAP), (40, RICH), (20, EXACT))]
    assert lines[5] == "predicted step time, mean: 0.525 of serial (1.90x)"
    assert lines[6].startswith(f"last readings, at step 80: {RICH}: rho_forward 1.33, ")
    assert lines[6].endswith("bias 0.4 (bound 0.5)")
    assert lines[-5:] == [
        "2 switches in 4 checks:",
        f"  step 40: from {CHEAP} to {RICH}: bias 0.6 > 0.5",
        f"    {CHEAP}: bias 0.6 (bound 0.5); {RICH}: bias 0.1 (bound 0.5)",
        f"  step 80: from {RICH} to {EXACT}: convergence factor 1.2 > 1",
        f"    {RICH}: bias 0.4 (bound 0.5)",
    ]


def test_readings_of_older_logs_are_of_the_setting_before():
    run = run_of(older(history()), "here")
    assert [name for name, _ in run.series("cosine")] == [CHEAP, RICH]
    assert f"last readings, at step 80: {RICH}: rho_forward 1.33" in as_text(run)
    late = run_of([entry for entry in older(history()) if entry["step"] >= 40], "here")
    assert "last readings, at step 80: mgrit" in as_text(late)
    assert late.checks[0].readings[0].name == ""  # nobody knows which it was
    back = [{"step": 90, "lp_check_name": CHEAP, "lp_check_reason": "it pays again", "lp_check_cosine": 0.9}]
    tried = run_of([*older(history()), *back], "here").checks[-1]
    assert (tried.before, tried.readings[0].name) == (EXACT, "")  # it was no reading of the exact solve


def test_odd_entries_are_left_alone():
    odd = [1, None, {}, {"loss": 1.0}, {"step": "x", "loss": 1.0}, {"step": -1, "loss": 1.0}, {"step": 1e400}]
    odd += [{"step": 3, "loss": "x", "eval_loss": [1], "lp_forward_factor": {}, "lp_check_name": 4}]
    odd += [{"step": 4, "lp_check_readings": [3, {"name": 3, "bias": "x"}], "lp_check_bias": 10**400}]
    odd += [{"step": 4, "lp_check_share": 0, "lp_check_lipschitz": ["a"], "lp_check_setting": "b"}]
    run = run_of([*history(), *odd], "odd")
    assert (run.steps, run.training, len(run.checks)) == (100, run_of(history(), "here").training, 7)
    json.dumps(summary(run), allow_nan=False)
    assert as_text(run)


def test_run_without_checks_or_with_a_diverged_loss():
    plain = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": math.nan}]
    run = run_of(plain, "plain")
    assert (run.spans, run.switches, run.shares, run.mean_share) == ([], [], {}, None)
    assert summary(run)["losses"] == {"training": None}
    assert as_text(run) == "plain: 2 steps, training loss not finite"
    assert as_text(run_of([], "empty")) == "empty: 0 steps, no losses"


def test_newest_state_is_read(tmp_path):
    for step in (9, 10):
        write_run(tmp_path / f"checkpoint-{step}", [{"step": step, "loss": 1.0}], step)
    write_run(tmp_path / "checkpoint-old", [{"step": 99, "loss": 1.0}], 99)
    assert read_run(tmp_path).steps == 10
    write_run(tmp_path, [{"step": 8, "loss": 1.0}], 8)  # an earlier part of the run ended cleanly
    assert read_run(tmp_path).steps == 10
    write_run(tmp_path, [{"step": 12, "loss": 1.0}], 12)
    assert read_run(str(tmp_path)).steps == 12


DEEP = '{"global_step": 3, "log_history": ' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.mark.parametrize(
    "content",
    [
        *("{", "[]", '{"global_step": 3}', '{"global_step": "x", "log_history": []}', DEEP, b"\xff\xfe{}"),
        *('{"global_step": 3, "log_history": {}}', f'{{"global_step": {"9" * 5000}, "log_history": []}}'),
    ],
    ids=range(8),
)
def test_folders_without_a_state_are_named(tmp_path, content):
    with pytest.raises(CheckpointError, match=r"has no trainer_state\.json.*save_state"):
        read_run(tmp_path)
    (tmp_path / "trainer_state.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=r"trainer_state\.json is no state of a Trainer"):
        read_run(tmp_path)
