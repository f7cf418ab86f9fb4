"""`torchrun --max-restarts`: a run with a fault comes back from its last whole checkpoint and ends as if none was."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.multiproc import free_port
from tests.problems import assert_same

pytestmark = pytest.mark.slow


def run(kind: str, folder: Path, processes: int, lp_size: int) -> Path:
    """The folder of the model that a run under torchrun leaves."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--max_restarts", "1"]
    command += ["--master_port", str(free_port()), str(Path(__file__).with_name("restarting.py"))]
    command += [kind, str(folder), str(lp_size)]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / "fault").exists() == (kind != "none")
    return folder / "model"


@pytest.mark.parametrize(("processes", "lp_size"), [(2, 2), (4, 2)])
def test_a_run_comes_back_by_itself(processes, lp_size, tmp_path):
    expected = load_file(run("none", tmp_path / "none", processes, lp_size) / "model.safetensors")
    for kind in ("killed", "exception", "hung"):
        assert_same(load_file(run(kind, tmp_path / kind, processes, lp_size) / "model.safetensors"), expected)


def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    """What was saved by two lp ranks is gone on with by one process, and by three."""
    expected = load_file(run("none", tmp_path / "none", 2, 2) / "model.safetensors")
    for processes in (1, 3):
        folder = tmp_path / str(processes)
        run("killed", folder, 2, 2)
        for step in (6, 8):  # as if it had ended before
            path = folder / f"checkpoint-{step}"
            subprocess.run(["rm", "-r", str(path)], check=True)
        assert_same(load_file(run("killed", folder, processes, processes) / "model.safetensors"), expected)
