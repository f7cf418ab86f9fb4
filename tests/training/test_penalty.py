"""The increment penalty in the Trainer: logged beside the loss, and scaled as the loss is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.multiproc import RankPool
from tests.training import runs

SETTINGS = {"increment_penalty": 5.0, "dropout": 0.0, "per_device_train_batch_size": 8}


def test_logged_beside_the_loss(ranks1: RankPool, ranks2: RankPool, tmp_path: Path) -> None:
    plain = ranks1.run(runs.train, str(tmp_path), "bert_classifier", SETTINGS | {"increment_penalty": 0.0})[0]
    assert not any("lp_penalty" in entry for entry in plain["logs"])
    one = ranks1.run(runs.train, str(tmp_path), "bert_classifier", SETTINGS)[0]
    two = ranks2.run(runs.train, str(tmp_path), "bert_classifier", SETTINGS | {"lp_size": 2})[0]
    assert one["losses"][0] == plain["losses"][0]  # the logged loss is the model's own
    assert one["weights"] == two["weights"] != plain["weights"]
    penalties = [[entry["lp_penalty"] for entry in run["logs"]] for run in (one, two)]
    assert penalties[0] == pytest.approx(penalties[1], rel=1e-6)
    assert 0 < penalties[0][-1] < penalties[0][0]


@pytest.mark.parametrize(("family", "alpha"), [("bert_classifier", 5.0), ("llama", 5.0)])
def test_accumulated_pieces_and_dp_ranks_count_as_one_batch(
    family: str, alpha: float, ranks1: RankPool, ranks2: RankPool, tmp_path: Path
) -> None:
    """For heads that divide their loss by the number of items (Llama) and for those that don't (BERT)."""
    settings = SETTINGS | {"increment_penalty": alpha}
    whole = ranks1.run(runs.train, str(tmp_path), family, settings)[0]
    plain = ranks1.run(runs.train, str(tmp_path), family, settings | {"increment_penalty": 0.0})[0]
    assert whole["norms"] != pytest.approx(plain["norms"], rel=0.02)
    pieces = settings | {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    accumulated = ranks1.run(runs.train, str(tmp_path), family, pieces)[0]
    spread = ranks2.run(runs.train, str(tmp_path), family, settings | {"per_device_train_batch_size": 4})[0]
    for run in (accumulated, spread):
        assert run["norms"] == pytest.approx(whole["norms"], rel=1e-3)
