"""`push_to_hub` of converted models: what arrives is what `save_pretrained` writes, whole, from one rank or several."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError

from hf_layerpar.hub import upload
from tests.hub import scenarios
from tests.hub.endpoint import Endpoint
from tests.hub.stock import load_stock
from tests.multiproc import RankPool

MODELS = {
    "tester/plain": ("bert", {}),
    "tester/folded": ("llama", {"step_size": 0.5}),
    "tester/code": ("bert", {"step_size": 0.5, "form": "euler"}),
}
PLAIN = {"config.json", "generation_config.json", "model.safetensors", "README.md"}


@pytest.fixture(scope="module")
def pushed(endpoint: Endpoint, ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All the models, from one process and from two; the folder with what they compute."""
    folder = tmp_path_factory.mktemp("logits")
    for repo_id, (family, settings) in MODELS.items():
        commits = ranks.run(scenarios.push_serial, folder, repo_id, family, settings)
        assert commits == [f"{endpoint.url}/{repo_id}/commit/{endpoint.store.revision(repo_id, 'main')['oid']}", None]
        commits = ranks.run(scenarios.push_parallel, folder, f"{repo_id}-2", family, settings)
        assert commits[0] is not None
        assert commits[1] is None
    return folder


def test_stock_classes_load_what_was_pushed(pushed: Path, environment: dict[str, str], endpoint: Endpoint) -> None:
    found = load_stock(pushed, environment)
    assert set(found) == set(MODELS) | {f"{repo_id}-2" for repo_id in MODELS}
    for repo_id, loaded in found.items():
        kind = repo_id.removeprefix("tester/").removesuffix("-2")
        assert loaded["distance"] < (1e-5 if kind == "folded" else 1e-7), repo_id
        assert (loaded["refused"] is not None) == (kind == "code"), repo_id
        files = endpoint.files(repo_id)
        assert files | {"generation_config.json"} == PLAIN | ({"modeling_hf_layerpar.py"} if kind == "code" else set())
        assert endpoint.messages(repo_id) == ["Upload model"]


def test_both_ways_push_the_same(pushed: Path, endpoint: Endpoint) -> None:
    for repo_id in MODELS:
        one, two = (endpoint.store.revision(name, "main")["files"] for name in (repo_id, f"{repo_id}-2"))
        assert {n: e["sha256"] for n, e in one.items() if n != "README.md"} == {
            n: e["sha256"] for n, e in two.items() if n != "README.md"
        }


def test_card(pushed: Path, endpoint: Endpoint) -> None:
    card = ModelCard(endpoint.text("tester/code", "README.md"))
    assert {"hf_layerpar", "layer-parallel", "mine"} <= set(card.data.tags)
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "fill-mask"
    assert 'AutoModelForMaskedLM.from_pretrained("tester/code", trust_remote_code=True)' in card.text
    assert "| step size | 0.5 |" in card.text
    assert "| steps in `bert.encoder.layer` | 8 |" in card.text
    assert "coarse_operator" not in card.text
    parallel = ModelCard(endpoint.text("tester/folded-2", "README.md"))
    assert 'AutoModelForCausalLM.from_pretrained("tester/folded-2")' in parallel.text
    assert "| lp_size | 2 |" in parallel.text
    assert "mgrit" in parallel.data.tags


def test_a_second_push_replaces_the_first_whole(
    pushed: Path, endpoint: Endpoint, ranks: RankPool, tmp_path: Path
) -> None:
    repo_id = "tester/again"
    code = {"step_size": 0.5, "form": "euler"}
    ranks.run(scenarios.push_serial, tmp_path, repo_id, "bert", code)
    assert "modeling_hf_layerpar.py" in endpoint.files(repo_id)
    # pieces in place of the one file, which stock would go on loading if it stayed
    commit = {"max_shard_size": "50KB", "commit_message": "In shards"}
    ranks.run(_push_with, tmp_path, repo_id, commit)
    files = endpoint.files(repo_id)
    assert "model.safetensors.index.json" in files
    assert not files & {"model.safetensors", "modeling_hf_layerpar.py"}
    assert endpoint.messages(repo_id) == ["Upload model", "In shards"]
    first = endpoint.store.history(repo_id)[1]["oid"]
    assert "model.safetensors" in endpoint.files(repo_id, first)


def _push_with(folder: Path, repo_id: str, options: dict[str, Any]) -> None:
    scenarios.push_parallel(folder, repo_id, "llama", {}, **options)


def test_a_card_that_people_wrote_is_kept(endpoint: Endpoint, ranks: RankPool, tmp_path: Path) -> None:
    repo_id = "tester/written"
    ranks.run(scenarios.push_serial, tmp_path, repo_id, "llama", {})
    endpoint.write(repo_id, "README.md", "---\nlicense: mit\ntags: [theirs]\n---\nWritten with care.\n")
    ranks.run(scenarios.push_serial, tmp_path, repo_id, "llama", {}, 1)
    card = ModelCard(endpoint.text(repo_id, "README.md"))
    assert card.text.strip() == "Written with care."
    assert card.data.license == "mit"
    assert {"theirs", "hf_layerpar", "mine"} <= set(card.data.tags)


