"""Which checks run: those marked `gpu` where there is a GPU, or where a device is named."""

from __future__ import annotations

import os

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several that share the cores
    torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=("cpu", "cuda"),
        help="run the checks marked gpu on this device (default: on a GPU where there is one, else not at all)",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--device") is None and not torch.cuda.is_available():
        gone = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=gone)
        items[:] = [item for item in items if item not in gone]


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """Where the checks marked `gpu` run."""
    return request.config.getoption("--device") or "cuda"
