"""Loads what was pushed in a process that has nothing but transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def load_stock(folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    """What `load_stock.py` says of a folder."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("load_stock.py")), str(folder)],
        env=os.environ | environment | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("REPORT")[2])
