"""The tagging recipe run the way a user runs it, a few steps of a small network on the real treebank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer, DataCollatorForTokenClassification

from hf_layerpar.errors import ConfigurationError
from hf_layerpar.ode.convert import ode_view
from hf_layerpar.report.run import read_run
from recipes import tag_morphology, tagging
from recipes.benchmarks.launch import ROOT
from recipes.treebank import Sentence, load_treebank
from tests.recipes.launched import assert_train_alike, result_of

PAPER = ROOT / "recipes" / "tag_morphology_paper.yaml"
SMALL = ["--width", "32", "--heads", "2", "--mlp_width", "32", "--inner_layers", "4", "--step_size", "0.5"]
SMALL += ["--buffers", "1", "1", "--max_length", "16", "--vocabulary", "500", "--max_train_samples", "100"]
SMALL += ["--max_eval_samples", "8", "--max_steps", "5", "--eval_steps", "2", "--logging_steps", "1"]
SMALL += ["--per_device_train_batch_size", "4", "--learning_rate", "0.01"]

SENTENCES = [Sentence(("the", "dog", "barks"), ("DET", "NOUN", "VERB"))]


def run(folder: Path, processes: int, *options: str) -> dict[str, Any]:
    return result_of("tag_morphology", folder, processes, *SMALL, *options)


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("one")
    return run(folder, 1), folder


def test_two_processes_train_as_one(one, tmp_path):
    alone, _ = one
    two = run(tmp_path, 2, "--micro_batches", "2")
    assert [rank["layers"]["roberta_prelayernorm.encoder.layer"] for rank in two["ranks"]] == [[0, 1, 2], [3, 4, 5]]
    assert [entry["step"] for entry in alone["evaluation"]] == [2, 4, 5]
    pairs = list(zip(two["evaluation"], alone["evaluation"], strict=True))
    for ours, theirs in [*pairs, *((two["metrics"][split], alone["metrics"][split]) for split in alone["metrics"])]:
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
        assert ours == pytest.approx(theirs, abs=0.05)  # rounding decides between equally likely tags
    losses = [entry["loss"] for entry in alone["steps"]]
    assert len(losses) == 5
    assert_train_alike([entry["loss"] for entry in two["steps"]], losses)
    assert losses[-1] < losses[0] - 0.2, "it doesn't learn"


def test_result_and_logs(one):
    result, folder = one
    ode = result["settings"]["ode"]
    assert (ode["step_size"], ode["form"], ode["buffers"]) == (0.5, "split", [1, 1])
    assert result["rows"]["validation"] > 8, "no sentence was cut"
    for split in ("validation", "test"):
        found = result["metrics"][split]
        assert list(found) == ["loss", "accuracy", "macro_f1", "most_frequent_tag", "most_frequent_tag_of_word"]
        assert 0 < found["most_frequent_tag"] < found["most_frequent_tag_of_word"] < 1
    logged = read_run(folder)
    assert logged.validation == [(entry["step"], entry["loss"]) for entry in result["evaluation"]]
    assert (logged.steps, len(logged.training)) == (5, 5)


def test_saved_model_loads_with_stock_transformers(one):
    result, folder = one
    model = AutoModelForTokenClassification.from_pretrained(folder / "model").eval()
    assert type(model).__module__.startswith("transformers.")
    assert model.config.num_hidden_layers == 6
    names = [model.config.id2label[i] for i in range(model.config.num_labels)]
    assert names[-1] == tagging.RARE
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    sentences = load_treebank("offline", None, "upos").validation[:8]
    batch = DataCollatorForTokenClassification(tokenizer)(tagging.encode(sentences, tokenizer, names, 16))
    with torch.no_grad():
        output = model(**batch)
    assert float(output.loss) == pytest.approx(result["metrics"]["validation"]["loss"], abs=1e-4)
    counted = batch["labels"] != tagging.IGNORED
    assert int(counted.sum()) == sum(len(sentence.words) for sentence in sentences)
    right = (output.logits.argmax(-1) == batch["labels"])[counted]
    assert float(right.float().mean()) == pytest.approx(result["metrics"]["validation"]["accuracy"])


def test_mgrit_and_sgd_on_all_features(tmp_path):
    options = ["--strategy", "mgrit", "--coarsening", "2", "--coarse_operator", "aggregate", "--target", "feats"]
    options += ["--optim", "sgd", "--optim_args", "momentum=0.9", "--max_steps", "2"]
    result = tag_morphology.main([*SMALL, *options, "--output_dir", str(tmp_path)])
    assert set(result["gradient_agreement"]) == {"before", "after"}
    assert all(0.9 < v["cosine"] < 1 for found in result["gradient_agreement"].values() for v in found)
    assert {entry["lp_backward_mode"] for entry in result["steps"]} == {"mgrit"}
    names = json.loads((tmp_path / "model" / "config.json").read_text())["label2id"]
    assert "NOUN|Gender=Masc|Number=Plur" in names


def test_network_of_the_defaults():
    recipe, args = tag_morphology.parse([])
    tokenizer = tagging.train_tokenizer(SENTENCES, 100)
    model = tag_morphology.build_model(recipe, tokenizer, ["NOUN", tagging.RARE], args.seed)
    (stack,) = ode_view(model).stacks
    assert list(stack.step_sizes) == [1 / 8] * 64
    assert ode_view(model).settings.form == "split"
    assert (model.config.hidden_size, model.config.intermediate_size) == (48, 128)
    assert model.roberta_prelayernorm.embeddings.position_embeddings.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.config.num_labels == 2
    assert model.accepts_loss_kwargs is False


def test_network_of_the_paper():
    recipe, args = tag_morphology.parse([str(PAPER), "--max_steps", "7"])
    config = args.layer_parallel_config
    assert (config.strategy, config.coarsening) == ("mgrit", 2)
    assert (args.per_device_train_batch_size, args.optim, args.max_steps) == (8, "sgd", 7)
    with torch.device("meta"):
        tokenizer = tagging.train_tokenizer(SENTENCES, 100)
        model = tag_morphology.build_model(recipe, tokenizer, ["NOUN", tagging.RARE], args.seed)
    (stack,) = ode_view(model).stacks
    assert list(stack.step_sizes) == [1.0] * 64
    assert (model.config.intermediate_size, model.config.max_position_embeddings) == (128, 2049)


def test_wrong_settings_are_named(tmp_path):
    with pytest.raises(ConfigurationError, match="width=30 must be a multiple of heads=4"):
        tag_morphology.parse(["--width", "30"])
    with pytest.raises(ConfigurationError, match="max_length=0"):
        tag_morphology.parse(["--max_length", "0"])
    with pytest.raises(ConfigurationError, match="target='lemma' must be one of upos, feats"):
        tag_morphology.main(["--target", "lemma", "--output_dir", str(tmp_path)])
    settings = tmp_path / "settings.yaml"
    settings.write_text("widht: 7\n")
    with pytest.raises(ConfigurationError, match=r"settings\.yaml sets \['widht'\]"):
        tag_morphology.parse([str(settings)])
