"""A recipe started the way a user starts it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from recipes.benchmarks.launch import ROOT, launch


def result_of(recipe: str, folder: Path, processes: int, *options: str) -> dict[str, Any]:
    """What result.json of recipes/<recipe>.py in `folder` holds after a run on so many processes."""
    script = ROOT / "recipes" / f"{recipe}.py"
    launch(processes, script, [*options, "--output_dir", str(folder)], timeout=300)
    return json.loads((folder / "result.json").read_text())
