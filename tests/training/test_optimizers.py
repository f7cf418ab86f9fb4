"""Optimizers that work on several parameters at once, or on whole matrices: the same weights at every lp size."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.multiproc import RankPool
from tests.training import runs

OPTIMIZERS: dict[str, tuple[dict[str, Any], tuple[type, dict[str, Any]] | None]] = {
    "fused": ({"optim": "adamw_torch_fused"}, None),
    "adafactor": ({"optim": "adafactor"}, None),
    "foreach": ({}, (torch.optim.AdamW, {"lr": 1e-3, "foreach": True})),
    "muon": ({}, (torch.optim.Muon, {"lr": 1e-2})),
}


def train(output_dir: str, lp_size: int) -> dict[str, Any]:
    found = {}
    for name, (settings, optimizer) in OPTIMIZERS.items():
        model = runs.build("llama")
        for parameter in model.parameters():  # Muon takes matrices only
            parameter.requires_grad_(name != "muon" or parameter.ndim == 2)
        args = runs.arguments(output_dir, max_steps=3, max_grad_norm=0.5, lp_size=lp_size, **settings)
        run = runs.LayerParallelTrainer(
            model, args, train_dataset=runs.Samples("llama", 64), optimizer_cls_and_kwargs=optimizer
        )
        run.remove_callback(runs.hf.PrinterCallback)
        run.train()
        found[name] = runs.outcome(run)
    return found


def test_the_same_weights_at_every_lp_size(ranks1: RankPool, ranks2: RankPool, tmp_path) -> None:
    one = ranks1.run(train, str(tmp_path), 1)[0]
    two = ranks2.run(train, str(tmp_path), 2)[0]
    assert len({one[name]["weights"] for name in OPTIMIZERS}) >= 3  # foreach and fused are the same function
    for name in OPTIMIZERS:
        assert two[name]["losses"] == pytest.approx(one[name]["losses"], abs=1e-6)
        assert two[name]["weights"] == one[name]["weights"], name
        assert len(set(one[name]["losses"])) == 3
