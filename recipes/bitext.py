"""Pairs of sentences for translation, offline or from the hub, and a tokenizer for both languages together.

A pair is (source, target); a row is `{"input_ids": [source tokens], "labels": [target tokens]}`, each with </s> at its
end and not padded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_layerpar.errors import ConfigurationError
from recipes.offline import ENGLISH, OFFLINE, SPANISH, DownloadError, complete_folder, fetch
from recipes.sword import chapters

Pair = tuple[str, str]
Rows = list[dict[str, list[int]]]

OFFLINE_LANGUAGES = ("en", "es")
HELD_OUT_EVERY = 20
"""One offline pair of so many is kept for validation."""

LENGTH_RATIO = 1.7
"""Verses of which one has more than so many times the characters of the other were not cut at the same place."""

TOKENIZER_LINES = 400_000
"""The tokenizer is trained on at most so many lines, evenly spaced."""


@dataclass(frozen=True)
class Bitext:
    """Rows, and the validation pairs as text, in the order of their rows."""

    train: Rows
    validation: Rows
    validation_pairs: list[Pair]
    tokenizer: PreTrainedTokenizerBase


def aligned_verses() -> list[Pair]:
    """About 30,000 (English, Spanish) verses, in the order of the text.

    The two Bibles count some verses differently: where a chapter hasn't the same verses in both, verses have moved
    inside it or over into the next one, so both are left out, and so is a pair whose lengths don't fit.
    Raises DownloadError when the texts can't be fetched.
    """
    english, spanish = chapters(fetch(ENGLISH)), chapters(fetch(SPANISH))
    pairs: list[Pair] = []
    moved = False
    for name, theirs in spanish.items():
        ours = english.get(name, [])
        here, there = ([i for i, verse in enumerate(verses) if verse] for verses in (ours, theirs))
        if here == there and not moved:
            pairs += [(ours[i], theirs[i]) for i in here]
        moved = here != there
    return [(a, b) for a, b in pairs if max(len(a), len(b)) <= LENGTH_RATIO * min(len(a), len(b))]


def offline_pairs(source: str, target: str) -> tuple[list[Pair], list[Pair]]:
    """(train, validation) verses. No verse of one has the same source text as one of the other.

    Raises ConfigurationError for other languages than English and Spanish.
    """
    if {source, target} != set(OFFLINE_LANGUAGES):
        raise ConfigurationError(
            f"source_lang={source!r}, target_lang={target!r}: the offline text has {' and '.join(OFFLINE_LANGUAGES)}; "
            "name one as source and the other as target, or give --dataset_name"
        )
    pairs = [pair if source == "en" else pair[::-1] for pair in aligned_verses()]
    validation = pairs[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    held_out = {pair[0] for pair in validation}
    return [pair for pair in pairs if pair[0] not in held_out], validation


def hub_pairs(name: str, config: str | None, source: str, target: str) -> tuple[list[Pair], list[Pair]]:
    """(train, validation) pairs of a hub data set whose rows are `{"translation": {source: ..., target: ...}}`.

    Raises DownloadError where neither the hub nor its cache has it, ConfigurationError where its rows are others.
    """
    from datasets import load_dataset  # an optional dependency, and slow to import

    try:
        splits = [load_dataset(name, config, split=split) for split in ("train", "validation")]
    except OSError as error:
        raise DownloadError(
            f"{name!r} could not be loaded: {error}. It needs the Hugging Face Hub, or its cache; --dataset_name "
            f"{OFFLINE} needs neither."
        ) from error
    found: list[list[Pair]] = []
    for split in splits:
        columns = split.column_names
        languages = sorted(split[0]["translation"]) if "translation" in columns else None
        if languages is None or not {source, target} <= set(languages):
            raise ConfigurationError(
                f"dataset_name={name!r} has the columns {columns} and the languages {languages}; it needs a column "
                f"'translation' with source_lang={source!r} and target_lang={target!r}"
            )
        found.append([(row[source], row[target]) for row in split["translation"]])
    return found[0], found[1]


def joint_tokenizer(lines: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocab_size` tokens trained on `lines` (both languages), which any text can be written in.

    It puts </s> after a sentence. The same lines give the same tokenizer; it is kept in the cache of offline data.
    Raises ConfigurationError when `vocab_size` doesn't hold the 256 bytes and the special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    special = ["<s>", "<pad>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(special) + len(alphabet):
        raise ConfigurationError(
            f"vocab_size={vocab_size} must be at least {len(special) + len(alphabet)}: every byte and {special}"
        )
    step = -(-len(lines) // TOKENIZER_LINES)
    lines = lines[:: max(step, 1)]
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode() + b"\n")

    def fill(folder: Path, scratch: Path) -> None:
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel()
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
        )
        bpe.train_from_iterator(lines, trainer)
        bpe.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", special.index("</s>"))]
        )
        PreTrainedTokenizerFast(
            tokenizer_object=bpe,
            bos_token="<s>",
            pad_token="<pad>",
            eos_token="</s>",
            clean_up_tokenization_spaces=False,
        ).save_pretrained(folder)

    name = f"bpe-{vocab_size}-{digest.hexdigest()[:16]}"
    return PreTrainedTokenizerFast.from_pretrained(complete_folder(name, ("tokenizer.json",), fill))


def tokenized(pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[Rows, list[Pair]]:
    """(rows, their pairs) of those pairs of which neither side is empty or longer than `max_length` tokens."""
    pairs = [pair for pair in pairs if all(pair)]
    if not pairs:
        return [], []
    sources, targets = (list(side) for side in zip(*pairs, strict=True))
    inputs = tokenizer(sources)["input_ids"]
    labels = tokenizer(text_target=targets)["input_ids"]
    kept = [i for i in range(len(pairs)) if max(len(inputs[i]), len(labels[i])) <= max_length]  # type: ignore[arg-type, index]
    return [{"input_ids": inputs[i], "labels": labels[i]} for i in kept], [pairs[i] for i in kept]  # type: ignore[index]


def load_bitext(
    name: str,
    config: str | None,
    source: str,
    target: str,
    tokenizer_name: str | None,
    vocab_size: int,
    max_length: int,
    max_eval_rows: int,
) -> Bitext:
    """`offline_pairs` or `hub_pairs` as rows; the validation slice is at most `max_eval_rows`, evenly spaced.

    tokenizer_name: a tokenizer of the hub or a folder; None: `joint_tokenizer` of the training pairs.
    Raises ConfigurationError where no pair is left on one of the two sides.
    """
    train, validation = (
        offline_pairs(source, target) if name == OFFLINE else hub_pairs(name, config, source, target)
    )
    if tokenizer_name is None:
        tokenizer: PreTrainedTokenizerBase = joint_tokenizer(list(chain.from_iterable(train)), vocab_size)
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
        except OSError as error:
            raise DownloadError(
                f"tokenizer_name={tokenizer_name!r} could not be loaded: {error}. Without it one is trained."
            ) from error
    train_rows, _ = tokenized(train, tokenizer, max_length)
    rows, pairs = tokenized(validation, tokenizer, max_length)
    if not train_rows or not rows or max_eval_rows < 1:
        raise ConfigurationError(
            f"max_length={max_length} leaves {len(train_rows)} pairs for training and {len(rows)} for validation, "
            f"max_eval_rows={max_eval_rows} of them; each must be at least 1"
        )
    places = np.linspace(0, len(rows) - 1, min(max_eval_rows, len(rows))).round().astype(int)
    return Bitext(train_rows, [rows[i] for i in places], [pairs[i] for i in places], tokenizer)
