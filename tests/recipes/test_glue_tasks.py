"""Every GLUE task: columns, labels, splits and metrics, on data shaped like the hub's; and the offline task."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
from transformers import AutoTokenizer, EvalPrediction

from hf_layerpar.errors import ConfigurationError
from recipes import glue_tasks
from recipes.glue_tasks import (
    TASKS,
    encode,
    get_task,
    load_files,
    load_splits,
    local_metrics,
    majority_share,
    metrics_for,
)
from recipes.offline import DownloadError, Sentence, minilm
from tests.recipes.fake_glue import CLASSES, COLUMNS


def test_every_glue_task_is_known():
    assert set(TASKS) == set(COLUMNS) | {glue_tasks.OFFLINE}
    with pytest.raises(ConfigurationError, match=r"'squad'.*sst2"):
        get_task("squad")


@pytest.mark.parametrize("name", sorted(COLUMNS))
def test_splits_and_features_of_a_glue_task(name, hub):
    splits = load_splits(name, seed=3)
    tests = {"test_matched", "test_mismatched"} if name == "mnli" else {"test"}
    assert set(splits.held_out) == {"validation"} | tests
    assert (len(splits.train), len(splits.held_out["validation"])) == (36, 4)
    texts = {r["text"] for r in splits.train}
    assert not texts & {r["text"] for r in splits.held_out["validation"]}
    columns = COLUMNS[name]
    for row in splits.train:
        i = row["text"].split()[-1]
        assert row["text"] == f"train {columns[0]} {i}"
        assert row["pair"] == (f"train {columns[1]} {i}" if len(columns) == 2 else None)
    for test in tests:
        assert all(r["text"].startswith(test.replace("test", "validation") + " ") for r in splits.held_out[test])
        assert all(r["label"] >= 0 for r in splits.held_out[test]), "hidden labels in a test split"
    regression = name == "stsb"
    features = encode(splits.train, AutoTokenizer.from_pretrained(minilm()), max_length=12, regression=regression)
    assert all(type(f["labels"]) is (float if regression else int) for f in features)
    assert all(len(f["input_ids"]) <= 12 for f in features)
    assert any(1 in f["token_type_ids"] for f in features) == (len(columns) == 2)
    assert get_task(name).num_labels == CLASSES.get(name, 2)


def test_splits_depend_on_the_seed_only(hub):
    assert load_splits("rte", seed=1) == load_splits("rte", seed=1)
    assert load_splits("rte", seed=1).train != load_splits("rte", seed=2).train
    limited = load_splits("rte", seed=1, max_train=5, max_held_out=2)
    assert limited.train == load_splits("rte", seed=1).train[:5]
    assert {len(rows) for rows in limited.held_out.values()} == {2}


def test_offline_splits_share_no_row(monkeypatch):
    rows = [Sentence(f"sentence {i}", 1.0 if i % 3 else -1.0, int(i % 3 > 0)) for i in range(50)]
    monkeypatch.setattr(glue_tasks, "sentiment", lambda source: rows)
    splits = load_splits("offline", seed=0)
    parts = [splits.train, splits.held_out["validation"], splits.held_out["test"]]
    assert [len(p) for p in parts] == [40, 5, 5]
    assert {r["text"] for p in parts for r in p} == {s.text for s in rows}
    assert majority_share([r for p in parts for r in p]) == pytest.approx(33 / 50)


def test_unreachable_hub_names_the_remedy(monkeypatch):
    def unreachable(path, name):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DownloadError, match="--task offline"):
        load_splits("sst2", seed=0)


def test_metrics_by_hand():
    predictions, labels = np.array([1, 1, 0, 0, 1]), np.array([1, 0, 0, 1, 1])
    assert local_metrics(get_task("sst2"), predictions, labels) == pytest.approx({"accuracy": 3 / 5, "f1": 2 / 3})
    # tp 2, fp 1, fn 1, tn 1: (2*1 - 1*1) / sqrt(3*3*2*2)
    assert local_metrics(get_task("cola"), predictions, labels)["matthews_correlation"] == pytest.approx(1 / 6)
    mnli = local_metrics(get_task("mnli"), np.array([0, 1, 2, 2]), np.array([0, 1, 2, 1]))
    assert mnli == pytest.approx({"accuracy": 3 / 4, "f1": (1 + 2 / 3 + 2 / 3) / 3})
    line = np.array([0.0, 1.0, 2.0, 4.0])
    assert local_metrics(get_task("stsb"), 2 * line + 1, line) == pytest.approx({"pearson": 1.0, "spearmanr": 1.0})


@pytest.mark.parametrize("name", ["offline", "mrpc", "stsb"])
def test_metrics_without_the_hub_are_the_local_ones_and_say_so(name, monkeypatch):
    import evaluate

    def unreachable(path, config):
        assert (path, config) == ("glue", name)
        raise FileNotFoundError("no hub")

    monkeypatch.setattr(evaluate, "load", unreachable)
    compute, origin = metrics_for(get_task(name))
    assert origin == ("scikit-learn" if name == "offline" else "scikit-learn (evaluate.load failed: FileNotFoundError)")
    logits = np.array([[2.0, 0.0], [0.5, 1.0], [1.0, 3.0]]) if name != "stsb" else np.array([[1.0], [2.0], [2.5]])
    labels = np.array([0, 1, 0]) if name != "stsb" else np.array([1.0, 2.0, 2.5])
    expected = {"accuracy": 2 / 3, "f1": 2 / 3} if name != "stsb" else {"pearson": 1.0, "spearmanr": 1.0}
    assert compute(EvalPrediction(predictions=logits, label_ids=labels)) == pytest.approx(expected)


def test_official_metric_is_used_where_the_hub_answers(monkeypatch):
    import evaluate

    class Official:
        def compute(self, predictions, references):
            return {"accuracy": float((predictions == references).mean()), "official": 1.0}

    monkeypatch.setattr(evaluate, "load", lambda path, config: Official())
    compute, origin = metrics_for(get_task("mrpc"))
    assert origin == "evaluate"
    found = compute(EvalPrediction(predictions=np.array([[2.0, 0.0], [0.0, 1.0]]), label_ids=np.array([0, 1])))
    assert found == pytest.approx({"accuracy": 1.0, "f1": 1.0, "official": 1.0})


ROWS = {
    "words.csv": "id,text,label\n" + "".join(f"{i},text {i},{'bad' if i % 3 else 'good'}\n" for i in range(30)),
    "pairs.tsv": "question\tanswer\tlabel\n" + "".join(f"q {i}\ta {i}\t{i % 4}\n" for i in range(30)),
    "scores.jsonl": "".join(f'{{"sentence": "s {i}", "label": {i / 10}}}\n' for i in range(30)),
}


@pytest.mark.parametrize(
    ("name", "keys", "labels"),
    [
        ("words.csv", ("text", None), ("bad", "good")),
        ("pairs.tsv", ("question", "answer"), ("0", "1", "2", "3")),
        ("scores.jsonl", ("sentence", None), ()),
    ],
)
def test_files_of_ones_own_make_a_task(name, keys, labels, tmp_path):
    path = tmp_path / name
    path.write_text(ROWS[name])
    task, splits = load_files({"train": str(path), "test": str(path)}, 0, {"train": 20, "test": 5})
    assert (task.keys, task.labels, task.glue) == (keys, labels, None)
    assert [len(splits.train), {k: len(v) for k, v in splits.held_out.items()}] == [20, {"test": 5}]
    assert {row["label"] for row in splits.train} == set(range(len(labels))) or not labels
    assert splits.held_out["test"][1]["text"] in ("text 1", "q 1", "s 1")
    _, alone = load_files({"train": str(path)}, 0, {})
    assert [len(alone.train), len(alone.held_out["validation"])] == [27, 3]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", "text,label\nx,1\ny,1\n", "has 1 classes"),
        ("a.csv", "text,stars\nx,1\n", "one called 'label'"),
        ("a.csv", "text,label\nx,1\ny,\n", "with a value in each row"),
        ("a.csv", "number,label\n1,1\n2,0\n", "none of text"),
        ("a.csv", 'text,label\n"x,1\ny,2,3,4\n', "can't be read as csv"),
        ("a.txt", "x", "must be a file that ends in"),
        ("a.csv", "text,label\nx,1\ny,0\n", "no rows for validation"),
    ],
)
def test_files_that_make_no_task_are_refused(name, content, says, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigurationError, match=says):
        load_files({"train": str(tmp_path / name)}, 0, {})
