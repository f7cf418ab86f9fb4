"""A resumed run ends with the bits of an uninterrupted one, at any lp size."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from tests.multiproc import RankPool
from tests.training import runs, scenarios

SAVING = {"save_strategy": "steps", "max_steps": 6, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5}


def optimizer_states(checkpoint: Path) -> dict[str, dict]:
    """The states in all files of a checkpoint, each of which is there once."""
    states: dict[str, dict] = {}
    for file in sorted(checkpoint.glob("optimizer-*.pt")):
        found = torch.load(file, weights_only=True)["state"]
        assert not states.keys() & found.keys(), f"{file.name} holds what another file holds"
        states |= found
    return states


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("bert_classifier", {}),
        ("llama", {}),
        ("gpt2", {"micro_batches": 2}),
        ("bert", {}),
        ("t5", {}),
        ("bart", {"micro_batches": 2}),
        ("gpt2", {"schedule": "zb_v", "micro_batches": 2, "layers": 6}),
        ("llama", {"schedule": "interleaved_1f1b", "micro_batches": 4, "layers": 7}),
    ],
    ids=["classifier", "untied", "tied", "tied encoder", "t5", "bart", "v", "interleaved"],
)
def test_resume_at_another_lp_size(
    family: str, settings: dict, ranks1: RankPool, ranks2: RankPool, ranks3: RankPool, tmp_path: Path
) -> None:
    settings = SAVING | settings | {"save_steps": 3}
    whole = ranks1.run(runs.train, str(tmp_path / "whole"), family, settings)[0]
    two = ranks2.run(runs.train, str(tmp_path), family, settings | {"lp_size": 2})[0]
    assert two["weights"] == whole["weights"]
    middle = tmp_path / "checkpoint-3"
    assert {"optimizer-00000-of-00002.pt", "optimizer-00001-of-00002.pt", "rng_state_0.pth"} <= set(os.listdir(middle))
    written, expected = optimizer_states(middle), optimizer_states(tmp_path / "whole" / "checkpoint-3")
    assert written.keys() == expected.keys()
    for name, state in expected.items():
        assert all(torch.equal(written[name][key], value) for key, value in state.items()), name
    for pool in (ranks1, ranks2, ranks3):
        other = settings | {"lp_size": pool.world, "save_strategy": "no"}
        again = pool.run(runs.train, str(tmp_path / f"lp{pool.world}"), family, other, str(middle))[0]
        assert again["weights"] == whole["weights"], f"lp_size {pool.world}"
        assert again["losses"] == pytest.approx(whole["losses"], abs=1e-6)


def test_resume_with_spread_ends(ranks1: RankPool, ranks2: RankPool, tmp_path: Path) -> None:
    settings = SAVING | {"lp_size": 2, "ends": "spread", "save_steps": 3}
    whole = ranks2.run(runs.train, str(tmp_path), "gpt2", settings)[0]
    middle = tmp_path / "checkpoint-3"
    assert len(optimizer_states(middle)) > 0
    again = ranks2.run(runs.train, str(tmp_path / "b"), "gpt2", settings, str(middle))
    assert again[0]["weights"] == whole["weights"]
    assert again[0]["copies"] == again[1]["copies"] is not None
    alone = ranks1.run(runs.train, str(tmp_path / "c"), "gpt2", settings | {"lp_size": 1}, str(middle))[0]
    assert alone["losses"][3] == pytest.approx(whole["losses"][3], abs=1e-5)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("strategy", "accumulation"), [("random", 1), ("random", 2), ("group_by_length", 1)])
def test_resume_inside_a_later_epoch_with_random_data(
    workers: int, strategy: str, accumulation: int, ranks2: RankPool, ranks4: RankPool, tmp_path: Path
) -> None:
    """20 samples, 8 a batch on two dp ranks: epochs of 3 batches; stopped after step 5, inside a later epoch."""
    settings = {"max_steps": 8, "dataloader_num_workers": workers, "train_sampling_strategy": strategy}
    settings |= {"gradient_accumulation_steps": accumulation}
    saving = settings | {"save_strategy": "steps", "save_steps": 5}
    whole = ranks2.run(scenarios.train_noisy, str(tmp_path), saving, None, 20)
    again = ranks4.run(
        scenarios.train_noisy, str(tmp_path / "b"), settings | {"lp_size": 2}, str(tmp_path / "checkpoint-5"), 20
    )
    assert again[0]["losses"] == pytest.approx(whole[0]["losses"], abs=1e-6)
    assert again[0]["weights"] == whole[0]["weights"]


def test_resume_at_the_end_of_an_epoch(ranks1: RankPool, ranks2: RankPool, tmp_path: Path) -> None:
    settings = {"max_steps": -1, "num_train_epochs": 3, "save_strategy": "epoch"}
    whole = ranks1.run(scenarios.train_noisy, str(tmp_path), settings, None, 10)[0]
    again = ranks2.run(
        scenarios.train_noisy, str(tmp_path / "b"), settings | {"lp_size": 2}, str(tmp_path / "checkpoint-3"), 10
    )[0]
    assert again["weights"] == whole["weights"]


@pytest.mark.parametrize("conversion", [{}, {"step_size": 1 / 3, "num_steps": 6}, {"step_size": 0.5, "num_steps": 6}])
def test_key_conversion_and_folding_lose_nothing(
    conversion: dict, ranks1: RankPool, ranks2: RankPool, tmp_path: Path
) -> None:
    """ViT is saved under other names than it has in memory (stock's resume restores 8 of 104 tensors)."""
    for family in ("vit", "gemma2"):
        directory = tmp_path / family
        settings = SAVING | {"save_steps": 3, "save_strategy": "steps", "lp_size": 2}
        whole = ranks2.run(scenarios.train_converted, str(directory), family, settings, conversion)[0]
        again = ranks1.run(
            scenarios.train_converted, str(directory / "b"), family, SAVING, conversion, str(directory / "checkpoint-3")
        )[0]
        assert again["weights"] == whole["weights"]


def test_weights_that_are_not_in_the_checkpoint_are_an_error(ranks2: RankPool, tmp_path: Path) -> None:
    ranks2.run(runs.train, str(tmp_path), "vit", SAVING | {"lp_size": 2, "save_steps": 3})
    message = ranks2.run(scenarios.resume_with_a_tensor_lost, str(tmp_path / "checkpoint-3"), {"lp_size": 2})
    assert all("missing_keys" in text and "layernorm" in text for text in message)


def test_best_model_is_loaded(ranks2: RankPool, tmp_path: Path) -> None:
    settings = {
        "lp_size": 2,
        "max_steps": 6,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 1,
        "load_best_model_at_end": True,
        "learning_rate": 3e-2,  # random tokens: the more is learnt, the worse the evaluation
    }
    result = ranks2.run(scenarios.train_for_the_best, str(tmp_path), settings)[0]
    losses = result["eval_losses"]
    best = losses.index(min(losses))
    assert losses[-1] > losses[best] + 0.01, "the best is the last one"
    assert result["best"].endswith(f"checkpoint-{2 + 2 * best}")
    assert result["eval_loss_after"] == pytest.approx(result["best_metric"], abs=1e-6)
    assert result["weights"] == result["weights_at_evaluations"][best]
    # the best is kept beside the newest while training, and alone at the end
    assert [name for name in os.listdir(tmp_path) if name.startswith("checkpoint")] == [f"checkpoint-{2 + 2 * best}"]


def test_rotation_keeps_the_newest(ranks1: RankPool, tmp_path: Path) -> None:
    ranks1.run(runs.train, str(tmp_path), "llama", {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2})
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-3", "checkpoint-4"]
    assert json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["global_step"] == 4


def test_model_init_and_a_second_call(ranks2: RankPool, tmp_path: Path) -> None:
    plain = ranks2.run(runs.train, str(tmp_path), "llama", {"lp_size": 2, "dropout": 0.0})[0]
    again = ranks2.run(scenarios.train_from_model_init, str(tmp_path), {"lp_size": 2})[0]
    assert again["weights"] == again["weights_of_second_call"] == plain["weights"]


def test_a_second_trainer_takes_the_model_over(ranks2: RankPool, tmp_path: Path) -> None:
    for strategy, error in ranks2.run(scenarios.second_trainer, str(tmp_path)):
        assert strategy == "mgrit"
        assert "spread over 2 lp ranks already, but lp_size=1" in error
