"""Text for masked language models: rows of T tokens, `[CLS]` first and `[SEP]` last, some of them masked.

Training rows are `{"input_ids"}` `[T]` and get new masks each time they are drawn; validation rows are `{"input_ids",
"labels"}` with masks made once. labels are -100 where nothing is masked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    EvalPrediction,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    default_data_collator,
)

from hf_layerpar.errors import ConfigurationError
from recipes.language import Blocks, TokenBlocks, held_out_blocks, hub_rows
from recipes.offline import OFFLINE, complete_folder, english_text
from recipes.predictions import accuracy

VOCABULARY = 2048
SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}

_FOLDER = f"english-bpe-{VOCABULARY}"
_TOKENS = "tokens.npy"
_STRAIGHT = str.maketrans("‘’“”", "''\"\"")


class FramedBlocks(Dataset):
    """Blocks of T - 2 tokens as rows of T: the same with `cls` before and `sep` after."""

    def __init__(self, blocks: TokenBlocks, cls: int, sep: int) -> None:
        self.blocks = blocks
        self.ends = torch.tensor([cls]), torch.tensor([sep])

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        first, last = self.ends
        return {"input_ids": torch.cat([first, self.blocks[index]["input_ids"], last])}


class Masks:
    """Data collator: masks training rows anew (`share` of their tokens; of these 80 % become `[MASK]`, 10 % a random
    token, 10 % stay), and leaves rows that have labels as they are."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, share: float, seed: int | None = None) -> None:
        self.masking = DataCollatorForLanguageModeling(tokenizer, mlm_probability=share, seed=seed)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        if "labels" in rows[0]:
            return default_data_collator(rows)
        return self.masking([row["input_ids"] for row in rows])


def train_tokenizer(lines: list[str], size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of lower-case text: it spells any text, and the same lines always give the same tokenizer (a
    WordPiece vocabulary is numbered in another order each time)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=list(SPECIAL.values()), initial_alphabet=alphabet, show_progress=False
        ),
    )
    cls, sep = SPECIAL["cls_token"], SPECIAL["sep_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in (cls, sep)],
    )
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **SPECIAL)


def english_tokens() -> tuple[np.ndarray, Path]:
    """(the offline text as tokens `[tokens]`, the folder of its tokenizer), made on first use and then kept in the
    cache. Curly quotation marks are made straight, as in most other text."""

    def fill(folder: Path, scratch: Path) -> None:
        lines = english_text().translate(_STRAIGHT).splitlines()
        tokenizer = train_tokenizer(lines, VOCABULARY)
        tokenizer.save_pretrained(folder)
        encoded = tokenizer(lines, add_special_tokens=False)["input_ids"]
        np.save(folder / _TOKENS, np.concatenate([np.array(line, np.uint16) for line in encoded]))

    folder = complete_folder(_FOLDER, ("tokenizer.json", "tokenizer_config.json", _TOKENS), fill)
    return np.load(folder / _TOKENS), folder


def masked_once(rows: Any, tokenizer: PreTrainedTokenizerBase, share: float) -> list[dict[str, Tensor]]:
    """The rows with masks and labels that are the same in every run."""
    batch = Masks(tokenizer, share, seed=0)(list(rows))
    return [{key: batch[key][i] for key in ("input_ids", "labels")} for i in range(len(batch["input_ids"]))]


def load_masked(
    name: str,
    config: str | None,
    tokenizer_name: str,
    length: int,
    count: int,
    share: float,
    streaming: bool,
    seed: int,
) -> Blocks:
    """Rows of `length` tokens of the offline text, or of a hub data set's column "text" with a tokenizer that has
    `[CLS]`, `[SEP]` and `[MASK]`; documents of the latter are parted by a `[SEP]`. `count` validation rows, of whose
    tokens `share` are masked.

    Raises ConfigurationError for sizes that make no rows and for other tokenizers, DownloadError as `hub_rows`.
    """
    if length < 3 or count < 1 or not 0 < share < 1:
        raise ConfigurationError(
            f"block_size={length} must be at least 3 (a token and the two that frame it), max_eval_blocks={count} at "
            f"least 1, mask_share={share} in (0, 1)"
        )
    if name == OFFLINE:
        tokens, folder = english_tokens()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        halves = held_out_blocks(tokens, length - 2, count)
        train, validation = (FramedBlocks(b, tokenizer.cls_token_id, tokenizer.sep_token_id) for b in halves)
    else:
        train, validation, tokenizer = hub_rows(name, config, tokenizer_name, _cut, length, count, streaming, seed)
    tokenizer.model_max_length = length  # saved with the model: more positions were not trained
    return Blocks(train, masked_once(validation, tokenizer, share), tokenizer)


def _cut(rows: dict[str, list], tokenizer: PreTrainedTokenizerBase, length: int) -> dict[str, list]:
    cls, sep, mask = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id
    if None in (cls, sep, mask):
        raise ConfigurationError(
            f"tokenizer_name={tokenizer.name_or_path!r} has cls_token={tokenizer.cls_token}, sep_token="
            f"{tokenizer.sep_token}, mask_token={tokenizer.mask_token}; masked language models need all three"
        )
    found = tokenizer(rows["text"], add_special_tokens=False)["input_ids"]
    tokens = [token for document in found for token in (*document, sep)]
    inner = length - 2
    starts = range(0, len(tokens) - inner + 1, inner)
    return {"input_ids": [[cls, *tokens[i : i + inner], sep] for i in starts]}


def masked_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of the masked tokens that are the most likely ones."""
    return {"masked_accuracy": accuracy(prediction)["accuracy"]}
