"""A checkpoint is whole or absent, whenever a process is killed or fails."""

from __future__ import annotations

import errno
import os
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import TrainerState

from hf_layerpar.errors import CheckpointError, PeerLostError
from hf_layerpar.ode.checkpoint import SavePretrained
from hf_layerpar.run.first_rank import tell_all, together
from hf_layerpar.sharding import LayerParallel
from hf_layerpar.training import checkpoints
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


# ---- a step of a save that fails on one rank
@contextmanager
def _failing(owner: Any, name: str, part: str, rank: int) -> Iterator[None]:
    """`owner.name` fails on a rank where a path among the arguments has `part`."""
    original = getattr(owner, name)

    def failing(*args: Any, **kwargs: Any) -> Any:
        if os.environ["RANK"] == str(rank) and any(isinstance(arg, str | Path) and part in str(arg) for arg in args):
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args, **kwargs)

    setattr(owner, name, failing)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def _full_disk(rank: int) -> Iterator[None]:
    """Files can't become large on a rank: what its libraries then say themselves."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if os.environ["RANK"] == str(rank):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


FAULTS: dict[str, tuple[Any, ...]] = {  # what fails, and for what
    "weights": (SavePretrained, "_write", "checkpoint-4"),
    "mkdir": (Path, "mkdir", "_checkpoint-4.partial"),
    "state": (TrainerState, "save_to_json", "checkpoint-4"),
    "scheduler": (torch, "save", "checkpoint-4.partial/scheduler"),
    "streams": (torch, "save", "checkpoint-4.partial/rng"),
    "sync": (checkpoints, "sync", "checkpoint-4"),
    "rename": (Path, "rename", "_checkpoint-4.partial"),
    "rotation": (Path, "rename", "_checkpoint-2.deleted"),
}


def train_with_a_fault(directory: str, settings: dict[str, Any], fault: str, rank: int) -> tuple[str, int]:
    """The error, and a sum over the ranks, which can all still talk."""
    said = "no error"
    try:
        with _full_disk(rank) if fault == "full" else _failing(*FAULTS[fault], rank):
            runs.train(directory, "llama", settings)
    except CheckpointError as error:
        said = str(error)
    number = torch.ones(1)
    dist.all_reduce(number)
    return said, int(number)


@pytest.mark.parametrize("fault", ["full", *FAULTS])
def test_any_failure_of_a_save_is_one_error_on_all_ranks(fault: str, ranks2: RankPool, tmp_path: Path) -> None:
    settings = SAVING | {"save_total_limit": 1}
    first, second = ranks2.run(train_with_a_fault, str(tmp_path), settings, fault, 0)
    assert first == second
    assert first[1] == 2
    assert ("File too large" if fault == "full" else "No space left on device") in first[0]
    assert "{0: " in first[0], "the rank is named"
    left = {path.name for path in tmp_path.iterdir()}
    if fault == "rotation":
        assert "checkpoint-4 is written, but older checkpoints were not removed" in first[0]
        assert left == {"checkpoint-2", "checkpoint-4"}
    else:
        assert f"checkpoint-{2 if fault == 'full' else 4} was not written" in first[0]
        assert left == (set() if fault == "full" else {"checkpoint-2"}), "what could not be finished is removed"


def test_a_replacement_that_fails_leaves_the_old_one(ranks2: RankPool, tmp_path: Path) -> None:
    settings = SAVING | {"max_steps": 4}
    ranks2.run(runs.train, str(tmp_path), "llama", settings)
    before = (tmp_path / "checkpoint-4" / "trainer_state.json").read_bytes()
    for fault in ("rename", "weights"):
        first, _ = ranks2.run(train_with_a_fault, str(tmp_path), settings, fault, 0)
        assert "checkpoint-4 was not written" in first[0]
        assert (tmp_path / "checkpoint-4" / "trainer_state.json").read_bytes() == before
        assert sorted(os.listdir(tmp_path)) == ["checkpoint-2", "checkpoint-4"]


def save_model_with_a_fault(directory: str) -> list[str]:
    run = runs.trainer(directory, "llama", {"lp_size": 2})
    said = []
    for fault in (_full_disk(0), _failing(os, "makedirs", "model", 0)):
        try:
            with fault:
                run.save_model(f"{directory}/model")
        except CheckpointError as error:
            said.append(str(error))
        run.evaluate(runs.Samples("llama", 4))
    return said


def test_a_model_that_can_not_be_saved(ranks2: RankPool, tmp_path: Path) -> None:
    first, second = ranks2.run(save_model_with_a_fault, str(tmp_path))
    assert first == second
    assert len(first) == 2
    assert all("the model was not written to" in said and "{0: " in said for said in first)


# ---- a rank that dies in a save
def train_and_die_in(directory: str, settings: dict[str, Any], name: str, rank: int) -> None:
    """A rank is killed in its second call of a function."""
    owner: Any = LayerParallel if name == "state_dict" else checkpoints
    original, calls = getattr(owner, name), []

    def killed(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == 2 and os.environ["RANK"] == str(rank):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, killed)
    runs.train(directory, "llama", settings)


@pytest.mark.parametrize(
    ("dead", "name"), [(0, "save_optimizer"), (2, "save_optimizer"), (0, "state_dict"), (1, "state_dict")]
)
def test_a_rank_killed_in_a_save_is_named(dead: int, name: str, tmp_path: Path) -> None:
    began = time.monotonic()
    ended = outcomes_of_ranks(train_and_die_in, 3, str(tmp_path), SAVING | {"lp_size": 3}, name, dead)
    assert time.monotonic() - began < 60
    assert ended.pop(dead) == "exit code -9"
    for said in ended:
        assert f"lost world rank {dead} during" in said
        assert "PeerLostError" in said
    assert "checkpoint-4" not in os.listdir(tmp_path)


def outcomes_told() -> tuple[dict[int, Any], str]:
    said = tell_all(dist.get_rank() * 10, dist.group.WORLD, "a test")
    try:
        with together("nothing was done", dist.group.WORLD):
            if dist.get_rank() > 0:
                raise ValueError(f"no {dist.get_rank()}")
    except CheckpointError as error:
        return said, str(error)
    return said, "no error"


def test_everybody_hears_everybody(ranks3: RankPool) -> None:
    text = "nothing was done: by world rank: {1: 'ValueError: no 1', 2: 'ValueError: no 2'}"
    assert ranks3.run(outcomes_told) == [({0: 0, 1: 10, 2: 20}, text)] * 3


def hang_and_tell() -> str:
    group = dist.new_group(timeout=timedelta(seconds=2))
    if dist.get_rank() == 1:
        time.sleep(5)
        return ""
    try:
        tell_all(None, group, "a test")
    except PeerLostError as error:
        return str(error)
    return "no error"


def test_a_hung_rank_is_named() -> None:
    assert "lost world rank 1 during a test" in outcomes_of_ranks(hang_and_tell, 2)[0]
