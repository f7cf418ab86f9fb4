"""The tour of the README: a recipe trains on two processes and pushes; stock transformers loads it from the Hub."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.benchmarks.launch import ROOT, launch
from tests.hub.endpoint import Endpoint

REPOSITORY = "tester/movie-sentences"
SMALL = ["--max_train_samples", "64", "--max_eval_samples", "20", "--max_length", "16", "--max_steps", "2"]
PIPELINE = """
import json, sys
from transformers import pipeline
for model in sys.argv[2:]:
    classify = pipeline("text-classification", model=model, device="cpu")
    print("FOUND" + json.dumps(classify(json.loads(sys.argv[1]))))
assert "hf_layerpar" not in sys.modules
"""
SENTENCES = ["a film as good as they get", "two hours of my life are gone"]


def classified(*models: str) -> list[list[dict]]:
    """What stock's pipeline says of the sentences, by model."""
    command = [sys.executable, "-c", PIPELINE, json.dumps(SENTENCES), *models]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(found) for found in done.stdout.split("FOUND")[1:]]


def test_a_recipe_pushes_what_stock_pipelines_load(
    endpoint: Endpoint, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    push = ["--push_to_hub", "true", "--hub_model_id", REPOSITORY]
    launch(2, ROOT / "recipes" / "glue_bert.py", [*SMALL, *push, "--output_dir", str(tmp_path)], timeout=300)
    assert endpoint.messages(REPOSITORY) == ["End of training"]
    files = endpoint.files(REPOSITORY)
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= files
    assert not [name for name in files if "/" in name], "more than the model was pushed"
    assert (tmp_path / "result.json").exists()
    assert (tmp_path / "trainer_state.json").exists()
    found, local = classified(REPOSITORY, str(tmp_path / "model"))
    assert found == local
    assert {label["label"] for label in found} <= {"negative", "positive"}
    card = (tmp_path / "model" / "README.md").read_text()
    accuracy = json.loads((tmp_path / "result.json").read_text())["metrics"]["test"]["accuracy"]
    assert f"{accuracy:.4g}" in card, "the test accuracy is not on the card"
    assert "| test | majority |" in card, "a metric that the recipe adds is not on the card"
    assert "trained on the rated sentences of Hutto and Gilbert (ICWSM 2014, MIT licence): movies" in card
