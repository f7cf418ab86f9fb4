"""A resumed run ends with the bits of an uninterrupted one, at any lp size."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor, nn

from hf_layerpar.checkpoint import saving
from hf_layerpar.checkpoint.tensors import TensorFolder
from hf_layerpar.errors import CheckpointError
from hf_layerpar.ode.convert import convert_to_ode
from hf_layerpar.sharding import parallelize
from hf_layerpar.training.checkpoints import check_comes_back
from hf_layerpar.training.trainer import LayerParallelTrainer
from tests import zoo
from tests.checkpoint.test_pieces import mixtral
from tests.multiproc import RankPool
from tests.problems import assert_same
from tests.training import runs, scenarios

SAVING = {"save_strategy": "steps", "max_steps": 6, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5}


def optimizer_states(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The states that a checkpoint has, as "<parameter>.<state>"."""
    folder = TensorFolder(checkpoint / "optimizer")
    states = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in folder.shapes.items()}
    folder.read(states)
    return states


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("bert_classifier", {}),
        pytest.param("llama", {}, marks=pytest.mark.compat),
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
    assert {"optimizer", "scheduler.pt", "rng_state_0.pth"} <= set(os.listdir(middle))
    assert set(os.listdir(middle / "optimizer")) == {"__0_0.distcp", "__1_0.distcp", ".metadata", "groups.pt"}
    assert_same(optimizer_states(middle), optimizer_states(tmp_path / "whole" / "checkpoint-3"))
    for pool in (ranks1, ranks2, ranks3):
        other = settings | {"lp_size": pool.world, "save_strategy": "no"}
        again = pool.run(runs.train, str(tmp_path / f"lp{pool.world}"), family, other, str(middle))[0]
        assert again["weights"] == whole["weights"], f"lp_size {pool.world}"
        assert again["losses"] == pytest.approx(whole["losses"], abs=1e-6)


DEALT = {"strategy": "mgrit", "coarsening": 3, "split": "interleaved"}
EXACT = {"forward_iterations": 0, "backward_iterations": 0}


@pytest.mark.parametrize("settings", [{"split": "v"}, DEALT | EXACT, DEALT], ids=["v", "exact, dealt out", "dealt out"])
def test_resume_with_another_split(
    settings: dict, ranks1: RankPool, ranks2: RankPool, ranks3: RankPool, tmp_path: Path
) -> None:
    """The same bits where steps are exact; the increments of `aggregate` are summed in another order on other ranks."""
    common = SAVING | {"layers": 6}
    whole = ranks2.run(runs.train, str(tmp_path), "llama", common | settings | {"lp_size": 2, "save_steps": 3})[0]
    middle = str(tmp_path / "checkpoint-3")
    other = {k: v for k, v in settings.items() if k != "split"}
    pipelines = [] if settings == DEALT else [{"split": "interleaved"}]
    for pool in (ranks1, ranks2, ranks3):
        for changed in (settings, other, *pipelines):
            changed = common | changed | {"lp_size": pool.world, "save_strategy": "no"}
            again = pool.run(runs.train, str(tmp_path / "b"), "llama", changed, middle)[0]
            assert again["losses"] == pytest.approx(whole["losses"], abs=1e-6)
            assert settings == DEALT or again["weights"] == whole["weights"]


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
    assert all("2 missing" in text and "layernorm" in text for text in message)


@pytest.mark.compat
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


# ---- models that are not one class of transformers with its config
class Around(nn.Module):
    """A module of one's own around a backbone, with tensors of its own."""

    def __init__(self, backbone: Any, tied: bool) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.config.hidden_size, backbone.config.vocab_size, bias=False)
        if tied:
            self.head.weight = backbone.get_input_embeddings().weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
        logits = self.head(self.backbone(input_ids, attention_mask=attention_mask).last_hidden_state)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)  # type: ignore[index]
        return {"loss": loss, "logits": logits}


class Scaled(hf.LlamaForCausalLM):
    """A class of one's own, which its config alone doesn't make."""

    def __init__(self, config: Any, scale: float) -> None:
        super().__init__(config)
        self.scale = scale


def _lora(**settings: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **settings)


def made(kind: str) -> Any:
    model: Any = runs.build("llama")
    if kind in ("around", "around tied"):
        return Around(model.model, tied=kind == "around tied")
    if kind == "resized":
        model.resize_token_embeddings(zoo.VOCAB + 8)
    if kind == "added":
        torch.manual_seed(1)
        model.add_adapter(_lora(), "mine")
    if kind in ("named", "two", "saved head", "unsaved"):
        from peft import get_peft_model

        torch.manual_seed(1)
        more = {"modules_to_save": ["lm_head"]} if kind == "saved head" else {}
        model = get_peft_model(model, _lora(**more), "default" if kind in ("saved head", "unsaved") else "mine")
        if kind == "two":
            model.add_adapter("other", _lora())
        if kind == "unsaved":
            model.base_model.model.lm_head.requires_grad_(True)
    if kind == "new head":
        model.lm_head = nn.Linear(model.config.hidden_size, zoo.VOCAB)  # with a bias, of which its config knows nothing
    if kind == "scaled":
        model = Scaled(model.config, 2.0)
    if kind == "experts":
        model = mixtral()
    if kind == "renamed and folded":
        model = convert_to_ode(runs.build("vit"), step_size=1 / 3, num_steps=4)
    return model


