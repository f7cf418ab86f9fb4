"""A model and batches for the command line: its head by its architecture, its batches from lines of text.

Shapes: B rows, T tokens; input_ids, attention_mask and (for token losses) labels are `[B, T]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_layerpar.errors import ConfigurationError, UnsupportedModelError
from hf_layerpar.loading import from_pretrained

Task = Literal["causal-lm", "masked-lm", "sequence-classification"]

_AUTO_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "sequence-classification": "AutoModelForSequenceClassification",
}
_HEADS: dict[str, Task] = {
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForMaskedLM": "masked-lm",
    "ForSequenceClassification": "sequence-classification",
}
"""Ends of the class names in `config.architectures`."""

MOST_LABELS = 100_000
"""Of a classification head."""

_MASKED_SHARE = 0.15
_IGNORED = -100


def task_of(config: Any) -> Task:
    """What the head that a checkpoint was saved with is trained on.

    Raises UnsupportedModelError for others (encoder-decoders, images, models without a head).
    """
    architecture = (getattr(config, "architectures", None) or ["no class"])[0]
    for end, task in _HEADS.items():
        if architecture.endswith(end) and not getattr(config, "is_encoder_decoder", False):
            return task
    raise UnsupportedModelError(
        f"no batches can be made for {architecture} (config.architectures): the command knows "
        f"{', '.join(get_args(Task))}; choose one of them with --task where the model has such a class, or call "
        "hf_layerpar.diagnose(model, batches) with batches of your own"
    )


def load_model(path: str, task: Task | None, num_labels: int) -> PreTrainedModel:
    """The model in training mode with the head it was saved with, or with that of `task` (new, if it had none).

    num_labels: of a new classification head.
    """
    if task is None:
        model = from_pretrained(path)
    else:
        more = {"num_labels": num_labels} if task == "sequence-classification" else {}
        model = getattr(transformers, _AUTO_CLASSES[task]).from_pretrained(path, **more)
    return model.train()


def text_batches(
    tokenizer: PreTrainedTokenizerBase, task: Task, file: Path, *, count: int, rows: int, tokens: int
) -> list[dict[str, Tensor]]:
    """`count` batches from the lines of a text file, in their order.

    Language models get one run of text cut into rows of T tokens (masked: 15 % of them, seeded). Classifiers get lines
    of "label<TAB>text" with integer labels, padded or cut to T.

    Raises ConfigurationError when the file has too little text or is no UTF-8, or a line has no label.
    """
    lines = _lines(file)
    if task == "sequence-classification":
        return _classification(tokenizer, _labelled(lines, file), count, rows, tokens)
    text = "\n".join(lines)
    blocks = token_blocks(tokenizer, text, task, count * rows, tokens).view(count, rows, tokens)
    return [_language_batch(tokenizer, task, block, seed) for seed, block in enumerate(blocks)]


def token_blocks(tokenizer: PreTrainedTokenizerBase, text: str, task: Task, rows: int, tokens: int) -> Tensor:
    """`[rows, T]`: one run of text cut into rows. For a causal model whose tokenizer begins texts with its BOS token so
    does every row.

    Raises ConfigurationError when there is too little text.
    """
    bos = tokenizer.bos_token_id
    start = [bos] if task == "causal-lm" and bos is not None and tokenizer("a")["input_ids"][0] == bos else []
    width = tokens - len(start)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) < rows * width:
        raise ConfigurationError(
            f"the text has {len(ids)} tokens, but {rows} rows of {tokens} take {rows * width}; give more text, or "
            "smaller or fewer batches"
        )
    return torch.tensor([[*start, *ids[row * width : (row + 1) * width]] for row in range(rows)])


def random_batches(
    tokenizer: PreTrainedTokenizerBase, task: Task, *, num_labels: int, count: int, rows: int, tokens: int
) -> list[dict[str, Tensor]]:
    """As `text_batches`, of tokens (and labels) drawn at random: for timing, not for judging a pretrained model."""
    generator = torch.Generator().manual_seed(0)
    special = set(tokenizer.all_special_ids)
    plain = torch.tensor([i for i in range(len(tokenizer)) if i not in special])
    drawn = plain[torch.randint(len(plain), (count, rows, tokens), generator=generator)]
    if task != "sequence-classification":
        return [_language_batch(tokenizer, task, block, seed) for seed, block in enumerate(drawn)]
    labels = torch.randint(num_labels, (count, rows), generator=generator)
    return [
        {"input_ids": block, "attention_mask": torch.ones_like(block), "labels": label}
        for block, label in zip(drawn, labels, strict=True)
    ]


def labels_in(file: Path) -> int:
    """Number of classes of a file of "label<TAB>text" lines: its largest label and one."""
    lines = _lines(file)
    return max((label for label, _ in _labelled(lines, file)), default=0) + 1


def _lines(file: Path) -> list[str]:
    """Those of a text file that aren't empty. Raises ConfigurationError where it is no UTF-8."""
    try:
        return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            f"{file} is no UTF-8 text (byte {error.start}: {error.reason}); convert it to UTF-8 (iconv -t utf-8)"
        ) from error


def _language_batch(tokenizer: PreTrainedTokenizerBase, task: Task, ids: Tensor, seed: int) -> dict[str, Tensor]:
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    if task == "causal-lm":
        return batch
    mask_id = tokenizer.mask_token_id
    if not isinstance(mask_id, int):
        raise ConfigurationError("the tokenizer has no mask token, so no masked-lm batch can be made of its text")
    chosen = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < _MASKED_SHARE
    chosen[:, 0] |= ~chosen.any(1)  # a row without any would have no loss
    return batch | {
        "input_ids": ids.masked_fill(chosen, mask_id),
        "labels": ids.masked_fill(~chosen, _IGNORED),
    }


def _labelled(lines: Sequence[str], file: Path) -> list[tuple[int, str]]:
    found = []
    for number, line in enumerate(lines, start=1):
        label, tab, text = line.partition("\t")
        if not tab or not label.strip().isdecimal():
            raise ConfigurationError(
                f"{file}, text line {number}: {line[:40]!r} is not a label, a tab and a text; sequence classification "
                "needs integer labels from 0 on"
            )
        if len(label.strip()) > 9 or int(label) >= MOST_LABELS:
            raise ConfigurationError(
                f"{file}, text line {number}: label {label[:40]} is too large; number the labels from 0 to at most "
                f"{MOST_LABELS - 1}"
            )
        found.append((int(label), text))
    return found


def _classification(
    tokenizer: PreTrainedTokenizerBase, labelled: Sequence[tuple[int, str]], count: int, rows: int, tokens: int
) -> list[dict[str, Tensor]]:
    if len(labelled) < count * rows:
        raise ConfigurationError(
            f"the file has {len(labelled)} labelled lines, but {count} batches of {rows} take {count * rows}; give "
            "more text, or smaller or fewer batches"
        )
    batches = []
    for start in range(0, count * rows, rows):
        part = labelled[start : start + rows]
        made = tokenizer(
            [text for _, text in part], padding="max_length", truncation=True, max_length=tokens, return_tensors="pt"
        )
        batches.append({**made, "labels": torch.tensor([label for label, _ in part])})
    return batches
