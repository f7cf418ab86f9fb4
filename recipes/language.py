"""Text for causal language models: blocks of T tokens, each row `{"input_ids", "labels"}` with the same `[T]` numbers
(the model itself shifts its labels by one).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils.data import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hf_layerpar.errors import ConfigurationError
from recipes.offline import NAME_OFFLINE, OFFLINE, DownloadError, english_text, hub_dataset

HELD_OUT = 0.05
"""The share of the offline text, its end, that is kept for validation."""

_SPECIAL = ("<pad>", "</s>", "<unk>")


@dataclass(frozen=True)
class Blocks:
    """train may be an iterable data set (streaming); validation has a length."""

    train: Any
    validation: Any
    tokenizer: PreTrainedTokenizerBase


def spread(rows: int, count: int) -> np.ndarray:
    """At most `count` places among `rows`, evenly spaced."""
    return np.linspace(0, rows - 1, min(count, rows)).round().astype(int)


class TokenBlocks(Dataset):
    """Tokens `[tokens]` cut into rows of `length`; what is left at the end is dropped."""

    def __init__(self, tokens: np.ndarray, length: int) -> None:
        self.rows = tokens[: len(tokens) // length * length].reshape(-1, length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = torch.from_numpy(self.rows[index].astype(np.int64))
        return {"input_ids": row, "labels": row}

    def spread(self, count: int) -> TokenBlocks:
        """At most `count` of the rows, evenly spaced."""
        return TokenBlocks(self.rows[spread(len(self), count)].reshape(-1), self.rows.shape[1])


def held_out_blocks(tokens: np.ndarray, length: int, max_eval_blocks: int) -> tuple[TokenBlocks, TokenBlocks]:
    """(training blocks, validation blocks) of `tokens` `[tokens]`; the latter, evenly spaced, from the end.

    Raises ConfigurationError where there are too few tokens for one block on each side.
    """
    held_out = int(len(tokens) * HELD_OUT)
    if held_out < length:
        raise ConfigurationError(
            f"blocks of {length} tokens: the validation part of {len(tokens)} tokens has {held_out}; use a smaller "
            "block_size"
        )
    train, validation = np.split(tokens, [len(tokens) - held_out])
    return TokenBlocks(train, length), TokenBlocks(validation, length).spread(max_eval_blocks)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte of UTF-8, numbered as by ByT5's tokenizer, but without its end token after every text: a prompt
    is not at its end."""
    numbers = {character: byte + len(_SPECIAL) for byte, character in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(_SPECIAL)} | numbers, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    pad, end, unknown = _SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, eos_token=end, unk_token=unknown)


def offline_blocks(text: str, length: int, max_eval_blocks: int) -> Blocks:
    """`held_out_blocks` of the text's bytes."""
    tokenizer = byte_tokenizer()
    # the tokenizer itself does the same, much slower
    tokens = np.frombuffer(text.encode(), np.uint8).astype(np.uint16) + len(_SPECIAL)
    return Blocks(*held_out_blocks(tokens, length, max_eval_blocks), tokenizer)


def hub_rows(
    name: str,
    config: str | None,
    tokenizer_name: str,
    cut: Callable[[dict[str, list], PreTrainedTokenizerBase, int], dict[str, list]],
    length: int,
    max_eval_blocks: int,
    streaming: bool,
    seed: int,
) -> tuple[Any, Any, PreTrainedTokenizerBase]:
    """(train, validation, tokenizer): what `cut(rows, tokenizer, length)` makes of a hub data set's column "text". The
    first blocks of its train split are the validation blocks.

    streaming: read while training (give max_steps then), instead of downloading and cutting everything first.
    Raises DownloadError where the hub or its cache don't have the data or the tokenizer.
    """
    data = hub_dataset(name, config, NAME_OFFLINE, split="train", streaming=streaming)
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
    except OSError as error:
        raise DownloadError(
            f"tokenizer_name={tokenizer_name!r} could not be loaded: {error}. It needs the Hugging Face Hub, or its "
            f"cache; {NAME_OFFLINE}."
        ) from error
    columns = list(next(iter(data)))
    if "text" not in columns:
        raise ConfigurationError(f"dataset_name={name!r} has the columns {columns}; it needs one called 'text'")
    settings = {"tokenizer": tokenizer, "length": length}
    blocks: Any = data.map(cut, batched=True, remove_columns=columns, fn_kwargs=settings).with_format("torch")
    train, validation = blocks.skip(max_eval_blocks), blocks.take(max_eval_blocks)
    if streaming:
        train = train.shuffle(seed=seed, buffer_size=10_000)
        validation = list(validation)
    return train, validation, tokenizer


def _cut(rows: dict[str, list], tokenizer: PreTrainedTokenizerBase, length: int) -> dict[str, list]:
    """Blocks of the documents, each ended by the tokenizer's end-of-text token."""
    if tokenizer.eos_token_id is None:
        raise ConfigurationError(
            f"tokenizer_name={tokenizer.name_or_path!r} has no end-of-text token, which causal language models need "
            "between documents"
        )
    found = tokenizer(rows["text"], add_special_tokens=False)["input_ids"]
    tokens = [token for document in found for token in (*document, tokenizer.eos_token_id)]
    blocks = [tokens[i : i + length] for i in range(0, len(tokens) - length + 1, length)]
    return {"input_ids": blocks, "labels": blocks}


def load_blocks(
    name: str, config: str | None, tokenizer_name: str, length: int, max_eval_blocks: int, streaming: bool, seed: int
) -> Blocks:
    """`offline_blocks` of the offline text, or those of `hub_rows`."""
    if length < 2 or max_eval_blocks < 1:
        raise ConfigurationError(
            f"block_size={length} must be at least 2 (a token and the next), max_eval_blocks={max_eval_blocks} at "
            "least 1"
        )
    if name == OFFLINE:
        blocks = offline_blocks(english_text(), length, max_eval_blocks)
    else:
        blocks = Blocks(*hub_rows(name, config, tokenizer_name, _cut, length, max_eval_blocks, streaming, seed))
    blocks.tokenizer.model_max_length = length  # saved with the model: more positions were not trained
    return blocks
