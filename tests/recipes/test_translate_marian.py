"""The translation recipe run the way a user runs it, a few steps of a small network on the real verses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    M2M100ForConditionalGeneration,
    MarianMTModel,
)

from hf_layerpar import LayerParallelConfig, parallelize
from hf_layerpar.errors import ConfigurationError
from hf_layerpar.ode.convert import ode_view
from hf_layerpar.report.run import read_run
from recipes import translate_marian
from recipes.benchmarks.launch import ROOT
from recipes.bitext import Bitext, load_bitext
from recipes.predictions import accuracy, likeliest
from recipes.translation_metrics import bleu_of_generated, corpus_bleu
from tests.multiproc import run_ranks
from tests.recipes.launched import assert_train_alike, result_of

PAPER = ROOT / "recipes" / "translate_marian_paper.yaml"
VOCAB, LENGTH, TRAIN, VALIDATION = 600, 24, 6000, 24
NETWORK = ["--width", "32", "--heads", "2", "--inner_layers", "2", "--step_size", "0.5", "--buffers", "1", "1"]
DATA = ["--vocab_size", str(VOCAB), "--max_length", str(LENGTH), "--max_train_samples", str(TRAIN)]
DATA += ["--max_eval_samples", str(VALIDATION)]
# so long that different sentences get different translations
SMALL = [*NETWORK, *DATA, "--max_steps", "120", "--eval_steps", "60", "--logging_steps", "1"]
SMALL += ["--per_device_train_batch_size", "8", "--per_device_eval_batch_size", "32", "--learning_rate", "0.005"]


def run(folder: Path, processes: int, *options: str) -> dict[str, Any]:
    return result_of("translate_marian", folder, processes, *SMALL, *options)


@pytest.fixture(scope="module")
def bitext() -> Bitext:
    return load_bitext("offline", None, ("es", "en"), None, VOCAB, LENGTH, TRAIN, VALIDATION)


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("one")
    return run(folder, 1), folder


def test_two_processes_train_and_translate_as_one(one, bitext, tmp_path):
    alone, _ = one
    two = run(tmp_path, 2)
    # fewer beside the head
    stacks = {"model.encoder.layers": [[0, 1], [2, 3]], "model.decoder.layers": [[0, 1, 2], [3]]}
    assert {path: [rank["layers"][path] for rank in two["ranks"]] for path in stacks} == stacks
    losses = [entry["loss"] for entry in alone["steps"]]
    assert len(losses) == 120
    assert_train_alike([entry["loss"] for entry in two["steps"]], losses, tight=10)
    assert [entry["step"] for entry in alone["evaluation"]] == [60, 120]
    for name in ("loss", "accuracy"):
        ours, theirs = ([entry[name] for entry in found["evaluation"]] for found in (two, alone))
        assert ours == pytest.approx(theirs, abs=0.1)
    assert alone["evaluation"][-1]["loss"] < losses[0] - 2, "it doesn't learn"
    assert len({row["translation"] for row in two["translations"]}) > 2
    # what two processes translate is what one says with their weights
    check_saved(two, tmp_path, bitext, M2M100ForConditionalGeneration)


def test_result_and_logs(one, bitext):
    result, folder = one
    ode = result["settings"]["ode"]
    assert (ode["step_size"], ode["form"], ode["buffers"]) == (0.5, "split", [1, 1])
    assert result["rows"] == {"train": len(bitext.train), "validation": VALIDATION}
    assert set(result["metrics"]["validation"]) == {"loss", "accuracy", "bleu"}
    assert result["metrics"]["validation"]["bleu"] == result["bleu"]["score"]
    assert result["bleu"]["signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    shown = result["translations"]
    assert [row["source"] for row in shown] == bitext.sources[: translate_marian.SHOWN]
    assert [row["reference"] for row in shown] == bitext.references[: translate_marian.SHOWN]
    logged = read_run(folder)
    assert logged.validation == [(entry["step"], entry["loss"]) for entry in result["evaluation"]]
    assert (logged.steps, len(logged.training)) == (120, 120)


def check_saved(result: dict[str, Any], folder: Path, bitext: Bitext, model_class: type) -> None:
    """Stock transformers loads what was saved, and has its loss and its translations."""
    model = AutoModelForSeq2SeqLM.from_pretrained(folder / "model").eval()
    assert type(model) is model_class
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert tokenizer(bitext.sources)["input_ids"] == bitext.validation["input_ids"]
    assert tokenizer(text_target=bitext.references)["input_ids"] == bitext.validation["labels"]
    batch = DataCollatorForSeq2Seq(tokenizer)(list(bitext.validation))
    with torch.no_grad():
        loss = float(model(**batch).loss)
        found = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_length=LENGTH + 1)
    assert loss == pytest.approx(result["metrics"]["validation"]["loss"], abs=1e-4)
    translations = [text.strip() for text in tokenizer.batch_decode(found, skip_special_tokens=True)]
    shown = [row["translation"] for row in result["translations"]]
    assert translations[: len(shown)] == shown
    assert corpus_bleu(translations, bitext.references)["score"] == pytest.approx(result["bleu"]["score"])


def test_saved_model_loads_with_stock_transformers(one, bitext):
    result, folder = one
    check_saved(result, folder, bitext, M2M100ForConditionalGeneration)


def test_marian_itself_at_step_size_one(bitext, tmp_path):
    options = ["--architecture", "marian", "--step_size", "1", "--max_steps", "8", "--output_dir", str(tmp_path)]
    result = translate_marian.main([*SMALL, *options])
    assert result["settings"]["ode"]["form"] == "euler"
    check_saved(result, tmp_path, bitext, MarianMTModel)


def test_generating_while_training_with_mgrit(tmp_path):
    options = ["--strategy", "mgrit", "--coarsening", "2", "--coarse_operator", "aggregate", "--max_steps", "2"]
    options += ["--predict_with_generate", "--generation_num_beams", "2", "--output_dir", str(tmp_path)]
    result = translate_marian.main([*SMALL, *options])
    (evaluated,) = result["evaluation"]
    assert set(evaluated) == {"step", "loss", "bleu"}
    assert evaluated["bleu"] == result["bleu"]["score"]
    for values in result["gradient_agreement"].values():
        assert all(0.9 < v["cosine"] <= 1 for v in values)
    assert {entry["lp_backward_mode"] for entry in result["steps"]} == {"mgrit"}


def gradients(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}


def gradients_on_ranks(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Of this rank's parameters, with the loss."""
    loss = parallelize(model, LayerParallelConfig(micro_batches=2)).train_step(batch)
    return gradients(model) | {"loss": loss.numpy()}


