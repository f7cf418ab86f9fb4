"""A checkpoint is whole or absent, whenever a process is killed or fails."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.multiproc import RankPool, outcomes_of_ranks
from tests.training import runs, scenarios

SAVING = {"lp_size": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}


def test_killed_while_writing(ranks2: RankPool, tmp_path: Path) -> None:
    whole = ranks2.run(runs.train, str(tmp_path / "whole"), "llama", SAVING)[0]
    directory = tmp_path / "killed"
    doomed = RankPool(2)
    with pytest.raises(RuntimeError, match=r"exit code -9|failed"):
        doomed.run(scenarios.train_and_die, str(directory), SAVING, 4, "weights")
    left = sorted(os.listdir(directory))
    assert left == ["_checkpoint-4.partial", "checkpoint-2"]
    assert "model.safetensors" in os.listdir(directory / left[0]), "killed too early to show anything"
    again = ranks2.run(runs.train, str(directory), "llama", SAVING, True)[0]
    assert again["weights"] == whole["weights"]
    assert sorted(os.listdir(directory)) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_killed_while_replacing_the_only_checkpoint(ranks1: RankPool, tmp_path: Path) -> None:
    settings = SAVING | {"lp_size": 1, "max_steps": 2}
    whole = ranks1.run(runs.train, str(tmp_path), "llama", settings)[0]
    doomed = RankPool(1)
    with pytest.raises(RuntimeError, match="exit code -9"):
        doomed.run(scenarios.train_and_die, str(tmp_path), settings, 2, "renames")
    assert "checkpoint-2" not in os.listdir(tmp_path)
    again = ranks1.run(runs.train, str(tmp_path), "llama", settings, True)[0]
    assert again["weights"] == whole["weights"]
    assert "checkpoint-2" in os.listdir(tmp_path)


def test_a_failure_on_one_rank_is_an_error_on_all(ranks2: RankPool, tmp_path: Path) -> None:
    for message in ranks2.run(scenarios.train_with_a_failing_rank, str(tmp_path), SAVING):
        assert "checkpoint-4 was not written" in message
        assert "{1: 'OSError: No space left on device'}" in message
    assert "checkpoint-2" in os.listdir(tmp_path)
    assert "checkpoint-4" not in os.listdir(tmp_path)


@pytest.mark.parametrize("when", ["between steps", "mid-step"])
def test_a_killed_rank_ends_the_others(when: str, tmp_path: Path) -> None:
    began = time.monotonic()
    ended = outcomes_of_ranks(scenarios.train_until_a_rank_dies, 2, str(tmp_path), SAVING, when)
    assert time.monotonic() - began < 60
    assert ended[1] == "exit code -9"
    assert "PeerLostError: rank 0 of 2 lost another one during" in ended[0]
    assert "restart all ranks, from the last checkpoint" in ended[0]
