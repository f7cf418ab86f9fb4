"""Rank pools shared by all training tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.training.ranks import RankPool


def _pool(world: int):
    @pytest.fixture(scope="session", name=f"ranks{world}")
    def ranks() -> Iterator[RankPool]:
        pool = RankPool(world)
        yield pool
        pool.close()

    return ranks


ranks1, ranks2, ranks3, ranks4 = (_pool(world) for world in (1, 2, 3, 4))
