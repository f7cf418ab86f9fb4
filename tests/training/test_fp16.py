"""fp16: one scale of the loss for all processes, and the same steps skipped by all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from hf_layerpar.errors import ConfigurationError
from hf_layerpar.training.trainer import LayerParallelTrainer
from tests.multiproc import RankPool
from tests.training import runs

OVERFLOWS = "model.layers.3.mlp.up_proj.weight"
"""On the last of two lp ranks."""


def train(output_dir: str, settings: dict[str, Any], resume: str | None = None) -> dict[str, Any]:
    """A run in which one gradient of one dp rank overflows in the third step; with the scale after each step."""
    scales: list[float] = []

    class Note(hf.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            scales.append(run.accelerator.scaler.get_scale())

    run = runs.trainer(output_dir, "llama", {"fp16": True, "dropout": 0.0} | settings, callbacks=[Note()])

    def overflow(grad: torch.Tensor) -> torch.Tensor:
        hit = run.state.global_step == 2 and run.mesh.dp_rank == run.mesh.dp_size - 1
        return grad * float("inf") if hit else grad

    for name, parameter in run.model.named_parameters():
        if name == OVERFLOWS:
            parameter.register_hook(overflow)
    dtypes = set()
    run.model.lm_head.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    run.train(resume_from_checkpoint=resume)
    return runs.outcome(run) | {"scales": scales, "fp16": torch.float16 in dtypes}


@pytest.mark.parametrize(
    ("optim", "accumulation"), [("adamw_torch", 1), pytest.param("adamw_torch_fused", 2, marks=pytest.mark.slow)]
)
def test_all_ranks_skip_the_step_that_overflows_on_one(
    optim: str, accumulation: int, ranks1: RankPool, ranks2: RankPool, tmp_path
) -> None:
    settings = {"optim": optim, "gradient_accumulation_steps": accumulation, "max_steps": 4}
    one = ranks1.run(train, str(tmp_path), settings)[0]
    two = ranks2.run(train, str(tmp_path), settings | {"lp_size": 2, "micro_batches": 2})
    assert one["scales"] == two[0]["scales"] == two[1]["scales"] == [2.0**16, 2.0**16, 2.0**15, 2.0**15]
    assert any(rank["fp16"] for rank in two)
    assert one["fp16"]
    assert two[0]["losses"] == pytest.approx(one["losses"], abs=2e-4)
    assert two[0]["largest"] == pytest.approx(one["largest"], rel=2e-2, abs=1e-3)
    assert 0 < one["norms"][3] < 100


def test_the_scale_is_saved_and_resumed(ranks2: RankPool, tmp_path) -> None:
    settings = {"lp_size": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 3}
    through = ranks2.run(train, str(tmp_path), settings)[0]
    resumed = ranks2.run(train, str(tmp_path), settings, str(tmp_path / "checkpoint-3"))[0]
    assert resumed["scales"] == through["scales"][3:] == [2.0**15]
    assert resumed["weights"] == through["weights"]


@pytest.mark.slow
def test_on_a_mesh(ranks2: RankPool, ranks4: RankPool, tmp_path) -> None:
    settings = {"max_steps": 4, "max_grad_norm": 0.5}
    flat = ranks2.run(train, str(tmp_path), settings)
    grid = ranks4.run(train, str(tmp_path), settings | {"lp_size": 2})
    assert all(rank["scales"] == [2.0**16, 2.0**16, 2.0**15, 2.0**15] for rank in (*flat, *grid))
    assert grid[0]["losses"] == pytest.approx(flat[0]["losses"], abs=1e-6)
    assert grid[0]["weights"] == flat[0]["weights"]


def test_what_is_refused(tmp_path) -> None:
    def trainer(**settings: Any) -> LayerParallelTrainer:
        return runs.trainer(str(tmp_path), "llama", {"fp16": True} | settings)

    with pytest.raises(ConfigurationError, match="39 trained parameters in float16"):
        trainer(dtype="float16").train()
    with pytest.raises(ConfigurationError, match="fp16 with controller='raise'"):
        trainer(controller="raise", strategy="mgrit")
