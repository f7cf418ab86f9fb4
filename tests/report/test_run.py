"""What the records, the summary and the text say of a made-up log history."""

from __future__ import annotations

import json
import math

import pytest

from hf_layerpar.errors import CheckpointError
from hf_layerpar.report.run import UNKNOWN, Span, as_text, read_run, run_of, summary
from tests.report.logs import CHEAP, EXACT, RICH, history, write_run


def test_records_of_a_history():
    run = run_of(history(), "here")
    assert (run.name, run.steps, len(run.training), len(run.checks)) == ("here", 100, 10, 4)
    assert run.training[0] == (10, pytest.approx(4.8))
    assert run.validation == [(50, pytest.approx(4.1)), (100, pytest.approx(3.1))]
    assert run.factors == {"forward": [(step, 0.3) for step in range(10, 101, 10)]}
    assert run.series("cosine")[-1] == (80, 0.92)
    assert run.checks[1].setting == 1
    assert run.checks[1].lipschitz == (1.0, 1.4, 1.8, pytest.approx(2.2))


def test_settings_switches_and_shares():
    run = run_of(history(), "here")
    assert run.spans == [Span(CHEAP, 0, 0, 40), Span(RICH, 1, 40, 80), Span(EXACT, 2, 80, 100)]
    assert [(c.step, c.reason[:4]) for c in run.switches] == [(40, "bias"), (80, "conv")]
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
    assert found["switches"][0] == {"step": 40, "to": RICH, "reason": "bias to noise 0.6 > 0.5"}
    assert found["losses"] == {"training": pytest.approx(3.0), "validation": pytest.approx(3.1)}
    assert found["last_readings"]["rho_forward"] == pytest.approx(80 / 60)
    lines = as_text(run, [serial]).splitlines()
    assert lines[0] == "runs/lp: 100 steps, training loss 3.0000, validation loss 3.1000"
    assert lines[1].startswith("against runs/serial: ")
    assert lines[1].endswith("(validation: this run +0.2500)")
    assert lines[2:5] == [f" {p}.0 % of the steps with {n}" for p, n in ((40, CHEAP), (40, RICH), (20, EXACT))]
    assert lines[5] == "predicted step time, mean: 0.525 of serial (1.90x)"
    assert lines[-3:] == [
        "2 switches in 4 checks:",
        f"  step 40: to {RICH}: bias to noise 0.6 > 0.5",
        f"  step 80: to {EXACT}: convergence factor 1.2 > 1",
    ]


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


@pytest.mark.parametrize("content", ["{", "[]", '{"global_step": 3}'])
def test_folders_without_a_state_are_named(tmp_path, content):
    with pytest.raises(CheckpointError, match=r"has no trainer_state\.json.*save_state"):
        read_run(tmp_path)
    (tmp_path / "trainer_state.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"trainer_state\.json is no state of a Trainer"):
        read_run(tmp_path)
