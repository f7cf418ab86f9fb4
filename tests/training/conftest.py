"""Rank pools as fixtures."""

from __future__ import annotations

import pytest

from tests.multiproc import RankPool, shared_pool


def _pool(world: int):
    @pytest.fixture(scope="session", name=f"ranks{world}")
    def ranks() -> RankPool:
        return shared_pool(world)

    return ranks


ranks1, ranks2, ranks3, ranks4 = (_pool(world) for world in (1, 2, 3, 4))