def test_a_hub_that_cannot_be_asked_has_no_missing_card(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise LocalEntryNotFoundError("timed out")

    monkeypatch.setattr(upload, "hf_hub_download", unreachable)
    repository = object.__new__(upload.Repository)
    repository.api, repository.repo_id, repository.revision = HfApi(), "tester/written", None
    with pytest.raises(LocalEntryNotFoundError):
        repository.card()


@pytest.mark.parametrize("spread", [False, True])
def test_save_pretrained_pushes_what_it_wrote(
    spread: bool, endpoint: Endpoint, ranks: RankPool, tmp_path: Path
) -> None:
    folder = tmp_path / f"mine-{spread}"
    repo_id = f"tester/{folder.name}"
    folder.mkdir()
    (folder / "optimizer.pt").write_text("stays here")
    ranks.run(_save_with, folder, spread, {"commit_message": "m", "private": True, "revision": "dev"})
    assert endpoint.files(repo_id, "dev") == PLAIN
    assert endpoint.messages(repo_id, "dev") == ["m"]
    assert endpoint.files(repo_id) == set()
    written = json.loads((folder / "config.json").read_text())
    assert json.loads(endpoint.text(repo_id, "config.json", "dev")) == written


def _save_with(folder: Path, spread: bool, options: dict[str, Any]) -> None:
    scenarios.save_and_push(folder, "gpt2", spread, **options)


# ---- failures


def test_a_refused_push_is_raised_on_all_ranks(endpoint: Endpoint, ranks: RankPool) -> None:
    endpoint.refuse = 403
    try:
        first, second = ranks.run(scenarios.failing_push, "tester/refused", 5)
    finally:
        endpoint.refuse = None
    assert first[0] == "HfHubHTTPError"
    assert second[0] == "HubError"
    assert "commits are refused" in second[1]
    assert endpoint.files("tester/refused") == set()
    first, second = ranks.run(_push_without_permission, "tester/forbidden")
    assert "401" in first[1]
    assert second[0] == "HubError"
    assert "401" in second[1]


def _push_without_permission(repo_id: str) -> tuple[str, str]:
    return scenarios.failing_push(repo_id, 5, token="hf_wrong")


def test_killed_during_the_first_push(endpoint: Endpoint, environment: dict[str, str]) -> None:
    repo_id, doomed = "tester/never", RankPool(1, environment)
    ended = _interrupted(endpoint, doomed, (scenarios.push_alone, repo_id), doomed.run(os.getpid)[0])
    assert ended == ["exit code -9"]
    assert [commit["message"] for commit in endpoint.store.history(repo_id)] == ["initial commit"]
    assert endpoint.files(repo_id) == set()


def test_an_endpoint_that_dies_and_a_rank_that_is_killed(tmp_path: Path) -> None:
    folder, repo_id = tmp_path / "endpoint", "tester/held"
    endpoint = Endpoint(folder)
    environment = endpoint.environment | {"HF_HOME": str(tmp_path / "home")}
    pool = RankPool(2, environment)
    try:
        pool.run(scenarios.push_serial, tmp_path, repo_id, "llama", {"step_size": 0.5})
        before = endpoint.store.history(repo_id)
        first, second = _interrupted(endpoint, pool, (scenarios.failing_push, repo_id, 7))
        assert second[0] == "HubError"
        assert first[0] not in ("pushed", "HubError")
        assert first[0] in second[1]

        endpoint = Endpoint(folder, endpoint.port)
        assert endpoint.store.history(repo_id) == before
        push = scenarios.failing_push, repo_id, 8
        first, second = _interrupted(endpoint, pool, push, pool.run(os.getpid)[0])
        assert first == "exit code -9"
        assert "PeerLostError" in second  # and no wait for a rank that is gone
        assert endpoint.store.history(repo_id) == before
        (loaded,) = load_stock(tmp_path, environment).values()
        assert loaded["distance"] < 1e-5
    finally:
        pool.close()
        endpoint.close()


def _interrupted(endpoint: Endpoint, pool: RankPool, push: tuple[Any, ...], pid: int | None = None) -> list[Any]:
    """How the ranks ended whose push was in the middle of its transfer when process `pid`, or the endpoint, died."""
    endpoint.transferring.clear()
    endpoint.release.clear()
    endpoint.hold_transfers = True
    ended: list[Any] = []
    run = pool.run if pid is None else pool.outcomes
    watch = threading.Thread(target=lambda: ended.extend(run(*push)))
    watch.start()
    try:
        assert endpoint.transferring.wait(120)
        if pid is None:
            endpoint.close()
        else:
            os.kill(pid, signal.SIGKILL)
        watch.join(120)
    finally:
        endpoint.hold_transfers = False
        endpoint.release.set()
    return ended
