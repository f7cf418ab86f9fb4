"""A script in an interpreter that has imported nothing yet."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def report_of(script: Path, folder: Path, environment: dict[str, str], timeout: float) -> dict[str, Any]:
    """The JSON that `python script folder` prints behind the word REPORT; fails with its stderr where it fails."""
    done = subprocess.run(
        [sys.executable, str(script), str(folder)],
        env=os.environ | environment | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("REPORT")[2])
