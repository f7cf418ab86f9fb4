"""The vision recipe run the way a user runs it, a few steps of a small network on scikit-learn's digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from hf_layerpar.errors import ConfigurationError
from hf_layerpar.ode.convert import ode_view
from hf_layerpar.report.run import read_run
from recipes import train_vit
from recipes.benchmarks.launch import ROOT
from recipes.images import load_images, pixel_rows
from tests.recipes.launched import assert_train_alike, result_of

PAPER = ROOT / "recipes" / "train_vit_paper.yaml"
SMALL = ["--dataset_name", "digits", "--image_size", "8", "--patch_size", "4", "--validation_rows", "50"]
SMALL += ["--width", "32", "--heads", "2", "--inner_layers", "4", "--step_size", "0.25", "--buffers", "1", "1"]
SMALL += ["--max_steps", "20", "--eval_steps", "8", "--logging_steps", "1", "--learning_rate", "4e-3"]
SMALL += ["--per_device_train_batch_size", "16", "--per_device_eval_batch_size", "64"]


def run(folder: Path, processes: int, *options: str) -> dict[str, Any]:
    return result_of("train_vit", folder, processes, *SMALL, *options)


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("one")
    return run(folder, 1), folder


def test_two_processes_train_as_one(one, tmp_path):
    alone, _ = one
    two = run(tmp_path, 2, "--micro_batches", "2")
    assert [rank["layers"]["vit.layers"] for rank in two["ranks"]] == [[0, 1, 2], [3, 4, 5]]
    losses = [entry["loss"] for entry in alone["steps"]]
    assert len(losses) == 20
    assert_train_alike([entry["loss"] for entry in two["steps"]], losses)
    assert [entry["step"] for entry in alone["evaluation"]] == [8, 16, 20]
    for ours, theirs in zip(two["evaluation"], alone["evaluation"], strict=True):
        assert ours == pytest.approx(theirs, abs=0.1)
    accuracies = [found["metrics"]["test"]["accuracy"] for found in (two, alone)]
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.1)
    assert min(accuracies) > 0.3, "it doesn't learn"


def test_result_and_logs(one):
    result, folder = one
    ode = result["settings"]["ode"]
    assert (ode["step_size"], ode["form"], ode["buffers"]) == (0.25, "split", [1, 1])
    assert result["rows"] == {"train": 1387, "validation": 50, "test": 360}
    assert set(result["metrics"]["validation"]) - {"epoch"} == {"loss", "accuracy"}
    assert result["metrics"]["validation"]["accuracy"] == result["evaluation"][-1]["accuracy"]
    assert result["seconds"]["all"] > result["seconds"]["training"] > 0
    assert result["gradient_agreement"] == {}
    logged = read_run(folder)
    assert logged.validation == [(entry["step"], entry["loss"]) for entry in result["evaluation"]]
    assert (logged.steps, len(logged.training)) == (20, 20)


def test_saved_model_loads_with_stock_transformers(one):
    result, folder = one
    model = AutoModelForImageClassification.from_pretrained(folder / "model").eval()
    assert type(model).__module__.startswith("transformers.")
    assert model.config.num_hidden_layers == 6
    test = load_images("digits", None, None, None, 50, 42).test
    assert test is not None
    rows = pixel_rows(test, AutoImageProcessor.from_pretrained(folder / "model"))[:]
    labels = torch.tensor(rows["labels"])
    with torch.no_grad():
        found = model(pixel_values=torch.stack(rows["pixel_values"]), labels=labels)
    assert float(found.loss) == pytest.approx(result["metrics"]["test"]["loss"], abs=1e-4)
    assert float((found.logits.argmax(-1) == labels).float().mean()) == pytest.approx(
        result["metrics"]["test"]["accuracy"]
    )


def test_pipeline_classifies_images(one, tmp_path):
    result, folder = one
    classify = pipeline("image-classification", model=str(folder / "model"))
    test = load_images("digits", None, None, None, 50, 42).test
    assert test is not None
    answers = [found[0]["label"] for found in classify(list(test["image"]), top_k=1)]
    right = sum(int(answer) == label for answer, label in zip(answers, test["label"], strict=True))
    assert right / len(test) == pytest.approx(result["metrics"]["test"]["accuracy"])
    test[0]["image"].resize((50, 30)).save(tmp_path / "wide.png")
    scores = classify(str(tmp_path / "wide.png"), top_k=10)
    assert {score["label"] for score in scores} == set("0123456789")
    assert sum(score["score"] for score in scores) == pytest.approx(1)


def test_mgrit_measures_its_gradient_and_resumes_with_random_crops(tmp_path):
    options = [
        *SMALL,
        "--strategy",
        "mgrit",
        "--coarsening",
        "2",
        "--coarse_operator",
        "aggregate",
        "--augment",
        "true",
    ]
    options += ["--output_dir", str(tmp_path), "--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2"]
    result = train_vit.main(options)
    assert set(result["gradient_agreement"]) == {"before", "after"}
    for values in result["gradient_agreement"].values():
        assert all(0.9 < v["cosine"] < 1 for v in values)
    assert {entry["lp_backward_mode"] for entry in result["steps"]} == {"mgrit"}
    resumed = train_vit.main([*options, "--resume_from_checkpoint", str(tmp_path / "checkpoint-2")])
    assert [entry["loss"] for entry in resumed["steps"]] == [entry["loss"] for entry in result["steps"]]
    assert resumed["metrics"] == result["metrics"]


def test_network_of_the_defaults():
    recipe, args = train_vit.parse([])
    model = train_vit.build_model(recipe, ["a", "b"], args.seed)
    (stack,) = ode_view(model).stacks
    assert list(stack.step_sizes) == [1.0, 1.0, *[1 / 16] * 28, 1.0, 1.0]
    assert ode_view(model).settings.form == "split"
    assert (model.config.hidden_size, model.config.intermediate_size, model.config.num_attention_heads) == (64, 256, 4)
    assert model.vit.embeddings.position_embeddings.shape == (1, 17, 64)
    assert model.config.id2label == {0: "a", 1: "b"}
    assert model.vit.layers[3].mlp.fc1.weight.std().item() == pytest.approx(64**-0.5, rel=0.05)


def test_network_of_the_paper():
    recipe, args = train_vit.parse([str(PAPER), "--max_steps", "7"])
    assert (recipe.dataset_name, recipe.augment, args.per_device_train_batch_size) == ("ILSVRC/imagenet-1k", True, 4)
    config = args.layer_parallel_config
    assert (config.strategy, config.coarsening, config.coarse_operator) == ("mgrit", 4, "rediscretize")
    assert (config.forward_iterations, config.backward_iterations) == (0, 1)
    assert args.max_steps == 7
    with torch.device("meta"):
        model = train_vit.build_model(recipe, [str(i) for i in range(1000)], args.seed)
    (stack,) = ode_view(model).stacks
    assert list(stack.step_sizes) == [1.0] * 32
    assert model.vit.embeddings.position_embeddings.shape == (1, 197, 768)
    assert model.classifier.weight.shape == (1000, 768)
    assert model.vit.layers[0].mlp.fc1.weight.shape == (3072, 768)


def test_wrong_settings_are_named():
    with pytest.raises(ConfigurationError, match="image_size=28 must be a multiple of patch_size=5"):
        train_vit.parse(["--patch_size", "5"])
    with pytest.raises(ConfigurationError, match="width=30 must be a multiple of heads=4"):
        train_vit.parse(["--width", "30"])
    with pytest.raises(ConfigurationError, match="validation_rows=0"):
        train_vit.main(["--dataset_name", "digits", "--validation_rows", "0"])
