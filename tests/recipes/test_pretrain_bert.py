"""The BERT recipe run the way a user runs it, a few steps of a small network on the real text, and fine-tuned after."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

from hf_layerpar.errors import ConfigurationError
from hf_layerpar.ode.convert import ode_view
from hf_layerpar.report.run import read_run
from recipes import glue_bert, pretrain_bert
from recipes.benchmarks.launch import ROOT
from recipes.glue_tasks import get_task
from recipes.masking import load_masked
from tests.recipes.launched import assert_train_alike, result_of

RECIPES = ROOT / "recipes"
PAPER = RECIPES / "pretrain_bert_paper.yaml"
SMALL = ["--width", "32", "--heads", "2", "--inner_layers", "4", "--step_size", "0.25", "--buffers", "1", "1"]
SMALL += ["--block_size", "16", "--max_eval_blocks", "32", "--max_steps", "5", "--eval_steps", "2", "--dropout", "0.1"]
SMALL += ["--logging_steps", "1", "--per_device_train_batch_size", "16", "--per_device_eval_batch_size", "32"]
SMALL += ["--learning_rate", "3e-3"]
TUNED = ["--max_train_samples", "40", "--max_eval_samples", "10", "--max_length", "16", "--max_steps", "4"]
TUNED += ["--per_device_train_batch_size", "8", "--learning_rate", "1e-3", "--source", "tweets"]


def losses(result: dict[str, Any], key: str) -> list[float]:
    return [entry["loss"] for entry in result[key]]


def tokenizer() -> Any:
    return load_masked("offline", None, "", 16, 32, 0.2, False, 0).tokenizer


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("one")
    return result_of("pretrain_bert", folder, 1, *SMALL), folder


def test_two_processes_train_as_one(one, tmp_path):
    alone, _ = one
    two = result_of("pretrain_bert", tmp_path, 2, *SMALL)
    # as few as can be beside a head that costs as much as five
    assert [rank["layers"]["roberta_prelayernorm.encoder.layer"] for rank in two["ranks"]] == [[0, 1, 2, 3, 4], [5]]
    assert [entry["step"] for entry in alone["evaluation"]] == [2, 4, 5]
    assert len(alone["steps"]) == 5
    assert_train_alike(losses(two, "steps"), losses(alone, "steps"))
    assert losses(two, "evaluation") == pytest.approx(losses(alone, "evaluation"), abs=1e-4)
    falling = losses(alone, "evaluation")
    assert falling[-1] < falling[0] - 0.02, "it doesn't learn"


def test_result_and_logs(one):
    result, folder = one
    ode = result["settings"]["ode"]
    assert (ode["step_size"], ode["form"], ode["buffers"]) == (0.25, "split", [1, 1])
    assert result["settings"]["recipe"]["mask_share"] == 0.2
    assert set(result["evaluation"][0]) == {"step", "loss", "masked_accuracy"}
    assert result["metrics"]["validation"]["masked_accuracy"] == result["evaluation"][-1]["masked_accuracy"]
    assert result["rows"]["validation"] == 32
    logged = read_run(folder)
    assert logged.validation == [(entry["step"], entry["loss"]) for entry in result["evaluation"]]
    assert (logged.steps, len(logged.training)) == (5, 5)


def test_saved_model_loads_with_stock_transformers(one):
    result, folder = one
    model = AutoModelForMaskedLM.from_pretrained(folder / "model").eval()
    assert type(model).__module__.startswith("transformers.")
    assert model.config.num_hidden_layers == 6
    rows = load_masked("offline", None, "", 16, 32, 0.2, False, 0).validation
    ids, labels = (torch.stack([row[key] for row in rows]) for key in ("input_ids", "labels"))
    with torch.no_grad():
        found = model(input_ids=ids, labels=labels)
    assert float(found.loss) == pytest.approx(result["metrics"]["validation"]["loss"], abs=1e-4)
    masked = labels != -100
    right = (found.logits.argmax(-1) == labels)[masked].float().mean()
    assert float(right) == pytest.approx(result["metrics"]["validation"]["masked_accuracy"])
    saved = AutoTokenizer.from_pretrained(folder / "model")
    assert (len(saved), saved.model_max_length) == (2048, 16)
    fill = pipeline("fill-mask", str(folder / "model"))
    assert len(fill(f"in the {fill.tokenizer.mask_token} god created")) == 5


def test_mgrit_measures_its_gradient(tmp_path):
    options = ["--strategy", "mgrit", "--coarsening", "2", "--coarse_operator", "aggregate"]
    result = pretrain_bert.main([*SMALL, *options, "--output_dir", str(tmp_path), "--max_steps", "2"])
    assert set(result["gradient_agreement"]) == {"before", "after"}
    for values in result["gradient_agreement"].values():
        assert all(0.9 < v["cosine"] < 1 for v in values)
    assert {entry["lp_backward_mode"] for entry in result["steps"]} == {"mgrit"}


@pytest.mark.slow
def test_pretrained_network_is_fine_tuned(one, tmp_path):
    """Its step sizes come from the checkpoint, on one process as on two; what comes out is ordinary again."""
    _, pretrained = one
    options = ["--model_name", str(pretrained / "model"), *TUNED]
    alone, two = (result_of("glue_bert", tmp_path / str(n), n, *options) for n in (1, 2))
    for result in (alone, two):
        ode = result["settings"]["ode"]
        assert (ode["step_size"], ode["form"], ode["buffers"]) == (0.25, "split", [1, 1])
    assert_train_alike(losses(two, "steps"), losses(alone, "steps"), tight=4)
    assert losses(two, "evaluation") == pytest.approx(losses(alone, "evaluation"), abs=1e-4)
    steps = losses(alone, "steps")
    assert max(steps) - min(steps) > 1e-2, "the losses don't move, so they compare nothing"

    before, after = (load_file(folder / "model" / "model.safetensors") for folder in (pretrained, tmp_path / "2"))
    body = [key for key in after if key.startswith("roberta_prelayernorm.")]
    assert len(body) == 4 + 1 + 6 * 16 + 2  # embeddings and their norm, six layers, last norm
    for key in body:  # four small steps away, whatever the step size of its layer
        moved, size = (after[key] - before[key]).norm(), before[key].norm()
        assert moved < 0.5 * size or key.endswith("bias"), key
    classify = pipeline("text-classification", str(tmp_path / "2" / "model"))
    assert 0.5 <= classify("fine")[0]["score"] <= 1


def test_fine_tuning_names_what_contradicts_the_checkpoint(one):
    _, folder = one
    name = str(folder / "model")
    for options, message in (
        (["--step_size", "1"], r"step_size=1\.0 contradicts step_size=0\.25"),
        (["--buffers", "0", "0"], r"buffers=\(0, 0\) contradicts buffers=\(1, 1\)"),
        (["--max_length", "17"], "max_length=17.* 16 tokens"),
    ):
        recipe, args = glue_bert.parse(["--model_name", name, "--max_length", "16", *options])
        with pytest.raises(ConfigurationError, match=message):
            glue_bert.build_model(recipe, args.seed, get_task(recipe.task))


def test_network_of_the_defaults():
    recipe, args = pretrain_bert.parse([])
    model = pretrain_bert.build_model(recipe, tokenizer(), args.seed)
    (stack,) = ode_view(model).stacks
    assert list(stack.step_sizes) == [1.0, 1.0, *[recipe.step_size] * 16, 1.0, 1.0]
    assert ode_view(model).settings.form == "split"
    deviation = 0.02 * math.sqrt(768 / recipe.width)
    for layer in model.roberta_prelayernorm.encoder.layer:
        attention = layer.attention.self
        for same in (attention.query, attention.key):
            assert same.weight.std().item() == pytest.approx(deviation, rel=0.1)
        for scaled in (attention.value, layer.attention.output.dense, layer.intermediate.dense, layer.output.dense):
            assert scaled.weight.std().item() == pytest.approx(deviation * math.sqrt(math.log(40)), rel=0.1)


def test_network_of_the_paper():
    recipe, args = pretrain_bert.parse([str(PAPER), "--max_steps", "7"])
    tokens = tokenizer()
    with torch.device("meta"):
        model = pretrain_bert.build_model(recipe, tokens, args.seed)
    config = model.config
    assert config.initializer_range == 0.02
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (768, 3072, 128)
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.1, 0.1)
    assert set(ode_view(model).stacks[0].step_sizes) == {1.0}
    assert (recipe.block_size, recipe.mask_share, args.per_device_train_batch_size) == (224, 0.2, 32)
    parallel = args.layer_parallel_config
    assert (parallel.strategy, parallel.coarsening) == ("mgrit", 4)
    assert (parallel.forward_iterations, parallel.backward_iterations) == (1, 1)
    assert args.max_steps == 7


def test_wrong_settings_are_named():
    with pytest.raises(ConfigurationError, match="width=30 must be a multiple of heads=4"):
        pretrain_bert.parse(["--width", "30", "--heads", "4"])
    with pytest.raises(ConfigurationError, match=r"mask_share=1\.5 in \(0, 1\)"):
        pretrain_bert.main(["--mask_share", "1.5"])
    with pytest.raises(ConfigurationError, match="block_size=2 must be at least 3"):
        pretrain_bert.main(["--block_size", "2"])
