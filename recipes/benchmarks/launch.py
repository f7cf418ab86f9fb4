"""Starts a script of this repository on 1, 2 or 4 CPU processes, the way a user would, one thread a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "recipes" / "configs"
RESULTS = ROOT / "recipes" / "benchmarks" / "results"


def launch(processes: int, script: Path, arguments: Sequence[str], timeout: float = 1800.0) -> str:
    """Output of `accelerate launch --config_file recipes/configs/cpu_<processes>.yaml script arguments`.

    Raises RuntimeError with the end of the output when it fails, subprocess.TimeoutExpired after `timeout` seconds.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(CONFIGS / f"cpu_{processes}.yaml"), str(script), *arguments]
    # glibc gives large blocks back to the system when they are freed, and takes new pages, zeroed one by one, for the
    # next graph: what is timed must not depend on how much a side frees at a time
    memory = {"MALLOC_TRIM_THRESHOLD_": str(1 << 33), "MALLOC_MMAP_THRESHOLD_": str(1 << 33)}
    environment = os.environ | memory | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-6000:]}")
    return done.stdout


def found_by_rank(processes: int, script: Path, arguments: Sequence[str], timeout: float = 1800.0) -> list[Any]:
    """What each rank of a launched script writes to "<rank>.json" in the folder that `--rank_folder` gives it."""
    with tempfile.TemporaryDirectory() as folder:
        launch(processes, script, [*arguments, "--rank_folder", folder], timeout)
        return [json.loads(Path(folder, f"{rank}.json").read_text(encoding="utf-8")) for rank in range(processes)]
