"""Checkpoints made of GGUF packages: once, from parts in order, plain float32 afterwards."""

from __future__ import annotations

import pytest
import torch

from recipes import gguf_models, offline
from recipes.gguf_models import GEMMA3, SMOLLM2


def test_packages_are_pinned_and_in_order():
    for package in (SMOLLM2, *GEMMA3):
        assert len(package.sha256) == 64
    assert [package.names[0][-7:] for package in GEMMA3] == [".part00", ".part01", ".part02", ".part03"]
    assert len({package.sha256 for package in GEMMA3}) == 4


@pytest.mark.slow
def test_smollm2_is_the_pretrained_model(monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = gguf_models.smollm2()
    monkeypatch.setattr(gguf_models, "fetch", lambda package: pytest.fail("converted a second time"))
    assert gguf_models.smollm2() == folder
    assert folder.parent == offline.cache_dir()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    assert (model.config.model_type, model.config.num_hidden_layers, model.dtype) == ("llama", 30, torch.float32)
    assert not hasattr(model.config, "quantization_config")
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert tokenizer.decode(model(input_ids=ids).logits[0, -1].argmax()).strip() == "Paris"
