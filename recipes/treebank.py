"""Sentences of treebanks in Universal Dependencies: their words, each with a tag.

A tag is a word's part of speech ("upos"), or that and its morphological features in one ("feats"), as in
"NOUN|Gender=Masc|Number=Plur".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from hf_layerpar.errors import ConfigurationError
from recipes.offline import HEBREW, OFFLINE, fetch, hub_dataset

TARGETS = ("upos", "feats")

SPLITS = {"train": "train", "validation": "dev", "test": "test"}
"""Our splits, and what treebanks call them."""

NO_TAG = "_"
"""The tag of a surface word like "don't" whose parts, "do" and "n't", follow it as words with tags."""


class Sentence(NamedTuple):
    """As many tags as words, at least one."""

    words: tuple[str, ...]
    tags: tuple[str, ...]


@dataclass(frozen=True)
class Treebank:
    train: list[Sentence]
    validation: list[Sentence]
    test: list[Sentence]


def load_treebank(name: str, config: str | None, target: str) -> Treebank:
    """The treebank `name`: "offline", a folder with *train.conllu, *dev.conllu and *test.conllu as UD's repositories
    have them, or a hub data set with the columns tokens, upos and feats.

    Raises ConfigurationError for a target or data that can't be used, DownloadError where data can't be fetched.
    """
    if target not in TARGETS:
        raise ConfigurationError(f"target={target!r} must be one of {', '.join(TARGETS)}")
    if name == OFFLINE:
        found = offline_splits(target)
    elif Path(name).is_dir():
        found = folder_splits(Path(name), target)
    else:
        found = hub_splits(name, config, target)
    empty = [split for split in SPLITS if not found.get(split)]
    if empty:
        raise ConfigurationError(f"dataset_name={name!r} has no tagged sentences for {', '.join(empty)}")
    return Treebank(**{split: found[split] for split in SPLITS})


def offline_splits(target: str) -> dict[str, list[Sentence]]:
    """The Hebrew treebank: 4,937 / 500 / 716 sentences, split as its makers do."""
    ours = {theirs: split for split, theirs in SPLITS.items()}
    found: dict[str, list[Sentence]] = {split: [] for split in SPLITS}
    path = fetch(HEBREW) / "ud_fixed.conllu"
    with path.open(encoding="utf-8") as lines:
        for comments, sentence in read_conllu(lines, target, path):
            found[ours[comments["set"]]].append(sentence)
    return found


def folder_splits(folder: Path, target: str) -> dict[str, list[Sentence]]:
    """One file a split."""
    found = {}
    for split, theirs in SPLITS.items():
        paths = sorted(folder.glob(f"*{theirs}.conllu"))
        if len(paths) != 1:
            raise ConfigurationError(
                f"{folder} has {len(paths)} files *{theirs}.conllu, not one; give a folder with one file each for "
                f"{', '.join(SPLITS.values())}"
            )
        with paths[0].open(encoding="utf-8") as lines:
            found[split] = [sentence for _, sentence in read_conllu(lines, target, paths[0])]
    return found


def hub_splits(name: str, config: str | None, target: str) -> dict[str, list[Sentence]]:
    """The splits of a hub data set: train, validation (or dev) and test."""
    remedy = f"--dataset_name {OFFLINE} and --dataset_name FOLDER, with a folder of CoNLL-U files, need neither"
    data = hub_dataset(name, config, remedy)
    needed = ["tokens", "upos"] + ["feats"] * (target == "feats")
    found = {}
    for split, theirs in SPLITS.items():
        rows = data.get(split, data.get(theirs))
        if rows is None:
            raise ConfigurationError(
                f"dataset_name={name!r} has the splits {sorted(data)}; it needs train, validation (or dev) and test"
            )
        if not set(needed) <= set(rows.column_names):
            raise ConfigurationError(
                f"dataset_name={name!r} has the columns {rows.column_names}; target={target!r} needs {needed}"
            )
        kind = getattr(rows.features["upos"], "feature", None)
        names = getattr(kind, "names", None)  # of class labels; else the tags themselves are there
        sentences = []
        for row in rows:
            tags = [names[tag] if names else tag for tag in row["upos"]]
            features = row["feats"] if target == "feats" else [None] * len(tags)
            sentences.append(_sentence(zip(row["tokens"], tags, features, strict=True)))
        found[split] = [sentence for sentence in sentences if sentence.words]
    return found


def read_conllu(lines: Iterable[str], target: str, path: Path) -> Iterator[tuple[dict[str, str], Sentence]]:
    """(comments "# name = value", sentence) for every sentence of a CoNLL-U file; path: named in errors."""
    comments: dict[str, str] = {}
    words: list[tuple[str, str, str | None]] = []
    for number, line in enumerate([*lines, ""], start=1):  # the last sentence may lack its empty line
        line = line.rstrip("\r\n")
        if not line:
            if words:
                yield comments, _sentence(words)
            comments, words = {}, []
        elif line.startswith("#"):
            name, _, value = line[1:].partition("=")
            comments[name.strip()] = value.strip()
        else:
            fields = line.split("\t")
            if len(fields) != 10:
                raise ConfigurationError(
                    f"{path} line {number} has {len(fields)} tab-separated fields; a word of a CoNLL-U file has 10"
                )
            if fields[0].isdecimal():  # not 4-5, a surface word whose parts follow, nor 4.1, a word left unsaid
                words.append((fields[1], fields[3], fields[5] if target == "feats" else None))


def _sentence(words: Iterable[tuple[str, str, str | None]]) -> Sentence:
    """From (word, part of speech, features or None)."""
    kept = [word for word in words if word[1] != NO_TAG]
    tags = (upos if features is None else f"{upos}|{features}" for _, upos, features in kept)
    return Sentence(tuple(word for word, _, _ in kept), tuple(tags))
