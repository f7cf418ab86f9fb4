"""The GPT-2 recipe run the way a user runs it, a few steps of a small network on the real text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from hf_layerpar.errors import ConfigurationError
from hf_layerpar.ode.convert import ode_view
from hf_layerpar.report.run import read_run
from recipes import pretrain_gpt2
from recipes.benchmarks.launch import ROOT
from recipes.language import byte_tokenizer
from tests.recipes.launched import assert_train_alike, result_of

PAPER = ROOT / "recipes" / "pretrain_gpt2_paper.yaml"
SMALL = ["--width", "32", "--heads", "2", "--inner_layers", "4", "--step_size", "0.25", "--buffers", "1", "1"]
SMALL += ["--block_size", "16", "--max_eval_blocks", "8", "--max_steps", "5", "--eval_steps", "2"]
SMALL += ["--logging_steps", "1", "--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "8"]


def run(folder: Path, processes: int, *options: str) -> dict[str, Any]:
    return result_of("pretrain_gpt2", folder, processes, *SMALL, *options)


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("one")
    return run(folder, 1), folder


def test_two_processes_train_as_one(one, tmp_path):
    alone, _ = one
    two = run(tmp_path, 2, "--micro_batches", "2")
    assert [rank["layers"]["transformer.h"] for rank in two["ranks"]] == [[0, 1, 2], [3, 4, 5]]
    assert [entry["step"] for entry in alone["evaluation"]] == [2, 4, 5]
    ours, theirs = ([entry["loss"] for entry in found["evaluation"]] for found in (two, alone))
    assert ours == pytest.approx(theirs, abs=1e-4)
    losses = [entry["loss"] for entry in alone["steps"]]
    assert len(losses) == 5
    assert_train_alike([entry["loss"] for entry in two["steps"]], losses)
    assert losses[-1] < losses[0] - 0.02, "it doesn't learn"


def test_result_and_logs(one):
    result, folder = one
    ode = result["settings"]["ode"]
    assert (ode["step_size"], ode["form"], ode["buffers"]) == (0.25, "split", [1, 1])
    assert result["settings"]["training"]["max_steps"] == 5
    assert result["rows"]["validation"] == 8
    assert result["seconds"]["all"] > result["seconds"]["training"] > 0
    assert result["versions"]["torch"] == torch.__version__
    assert result["gradient_agreement"] == {}
    logged = read_run(folder)
    assert logged.validation == [(entry["step"], entry["loss"]) for entry in result["evaluation"]]
    assert result["metrics"]["validation"]["loss"] == result["evaluation"][-1]["loss"]
    assert (logged.steps, len(logged.training)) == (5, 5)


def test_saved_model_loads_with_stock_transformers(one):
    result, folder = one
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    assert type(model).__module__.startswith("transformers.")
    assert model.config.n_layer == 6
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    blocks = pretrain_gpt2.load_blocks("offline", None, "", 16, 8, False, 0)
    assert tokenizer.decode(blocks.validation[0]["input_ids"]) == blocks.tokenizer.decode(
        blocks.validation[0]["input_ids"]
    )
    batch = torch.stack([blocks.validation[i]["input_ids"] for i in range(8)])
    with torch.no_grad():
        loss = float(model(input_ids=batch, labels=batch).loss)
    assert loss == pytest.approx(result["metrics"]["validation"]["loss"], abs=1e-4)


def test_stock_pipeline_writes_on(one):
    _, folder = one
    (found,) = pipeline("text-generation", model=str(folder / "model"), device="cpu")("In the ")
    assert found["generated_text"].startswith("In the ")
    assert len(found["generated_text"].encode()) > len("In the ")


def test_mgrit_measures_its_gradient(tmp_path):
    options = ["--strategy", "mgrit", "--coarsening", "2", "--coarse_operator", "aggregate"]
    result = pretrain_gpt2.main([*SMALL, *options, "--output_dir", str(tmp_path), "--max_steps", "2"])
    assert set(result["gradient_agreement"]) == {"before", "after"}
    for values in result["gradient_agreement"].values():
        assert all(0.9 < v["cosine"] < 1 for v in values)
    assert {entry["lp_backward_mode"] for entry in result["steps"]} == {"mgrit"}


def test_network_of_the_defaults():
    recipe, args = pretrain_gpt2.parse([])
    model = pretrain_gpt2.build_model(recipe, byte_tokenizer(), args.seed)
    (stack,) = ode_view(model).stacks
    assert list(stack.step_sizes) == [1.0, 1.0, *[1 / 16] * 16, 1.0, 1.0]
    assert ode_view(model).settings.form == "split"
    assert (model.config.n_embd, model.config.n_head, model.config.n_positions) == (128, 4, 64)
    assert model.transformer.wte.weight.std().item() == pytest.approx(128**-0.5, rel=0.05)
    assert (args.learning_rate, args.weight_decay, args.max_steps) == (1e-3, 0.1, 2000)


def test_network_of_the_paper():
    recipe, args = pretrain_gpt2.parse([str(PAPER), "--max_steps", "7"])
    assert (recipe.width, recipe.heads, recipe.block_size, recipe.initializer_range) == (768, 12, 1024, 0.02)
    assert recipe.inner_layers + sum(recipe.buffers) == 20
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 256
    config = args.layer_parallel_config
    assert (config.strategy, config.forward_iterations, config.backward_iterations) == ("mgrit", 0, 1)
    assert args.max_steps == 7


def test_the_last_checkpoint_by_an_option():
    for given, meant in (("true", True), ("True", True), ("runs/x/checkpoint-3", "runs/x/checkpoint-3")):
        assert pretrain_gpt2.parse(["--resume_from_checkpoint", given])[1].resume_from_checkpoint == meant


def test_wrong_settings_are_named(tmp_path):
    with pytest.raises(ConfigurationError, match="width=30 must be a multiple of heads=4"):
        pretrain_gpt2.parse(["--width", "30"])
    recipe, args = pretrain_gpt2.parse(["--step_size", "2"])
    with pytest.raises(ConfigurationError, match=r"step_size=2"):
        pretrain_gpt2.build_model(recipe, byte_tokenizer(), args.seed)
    with pytest.raises(ConfigurationError, match="dataloader_num_workers=2 with streaming"):
        pretrain_gpt2.parse(["--streaming", "true", "--dataloader_num_workers", "2"])
    settings = tmp_path / "settings.yaml"
    settings.write_text("widht: 7\n")
    with pytest.raises(ConfigurationError, match=r"settings\.yaml sets \['widht'\]"):
        pretrain_gpt2.parse([str(settings)])
