"""Evaluation and prediction, with and without generation; executed on every rank of a pool."""

from __future__ import annotations

import functools
import os
from typing import Any

import numpy as np
import torch
import transformers as hf

from hf_layerpar.errors import ConfigurationError
from tests import zoo
from tests.training.runs import Samples, build, outcome, trainer


class RaggedSamples(Samples):
    """Samples of one to twelve tokens; a batch of one has no padding to speak of."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        length = 1 + (index * 7) % 12
        return {name: value[:length] for name, value in super().__getitem__(index).items()}


def evaluate(
    output_dir: str, family: str, settings: dict[str, Any], count: int, ragged: bool = False
) -> dict[str, Any]:
    """`evaluate` and `predict` without training; the metric sees what `compute_metrics` got on this rank."""
    seen: dict[str, Any] = {}

    def metrics(prediction: hf.EvalPrediction) -> dict[str, float]:
        seen.update(shape=np.shape(prediction.predictions), labels=np.asarray(prediction.label_ids).tolist())
        return {"sum": float(np.abs(prediction.predictions).sum())}

    samples = RaggedSamples(family, count, 1000) if ragged else Samples(family, count, 1000)
    run = trainer(output_dir, family, settings, eval_dataset=samples, compute_metrics=metrics)
    scores = run.evaluate()
    predictions = run.predict(samples).predictions
    keys = ("eval_loss", "eval_sum")
    return {k: scores[k] for k in keys} | seen | {"predictions": np.asarray(predictions), "rank": run.mesh.lp_rank}


def evaluate_objects(output_dir: str, settings: dict[str, Any], count: int) -> list[list[int]]:
    """The labels, gathered as objects, of two evaluations and a prediction."""
    seen: list[list[int]] = []

    def metrics(prediction: hf.EvalPrediction) -> dict[str, float]:
        assert all(isinstance(batch, list) for batch in prediction.label_ids)
        seen.append([int(label) for batch in prediction.label_ids for label in batch])
        return {}

    settings = settings | {"eval_use_gather_object": True, "eval_do_concat_batches": False}
    samples = Samples("bert_classifier", count)
    run = trainer(output_dir, "bert_classifier", settings, eval_dataset=samples, compute_metrics=metrics)
    run.evaluate()
    run.evaluate()
    run.predict(samples)
    return seen


class Translations(Samples):
    """Samples whose sources and targets have unequal lengths; a decoder's targets are its sources."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        source = super().__getitem__(index)["input_ids"][: 4 + index % 5]
        if self.family == "llama":
            return {"input_ids": source, "labels": source}
        return {"input_ids": source, "labels": zoo.tokens(1, 3 + index % 4, seed=index + 500)[0]}


def padded(items: list[dict[str, Any]], label_side: str) -> dict[str, Any]:
    """Batches padded to their longest sample, sources on the left, as generation by a decoder wants it."""

    def pad(name: str, value: int, side: str) -> torch.Tensor:
        rows = [item[name] for item in items]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)

    ids = pad("input_ids", zoo.PAD, "left")
    return {"input_ids": ids, "attention_mask": (ids != zoo.PAD).long(), "labels": pad("labels", -100, label_side)}


def _generating(family: str, count: int, seen: dict[str, Any]) -> dict[str, Any]:
    def metrics(prediction: hf.EvalPrediction) -> dict[str, float]:
        seen.setdefault("generated", []).append(_rows(prediction.predictions))
        return {"count": float(len(prediction.predictions))}

    collate = functools.partial(padded, label_side="left" if family == "llama" else "right")
    return {"eval_dataset": Translations(family, count, 1000), "data_collator": collate, "compute_metrics": metrics}


def _rows(ids: np.ndarray) -> list[list[int]]:
    """Sequences without what fills them up on the right."""
    return [np.trim_zeros(np.where(row == -100, zoo.PAD, row), "b").tolist() for row in ids]


def _generated(run: hf.Seq2SeqTrainer) -> dict[str, Any]:
    scores = run.evaluate()
    result = run.predict(run.eval_dataset)  # type: ignore[arg-type]
    loss, count = scores["eval_loss"], scores["eval_count"]
    assert result.label_ids is not None
    return {
        "eval_loss": loss,
        "eval_count": count,
        "predictions": _rows(result.predictions),  # type: ignore[arg-type]
        "labels": _rows(result.label_ids),  # type: ignore[arg-type]
    }


def generate(output_dir: str, family: str, settings: dict[str, Any], count: int) -> dict[str, Any]:
    """`evaluate` and `predict` with generation, without training."""
    settings = {"per_device_eval_batch_size": 2} | settings
    return _generated(trainer(output_dir, family, settings, **_generating(family, count, {})))


def generate_with_stock(output_dir: str, family: str, settings: dict[str, Any], count: int) -> dict[str, Any]:
    """The same by the stock Seq2SeqTrainer."""
    more = {"per_device_eval_batch_size": 2, "report_to": [], "disable_tqdm": True, "use_cpu": True}
    args = hf.Seq2SeqTrainingArguments(output_dir, **(more | settings))
    run = hf.Seq2SeqTrainer(build(family), args, **_generating(family, count, {}))
    run.remove_callback(hf.PrinterCallback)
    return _generated(run)


def train_and_generate(output_dir: str, settings: dict[str, Any]) -> dict[str, Any]:
    """A run that generates in its evaluations, from random streams that the ranks don't have in common."""
    seen: dict[str, Any] = {}
    settings = {"per_device_eval_batch_size": 2} | settings
    run = trainer(output_dir, "llama", settings, **_generating("llama", 3, seen))
    torch.manual_seed(int(os.environ["RANK"]))
    run.train()
    return outcome(run) | seen


def generation_error(output_dir: str, settings: dict[str, Any]) -> str:
    try:
        generate(output_dir, "llama", settings, 4)
    except ConfigurationError as error:
        return str(error)
    return "no error"
