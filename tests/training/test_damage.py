"""A checkpoint with a damaged or lost file: an error that names it, on all ranks, before anything is loaded."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from hf_layerpar.checkpoint.tensors import TensorFolder
from hf_layerpar.errors import CheckpointError
from hf_layerpar.ode.convert import convert_to_ode
from hf_layerpar.training.trainer import LayerParallelTrainer
from tests.multiproc import RankPool
from tests.training.runs import Samples, arguments, build, digest, wait_for_all

SETTINGS = {"lp_size": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 2}
FILES = (
    *("config.json", "model.safetensors", "exact_weights-00001-of-00002.safetensors", "trainer_state.json"),
    *("scheduler.pt", "optimizer/__0_0.distcp", "optimizer/__1_0.distcp", "optimizer/.metadata", "optimizer/groups.pt"),
    "rng_state_0.pth",
)


BEST = SETTINGS | {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}


def _trainer(directory: str, settings: dict[str, Any], **more: Any) -> LayerParallelTrainer:
    model = convert_to_ode(build("llama"), step_size=1 / 3, num_steps=4)
    run = LayerParallelTrainer(model, arguments(directory, **settings), train_dataset=Samples("llama", 64), **more)
    run.remove_callback(hf.PrinterCallback)
    return run


def _digest(run: LayerParallelTrainer) -> str:
    """Of the tensors on this rank."""
    return digest({name: t.detach().clone() for name, t in run.model.state_dict().items()})  # type: ignore[union-attr]


def write(directory: str) -> None:
    _trainer(directory, SETTINGS).train()


def resume(directory: str, damaged: list[str]) -> list[tuple[str, bool]]:
    """(error, whether the model is what it was) for each of the checkpoints."""
    run = _trainer(directory, SETTINGS | {"max_steps": 3, "save_strategy": "no"})
    ended = []
    for checkpoint in damaged:
        before = _digest(run)
        try:
            run.train(resume_from_checkpoint=checkpoint)
            said = "no error"
        except CheckpointError as error:
            said = str(error)
        ended.append((said, _digest(run) == before and run.optimizer is None))
    return ended


@pytest.fixture(scope="module")
def whole(ranks2: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    ranks2.run(write, str(directory))
    return directory / "checkpoint-2"


def _truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _empty(path: Path) -> None:
    os.truncate(path, 0)


def _garbage(path: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(path.stat().st_size))


KINDS: dict[str, Callable[[Path], Any]] = {
    "truncated": _truncated,
    "empty": _empty,
    "garbage": _garbage,
    "missing": Path.unlink,
}


def _refused(whole: Path, file: str, kinds: dict[str, Callable[[Path], Any]], ranks: RankPool, tmp_path: Path) -> None:
    copies = []
    for kind, damage in kinds.items():
        copies.append(str(shutil.copytree(whole, tmp_path / kind)))
        damage(tmp_path / kind / file)
    first, second = ranks.run(resume, str(tmp_path / "run"), copies)
    for kind, mine, theirs in zip(kinds, first, second, strict=True):
        assert file in mine[0], f"{kind}: {mine[0]}"
        assert "copy it anew" in mine[0] or "give a checkpoint-N directory" in mine[0]
        assert mine == theirs == (mine[0], True), f"{kind}: half loaded"


@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_named_and_nothing_is_loaded(
    file: str, whole: Path, ranks2: RankPool, tmp_path: Path
) -> None:
    _refused(whole, file, KINDS, ranks2, tmp_path)


def test_files_that_say_something_else(whole: Path, ranks2: RankPool, tmp_path: Path) -> None:
    def say(text: str) -> Callable[[Path], Any]:
        return lambda path: path.write_text(text)

    def turn(path: Path) -> None:
        """One byte in the middle of a state, which no reader looks at."""
        name, folder = "lm_head.weight.exp_avg", TensorFolder(path.parent)
        shape, dtype = folder.shapes[name]
        state = {name: torch.empty(shape, dtype=dtype)}
        folder.read(state)
        content = bytearray(path.read_bytes())
        content[content.index(state[name].numpy().tobytes()) + 100] ^= 255
        path.write_bytes(content)

    optimizer = "optimizer/__1_0.distcp"
    other = json.dumps(json.loads((whole / "config.json").read_text()) | {"hf_layerpar": {"step_size": "x"}})
    for number, (file, kinds) in enumerate(
        (
            (
                "trainer_state.json",
                {"list": say("[]"), "bare": say("{}"), "strange": say('{"global_step": 2, "x": 1}')},
            ),
            ("contents.json", {"list": say("[]"), "bare": say("{}"), "number": say('{"files": 3}')}),
            (optimizer, {"turned": turn}),
            ("rng_state_0.pth", {"other": lambda path: shutil.copy(whole / "scheduler.pt", path)}),
        )
    ):
        (tmp_path / str(number)).mkdir()
        _refused(whole, file, kinds, ranks2, tmp_path / str(number))
    shutil.copytree(whole, tmp_path / "settings")
    (tmp_path / "settings" / "config.json").write_text(other)
    first, second = ranks2.run(resume, str(tmp_path / "run"), [str(tmp_path / "settings")])
    assert first == second
    assert "step_size='x'" in first[0][0]
    assert first[0][1]


def test_a_folder_that_is_none(ranks2: RankPool, tmp_path: Path) -> None:
    for said in ranks2.run(resume, str(tmp_path), [str(tmp_path / "nowhere"), str(tmp_path)]):
        assert "nowhere is no directory" in said[0][0]
        assert "no whole checkpoint to resume from" in said[1][0]


def lose_the_best(directory: str) -> tuple[str, bool]:
    """The error of a run whose best checkpoint is damaged before it ends; whether the model is what it was."""
    before: list[str] = []

    def damage() -> None:
        if run.args.should_save:
            _truncated(Path(str(run.state.best_model_checkpoint)) / "model.safetensors")
        wait_for_all(run)
        before.append(_digest(run))
        load()

    run = _trainer(directory, BEST, eval_dataset=Samples("llama", 4))
    load, run._load_best_model = run._load_best_model, damage  # type: ignore[method-assign]
    try:
        run.train()
    except CheckpointError as error:
        return str(error), before == [_digest(run)]
    return "no error", False


def test_a_damaged_best_model(ranks2: RankPool, tmp_path: Path) -> None:
    first, second = ranks2.run(lose_the_best, str(tmp_path))
    assert first == second == (first[0], True)
    assert "the best model can't be loaded from" in first[0]
    assert "model.safetensors is damaged" in first[0]


def weights_only(directory: str, checkpoint: str) -> int:
    run = _trainer(directory, SETTINGS | {"max_steps": 3, "save_strategy": "no"})
    run.train(resume_from_checkpoint=checkpoint)
    return run.state.global_step


def test_what_is_left_out_on_purpose(whole: Path, ranks2: RankPool, tmp_path: Path) -> None:
    """Without the training state, and the file that says it was there, a run goes on from the weights."""
    left = shutil.copytree(whole, tmp_path / "left")
    shutil.rmtree(left / "optimizer")
    for name in ("contents.json", "scheduler.pt", "rng_state_0.pth"):
        (left / name).unlink()
    assert ranks2.run(weights_only, str(tmp_path), str(left)) == [3, 3]


def test_the_earlier_format_is_refused(whole: Path, ranks2: RankPool, tmp_path: Path) -> None:
    old = shutil.copytree(whole, tmp_path / "old")
    shutil.rmtree(old / "optimizer")
    (old / "contents.json").unlink()
    (old / "optimizer-00000-of-00002.pt").write_bytes(b"")
    first, second = ranks2.run(resume, str(tmp_path / "run"), [str(old)])
    assert first == second
    assert "remove contents.json and optimizer-*.pt to go on from the weights alone" in first[0][0]
    (old / "optimizer-00000-of-00002.pt").unlink()
    assert ranks2.run(weights_only, str(tmp_path), str(old)) == [3, 3]
