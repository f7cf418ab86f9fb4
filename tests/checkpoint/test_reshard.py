"""Every checkpoint goes on with every other number of dp, lp and tp ranks: all that four processes can make."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.multiproc import run_ranks
from tests.training import runs

Axes = tuple[int, int, int]
AXES: list[Axes] = [axes for axes in product((1, 2), (1, 2, 3), (1, 2)) if axes[0] * axes[1] * axes[2] <= 4]
SAVED, ROWS = 4, 8


def settings_of(axes: Axes) -> dict[str, Any]:
    """dp ranks share out the same rows."""
    dp, lp, tp = axes
    rows = {"per_device_train_batch_size": ROWS // dp, "lp_size": lp, "tp_size": tp}
    return rows | {"max_steps": SAVED + 10, "dropout": 0.0, "max_grad_norm": 0.3, "weight_decay": 0.1}


def train(folder: Path, axes: Axes, settings: dict[str, Any], checkpoint: Path | None = None) -> dict[str, Any]:
    dp, lp, tp = axes
    resumed = None if checkpoint is None else str(checkpoint)
    return run_ranks(runs.train, dp * lp * tp, str(folder), "llama", settings_of(axes) | settings, resumed)[0]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[Axes, tuple[Path, dict[str, Any]]]:
    """Of every number of ranks the folder with the checkpoint of its run, and what the run left."""
    found = {}
    for axes in AXES:
        folder = tmp_path_factory.mktemp("x".join(map(str, axes)))
        found[axes] = folder, train(folder, axes, {"save_strategy": "steps", "save_steps": SAVED})
    return found


@pytest.mark.slow
@pytest.mark.parametrize("there", AXES)
@pytest.mark.parametrize("here", AXES)
def test_it_goes_on(there: Axes, here: Axes, uninterrupted: Any, tmp_path: Path) -> None:
    folder, whole = uninterrupted[there]
    again = train(tmp_path, here, {}, folder / f"checkpoint-{SAVED}")
    assert len(set(whole["losses"])) == len(whole["losses"]) == SAVED + 10, "the run doesn't train"
    assert again["losses"] == pytest.approx(whole["losses"], abs=1e-5)
    assert again["norms"] == pytest.approx(whole["norms"], rel=1e-5)
    assert again["largest"] == pytest.approx(whole["largest"], abs=1e-5)
    if there[0] == here[0] and there[2] == here[2] == 1:  # other rows, or parts of matrices, have other sums
        assert again["weights"] == whole["weights"]
        assert again["norms"] == whole["norms"]  # logged losses are means over processes, of any number
