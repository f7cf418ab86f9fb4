"""A checkpoint is whole or absent, whenever a process is killed or fails."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from transformers import TrainerCallback, TrainerState

from hf_layerpar.checkpoint import pieces, saving
from hf_layerpar.checkpoint.trainer_state import StateWriting
from hf_layerpar.errors import CheckpointError, PeerLostError
from hf_layerpar.ode.saving import SavePretrained
from hf_layerpar.run.first_rank import tell_all, together
from hf_layerpar.sharding import LayerParallel
from hf_layerpar.training import checkpoints
from tests.multiproc import RankPool, outcomes_of_ranks, run_ranks
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
    "weights": (SavePretrained, "write", "checkpoint-4"),
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
    for fault in (_full_disk(0), _failing(Path, "mkdir", "model", 0)):
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
    owner: Any = LayerParallel if name == "state_dict" else StateWriting
    original, calls = getattr(owner, name), []

    def killed(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == 2 and os.environ["RANK"] == str(rank):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, killed)
    runs.train(directory, "llama", settings)


@pytest.mark.parametrize(("dead", "name"), [(0, "write"), (2, "write"), (0, "state_dict"), (1, "state_dict")])
def test_a_rank_killed_in_a_save_is_named(dead: int, name: str, tmp_path: Path) -> None:
    began = time.monotonic()
    ended = outcomes_of_ranks(train_and_die_in, 3, str(tmp_path), SAVING | {"lp_size": 3}, name, dead)
    assert time.monotonic() - began < 60
    assert ended.pop(dead) == "exit code -9"
    for said in ended:
        assert f"lost world rank {dead} during" in said
        assert "PeerLostError" in said
    assert "checkpoint-4" not in os.listdir(tmp_path)


# ---- every phase of a save, on ranks of which each writes its own
PHASES: dict[str, tuple[Any, str, str]] = {  # what a rank is in, and for what
    "weights": (pieces, "write_tensors", "model-"),
    "index": (Path, "write_text", "index.json"),
    "optimizer": (StateWriting, "write", "optimizer"),
    "metadata": (FileSystemWriter, "finish", "optimizer"),
    "contents": (Path, "write_text", "contents.json"),
    "rename": (Path, "rename", "_checkpoint-4.partial"),
}


def train_in_pieces(
    directory: str, settings: dict[str, Any], fault: str = "none", phase: str = "", rank: int = 0, resume: Any = None
) -> dict[str, Any]:
    """A run whose model is never gathered. fault: what a rank meets in a phase of the second save."""
    owner, name, part = PHASES.get(phase, (pieces, "write_tensors", ""))
    original, collected, saving.COLLECTED = getattr(owner, name), saving.COLLECTED, 0

    def faulty(*args: Any, **kwargs: Any) -> Any:
        where = str(args[0]._writer.path if isinstance(args[0], StateWriting) else getattr(args[0], "path", args[0]))
        if os.environ["RANK"] == str(rank) and "checkpoint-4" in where and part in where and fault != "none":
            if fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args, **kwargs)

    setattr(owner, name, faulty)
    try:
        return runs.train(directory, "llama", settings, resume)
    except CheckpointError as error:
        return {"error": str(error)}
    finally:
        saving.COLLECTED = collected
        setattr(owner, name, original)


def _faults() -> Iterator[Any]:
    for ranks, lp_size in ((2, 2), (3, 3), (4, 2)):
        for phase in PHASES:
            others = {"weights": (lp_size - 1,), "optimizer": (ranks - 1,)}
            for rank in (0, *others.get(phase, ())):
                for fault in ("killed", "full"):
                    quick = (ranks, phase, rank, fault) in {(4, "optimizer", 3, "killed"), (4, "weights", 1, "full")}
                    marks = [] if quick else [pytest.mark.slow]
                    yield pytest.param(ranks, lp_size, phase, rank, fault, marks=marks)


@pytest.mark.parametrize(("ranks", "lp_size", "phase", "rank", "fault"), _faults())
def test_a_fault_in_any_phase(ranks: int, lp_size: int, phase: str, rank: int, fault: str, tmp_path: Path) -> None:
    """All ranks get one error, and the last whole checkpoint is resumed as if there had been no fault."""
    settings = SAVING | {"lp_size": lp_size, "max_steps": 4}
    began = time.monotonic()
    if fault == "killed":
        ended = outcomes_of_ranks(train_in_pieces, ranks, str(tmp_path), settings, fault, phase, rank)
        assert ended.pop(rank) == "exit code -9"
        for text in ended:
            assert "PeerLostError" in text
            assert f"lost world rank {rank} during" in text
    else:
        first, *others = run_ranks(train_in_pieces, ranks, str(tmp_path), settings, fault, phase, rank)
        assert others == [first] * (ranks - 1)
        assert "checkpoint-4 was not written" in first["error"]
        assert f"{{{rank}: 'OSError: [Errno 28]" in first["error"]
        assert os.listdir(tmp_path) == ["checkpoint-2"]
    assert time.monotonic() - began < 60
    assert "checkpoint-4" not in os.listdir(tmp_path)
    whole = run_ranks(train_in_pieces, ranks, str(tmp_path / "whole"), settings | {"save_strategy": "no"})[0]
    again = run_ranks(train_in_pieces, ranks, str(tmp_path), settings, "none", "", 0, True)[0]
    assert again["weights"] == whole["weights"]
    assert "checkpoint-4" in os.listdir(tmp_path)


# ---- beside the training
def train_beside(directory: str, settings: dict[str, Any], fails: bool = False) -> dict[str, Any]:
    """A run whose first checkpoint is not written before the third step is through."""
    go, original, seen = threading.Event(), StateWriting.write, []

    class Steps(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                seen.extend(sorted(os.listdir(directory)))
                go.set()

    def later(states: StateWriting) -> None:
        if not go.wait(60):
            raise TimeoutError("training waits for its checkpoint")
        if fails and os.environ["RANK"] == "1":
            raise OSError("No space left on device")
        original(states)

    StateWriting.write, collected, saving.COLLECTED = later, saving.COLLECTED, 0  # type: ignore[method-assign]
    try:
        return runs.train(directory, "llama", settings, callbacks=[Steps()]) | {"seen": seen}
    except CheckpointError as error:
        return {"error": str(error)}
    finally:
        StateWriting.write, saving.COLLECTED = original, collected  # type: ignore[method-assign]


def _contents(checkpoint: Path) -> dict[str, bytes]:
    names = json.loads((checkpoint / "contents.json").read_text())["files"]
    chosen = [name for name in names if name.endswith((".safetensors", ".distcp", ".pth"))]
    return {name: (checkpoint / name).read_bytes() for name in chosen}


def test_checkpoints_are_written_beside_the_training(ranks2: RankPool, tmp_path: Path) -> None:
    whole = ranks2.run(train_in_pieces, str(tmp_path / "a"), SAVING)[0]
    beside = ranks2.run(train_beside, str(tmp_path / "b"), SAVING | {"async_save": True, "save_total_limit": 2})[0]
    assert beside["weights"] == whole["weights"]
    assert beside["seen"] == ["_checkpoint-2.partial"]
    assert sorted(os.listdir(tmp_path / "b")) == ["checkpoint-4", "checkpoint-6"]
    for step in (4, 6):
        found = _contents(tmp_path / "b" / f"checkpoint-{step}")
        assert found == _contents(tmp_path / "a" / f"checkpoint-{step}")
        assert len(found) == 5
    first, second = ranks2.run(train_beside, str(tmp_path / "c"), SAVING | {"async_save": True}, True)
    assert first == second
    assert "checkpoint-2 was not written" in first["error"]
    assert "{1: 'OSError: No space left on device'}" in first["error"]
    assert not os.listdir(tmp_path / "c")


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
