"""The lp ranks of one dp rank see one batch, whatever their collators and dataloader workers do."""

from __future__ import annotations

import pytest

from tests.multiproc import RankPool
from tests.training import scenarios


@pytest.mark.parametrize("workers", [0, 2])
def test_collators_that_differ_by_process(workers: int, ranks1: RankPool, ranks2: RankPool, tmp_path) -> None:
    settings = {"dataloader_num_workers": workers}
    alone = ranks1.run(scenarios.train_with_rank_collator, str(tmp_path), settings)[0]
    first, second = ranks2.run(scenarios.train_with_rank_collator, str(tmp_path), settings | {"lp_size": 2})
    assert first["weights"] == alone["weights"]
    assert first["eval_loss"] == second["eval_loss"] == alone["eval_loss"]
    assert first["stream"] == second["stream"] == alone["stream"]


@pytest.mark.parametrize("workers", [0, 2])
def test_random_data_is_the_same_at_every_lp_size(workers: int, ranks2: RankPool, ranks4: RankPool, tmp_path) -> None:
    settings = {"dataloader_num_workers": workers, "max_steps": 6}
    flat = ranks2.run(scenarios.train_noisy, str(tmp_path), settings)[0]
    grid = ranks4.run(scenarios.train_noisy, str(tmp_path), settings | {"lp_size": 2})[0]
    assert grid["weights"] == flat["weights"]


def test_random_data_is_new_in_every_epoch(ranks1: RankPool, tmp_path) -> None:
    settings = {"max_steps": 4, "train_sampling_strategy": "sequential", "learning_rate": 0.0, "dropout": 0.0}
    losses = ranks1.run(scenarios.train_noisy, str(tmp_path), settings, None, 4)[0]["losses"]
    assert len(set(losses)) == 4
