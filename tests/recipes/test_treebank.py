"""Treebanks read from CoNLL-U and from data sets shaped like the hub's."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest

from hf_layerpar.errors import ConfigurationError
from recipes.offline import DownloadError
from recipes.treebank import Sentence, load_treebank, read_conllu

TEXT = """\
# sent_id = a = b
# set = dev
1-2\tdon't\t_\t_\t_\t_\t_\t_\t_\t_
1\tdo\tdo\tAUX\tVBP\tMood=Ind|Tense=Pres\t3\taux\t_\t_
2\tn't\tnot\tPART\tRB\t_\t3\tadvmod\t_\t_
2.1\tsay\tsay\tVERB\tVB\t_\t_\t_\t_\t_
3\tgo\tgo\tVERB\tVB\tVerbForm=Inf\t0\troot\t_\t_

1\tYes\tyes\tINTJ\tUH\t_\t0\troot\t_\t_
"""


def test_conllu_has_syntactic_words_only():
    (comments, first), (none, second) = read_conllu(TEXT.splitlines(keepends=True), "upos", Path("x"))
    assert comments == {"sent_id": "a = b", "set": "dev"}
    assert first == Sentence(("do", "n't", "go"), ("AUX", "PART", "VERB"))
    assert (none, second) == ({}, Sentence(("Yes",), ("INTJ",)))
    (_, first), _ = read_conllu(TEXT.splitlines(), "feats", Path("x"))
    assert first.tags == ("AUX|Mood=Ind|Tense=Pres", "PART|_", "VERB|VerbForm=Inf")


def test_folder_of_conllu_files(tmp_path):
    for split in ("train", "dev"):
        (tmp_path / f"en_x-ud-{split}.conllu").write_text(TEXT, encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"has 0 files \*test\.conllu"):
        load_treebank(str(tmp_path), None, "upos")
    test = tmp_path / "en_x-ud-test.conllu"
    test.write_text("# nothing\n\n")
    with pytest.raises(ConfigurationError, match="no tagged sentences for test"):
        load_treebank(str(tmp_path), None, "upos")
    test.write_text("1\tYes\tyes\tINTJ\tUH\t_\t0\troot\t_\t_\n1 broken\n")
    with pytest.raises(ConfigurationError, match=r"test\.conllu line 2 has 1 tab-separated fields"):
        load_treebank(str(tmp_path), None, "upos")
    test.write_text(TEXT, encoding="utf-8")
    found = load_treebank(str(tmp_path), None, "upos")
    assert found.train == found.validation == found.test
    assert len(found.train) == 2


def hub(monkeypatch, classes: bool = True, middle: str = "validation") -> None:
    tags = ["_", "AUX", "PART", "VERB"]
    rows = {
        "tokens": [["don't", "do", "n't", "go"]],
        "upos": [list(range(4)) if classes else tags],
        "feats": [["None", "{'Mood': 'Ind'}", "None", "None"]],
    }
    kind = datasets.ClassLabel(names=tags) if classes else datasets.Value("string")
    text = datasets.List(datasets.Value("string"))
    features = datasets.Features({"tokens": text, "upos": datasets.List(kind), "feats": text})
    split = datasets.Dataset.from_dict(rows, features=features)
    data = datasets.DatasetDict(dict.fromkeys(("train", middle, "test"), split))

    def load_dataset(name, config):
        assert (name, config) == ("some/ud", "en_gum")
        return data

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


@pytest.mark.parametrize(("classes", "middle"), [(True, "validation"), (False, "dev")])
def test_hub_rows(classes, middle, monkeypatch):
    hub(monkeypatch, classes, middle)
    found = load_treebank("some/ud", "en_gum", "upos")
    assert found.train == found.test == [Sentence(("do", "n't", "go"), ("AUX", "PART", "VERB"))]
    assert load_treebank("some/ud", "en_gum", "feats").validation[0].tags[0] == "AUX|{'Mood': 'Ind'}"


def test_hub_faults_name_the_remedy(monkeypatch):
    data = datasets.Dataset.from_dict({"text": ["a"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: datasets.DatasetDict({"train": data}))
    with pytest.raises(ConfigurationError, match=r"'some/ud' has the columns \['text'\].*\['tokens', 'upos'\]"):
        load_treebank("some/ud", None, "upos")
    hub(monkeypatch)
    only = {"train": datasets.load_dataset("some/ud", "en_gum")["train"]}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: datasets.DatasetDict(only))
    with pytest.raises(ConfigurationError, match=r"'some/ud' has the splits \['train'\]"):
        load_treebank("some/ud", None, "upos")

    def unreachable(*args):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DownloadError, match="--dataset_name offline"):
        load_treebank("some/ud", "en_gum", "upos")


def test_real_treebank():
    found = load_treebank("offline", None, "upos")
    assert (len(found.train), len(found.validation), len(found.test)) == (4937, 500, 716)
    sentences = [*found.train, *found.validation, *found.test]
    assert sum(len(sentence.words) for sentence in sentences) == 160_379
    assert all(len(sentence.words) == len(sentence.tags) for sentence in sentences)
    assert found.validation[0].words[:5] == ("עשרות", "אנשים", "מגיעים", "מ", "תאילנד")
    assert found.validation[0].tags[:5] == ("NUM", "NOUN", "VERB", "ADP", "PROPN")
