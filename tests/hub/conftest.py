"""One endpoint and two ranks that talk to it, for all tests here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hub.endpoint import Endpoint
from tests.multiproc import RankPool


@pytest.fixture(scope="session")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    endpoint = Endpoint(tmp_path_factory.mktemp("endpoint"))
    yield endpoint
    endpoint.close()


@pytest.fixture(scope="session")
def environment(endpoint: Endpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of a process that talks to the endpoint, with a cache of its own."""
    return endpoint.environment | {"HF_HOME": str(tmp_path_factory.mktemp("home"))}


@pytest.fixture(scope="session")
def ranks(environment: dict[str, str]) -> Iterator[RankPool]:
    pool = RankPool(2, environment)
    yield pool
    pool.close()
