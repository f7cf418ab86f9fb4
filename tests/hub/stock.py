"""Loads what was pushed in a process that has nothing but transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.fresh import report_of


def load_stock(folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    """What `load_stock.py` says of a folder."""
    return report_of(Path(__file__).with_name("load_stock.py"), folder, environment, timeout=180)
