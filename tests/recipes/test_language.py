"""Blocks of text, offline and shaped like the hub's."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from transformers import ByT5Tokenizer

from hf_layerpar.errors import ConfigurationError
from recipes import language
from recipes.language import byte_tokenizer, load_blocks, offline_blocks
from recipes.offline import DownloadError, english_text

TEXT = "".join(f"Line {i}: “naïve” text.\n" for i in range(400))


def test_offline_blocks_are_the_text_split_by_position():
    found = offline_blocks(TEXT, 16, max_eval_blocks=1000)
    train = np.concatenate([row["input_ids"].numpy() for row in (found.train[i] for i in range(len(found.train)))])
    rest = np.concatenate([found.validation[i]["input_ids"].numpy() for i in range(len(found.validation))])
    raw = TEXT.encode()
    assert bytes((train - 3).astype(np.uint8)) == raw[: len(train)]
    start = len(raw) - int(0.05 * len(raw))
    assert bytes((rest - 3).astype(np.uint8)) == raw[start : start + len(rest)]
    assert start - 16 < len(train) <= start
    row = found.train[3]
    assert row["input_ids"].dtype == torch.int64
    assert torch.equal(row["input_ids"], row["labels"])
    assert found.tokenizer(TEXT[:200])["input_ids"] == list(train[: len(TEXT[:200].encode())])


def test_bytes_are_numbered_as_by_byt5():
    tokenizer, theirs = byte_tokenizer(), ByT5Tokenizer(extra_ids=0)
    text = "".join(map(chr, range(1, 3000)))
    numbers = tokenizer(text)["input_ids"]
    assert numbers == theirs(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(numbers, clean_up_tokenization_spaces=False) == text
    assert len(tokenizer) == len(theirs) == 259
    for name in ("pad_token_id", "eos_token_id", "unk_token_id"):
        assert getattr(tokenizer, name) == getattr(theirs, name)


def test_validation_slice_is_spread_over_its_part():
    everything, few = (offline_blocks(TEXT, 16, count).validation for count in (1000, 5))
    assert len(few) == 5
    for i, place in enumerate(np.linspace(0, len(everything) - 1, 5).round().astype(int)):
        assert torch.equal(few[i]["input_ids"], everything[int(place)]["input_ids"])


def test_wrong_sizes_are_named():
    with pytest.raises(ConfigurationError, match=r"blocks of 4096 tokens.*smaller block_size"):
        offline_blocks(TEXT, 4096, 8)
    with pytest.raises(ConfigurationError, match="block_size=1 must be at least 2"):
        load_blocks("offline", None, "", 1, 8, False, 0)
    with pytest.raises(ConfigurationError, match="max_eval_blocks=0"):
        load_blocks("offline", None, "", 8, 0, False, 0)


def hub(monkeypatch, streaming: bool, column: str = "text") -> None:
    data = datasets.Dataset.from_dict({column: [f"document {i}" for i in range(300)], "meta": [0] * 300})

    def load_dataset(name, config, split, streaming):
        assert (name, config, split) == ("some/web", "small", "train")
        return data.to_iterable_dataset() if streaming else data

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_blocks(streaming, monkeypatch, tmp_path):
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path)
    hub(monkeypatch, streaming)
    found = load_blocks("some/web", "small", str(tmp_path), 20, 10, streaming, seed=0)
    validation, train = list(found.validation), list(found.train)
    assert len(validation) == len(found.validation) == 10
    rows = torch.stack([row["input_ids"] for row in [*validation, *train]])
    assert torch.equal(rows, torch.stack([row["labels"] for row in [*validation, *train]]))
    text = found.tokenizer.decode(rows[:10].flatten())
    assert text.startswith("document 0</s>")
    assert "document 1</s>" in text
    assert "document 0" not in found.tokenizer.decode(torch.stack([row["input_ids"] for row in train]).flatten())[:2000]
    assert {tuple(row.shape) for row in rows} == {(20,)}
    assert len(rows) > 150


def test_hub_faults_name_the_remedy(monkeypatch, tmp_path):
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path)
    hub(monkeypatch, False, column="content")
    with pytest.raises(ConfigurationError, match=r"'some/web' has the columns \['content', 'meta'\]"):
        load_blocks("some/web", "small", str(tmp_path), 20, 10, False, seed=0)

    hub(monkeypatch, False)
    endless = byte_tokenizer()
    endless.eos_token = None
    endless.save_pretrained(tmp_path / "endless")
    with pytest.raises(ConfigurationError, match="has no end-of-text token"):
        load_blocks("some/web", "small", str(tmp_path / "endless"), 20, 10, False, seed=0)

    for error in (ConnectionError("no route"), RuntimeError("Dataset scripts are no longer supported")):

        def unreachable(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(datasets, "load_dataset", unreachable)
        with pytest.raises(DownloadError, match="--dataset_name offline"):
            load_blocks("some/web", "small", str(tmp_path), 20, 10, False, seed=0)


def test_real_text_is_plain_english():
    text = english_text()
    assert len(text.split()) > 750_000
    assert not set("<>") & set(text)
    assert text.splitlines()[-1].endswith("Amen.")
    found = language.offline_blocks(text, 64, 256)
    assert (len(found.validation), len(found.train) > 70_000) == (256, True)
