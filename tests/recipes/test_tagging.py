"""Rows, labels, metrics and baselines of the tagging recipe."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import EvalPrediction

from recipes.tagging import IGNORED, RARE, RARE_BELOW, baselines, encode, label_names, tag_metrics, train_tokenizer
from recipes.treebank import Sentence, load_treebank

DOG = Sentence(("the", "dog", "barks"), ("DET", "NOUN", "VERB"))
BARK = Sentence(("the", "barks"), ("DET", "NOUN"))
TRAIN = [DOG] * 20 + [BARK] * 30


def test_frequent_words_are_whole_and_the_first_piece_has_the_label():
    tokenizer = train_tokenizer(TRAIN, 30)
    names = label_names(TRAIN)
    assert names == ["DET", "NOUN", "VERB", RARE]
    (row,) = encode([Sentence(("the", "bog", "ü"), ("DET", "NOUN", "X"))], tokenizer, names, 16)
    assert tokenizer.convert_ids_to_tokens(row["input_ids"]) == ["▁the", "▁", "b", "o", "g", "▁", "[UNK]"]
    assert row["labels"] == [0, 1, *[IGNORED] * 3, 3, IGNORED]
    assert row["attention_mask"] == [1] * 7


def test_every_rank_trains_the_same_tokenizer():
    text = load_treebank("offline", None, "upos").train[:100]
    first, second = (train_tokenizer(text, 500) for _ in range(2))
    assert len(first) == 500
    assert first.get_vocab() == second.get_vocab()
    sentence = text[0]
    pieces = first(list(sentence.words), is_split_into_words=True)
    assert first.decode(pieces["input_ids"]) == " ".join(sentence.words)


def test_long_sentences_are_cut_between_words_and_none_is_lost():
    tokenizer = train_tokenizer(TRAIN, 30)
    names = label_names(TRAIN)
    sentence = Sentence(("dog", "bog") * 6 + ("bog" * 5,), ("NOUN", "VERB") * 6 + ("DET",))
    rows = encode([sentence], tokenizer, names, 5)
    assert len(rows) > 3
    assert all(0 < len(row["input_ids"]) <= 5 and row["labels"][0] != IGNORED for row in rows)
    labels = [label for row in rows for label in row["labels"] if label != IGNORED]
    assert labels == [names.index(tag) for tag in sentence.tags]


def test_tags_seen_seldom_are_one_label():
    seldom = [Sentence(("oh",), ("INTJ",))] * (RARE_BELOW - 1)
    assert label_names([*TRAIN, *seldom]) == ["DET", "NOUN", "VERB", RARE]
    assert "INTJ" in label_names([*TRAIN, *seldom, seldom[0]])


def test_metrics_count_words_only():
    labels = np.array([[0, IGNORED, 1], [1, 2, IGNORED]])
    predictions = np.array([[0, 2, 1], [0, 2, IGNORED]])
    found = tag_metrics(EvalPrediction(predictions=predictions, label_ids=labels))
    assert found["accuracy"] == 0.75
    assert found["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)


def test_baselines_answer_without_context():
    names = label_names(TRAIN)
    found = baselines(TRAIN, [DOG, BARK, Sentence(("cat", "oh"), ("DET", "INTJ"))], names)
    # 50 DET, 50 NOUN, 20 VERB in training; DET came first
    assert found["most_frequent_tag"] == pytest.approx(3 / 7)
    assert found["most_frequent_tag_of_word"] == pytest.approx(5 / 7)  # not "barks" as a verb, nor "oh"
