"""BLEU of what a model generates. Shapes: N sentences of T tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from transformers import EvalPrediction, PreTrainedTokenizerBase

from recipes.predictions import IGNORED


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
