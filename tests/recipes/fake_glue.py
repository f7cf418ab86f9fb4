"""GLUE's nine configurations with the hub's columns and a few rows each."""

from __future__ import annotations

import datasets

# Column names of nyu-mll/glue, as its data set card lists them.
COLUMNS = {
    "cola": ["sentence"],
    "sst2": ["sentence"],
    "mrpc": ["sentence1", "sentence2"],
    "qqp": ["question1", "question2"],
    "stsb": ["sentence1", "sentence2"],
    "mnli": ["premise", "hypothesis"],
    "qnli": ["question", "sentence"],
    "rte": ["sentence1", "sentence2"],
    "wnli": ["sentence1", "sentence2"],
}
CLASSES = {"stsb": 1, "mnli": 3}


def fake_glue(name: str, rows: int = 40) -> dict[str, datasets.Dataset]:
    def split(tag: str, hidden: bool = False) -> datasets.Dataset:
        columns = {c: [f"{tag} {c} {i}" for i in range(rows)] for c in COLUMNS[name]}
        label = (
            [0.25 * (i % 20) for i in range(rows)]
            if name == "stsb"
            else [i % CLASSES.get(name, 2) for i in range(rows)]
        )
        return datasets.Dataset.from_dict(
            columns | {"label": [-1] * rows if hidden else label, "idx": list(range(rows))}
        )

    held_out = ["validation_matched", "validation_mismatched"] if name == "mnli" else ["validation"]
    tests = [v.replace("validation", "test") for v in held_out]
    return {"train": split("train")} | {v: split(v) for v in held_out} | {t: split(t, hidden=True) for t in tests}
