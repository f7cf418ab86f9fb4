"""What the recipe tests share."""

from __future__ import annotations

import datasets
import evaluate
import pytest

from tests.recipes.fake_glue import fake_glue


@pytest.fixture
def hub(monkeypatch):
    """The hub's GLUE, and nothing else of the hub: metric definitions can't be had."""

    def load_dataset(path, name):
        assert path == "nyu-mll/glue"
        return fake_glue(name)

    def load_metric(path, name):
        raise FileNotFoundError(f"{path}/{name}")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(evaluate, "load", load_metric)
