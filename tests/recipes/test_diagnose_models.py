"""The diagnosis benchmark on a tiny control: what it writes, and that exact training is the measure."""

from __future__ import annotations

import json

import pytest

from recipes.benchmarks import diagnose_models
from recipes.benchmarks.diagnose_models import Case, control


def tiny(count):
    return control(count, rows=2, tokens=16, pretraining=2)


def test_it_writes_the_diagnosis_and_the_check(tmp_path, monkeypatch):
    monkeypatch.setattr(diagnose_models, "RESULTS", tmp_path)
    monkeypatch.setitem(diagnose_models.CASES, "control", Case(tiny, 3, 1e-3, converted=True))
    result = diagnose_models.run("control", None)
    stored = json.loads((tmp_path / "diagnosis" / "control.json").read_text())
    assert stored["diagnosis"] == result["diagnosis"]
    assert stored["diagnosis"]["buffers"] == [2, 2]
    runs = stored["training"]["runs"]
    assert {"exact", "exact, reverse order", "rediscretize 1/1 c=4"} <= set(runs)
    assert all(len(run["losses"]) == 3 for run in runs.values())
    assert runs["exact"]["progress"] == 1.0
    # the same weights and masks at the start: exact and any exact-forward run begin with the same loss
    assert runs["rediscretize 1/1 c=4"]["losses"][0] == pytest.approx(runs["exact"]["losses"][0], rel=1e-2)
    assert (tmp_path / "diagnosis" / "control.png").exists()
