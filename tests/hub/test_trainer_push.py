"""The Trainer's pushes, on lp size 1 and 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from tests.hub import scenarios
from tests.hub.endpoint import Endpoint
from tests.hub.stock import load_stock
from tests.multiproc import RankPool

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "hub_always_push": True, "max_steps": 4}
RUNS = {
    # post-LN with a step size: custom code; weights stay as they are
    "tester/lp2": ({"lp_size": 2, "hub_strategy": "checkpoint"} | SAVING, {"step_size": 0.5, "form": "euler"}),
    "tester/lp1": ({"lp_size": 1, "hub_strategy": "end"} | SAVING, {}),
}
MODEL = {"config.json", "model.safetensors", "training_args.bin", "README.md"}


@pytest.fixture(scope="module")
def trained(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    folder = tmp_path_factory.mktemp("trained")
    found = {}
    for repo_id, (settings, ode) in RUNS.items():
        out, file = folder / repo_id, folder / f"{repo_id.replace('/', '--')}.pt"
        settings = settings | {"hub_model_id": repo_id, "save_total_limit": 1}
        found[repo_id] = ranks.run(scenarios.train_and_push, out, settings, ode, file)
    return folder, found


def test_stock_classes_load_what_the_trainer_pushed(
    trained: Any, endpoint: Endpoint, environment: dict[str, str]
) -> None:
    folder, results = trained
    for repo_id, loaded in load_stock(folder, environment).items():
        assert loaded["distance"] < 1e-6
        assert (loaded["refused"] is not None) == (repo_id == "tester/lp2")
        first, second = results[repo_id]
        assert first["commit"].endswith(endpoint.store.revision(repo_id, "main")["oid"])
        assert second["commit"] is None


def test_what_is_pushed_when(trained: Any, endpoint: Endpoint) -> None:
    assert endpoint.messages("tester/lp1") == ["End of training"]
    assert endpoint.files("tester/lp1") == MODEL
    assert endpoint.messages("tester/lp2") == [
        "Training in progress, step 2",
        "Training in progress, step 4",
        "End of training",
    ]
    history = endpoint.store.history("tester/lp2")
    code = MODEL | {"modeling_hf_layerpar.py"}
    for commit in history[1:]:  # each revision is a whole model, and the checkpoint of the same step
        files = set(commit["files"]) - {".gitattributes"}
        assert {name for name in files if "/" not in name} == code
        kept = {name.removeprefix("last-checkpoint/") for name in files if "/" in name}
        assert {"optimizer/.metadata", "optimizer/__0_0.distcp", "optimizer/__1_0.distcp", "trainer_state.json"} <= kept
    weights = [commit["files"]["model.safetensors"]["sha256"] for commit in history[1:]]
    assert weights[0] != weights[1] == weights[2]
    assert history[2]["files"]["last-checkpoint/model.safetensors"]["sha256"] == weights[1]
    folder, _ = trained
    assert not list((folder / "tester/lp2").glob("_push-*"))


def test_the_card_tells_the_run(trained: Any, endpoint: Endpoint) -> None:
    _, results = trained
    card = ModelCard(endpoint.text("tester/lp2", "README.md"))
    assert {"hf_layerpar", "layer-parallel", "generated_from_trainer", "tiny"} <= set(card.data.tags)
    assert card.data.datasets == ["owner/sentences"]
    assert card.data.language == "en"
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.metrics == ["loss"]
    (result,) = card.data.eval_results
    assert (result.dataset_split, result.metric_type) == ("eval", "loss")
    assert result.metric_value == results["tester/lp2"][0]["evaluation"]
    assert 'AutoModelForSequenceClassification.from_pretrained("tester/lp2", trust_remote_code=True)' in card.text
    for row in ("| step size | 0.5 |", "| strategy | pipeline |", "| lp_size | 2 |", "| learning_rate | 0.001 |"):
        assert row in card.text
    assert f"| eval | loss | {result.metric_value:.4g} |" in card.text
    plain = ModelCard(endpoint.text("tester/lp1", "README.md"))
    assert "trust_remote_code" not in plain.text
    assert "| dp_size | 2 |" in plain.text


def test_a_card_that_people_wrote_is_kept(endpoint: Endpoint, ranks: RankPool, tmp_path: Path) -> None:
    repo_id = "tester/described"
    ranks.run(scenarios.push_serial, tmp_path, repo_id, "llama", {})
    endpoint.write(repo_id, "README.md", "---\nlicense: mit\ntags: [theirs]\n---\nWritten with care.\n")
    settings = SAVING | {"lp_size": 2, "hub_model_id": repo_id, "hub_strategy": "every_save"}
    ranks.run(scenarios.train_and_push, tmp_path / "run", settings, {}, tmp_path / "file.pt")
    history = endpoint.store.history(repo_id)
    assert history[-3]["message"] == "Training in progress, step 2"
    for commit in history[-3:]:
        card = ModelCard(endpoint.text(repo_id, "README.md", commit["oid"]))
        assert card.text.strip() == "Written with care."
        assert card.data.license == "mit"
        assert {"theirs", "hf_layerpar"} <= set(card.data.tags)


def test_a_run_goes_on_from_the_hub(trained: Any, endpoint: Endpoint, ranks: RankPool, tmp_path: Path) -> None:
    prefix, files = "last-checkpoint/", endpoint.store.revision("tester/lp2", "main")["files"]
    for name, entry in files.items():
        if name.startswith(prefix):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(endpoint.store.content(entry))
    settings, ode = RUNS["tester/lp2"]
    settings = settings | {"max_steps": 5, "hub_model_id": "tester/resumed", "save_strategy": "no"}
    assert ranks.run(scenarios.resume, tmp_path / "out", tmp_path / prefix, settings, ode) == [5, 5]


def test_failures_are_raised_on_all_ranks(endpoint: Endpoint, ranks: RankPool, tmp_path: Path) -> None:
    endpoint.refuse = 403
    try:
        first, second = ranks.run(scenarios.failing_trainer, tmp_path, {"lp_size": 2, "hub_model_id": "tester/failing"})
    finally:
        endpoint.refuse = None
    for mine, theirs, reason in zip(first, second, ("commits are refused", "401"), strict=True):
        assert mine[0] not in ("pushed", "HubError")
        assert theirs[0] == "HubError"
        assert reason in mine[1]
        assert reason in theirs[1]
    assert endpoint.files("tester/failing") == set()


def test_training_outlives_a_hub_that_refuses(endpoint: Endpoint, ranks: RankPool, tmp_path: Path) -> None:
    settings = {"lp_size": 2, "hub_model_id": "tester/away", "hub_strategy": "every_save"} | SAVING
    endpoint.refuse = 403
    try:
        first, second = ranks.run(scenarios.train_through_refusals, tmp_path, settings)
    finally:
        endpoint.refuse = None
    assert first["step"] == second["step"] == 4
    assert len(first["said"]) == 2
    assert all("push of step" in text and "commits are refused" in text for text in first["said"])
    assert endpoint.files("tester/away") == set()
