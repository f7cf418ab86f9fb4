"""One endpoint and two ranks that talk to it, for all tests here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hub.endpoint import Endpoint
from tests.multiproc import RankPool

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    endpoint = Endpoint(tmp_path_factory.mktemp("endpoint"))
    yield endpoint
    endpoint.close()


@pytest.fixture(scope="module")
def environment(endpoint: Endpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of a process that talks to the endpoint, with a cache of its own."""
    return endpoint.environment | {"HF_HOME": str(tmp_path_factory.mktemp("home"))}


@pytest.fixture(scope="module")
def ranks(environment: dict[str, str]) -> Iterator[RankPool]:
    pool = RankPool(2, environment)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def load_stock(environment: dict[str, str]) -> Callable[[Path], dict[str, Any]]:
    """What `load_stock.py` says of a folder."""

    def load(folder: Path) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("load_stock.py")), str(folder)],
            env=os.environ | environment | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.rpartition("REPORT")[2])

    return load
