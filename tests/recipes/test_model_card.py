"""Cards of recipes' runs: every figure comes from result.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from hf_layerpar.config import LayerParallelConfig, OdeSettings
from hf_layerpar.errors import ConfigurationError
from recipes import model_card


def result(**changes: Any) -> dict[str, Any]:
    settings = {
        "recipe": {"task": "sst2", "source": "movies", "model_name": "owner/base"},
        "ode": OdeSettings(step_size=0.25, form="euler").to_dict(),
        "layer_parallel": LayerParallelConfig(strategy="mgrit").to_dict(),
        "training": {"max_steps": 7, "num_train_epochs": 3, "learning_rate": 3e-4},
    }
    ranks = [{"device": "cpu", "lp_size": 2, "layers": {"bert.encoder.layer": part}} for part in ([0, 1], [2, 3])]
    return {
        "data": "nyu-mll/glue",
        "settings": settings,
        "metrics": {"validation": {"loss": 0.4321987, "accuracy": 0.8765}},
        "evaluation": [{"step": 3, "loss": 0.5}, {"step": 7, "loss": 0.4321987}],
        "steps": [{"step": 1, "loss": 2.0}, {"step": 7, "loss": 0.4}],
        "checks": [{"step": 2, "lp_check_name": "mgrit"}, {"step": 4, "lp_check_name": "exact"}],
        "seconds": {"training": 12.345, "all": 20.0},
        "ranks": ranks,
        "versions": {"torch": "2.13.0"},
    } | changes


def card_of(folder: Path, content: dict[str, Any]) -> ModelCard:
    folder.mkdir(exist_ok=True)
    (folder / "result.json").write_text(json.dumps(content))
    return ModelCard.load(model_card.main([str(folder), "-o", str(folder / "cards" / "mine.md")]))


def test_card_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    config = {"model_type": "ode-bert", "architectures": ["BertForSequenceClassification"], "hf_layerpar": {}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    card = card_of(tmp_path, result())
    assert (card.data.base_model, card.data.datasets) == ("owner/base", ["nyu-mll/glue"])
    assert {r.metric_type: r.metric_value for r in card.data.eval_results} == {"loss": 0.4321987, "accuracy": 0.8765}
    assert 'SequenceClassification.from_pretrained("mine", trust_remote_code=True)' in card.text
    for row in ("| steps in `bert.encoder.layer` | 4 |", "| seconds | 12.35 |", "| 4 | exact |", "| dp_size | 1 |"):
        assert f"\n{row}\n" in card.text


def test_offline_data_and_stock_runs(tmp_path: Path) -> None:
    settings = {
        "recipe": {"task": "offline", "source": "movies", "model_name": "minilm"},
        "ode": None,
        "layer_parallel": None,
        "training": {},
    }
    card = card_of(tmp_path, result(data="rated sentences: movies", settings=settings, ranks=[{"device": "cpu"}]))
    assert card.data.datasets is None
    assert card.data.base_model is None
    assert card.data.tags is None
    assert "from minilm, trained on rated sentences: movies" in card.text
    assert "hf_layerpar`" not in card.text.partition("## How to load it")[0]


def test_the_metrics_of_an_exact_run_stand_beside(tmp_path: Path) -> None:
    ours, exact = result(), result(metrics={"validation": {"loss": 0.5, "accuracy": 0.25}})
    exact["settings"]["layer_parallel"] = LayerParallelConfig().to_dict()
    (tmp_path / "exact.json").write_text(json.dumps(exact))
    (tmp_path / "run.json").write_text(json.dumps(ours))
    command = [str(tmp_path / "run.json"), "-o", str(tmp_path / "card.md"), "--against"]
    text = ModelCard.load(model_card.main([*command, str(tmp_path / "exact.json")])).text
    assert "\n| validation | accuracy | 0.8765 | 0.25 |\n" in text
    assert '\nEvaluation runs all layers exactly, whatever the training did. "Trained exactly" is a run' in text
    with pytest.raises(ConfigurationError, match="give one that was trained exactly"):
        model_card.main([*command, str(tmp_path / "run.json")])
    exact["settings"]["training"]["learning_rate"] = 1.0
    (tmp_path / "exact.json").write_text(json.dumps(exact))
    with pytest.raises(ConfigurationError, match=r"learning_rate=0.0003 in the run, 1.0 in the one"):
        model_card.main([*command, str(tmp_path / "exact.json")])


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="the folder of a finished run"):
        model_card.main([str(tmp_path), "-o", str(tmp_path / "card.md")])
    with pytest.raises(ConfigurationError, match="has no data, metrics, ranks"):
        card_of(tmp_path, {"settings": {}, "seconds": {}, "versions": {}})
    assert not (tmp_path / "card.md").exists()
