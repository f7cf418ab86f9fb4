"""The GLUE recipe, a few steps on a few sentences (`tests/hub/test_recipe_push.py` starts it as a user does).

Two exact processes must train like the stock Trainer in one; the refined network must train with MGRIT; what is saved
must load with stock transformers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from hf_layerpar.errors import ConfigurationError
from recipes import glue_bert
from recipes.benchmarks.launch import ROOT
from recipes.glue_tasks import get_task
from recipes.offline import minilm
from tests.recipes.launched import run_recipe

REFINED = ROOT / "recipes" / "glue_bert_refined.yaml"
SMALL = ["--max_train_samples", "96", "--max_eval_samples", "30", "--max_length", "24", "--max_steps", "6"]
SMALL += ["--per_device_train_batch_size", "10", "--per_device_eval_batch_size", "16"]  # neither divides its rows


@dataclass
class Run:
    result: dict[str, Any]
    folder: Path
    output: str

    @property
    def losses(self) -> list[float]:
        return [step["loss"] for step in self.result["steps"]]


def run(folder: Path, processes: int, *options: str) -> Run:
    output = run_recipe("glue_bert", folder, processes, *options)
    return Run(json.loads((folder / "result.json").read_text()), folder, output)


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Run:
    return run(tmp_path_factory.mktemp("stock"), 1, "--stock", "--dropout", "0.0", *SMALL)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Run:
    return run(tmp_path_factory.mktemp("pipeline"), 2, "--dropout", "0.0", "--micro_batches", "3", *SMALL)


@pytest.fixture(scope="module")
def refined(tmp_path_factory) -> Run:
    options = [str(REFINED), *SMALL, "--max_steps", "3", "--max_eval_samples", "10"]
    return run(tmp_path_factory.mktemp("refined"), 2, *options)


def test_two_processes_train_like_stock_in_one(stock, pipeline):
    assert [s["step"] for s in stock.result["steps"]] == list(range(1, 7))
    assert pipeline.losses == pytest.approx(stock.losses, abs=1e-5)
    assert max(stock.losses) - min(stock.losses) > 1e-2, "the losses don't move, so they compare nothing"
    norms = [[s["grad_norm"] for s in r.result["steps"]] for r in (stock, pipeline)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)
    for split in ("validation", "test"):
        ours, theirs = pipeline.result["metrics"][split], stock.result["metrics"][split]
        assert ours.keys() == theirs.keys() == {"loss", "accuracy", "f1", "majority"} | (ours.keys() & {"epoch"})
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours == pytest.approx(theirs, abs=0.1)  # rounding decides where both labels are equally likely


def test_saved_model_loads_with_stock_transformers(stock, pipeline):
    weights = [load_file(r.folder / "model" / "model.safetensors") for r in (stock, pipeline)]
    assert weights[0].keys() == weights[1].keys()
    start = load_file(minilm() / "model.safetensors")
    # of the whole, as Adam makes steps of rounding where the gradient is nothing else
    moved = sum(
        float((weights[0][f"bert.{k}"] - v).square().sum()) for k, v in start.items() if f"bert.{k}" in weights[0]
    )
    apart = sum(float((weights[0][k] - weights[1][k]).square().sum()) for k in weights[0])
    assert 0 < apart < 0.02**2 * moved

    folder = pipeline.folder / "model"
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(model).__module__.startswith("transformers.")
    reference = AutoModelForSequenceClassification.from_pretrained(stock.folder / "model")
    batch = tokenizer(["a fine film", "dull and far too long"], padding=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, reference(**batch).logits, atol=1e-3, rtol=1e-3)


def test_result_records_settings_ranks_and_versions(pipeline):
    result = pipeline.result
    assert result["settings"]["layer_parallel"]["strategy"] == "pipeline"
    assert result["settings"]["layer_parallel"]["micro_batches"] == 3
    assert result["settings"]["recipe"]["dropout"] == 0.0
    assert [r["layers"]["bert.encoder.layer"] for r in result["ranks"]] == [[0, 1, 2], [3, 4, 5]]
    assert [(r["lp_rank"], r["lp_size"], r["threads"], r["device"][:3]) for r in result["ranks"]] == [
        (0, 2, 1, "cpu"),
        (1, 2, 1, "cpu"),
    ]
    assert result["rows"] == {"train": 96, "validation": 30, "test": 30}
    assert result["seconds"]["all"] > result["seconds"]["training"] > 0
    assert result["versions"]["torch"] == torch.__version__
    assert result["gradient_agreement"] == {}
    assert not list(pipeline.folder.glob("*.part"))
    assert "test accuracy" in pipeline.output
    assert "pipeline" in pipeline.output


def test_refined_network_trains_with_mgrit(refined):
    result = refined.result
    assert result["settings"]["ode"]["step_size"] == 0.25
    settings = result["settings"]["layer_parallel"]
    assert (settings["strategy"], settings["coarse_operator"], settings["coarsening"]) == ("mgrit", "aggregate", 4)
    layers = [r["layers"]["bert.encoder.layer"] for r in result["ranks"]]
    assert layers[0] + layers[1] == list(range(24))
    assert all(len(held) == 12 for held in layers)
    assert len(refined.losses) == 3
    for when in ("before", "after"):
        values = result["gradient_agreement"][when]
        assert len(values) == 2
        assert all(0.5 < v["cosine"] < 1 for v in values), values  # inexact, but a gradient
    assert json.loads((refined.folder / "model" / "config.json").read_text())["num_hidden_layers"] == 24


def test_options_override_the_settings_file(tmp_path):
    settings = tmp_path / "settings.yaml"
    settings.write_text("output_dir: here\nlearning_rate: 1e-3\nmax_steps: 7\nbuffers: [1, 2]\nseed: 5\n")
    recipe, args = glue_bert.parse([str(settings), "--max_steps", "9", "--task", "sst2"])
    assert (args.output_dir, args.learning_rate, args.max_steps, args.seed) == ("here", 1e-3, 9, 5)
    assert (recipe.buffers, recipe.task, recipe.step_size) == ([1, 2], "sst2", None)
    assert args.lp_size == 1


def test_fine_tuning_of_the_paper():
    recipe, args = glue_bert.parse([str(ROOT / "recipes" / "glue_bert_paper.yaml"), "--task", "mrpc"])
    assert (recipe.task, recipe.model_name) == ("mrpc", "runs/pretrain_bert_paper/model")
    assert (args.layer_parallel_config.strategy, args.max_steps, args.num_train_epochs) == ("pipeline", -1, 3)


def test_wrong_settings_are_named(tmp_path):
    settings = tmp_path / "settings.yaml"
    settings.write_text("max_step: 7\n")
    with pytest.raises(ConfigurationError, match=r"settings\.yaml sets \['max_step'\]"):
        glue_bert.parse([str(settings)])
    with pytest.raises(ConfigurationError, match=r"step_size=0\.5"):
        glue_bert.parse(["--stock", "--step_size", "0.5"])
    with pytest.raises(ConfigurationError, match="strategy=mgrit"):
        glue_bert.parse(["--stock", "--strategy", "mgrit"])


def test_dropout_option_reaches_every_rate():
    recipe, args = glue_bert.parse(["--stock", "--dropout", "0.0"])
    model, _ = glue_bert.build_model(recipe, args.seed, get_task(recipe.task))
    rates = {name: m.p for name, m in model.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert len(rates) > 12
    assert set(rates.values()) == {0.0}


def test_regression_task_gets_a_regression_head():
    recipe, args = glue_bert.parse(["--stock", "--task", "stsb"])
    model, _ = glue_bert.build_model(recipe, args.seed, get_task(recipe.task))
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")
    assert model.classifier.out_features == 1


@pytest.mark.parametrize(("name", "family"), [("stsb", "bert"), ("mnli", "distilbert"), ("sst2", "roberta")])
def test_glue_tasks_train_other_models(name, family, hub, tmp_path):
    """One process; a regression, a pair task with two test sets, and a single-sentence one."""
    config = AutoConfig.for_model(
        family,
        vocab_size=30522,
        max_position_embeddings=80,
        **dict.fromkeys(("hidden_size", "dim"), 32),
        **dict.fromkeys(("num_hidden_layers", "n_layers"), 3),
        **dict.fromkeys(("num_attention_heads", "n_heads"), 2),
        **dict.fromkeys(("intermediate_size", "hidden_dim"), 64),
    )
    folder = tmp_path / "model"
    AutoModel.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(minilm()).save_pretrained(folder)
    options = ["--task", name, "--model_name", str(folder), "--output_dir", str(tmp_path / "out")]
    result = glue_bert.main([*options, "--max_steps", "3", "--per_device_train_batch_size", "8", "--max_length", "16"])
    tests = {"test_matched", "test_mismatched"} if name == "mnli" else {"test"}
    assert set(result["metrics"]) == {"validation"} | tests
    wanted = {"pearson", "spearmanr"} if name == "stsb" else {"accuracy", "f1", "majority"}
    assert all(wanted < set(values) for values in result["metrics"].values())
    assert [s["step"] for s in result["steps"]] == [1, 2, 3]
    assert all(s["grad_norm"] > 0 for s in result["steps"])
    written = json.loads((tmp_path / "out" / "result.json").read_text())
    assert written["metrics"] == result["metrics"]
