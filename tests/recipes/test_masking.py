"""Masked text: the tokenizer, the masks, and rows shaped like the hub's."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, ByT5Tokenizer, EvalPrediction

from hf_layerpar.errors import ConfigurationError
from recipes.masking import Masks, load_masked, masked_accuracy, train_tokenizer

LINES = ["In the beginning, God created the heavens and the earth."] * 3 + ["The earth was formless: “naïve” text 😀."]


@pytest.fixture(scope="module")
def offline():
    return load_masked("offline", None, "", 32, 200, 0.2, False, 0)


def test_tokenizer_spells_any_text_and_is_saved_whole(tmp_path):
    tokenizer = train_tokenizer(LINES, 300)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for given in ("The EARTH isn't flat: \t☃ naïve", "a", ""):
        found = loaded(given)
        assert found == tokenizer(given)
        assert tokenizer.unk_token_id not in found["input_ids"]
        assert loaded.decode(found["input_ids"], skip_special_tokens=True).strip() == given.lower()
    pair = loaded("the earth", "god")
    assert loaded.convert_ids_to_tokens(pair["input_ids"])[0] == "[CLS]"
    assert [pair["input_ids"].count(loaded.sep_token_id), max(pair["token_type_ids"])] == [2, 1]
    assert train_tokenizer(LINES, 300).backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_rows_of_the_offline_text(offline):
    tokenizer = offline.tokenizer
    row = offline.train[0]["input_ids"]
    assert (row.shape, row.dtype) == ((32,), torch.int64)
    assert (int(row[0]), int(row[-1])) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    text = tokenizer.decode(torch.cat([offline.train[i]["input_ids"][1:-1] for i in range(100)]))
    assert "in the beginning, god created the heavens and the earth." in text
    assert len(offline.validation) == 200
    assert len(offline.train) > 30_000


def test_masks(offline):
    tokenizer = offline.tokenizer
    rows = [offline.train[i] for i in range(400)]
    plain = torch.stack([row["input_ids"] for row in rows])
    collate = Masks(tokenizer, 0.2)
    first, second = collate(rows), collate(rows)
    assert not torch.equal(first["labels"], second["labels"])
    masked = first["labels"] != -100
    assert torch.equal(first["labels"][masked], plain[masked])
    assert torch.equal(first["input_ids"][~masked], plain[~masked])
    assert not masked[:, [0, -1]].any()
    share = masked[:, 1:-1].float().mean()
    assert float(share) == pytest.approx(0.2, abs=0.02)
    shown = first["input_ids"][masked]
    assert float((shown == tokenizer.mask_token_id).float().mean()) == pytest.approx(0.8, abs=0.05)
    assert float((shown == plain[masked]).float().mean()) == pytest.approx(0.1, abs=0.04)


def test_validation_masks_are_fixed(offline):
    again = load_masked("offline", None, "", 32, 200, 0.2, False, 1)
    collate = Masks(offline.tokenizer, 0.2)
    found, other = collate(offline.validation), collate(again.validation)
    for key in ("input_ids", "labels"):
        assert torch.equal(found[key], other[key])
        assert torch.equal(found[key], torch.stack([row[key] for row in offline.validation]))
    assert 0.15 < (found["labels"] != -100).float().mean() < 0.25


def test_accuracy_counts_masked_tokens():
    labels = np.array([[-100, 5, 6, -100], [7, -100, -100, 8]])
    tokens = np.array([[1, 5, 0, -100], [7, 2, 2, 0]])
    assert masked_accuracy(EvalPrediction(predictions=tokens, label_ids=labels)) == {"masked_accuracy": 0.5}


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_rows(streaming, monkeypatch, tmp_path):
    train_tokenizer(LINES, 300).save_pretrained(tmp_path / "masking")
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path / "bytes")
    data = datasets.Dataset.from_dict({"text": [f"document {i}" for i in range(300)], "meta": [0] * 300})
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, split, streaming: data.to_iterable_dataset() if streaming else data
    )
    found = load_masked("some/web", None, str(tmp_path / "masking"), 20, 10, 0.2, streaming, 0)
    validation, train = found.validation, list(found.train)
    assert len(validation) == 10
    assert len(train) > 100
    rows = torch.stack([row["input_ids"] for row in train])
    assert set(rows[:, 0].tolist()) == {found.tokenizer.cls_token_id}
    assert rows.shape[1] == 20
    original = torch.where(validation[0]["labels"] == -100, validation[0]["input_ids"], validation[0]["labels"])
    assert found.tokenizer.decode(original).startswith("[CLS] document 0[SEP] doc")
    assert Masks(found.tokenizer, 0.2)(train[:4])["labels"].shape == (4, 20)
    with pytest.raises(ConfigurationError, match=r"cls_token=None.*need all three"):
        list(load_masked("some/web", None, str(tmp_path / "bytes"), 20, 10, 0.2, streaming, 0).train)
