"""The sentence classification tasks of the GLUE recipe: rows, splits, features and metrics.

The offline task needs no hub; the GLUE tasks come by name through `datasets`, tasks of one's own from files. Rows are
`{"text", "pair", "label"}` (pair None for one-sentence tasks), features what a tokenizer makes of them and "labels".
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import EvalPrediction, PreTrainedTokenizerBase

from hf_layerpar.errors import ConfigurationError
from recipes.offline import OFFLINE, hub_dataset, sentiment

Row = dict[str, Any]

GLUE = "nyu-mll/glue"
"""Its name on the hub."""


@dataclass(frozen=True)
class Task:
    """keys: columns of the one or two sentences. labels: what 0, 1, ... mean; none for regression. tests: our test
    splits, each with the name of the GLUE split that serves as it. glue: its name in GLUE."""

    keys: tuple[str, str | None]
    labels: tuple[str, ...]
    tests: tuple[tuple[str, str], ...] = (("test", "validation"),)
    glue: str | None = None

    @property
    def num_labels(self) -> int:
        """1 for regression."""
        return len(self.labels) or 1


TASKS = {
    OFFLINE: Task(("text", None), ("negative", "positive"), tests=()),
    "cola": Task(("sentence", None), ("unacceptable", "acceptable")),
    "sst2": Task(("sentence", None), ("negative", "positive")),
    "mrpc": Task(("sentence1", "sentence2"), ("not_equivalent", "equivalent")),
    "qqp": Task(("question1", "question2"), ("not_duplicate", "duplicate")),
    "stsb": Task(("sentence1", "sentence2"), ()),
    "mnli": Task(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        tests=(("test_matched", "validation_matched"), ("test_mismatched", "validation_mismatched")),
    ),
    "qnli": Task(("question", "sentence"), ("entailment", "not_entailment")),
    "rte": Task(("sentence1", "sentence2"), ("entailment", "not_entailment")),
    "wnli": Task(("sentence1", "sentence2"), ("not_entailment", "entailment")),
}


@dataclass(frozen=True)
class Splits:
    """held_out: "validation" and "test", for mnli "test_matched" and "test_mismatched"; each name -> rows."""

    train: list[Row]
    held_out: dict[str, list[Row]]


def get_task(name: str) -> Task:
    if name not in TASKS:
        raise ConfigurationError(f"task={name!r} is unknown; use one of {', '.join(TASKS)}")
    return dataclasses.replace(TASKS[name], glue=None if name == OFFLINE else name)


LABEL, MOST_LABELS = "label", 1000


def load_files(files: dict[str, str], seed: int, limits: dict[str, int | None]) -> tuple[Task, Splits]:
    """A task of one's own, from CSV, TSV, JSON lines or parquet files with one header each.

    files: split -> path, of "train" and, if there are any, "validation" and "test" (else a tenth of train is held out).
    limits: split -> use only that many rows of it.

    The column "label" holds words, or whole numbers; others than 0, 1 ... are classes in their order. Numbers with a
    fraction make a regression. The text is in the column "text" or "sentence", or in the first one or two beside label
    and "id"-like ones.

    Raises ConfigurationError for a file that can't be read, and for columns or labels that make no task.
    """
    tables = {split: _table(path) for split, path in files.items()}
    keys, values = _text_columns(tables["train"], files["train"]), tables["train"][LABEL]
    regression = any(isinstance(value, float) and not value.is_integer() for value in values)
    classes = sorted(set(values)) if not regression else []
    if not regression and not 2 <= len(classes) <= MOST_LABELS:
        raise ConfigurationError(
            f"{files['train']}: its column {LABEL!r} has {len(classes)} classes ({str(classes[:3])[1:-1]}); 2 to "
            f"{MOST_LABELS} make a task"
        )
    number = {value: i for i, value in enumerate(classes)}
    made: dict[str, list[Row]] = {}
    for split, table in tables.items():
        if lost := [key for key in (*keys, LABEL) if key and key not in table.column_names]:
            raise ConfigurationError(f"{files[split]} lacks the columns {lost} that {files['train']} has")
        if new := sorted({str(value) for value in table[LABEL] if not regression and value not in number}):
            raise ConfigurationError(f"{files[split]} has labels {new[:3]} that {files['train']} has not")
        rows = _rows(table, keys)
        made[split] = rows if regression else [row | {"label": number[row["label"]]} for row in rows]
    train = made.pop("train")
    random.Random(seed).shuffle(train)
    if not made:
        made, train = {"validation": train[: len(train) // 10]}, train[len(train) // 10 :]
    held_out = {split: rows[: limits.get(split)] for split, rows in made.items()}
    for split, rows in {"train": train, **held_out}.items():
        if not rows:
            raise ConfigurationError(f"no rows for {split}: give at least one, of {len(tables['train'])} to train on")
    labels = tuple(str(value) for value in classes)
    return Task(keys, labels, tests=()), Splits(train[: limits.get("train")], held_out)


def _table(path: str) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    readers = {".csv": ("csv", {}), ".tsv": ("csv", {"sep": "\t"}), ".json": ("json", {}), ".jsonl": ("json", {})}
    name, options = (readers | {".parquet": ("parquet", {})}).get(Path(path).suffix, ("", {}))
    if not name or not Path(path).is_file():
        raise ConfigurationError(f"{path} must be a file that ends in .csv, .tsv, .json, .jsonl or .parquet")
    try:
        table = load_dataset(name, data_files=path, split="train", **options)
    except (DatasetGenerationError, OSError, ValueError) as error:
        cause = error.__cause__ or error
        raise ConfigurationError(f"{path} can't be read as {name}: {cause}") from error
    if LABEL not in table.column_names or any(value is None for value in table[LABEL]):
        raise ConfigurationError(
            f"{path} has the columns {table.column_names}; one called {LABEL!r} with a value in each row is needed"
        )
    return table


def _text_columns(table: Any, path: str) -> tuple[str, str | None]:
    """The columns of the one or two sentences."""
    texts = [name for name in table.column_names if name != LABEL and isinstance(table[name][0], str)]
    texts = [name for name in texts if name in ("text", "sentence")] or texts
    if not texts:
        raise ConfigurationError(f"{path} has the columns {table.column_names}, and none of text beside {LABEL!r}")
    return texts[0], texts[1] if len(texts) > 1 else None


def load_splits(
    name: str, seed: int, source: str = "movies", max_train: int | None = None, max_held_out: int | None = None
) -> Splits:
    """The task's rows, shuffled and split by `seed` alone: 80/10/10 offline; GLUE hides its test labels, so there a
    tenth of train (at most 2,000 rows) becomes the validation split and the official validation set the test.

    source: of the offline sentences. max_train, max_held_out: use only that many rows of train and of each other split.
    """
    task = get_task(name)
    if name == OFFLINE:
        rows = [{"text": s.text, "pair": None, "label": s.label} for s in sentiment(source)]
        tests: dict[str, list[Row]] = {}
    else:
        data = _load_glue(name)
        rows = _rows(data["train"], task.keys)
        tests = {test: _rows(data[split], task.keys) for test, split in task.tests}
    random.Random(seed).shuffle(rows)
    tenth = min(len(rows) // 10, 2000)
    held_out = {"validation": rows[:tenth]}
    train = rows[tenth:]
    if name == OFFLINE:
        tests, train = {"test": train[:tenth]}, train[tenth:]
    return Splits(train[:max_train], {k: v[:max_held_out] for k, v in (held_out | tests).items()})


def _load_glue(name: str) -> Any:
    return hub_dataset(GLUE, name, f"--task {OFFLINE} needs neither")


def _rows(split: Any, keys: tuple[str, str | None]) -> list[Row]:
    first, second = keys
    pairs = split[second] if second else [None] * len(split)
    return [
        {"text": text, "pair": pair, "label": label}
        for text, pair, label in zip(split[first], pairs, split[LABEL], strict=True)
    ]


def encode(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int, regression: bool) -> list[dict]:
    """Features without padding (the collator pads each batch to its longest sentence)."""
    texts = [r["text"] for r in rows]
    pairs = [r["pair"] for r in rows] if rows and rows[0]["pair"] is not None else None
    encoded = tokenizer(texts, pairs, truncation=True, max_length=max_length, padding=False)
    kind = float if regression else int
    return [{k: v[i] for k, v in encoded.items()} | {"labels": kind(r["label"])} for i, r in enumerate(rows)]


def majority_share(rows: Sequence[Row]) -> float:
    """Accuracy of always answering the most frequent label."""
    labels = [r["label"] for r in rows]
    return max(labels.count(label) for label in set(labels)) / len(labels)


def local_metrics(task: Task, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """GLUE's metrics by their definitions, plus accuracy and F1 for every classification task (macro F1 beyond two
    classes). predictions: class indices, or values for a regression; labels alike; both `[rows]`."""
    if task.num_labels == 1:
        from scipy.stats import pearsonr, spearmanr

        functions = {"pearson": pearsonr, "spearmanr": spearmanr}
        return {key: float(np.asarray(f(predictions, labels))[0]) for key, f in functions.items()}
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    average = "binary" if task.num_labels == 2 else "macro"
    found = {
        "accuracy": float(accuracy_score(labels, predictions)),
        "f1": float(f1_score(labels, predictions, average=average)),
    }
    if task.glue == "cola":
        found["matthews_correlation"] = float(matthews_corrcoef(labels, predictions))
    return found


def metrics_for(task: Task) -> tuple[Callable[[EvalPrediction], dict[str, float]], str]:
    """(compute_metrics for a Trainer, where the task's official metric comes from).

    GLUE tasks use `evaluate.load("glue", task)`, which reads its definition from the hub; where that can't be reached
    the same metrics are computed with scikit-learn and scipy, and the second value says so.
    """
    official, origin = None, "scikit-learn"
    if task.glue is not None:
        try:
            import evaluate

            official, origin = evaluate.load("glue", task.glue), "evaluate"
        except (ImportError, OSError) as error:
            origin = f"scikit-learn (evaluate.load failed: {type(error).__name__})"

    def compute(p: EvalPrediction) -> dict[str, float]:
        values = np.asarray(p.predictions[0] if isinstance(p.predictions, tuple) else p.predictions)
        labels = np.asarray(p.label_ids)
        predictions = values[:, 0] if task.num_labels == 1 else values.argmax(axis=1)
        found = local_metrics(task, predictions, labels)
        if official is not None:
            found |= official.compute(predictions=predictions, references=labels) or {}
        return found

    return compute, origin
