"""transformers' pipelines on converted models, in one process and on lp ranks that call them together."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from hf_layerpar import LayerParallelConfig, convert_to_ode, from_pretrained, parallelize
from tests import zoo
from tests.multiproc import run_ranks

hf.logging.set_verbosity_error()

SENTENCES = ["w5 w17 w60 w8", "w9 w31", "w77 w20 w5"]
OPTIONS: dict[str, dict[str, Any]] = {
    "text-classification": {"top_k": None, "batch_size": 2},
    "fill-mask": {"top_k": 3},
    "text-generation": {"max_new_tokens": 5, "do_sample": True, "return_full_text": False},
    "image-classification": {"top_k": 2},
}


def tokenizer() -> hf.PreTrainedTokenizerFast:
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "mask_token": "<m>", "unk_token": "<u>"}
    words = [*special.values(), *(f"w{i}" for i in range(len(special), zoo.VOCAB))]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<u>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return hf.PreTrainedTokenizerFast(tokenizer_object=words, **special)


def build(task: str) -> hf.PreTrainedModel:
    family = {"text-generation": "llama", "image-classification": "vit"}.get(task, "bert")
    model = zoo.build(family)[0]
    if task == "text-classification":
        torch.manual_seed(0)
        model = hf.BertForSequenceClassification(model.config)
    return model.eval()


def answers(task: str, model: hf.PreTrainedModel) -> Any:
    torch.manual_seed(4)
    if task == "image-classification":
        images = [Image.linear_gradient("L").convert("RGB").rotate(90 * i) for i in range(3)]
        processor = hf.ViTImageProcessorPil(size={"height": 16, "width": 16})
        return hf.pipeline(task, model=model, image_processor=processor)(images, **OPTIONS[task])
    sentences = [s + " <m>" for s in SENTENCES] if task == "fill-mask" else SENTENCES
    return hf.pipeline(task, model=model, tokenizer=tokenizer())(sentences, **OPTIONS[task])


@pytest.mark.parametrize("task", OPTIONS)
def test_at_step_size_one_the_answers_are_those_of_stock(task: str) -> None:
    stock = build(task)
    expected = answers(task, copy.deepcopy(stock))
    assert len(expected) == 3
    assert answers(task, convert_to_ode(copy.deepcopy(stock))) == expected
    parallelized = convert_to_ode(stock)
    parallelize(parallelized, LayerParallelConfig(strategy="mgrit", coarsening=2))
    assert answers(task, parallelized) == expected


def test_smaller_steps_are_what_a_pipeline_runs(tmp_path) -> None:
    task = "text-classification"
    model = convert_to_ode(build(task), step_size=0.5)
    scores = [{a["label"]: a["score"] for a in row} for row in answers(task, model)]
    for found, sentence in zip(scores, SENTENCES, strict=True):
        with torch.no_grad():
            logits = model(**tokenizer()(sentence, return_tensors="pt")).logits[0]
        expected = logits.softmax(-1).tolist()
        assert [found["LABEL_0"], found["LABEL_1"]] == pytest.approx(expected, rel=1e-5)
    assert scores != [{a["label"]: a["score"] for a in row} for row in answers(task, build(task))]
    model.save_pretrained(tmp_path)
    assert answers(task, from_pretrained(tmp_path)) == answers(task, model)


def answers_on_ranks(step_size: float) -> dict[str, tuple[bool, Any]]:
    """(the same as in one process, the answers) of every task."""
    found = {}
    for task in OPTIONS:
        serial = convert_to_ode(build(task), step_size=step_size)
        model = copy.deepcopy(serial)
        parallelize(model, LayerParallelConfig(strategy="mgrit", coarsening=2))
        expected, ours = answers(task, serial), answers(task, model)
        if task == "text-generation":  # the first rank's draws count
            torch.manual_seed(4 + dist.get_rank())
            chosen = hf.pipeline(task, model=model, tokenizer=tokenizer())("w9 w31", **OPTIONS[task])
            found["unlike streams"] = (True, chosen)
        found[task] = (ours == expected, ours)
    return found


@pytest.mark.parametrize(("world", "step_size"), [(2, 1.0), (3, 0.5)])
def test_on_lp_ranks_the_answers_are_those_of_one_process(world: int, step_size: float) -> None:
    ranks = run_ranks(answers_on_ranks, world, step_size)
    for found in ranks:
        assert found == ranks[0]
        for task, (same, _) in found.items():
            assert same, task
