"""A recipe's `main` on several processes that are kept for the next; `tests/hub/test_recipe_push.py` starts them as a
user does."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import multiprocessing as mp
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.multiproc import run_ranks


def run_main(recipe: str, argv: Sequence[str]) -> str:
    """What it prints. The processes stay, so their group does too."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setattr(dist, "destroy_process_group", lambda: None)
        patch.setattr(mp.current_process(), "name", "MainProcess")  # of another transformers' masks want a loader
        importlib.import_module(f"recipes.{recipe}").main(argv)
    return said.getvalue()


def run_recipe(recipe: str, folder: Path, processes: int, *options: str) -> str:
    """Runs recipes/<recipe>.py into `folder`; what its main process prints."""
    return run_ranks(run_main, processes, recipe, [*options, "--output_dir", str(folder)], timeout=300)[0]


def result_of(recipe: str, folder: Path, processes: int, *options: str) -> dict[str, Any]:
    """What result.json of recipes/<recipe>.py in `folder` holds after a run on so many processes."""
    run_recipe(recipe, folder, processes, *options)
    return json.loads((folder / "result.json").read_text())


def run_script(name: str, argv: Sequence[str]) -> None:
    """A benchmark as one of its own ranks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *argv])
        patch.setattr(dist, "init_process_group", lambda *_, **__: None)
        patch.setattr(dist, "destroy_process_group", lambda: None)
        importlib.import_module(f"recipes.benchmarks.{name}").main()


def benchmark(name: str, output: Path, *argv: str) -> dict[str, Any]:
    """What recipes/benchmarks/<name>.py writes, its ranks being processes that are kept for the next."""

    def launch(processes: int, script: Path, arguments: Sequence[str], timeout: float = 400.0) -> None:
        run_ranks(run_script, processes, script.stem, arguments, timeout=timeout)

    with pytest.MonkeyPatch.context() as patch:
        for place in ("launch", name):
            patch.setattr(importlib.import_module(f"recipes.benchmarks.{place}"), "launch", launch, raising=False)
        patch.setattr(sys, "argv", [f"{name}.py", *argv, "--output", str(output)])
        importlib.import_module(f"recipes.benchmarks.{name}").main()
    return json.loads(output.read_text(encoding="utf-8"))


def assert_train_alike(ours: Sequence[float], theirs: Sequence[float], tight: int = 5) -> None:
    """Losses of two runs of the same steps. Rounding differs between processors, and training makes it grow: only the
    first `tight` steps are compared closely, what comes later by its course."""
    assert len(ours) == len(theirs) >= tight
    assert ours[:tight] == pytest.approx(theirs[:tight], abs=1e-4)
    assert ours == pytest.approx(theirs, abs=0.1)
