"""Metrics of translations: accuracy of the reference's next token, and BLEU of what a model generates.

Shapes: N sentences, B of them in a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from transformers import EvalPrediction, PreTrainedTokenizerBase

IGNORED = -100
"""What the Trainer fills rows up with, and what no loss counts."""


def best_tokens(outputs: Any, labels: Tensor) -> Tensor:
    """The likeliest token at every place, `[B, T]`, from a model's outputs beside the loss: the first is the logits
    `[B, T, V]`, which would fill the memory if they were kept."""
    logits = outputs[0] if isinstance(outputs, tuple) else outputs
    return logits.argmax(-1)


def token_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """{"accuracy"}: the share of the references' tokens that are the likeliest ones after those before them."""
    labels = np.asarray(prediction.label_ids)
    counted = labels != IGNORED
    return {"accuracy": float((np.asarray(prediction.predictions) == labels)[counted].mean())}


def decoded(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The sentences in generated tokens `[N, T]`."""
    ids = np.where(ids == IGNORED, tokenizer.pad_token_id, ids)  # type: ignore[arg-type]
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def corpus_bleu(translations: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """{"score": BLEU from 0 to 100, "signature": sacrebleu's, which says how it was computed}."""
    from sacrebleu.metrics.bleu import BLEU  # an optional dependency

    metric = BLEU()
    score = metric.corpus_score(list(translations), [list(references)]).score
    return {"score": score, "signature": str(metric.get_signature())}


def bleu_of_generated(
    tokenizer: PreTrainedTokenizerBase, references: Sequence[str]
) -> Callable[[EvalPrediction], dict[str, float]]:
    """{"bleu"} of generated tokens `[N, T]`, as the Trainer's `compute_metrics` of the rows with these references."""

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        return {"bleu": corpus_bleu(decoded(np.asarray(prediction.predictions), tokenizer), references)["score"]}

    return compute
