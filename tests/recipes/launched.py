"""A recipe started the way a user starts it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from recipes.benchmarks.launch import ROOT, launch


def result_of(recipe: str, folder: Path, processes: int, *options: str) -> dict[str, Any]:
    """What result.json of recipes/<recipe>.py in `folder` holds after a run on so many processes."""
    script = ROOT / "recipes" / f"{recipe}.py"
    launch(processes, script, [*options, "--output_dir", str(folder)], timeout=300)
    return json.loads((folder / "result.json").read_text())


def assert_train_alike(ours: Sequence[float], theirs: Sequence[float], tight: int = 5) -> None:
    """Losses of two runs of the same steps. Rounding differs between processors, and training makes it grow: only the
    first `tight` steps are compared closely, what comes later by its course."""
    assert len(ours) == len(theirs) >= tight
    assert ours[:tight] == pytest.approx(theirs[:tight], abs=1e-4)
    assert ours == pytest.approx(theirs, abs=0.1)