@pytest.mark.parametrize("architecture", ["pre_ln", "marian"])
def test_every_gradient_of_several_ranks_is_that_of_the_serial_model(architecture, bitext):
    """And to the bit that of one rank: what several layers have a part in is summed in their order."""
    recipe, args = translate_marian.parse([*SMALL, "--architecture", architecture])
    model = translate_marian.build_model(recipe, bitext.tokenizer, args.seed)
    batch = dict(DataCollatorForSeq2Seq(bitext.tokenizer)([bitext.train[i] for i in range(4)]))
    assert (batch["attention_mask"] == 0).any()  # padded on both sides
    assert (batch["labels"] == -100).any()
    serial = copy.deepcopy(model)
    loss = serial(**batch).loss
    loss.backward()
    expected = gradients(serial) | {"loss": loss.detach().numpy()}
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"model.decoder.layers.2.encoder_attn.k_proj.weight", "model.encoder.layers.0.fc1.weight"} < names
    (one,) = run_ranks(gradients_on_ranks, 1, model, batch)
    assert set(one) == set(expected) == names | {"loss"}
    for name, gradient in one.items():
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-4, atol=1e-6, err_msg=name)
    for world in (2, 3):
        ranks = run_ranks(gradients_on_ranks, world, model, batch)
        assert set().union(*ranks) == set(one)
        for found in ranks:
            for name, gradient in found.items():
                np.testing.assert_array_equal(gradient, one[name], err_msg=name)
    for name in names:
        if not name.endswith("k_proj.bias"):  # which moves all scores of a query alike
            assert np.abs(expected[name]).max() > 1e-5, name


def test_bleu_of_known_pairs(bitext):
    found = corpus_bleu(["the cat is on the mat now", "a b c d"], ["the cat sat on the mat now", "a b c d"])
    # n-gram precisions 10/11, 7/9, 4/7, 2/5 and no brevity penalty
    assert found["score"] == pytest.approx(100 * (10 / 11 * 7 / 9 * 4 / 7 * 2 / 5) ** 0.25)
    ids = np.full((VALIDATION, LENGTH), -100)
    for row, labels in zip(ids, bitext.validation["labels"], strict=True):
        row[: len(labels)] = labels
    prediction = EvalPrediction(predictions=ids, label_ids=ids)
    assert bleu_of_generated(bitext.tokenizer, bitext.references)(prediction)["bleu"] == pytest.approx(100)


def test_accuracy_counts_the_references_tokens():
    labels = torch.tensor([[3, 4, -100], [5, 6, 7]])
    best = torch.tensor([[3, 1, 2], [5, 6, 0]])
    logits = torch.nn.functional.one_hot(best, 8).float()
    for outputs in (logits, (logits, torch.zeros(2))):
        assert torch.equal(likeliest(outputs, labels), best)
    assert accuracy(EvalPrediction(predictions=best.numpy(), label_ids=labels.numpy())) == {"accuracy": 3 / 5}


def test_network_of_the_defaults(bitext):
    recipe, args = translate_marian.parse([])
    model = translate_marian.build_model(recipe, bitext.tokenizer, args.seed)
    assert isinstance(model, M2M100ForConditionalGeneration)
    view = ode_view(model)
    assert [stack.path for stack in view.stacks] == ["model.encoder.layers", "model.decoder.layers"]
    assert view.settings.form == "split"
    assert model.accepts_loss_kwargs is False
    assert model.model.encoder.embed_tokens(torch.arange(VOCAB)).std().item() == pytest.approx(1, rel=0.05)
    assert args.generation_max_length == recipe.max_length + 1


def test_network_of_the_paper(bitext):
    recipe, args = translate_marian.parse([str(PAPER), "--max_steps", "7", "--lp_size", "1"])
    assert (recipe.source_lang, recipe.target_lang, recipe.max_length, recipe.dropout) == ("de", "en", 274, 0.1)
    with torch.device("meta"):
        model = translate_marian.build_model(recipe, bitext.tokenizer, args.seed)
    assert (model.config.encoder_layers, model.config.decoder_layers, model.config.encoder_ffn_dim) == (6, 6, 2048)
    assert model.config.dropout == model.config.attention_dropout == 0.1
    config = args.layer_parallel_config
    assert (config.strategy, config.coarsening) == ("mgrit", 3)
    assert (args.per_device_train_batch_size, args.max_steps) == (8, 7)
    parallelize(model, config)  # the grid fits both stacks


def test_wrong_settings_are_named():
    with pytest.raises(ConfigurationError, match="architecture='bart' must be one of pre_ln, marian"):
        translate_marian.parse(["--architecture", "bart"])
    with pytest.raises(ConfigurationError, match="width=30 must be a multiple of heads=4"):
        translate_marian.parse(["--width", "30"])
