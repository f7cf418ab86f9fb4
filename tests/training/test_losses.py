"""Which heads divide their loss by `num_items_in_batch` is found out by computing it."""

from __future__ import annotations

import pytest
import torch

from tests import zoo
from tests.training import runs

USES = ["llama", "gpt2", "opt", "vit"]
IGNORES = ["bert", "bert_classifier", "roberta", "distilbert", "bart", "t5", "deberta"]


@pytest.mark.parametrize(("family", "uses"), [(f, True) for f in USES] + [(f, False) for f in IGNORES])
def test_heads(family: str, uses: bool, tmp_path) -> None:
    run = runs.trainer(str(tmp_path), family, {})
    items = [runs.Samples(family, 8)[i] for i in range(4)]
    batch = run.data_collator(items)
    before = torch.get_rng_state()
    count = run._get_num_items_in_batch([batch], torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)
    assert run.model.training
    assert run.model_accepts_loss_kwargs is uses
    assert (count is not None) is uses
    assert getattr(run.model, "accepts_loss_kwargs", True) is uses


def test_a_batch_without_labels_decides_nothing(tmp_path) -> None:
    run = runs.trainer(str(tmp_path), "bert", {})
    ids = zoo.tokens(2, 12)
    for labels in ({}, {"labels": torch.full_like(ids, -100)}):
        run._get_num_items_in_batch([{"input_ids": ids, **labels}], torch.device("cpu"))
        assert run.model_accepts_loss_kwargs
    run._get_num_items_in_batch([{"input_ids": ids, "labels": ids}], torch.device("cpu"))
    assert not run.model_accepts_loss_kwargs


def test_label_smoothing_counts_items_where_the_head_does_not(tmp_path) -> None:
    run = runs.trainer(str(tmp_path), "bert", {"label_smoothing_factor": 0.1})
    ids = zoo.tokens(2, 12)
    assert run._get_num_items_in_batch([{"input_ids": ids, "labels": ids}], torch.device("cpu")) == ids.numel()
