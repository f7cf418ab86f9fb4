"""Evaluation and prediction: every sample once, in order, on every mesh."""

from __future__ import annotations

import numpy as np
import pytest

from tests.multiproc import RankPool
from tests.training import evaluating

COUNT = 37  # no batch size or number of ranks divides it


@pytest.mark.parametrize("family", ["bert_classifier", "llama"])
def test_predictions_are_those_of_one_process(
    family: str, ranks1: RankPool, ranks2: RankPool, ranks3: RankPool, ranks4: RankPool, tmp_path
) -> None:
    one = ranks1.run(evaluating.evaluate, str(tmp_path), family, {}, COUNT)[0]
    assert len(one["labels"]) == COUNT
    meshes = [(ranks2, 1), (ranks2, 2), (ranks3, 3), (ranks4, 2)]
    for pool, lp_size in meshes:
        for rank in pool.run(evaluating.evaluate, str(tmp_path), family, {"lp_size": lp_size}, COUNT):
            assert rank["labels"] == one["labels"]
            assert rank["shape"] == one["shape"]
            np.testing.assert_allclose(rank["predictions"], one["predictions"], atol=1e-5)
            assert rank["eval_sum"] == pytest.approx(one["eval_sum"], rel=1e-5)
    # the mean over batches depends on which samples share one, as in stock; at dp 1 the batches are the same
    lp2 = ranks2.run(evaluating.evaluate, str(tmp_path), family, {"lp_size": 2}, COUNT)[0]
    assert lp2["eval_loss"] == pytest.approx(one["eval_loss"], abs=1e-5)
    dp2, grid = (
        pool.run(evaluating.evaluate, str(tmp_path), family, {"lp_size": lp_size}, COUNT)[0]["eval_loss"]
        for pool, lp_size in ((ranks2, 1), (ranks4, 2))
    )
    assert grid == pytest.approx(dp2, abs=1e-5)
    assert dp2 == pytest.approx(one["eval_loss"], abs=0.05), "not counted per dp rank"


@pytest.mark.parametrize("family", ["bert_classifier", "llama"])
def test_micro_batches_change_nothing(family: str, ranks1: RankPool, ranks2: RankPool, tmp_path) -> None:
    one = ranks1.run(evaluating.evaluate, str(tmp_path), family, {}, 7)[0]
    for rank in ranks2.run(evaluating.evaluate, str(tmp_path), family, {"lp_size": 2, "micro_batches": 2}, 7):
        assert rank["eval_loss"] == pytest.approx(one["eval_loss"], abs=1e-5)
        np.testing.assert_allclose(rank["predictions"], one["predictions"], atol=1e-5)


def test_ragged_predictions(ranks1: RankPool, ranks4: RankPool, tmp_path) -> None:
    settings = {"per_device_eval_batch_size": 1}
    one = ranks1.run(evaluating.evaluate, str(tmp_path), "llama", settings, 9, True)[0]
    grid = ranks4.run(evaluating.evaluate, str(tmp_path), "llama", settings | {"lp_size": 2}, 9, True)[0]
    assert grid["labels"] == one["labels"]
    np.testing.assert_allclose(grid["predictions"], one["predictions"], atol=1e-5)


def test_objects_are_gathered_too(ranks2: RankPool, ranks1: RankPool, tmp_path) -> None:
    """In every evaluation, where stock forgets about it after the first one."""
    one = ranks1.run(evaluating.evaluate_objects, str(tmp_path), {}, 7)[0]
    assert one == [[i % 2 for i in range(7)]] * 3
    for lp_size in (1, 2):
        assert ranks2.run(evaluating.evaluate_objects, str(tmp_path), {"lp_size": lp_size}, 7) == [one, one]
