"""A treebank as rows for token classification: tokenizer, labels, metrics, and what is to be beaten.

A row is `{"input_ids", "attention_mask", "labels"}` of at most max_length pieces of words; the first piece of every
word has its tag as label, the others IGNORED.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import EvalPrediction, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from recipes.predictions import IGNORED
from recipes.treebank import Sentence

RARE = "rare"
"""The one label of all tags that the training sentences have fewer than `RARE_BELOW` times, or never."""

RARE_BELOW = 10


def train_tokenizer(sentences: Iterable[Sentence], size: int) -> PreTrainedTokenizerBase:
    """Byte-pair encoding with at most `size` pieces (and all characters): frequent words whole, others in pieces."""
    # not WordPiece: its trainer numbers and merges otherwise each time, so ranks would disagree
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[assignment]
    tokenizer.decoder = decoders.Metaspace()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=size, min_frequency=2, special_tokens=["[PAD]", "[UNK]"], show_progress=False
    )
    tokenizer.train_from_iterator((word for sentence in sentences for word in sentence.words), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


def label_names(sentences: Iterable[Sentence]) -> list[str]:
    """The tags that are labels of their own, and `RARE`."""
    counts = Counter(tag for sentence in sentences for tag in sentence.tags)
    return [*sorted(tag for tag, count in counts.items() if count >= RARE_BELOW), RARE]


def encode(
    sentences: Sequence[Sentence], tokenizer: PreTrainedTokenizerBase, names: Sequence[str], max_length: int
) -> list[dict[str, list[int]]]:
    """Rows without padding (the collator pads each batch to its longest). A sentence of more than `max_length` pieces
    becomes several rows, cut between words, so that every word is tagged once."""
    numbers = {name: i for i, name in enumerate(names)}
    rows = []
    for sentence in sentences:
        pieces = tokenizer(list(sentence.words), add_special_tokens=False)["input_ids"]
        ids: list[int] = []
        labels: list[int] = []
        for word, tag in zip(pieces, sentence.tags, strict=True):
            word = (word or [tokenizer.unk_token_id])[:max_length]
            if len(ids) + len(word) > max_length:
                rows.append(_row(ids, labels))
                ids, labels = [], []
            ids += word
            labels += [numbers.get(tag, numbers[RARE])] + [IGNORED] * (len(word) - 1)
        rows.append(_row(ids, labels))
    return rows


def _row(ids: list[int], labels: list[int]) -> dict[str, list[int]]:
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def tag_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy over all words, and F1 averaged over all tags that there are or were predicted."""
    from sklearn.metrics import accuracy_score, f1_score

    counted = prediction.label_ids != IGNORED
    labels = np.asarray(prediction.label_ids)[counted]
    tags = np.asarray(prediction.predictions)[counted]
    return {
        "accuracy": float(accuracy_score(labels, tags)),
        "macro_f1": float(f1_score(labels, tags, average="macro", zero_division=0)),
    }


def baselines(train: Sequence[Sentence], held_out: Sequence[Sentence], names: Sequence[str]) -> dict[str, float]:
    """Accuracies of answers that look at no context, learned from `train`: always its most frequent tag, and each
    word's own most frequent tag (of a word that it lacks, the most frequent tag of all)."""
    known = set(names)
    of_all: Counter[str] = Counter()
    of_word: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for word, tag in _words(train, known):
        of_all[tag] += 1
        of_word[word][tag] += 1
    first = of_all.most_common(1)[0][0]
    own = {word: tags.most_common(1)[0][0] for word, tags in of_word.items()}
    words = list(_words(held_out, known))
    return {
        "most_frequent_tag": sum(tag == first for _, tag in words) / len(words),
        "most_frequent_tag_of_word": sum(tag == own.get(word, first) for word, tag in words) / len(words),
    }


def _words(sentences: Iterable[Sentence], known: set[str]) -> Iterable[tuple[str, str]]:
    for sentence in sentences:
        for word, tag in zip(sentence.words, sentence.tags, strict=True):
            yield word, tag if tag in known else RARE