def train_made(
    directory: str, settings: dict[str, Any], kind: str, resume: str | None = None, collected: int = saving.COLLECTED
) -> dict[str, Any]:
    """collected: bytes of a model that is gathered where it is saved."""
    torch.manual_seed(0)
    family = "vit" if kind == "renamed and folded" else "llama"
    run = LayerParallelTrainer(
        made(kind),
        runs.arguments(directory, **settings),
        train_dataset=runs.Samples(family, 64),
        eval_dataset=runs.Samples(family, 4, 1000),
    )
    saving.COLLECTED, before = collected, saving.COLLECTED
    run.remove_callback(hf.PrinterCallback)
    if kind == "resized later" and run.args.process_index == 0:
        run.model.model.embed_tokens = nn.Embedding(zoo.VOCAB + 8, run.model.config.hidden_size)  # type: ignore[union-attr]
    if kind == "added later":
        run.model.add_adapter(_lora())  # type: ignore[union-attr, operator]
    try:
        run.train(resume_from_checkpoint=resume)
    except CheckpointError as error:
        return {"error": str(error), "step": run.state.global_step}
    finally:
        saving.COLLECTED = before
    return runs.outcome(run)


KINDS = ("around", "around tied", "resized", "new head", "scaled", "added", "named", "two", "saved head")


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_written_is_read_back(kind: str, ranks1: RankPool, ranks2: RankPool, tmp_path: Path) -> None:
    """Also as the best model, at the end."""
    settings = SAVING | {
        "lp_size": 2,
        "save_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "remove_unused_columns": False,
    }
    settings |= {"load_best_model_at_end": True}
    whole = ranks2.run(train_made, str(tmp_path), settings, kind)[0]
    assert whole["weights"] is not None
    for pool in (ranks1, ranks2):
        again = pool.run(
            train_made, str(tmp_path / "b"), settings | {"lp_size": pool.world}, kind, str(tmp_path / "checkpoint-3")
        )[0]
        assert again["weights"] == whole["weights"]


@pytest.mark.parametrize("kind", ["around tied", "experts", "renamed and folded"])
def test_what_was_written_in_pieces_is_read_back(
    kind: str, ranks1: RankPool, ranks2: RankPool, ranks3: RankPool, tmp_path: Path
) -> None:
    settings = SAVING | {"lp_size": 2, "save_steps": 3, "remove_unused_columns": False}
    whole = ranks2.run(train_made, str(tmp_path), settings, kind, None, 0)[0]
    middle = tmp_path / "checkpoint-3"
    assert len(list(middle.glob("model-*.safetensors"))) == 2
    assert len(list(middle.glob("exact_weights-*"))) == (2 if kind == "renamed and folded" else 0)
    for pool in (ranks1, ranks3):
        other = settings | {"lp_size": pool.world, "save_strategy": "no"}
        again = pool.run(train_made, str(tmp_path / "b"), other, kind, str(middle))[0]
        assert again["weights"] == whole["weights"]


def save_adapters(directory: str) -> None:
    """In a loop of one's own, by all ranks together."""
    model = convert_to_ode(made("saved head"))
    handle = parallelize(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.fill_(7.0)
    model.save_pretrained(f"{directory}/given", state_dict=handle.state_dict())
    model.save_pretrained(f"{directory}/adapters")


def test_adapters_and_modules_of_other_ranks_are_saved(ranks2: RankPool, tmp_path: Path) -> None:
    ranks2.run(save_adapters, str(tmp_path))
    weights = load_file(tmp_path / "adapters" / "adapter_model.safetensors")
    assert_same(weights, load_file(tmp_path / "given" / "adapter_model.safetensors"))
    assert (weights["base_model.model.lm_head.weight"] == 7).all()
    assert sum("lora_A" in name for name in weights) == 8


@pytest.mark.parametrize("form", ["euler", "split"])
@pytest.mark.parametrize("family", zoo.NAMES)
def test_what_can_be_read_back_is_not_refused(family: str, form: Any) -> None:
    if form == "split" and family not in zoo.SPLIT:
        return
    model = convert_to_ode(runs.build(family), step_size=0.5, num_steps=4, form=form)
    parallelize(model)
    check_comes_back(model)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("resized later", "embed_tokens"),
        ("added later", "lora_A"),
        ("unsaved", "1 trained parameters of the PeftModel are in none of the adapters"),
    ],
)
def test_what_could_not_be_read_back_is_not_trained(
    kind: str, said: str, ranks1: RankPool, ranks2: RankPool, tmp_path: Path
) -> None:
    pool = ranks1 if kind == "added later" else ranks2  # PEFT itself fails where layers are lacking
    first, *others = pool.run(train_made, str(tmp_path), SAVING | {"lp_size": pool.world, "save_steps": 3}, kind)
    assert others == [first] * (pool.world - 1)
    assert said in first["error"]
    assert first["step"] == 0
    assert not list(tmp_path.iterdir())
