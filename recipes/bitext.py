"""Pairs of sentences for translation, offline or from the hub, and a tokenizer for both languages together.

Pairs are a data set with the columns "source" and "target"; its rows for a model have the columns "input_ids" and
"labels", the tokens of the two, each with </s> at its end and not padded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_layerpar.errors import ConfigurationError
from recipes.language import spread
from recipes.offline import ENGLISH, NAME_OFFLINE, OFFLINE, SPANISH, DownloadError, complete_folder, fetch, hub_dataset
from recipes.sword import chapters

OFFLINE_LANGUAGES = ("en", "es")
HELD_OUT_EVERY = 20
"""One offline pair of so many is kept for validation."""

LENGTH_RATIO = 1.7
"""Verses of which one has more than so many times the characters of the other were not cut at the same place."""

TOKENIZER_PAIRS = 200_000
"""The tokenizer is trained on at most so many pairs, evenly spaced."""

IDS = ("input_ids", "labels")
TEXT = ("source", "target")


@dataclass(frozen=True)
class Bitext:
    """Rows, and the validation rows' text in their order."""

    train: Dataset
    validation: Dataset
    sources: list[str]
    references: list[str]
    tokenizer: PreTrainedTokenizerBase


def aligned_verses() -> list[tuple[str, str]]:
    """About 30,000 (English, Spanish) verses, in the order of the text.

    The two Bibles count some verses differently: where a chapter hasn't the same verses in both, verses have moved
    inside it or over into the next one, so both are left out, and so is a pair whose lengths don't fit.
    Raises DownloadError when the texts can't be fetched.
    """
    english, spanish = chapters(fetch(ENGLISH)), chapters(fetch(SPANISH))
    pairs: list[tuple[str, str]] = []
    moved = False
    for name, theirs in spanish.items():
        ours = english.get(name, [])
        here, there = ([i for i, verse in enumerate(verses) if verse] for verses in (ours, theirs))
        if here == there and not moved:
            pairs += [(ours[i], theirs[i]) for i in here]
        moved = here != there
    return [(a, b) for a, b in pairs if max(len(a), len(b)) <= LENGTH_RATIO * min(len(a), len(b))]


def offline_pairs(source: str, target: str) -> tuple[Dataset, Dataset]:
    """(train, validation) pairs of verses. No source text of one is in the other.

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
    train = [pair for pair in pairs if pair[0] not in held_out]
    found = (Dataset.from_dict(dict(zip(TEXT, zip(*side, strict=True), strict=True))) for side in (train, validation))
    return next(found), next(found)


def hub_pairs(name: str, config: str | None, source: str, target: str) -> tuple[Dataset, Dataset]:
    """(train, validation) pairs of a hub data set whose rows are `{"translation": {source: ..., target: ...}}`.

    Raises DownloadError where neither the hub nor its cache has it, ConfigurationError where its rows are others.
    """
    splits = [hub_dataset(name, config, NAME_OFFLINE, split=split) for split in ("train", "validation")]

    def sides(rows: dict[str, list]) -> dict[str, list]:
        return {
            side: [pair[language] for pair in rows["translation"]]
            for side, language in zip(TEXT, (source, target), strict=True)
        }

    found: list[Dataset] = []
    for split in splits:
        columns = split.column_names
        languages = sorted(split[0]["translation"]) if "translation" in columns else []
        if not {source, target} <= set(languages):
            raise ConfigurationError(
                f"dataset_name={name!r} has the columns {columns} and the languages {languages}; it needs a column "
                f"'translation' with source_lang={source!r} and target_lang={target!r}"
            )
        found.append(split.map(sides, batched=True, remove_columns=columns))
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


def with_tokens(pairs: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """The pairs, with their tokens, of which neither side is empty or longer than `max_length` tokens."""

    def encode(rows: dict[str, list]) -> dict[str, list]:
        found = {
            **{side: rows[side] for side in TEXT},
            "input_ids": tokenizer(rows["source"])["input_ids"],
            "labels": tokenizer(text_target=rows["target"])["input_ids"],
        }
        kept = [
            i
            for i in range(len(rows["source"]))
            if all(rows[side][i].strip() for side in TEXT) and max(len(found[side][i]) for side in IDS) <= max_length
        ]
        return {name: [values[i] for i in kept] for name, values in found.items()}

    return pairs.map(encode, batched=True, remove_columns=pairs.column_names)


def load_bitext(
    name: str,
    config: str | None,
    languages: tuple[str, str],
    tokenizer_name: str | None,
    vocab_size: int,
    max_length: int,
    max_train_samples: int | None,
    max_eval_samples: int,
) -> Bitext:
    """`offline_pairs` or `hub_pairs` as rows.

    languages: source and target.
    tokenizer_name: a tokenizer of the hub or a folder; None: `joint_tokenizer` of the training pairs, of which there
        are at most `TOKENIZER_PAIRS` and which `max_train_samples` doesn't limit.
    max_train_samples: the first so many training pairs, before those too long are left out; None: all.
    max_eval_samples: the validation slice is at most so many of the pairs that are not too long, evenly spaced.
    Raises ConfigurationError where no pair is left on one of the two sides.
    """
    train, validation = offline_pairs(*languages) if name == OFFLINE else hub_pairs(name, config, *languages)
    if tokenizer_name is None:
        some = train.select(spread(len(train), TOKENIZER_PAIRS))
        tokenizer: PreTrainedTokenizerBase = joint_tokenizer([*some["source"], *some["target"]], vocab_size)
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
        except OSError as error:
            raise DownloadError(
                f"tokenizer_name={tokenizer_name!r} could not be loaded: {error}. Without it one is trained."
            ) from error
    if max_train_samples is not None:
        train = train.take(min(max_train_samples, len(train)))
    train, validation = (with_tokens(pairs, tokenizer, max_length) for pairs in (train, validation))
    if not len(train) or not len(validation) or max_eval_samples < 1:
        raise ConfigurationError(
            f"max_length={max_length} and max_train_samples={max_train_samples} leave {len(train)} pairs for training "
            f"and {len(validation)} for validation, of which max_eval_samples={max_eval_samples}; each must be at "
            "least 1"
        )
    validation = validation.select(spread(len(validation), max_eval_samples))
    return Bitext(
        train=train.select_columns(list(IDS)),
        validation=validation.select_columns(list(IDS)),
        sources=list(validation["source"]),
        references=list(validation["target"]),
        tokenizer=tokenizer,
    )
