"""What the Trainer keeps of a model's answers at an evaluation, and the share of them that is right.

Shapes: N rows, B of them in a batch, T tokens, C classes (the vocabulary, tags, or labels of images).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor
from transformers import EvalPrediction

IGNORED = -100
"""The label that no loss and no metric counts, and what the Trainer fills rows up with."""


def likeliest(outputs: Any, labels: Tensor) -> Tensor:
    """For `preprocess_logits_for_metrics`: the likeliest classes, `[B]` or `[B, T]`, from a model's outputs beside the
    loss. The first of these is the logits, `[B, C]` or `[B, T, C]`, which would fill the memory if they were kept."""
    logits = outputs[0] if isinstance(outputs, tuple) else outputs
    return logits.argmax(-1)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """{"accuracy"}: the share of the labels, IGNORED ones left out, that are the likeliest classes."""
    labels = np.asarray(prediction.label_ids)
    counted = labels != IGNORED
    return {"accuracy": float((np.asarray(prediction.predictions) == labels)[counted].mean())}
