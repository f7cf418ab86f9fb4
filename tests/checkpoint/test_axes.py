"""Checkpoints of ranks that have pieces of tensors (fsdp over the dp axis, tp): whole ones, for any other numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from tests.checkpoint.test_pieces import stored
from tests.multiproc import run_ranks
from tests.problems import assert_same
from tests.training.test_writing import train_in_pieces

SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "dropout": 0.0, "max_grad_norm": 0.3}


@pytest.mark.parametrize(
    ("axes", "others"),
    [
        ({"lp_size": 2, "fsdp": True}, {"lp_size": 2}),
        pytest.param(
            {"lp_size": 1, "fsdp": True},
            {"lp_size": 4, "per_device_train_batch_size": 16},
            marks=pytest.mark.slow,
        ),
        ({"lp_size": 2, "tp_size": 2}, {"lp_size": 4}),
    ],
    ids=["fsdp", "fsdp alone", "tp"],
)
@pytest.mark.parametrize("beside", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_resume_on_other_axes(axes: dict[str, Any], others: dict[str, Any], beside: bool, tmp_path: Path) -> None:
    settings = SAVING | axes | {"async_save": beside}
    whole = run_ranks(train_in_pieces, 4, str(tmp_path), settings)[0]
    middle = str(tmp_path / "checkpoint-2")
    again = run_ranks(train_in_pieces, 4, str(tmp_path / "b"), settings, "none", "", 0, middle)[0]
    assert again["weights"] == whole["weights"]
    loaded = hf.LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert_same(stored(tmp_path / "checkpoint-4"), loaded.state_dict())
    if others["lp_size"] == 4 and "fsdp" in axes:
        return  # losses are means over other batches there
    different = run_ranks(train_in_pieces, 4, str(tmp_path / "c"), SAVING | others, "none", "", 0, middle)[0]
    assert different["losses"] == pytest.approx(whole["losses"], abs=1e-5)
    assert different["largest"] == pytest.approx(whole["largest"], abs=1e-5)
