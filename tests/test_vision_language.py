"""Vision-language models with pictures: vision states without a batch dimension, and towers whose states are read."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from hf_layerpar import LayerParallelConfig, convert_to_ode, ode_view, parallelize
from hf_layerpar.errors import ConfigurationError, UnsupportedModelError
from tests.multiproc import run_ranks

IMAGE, VISION_START, VISION_END = 5, 3, 4
_TEXT: dict[str, Any] = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
_TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
_TEXT |= {"bos_token_id": 1, "eos_token_id": 2}
_MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
_MARKS = {"image_token_id": IMAGE, "video_token_id": 6, "vision_start_token_id": VISION_START}
_MARKS |= {"vision_end_token_id": VISION_END}
_PATCHES = {"patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2, "depth": 4, "num_heads": 4}
_QWEN3 = _PATCHES | {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32, "num_position_embeddings": 16}

VISION: dict[str, Any] = {
    "qwen2_vl": _PATCHES | {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
    "qwen2_5_vl": _PATCHES
    | {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32, "window_size": 16}
    | {"fullatt_block_indexes": [1, 3]},
    "qwen3_vl": _QWEN3 | {"deepstack_visual_indexes": [0, 2]},
    "llava": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    | {"image_size": 16, "patch_size": 8, "model_type": "clip_vision_model"},
}
CLASSES: dict[str, tuple[Any, Any]] = {
    "qwen2_vl": (hf.Qwen2VLForConditionalGeneration, hf.Qwen2VLConfig),
    "qwen2_5_vl": (hf.Qwen2_5_VLForConditionalGeneration, hf.Qwen2_5_VLConfig),
    "qwen3_vl": (hf.Qwen3VLForConditionalGeneration, hf.Qwen3VLConfig),
    "llava": (hf.LlavaForConditionalGeneration, hf.LlavaConfig),
}


def build(name: str) -> tuple[Any, dict[str, Tensor]]:
    """(model in float64, two rows of text with a picture of four places in each)."""
    torch.manual_seed(0)
    model_class, config_class = CLASSES[name]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 99, (2, 12), generator=generator)
    ids[:, 1], ids[:, 2:6], ids[:, 6] = VISION_START, IMAGE, VISION_END
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    if name == "llava":
        text = _TEXT | {"model_type": "llama"}
        config = config_class(text_config=text, vision_config=VISION[name], image_token_index=IMAGE)
        batch["pixel_values"] = torch.randn(2, 3, 16, 16, generator=generator).double()
    else:
        config = config_class(text_config=_TEXT | _MROPE | {"head_dim": 8}, vision_config=VISION[name], **_MARKS)
        batch["pixel_values"] = torch.randn(2 * 16, 3 * 2 * 4 * 4, generator=generator).double()
        batch["image_grid_thw"] = torch.tensor([[1, 4, 4]] * 2)
        batch["mm_token_type_ids"] = (ids == IMAGE).long()
    return model_class(config).eval().double(), batch


def deviations(
    name: str, stacks: list[str] | None, settings: dict[str, Any]
) -> tuple[float, float, list[str], set[str]]:
    """Errors of loss and gradients, the stacks, and the names of this rank's gradients."""
    model, batch = build(name)
    stock = copy.deepcopy(model)
    expected = stock(**batch, use_cache=False).loss
    expected.backward()
    grads = {n: p.grad for n, p in stock.named_parameters() if p.grad is not None}
    norm = sum(float(g.square().sum()) for g in grads.values()) ** 0.5
    handle = parallelize(convert_to_ode(model, stacks=stacks), LayerParallelConfig(**settings))
    loss = handle.train_step(batch)
    mine = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    error = max(float((g - grads[n]).norm()) for n, g in mine.items() if n in grads) / norm
    paths = [stack.path for stack in ode_view(model).stacks]
    assert abs(float(model(**batch).loss.detach()) - float(loss)) < 1e-6
    return abs(float(loss) - float(expected.detach())), error, paths, set(mine)


def refusal(name: str, stacks: list[str] | None, settings: dict[str, Any]) -> str:
    with pytest.raises((ConfigurationError, UnsupportedModelError)) as caught:
        deviations(name, stacks, settings)
    return str(caught.value)


WORKING = [
    ("qwen2_vl", None, {}),
    ("qwen2_5_vl", None, {}),
    ("llava", ["language_model.layers"], {}),
    ("llava", ["language_model.layers"], {"micro_batches": 2}),
]


@pytest.mark.parametrize(("name", "stacks", "settings"), WORKING)
def test_pictures_on_two_ranks(name: str, stacks: list[str] | None, settings: dict[str, Any]) -> None:
    model, batch = build(name)
    model(**batch).loss.backward()
    names = {n for n, p in model.named_parameters() if p.grad is not None}
    ranks = run_ranks(deviations, 2, name, stacks, settings)
    for loss_error, error, paths, _ in ranks:
        assert loss_error < 2e-6
        assert error < 1e-8  # rotary tables in float32
        assert len(paths) == (2 if stacks is None else 1)
    assert set.union(*(found for *_, found in ranks)) >= names


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("settings", [{"micro_batches": 2}, {"ends": "spread"}], ids=["micro-batches", "spread"])
def test_patches_of_all_pictures_are_not_cut(name: str, settings: dict[str, Any]) -> None:
    """Their states are [patches, D], and which of them belong to a row only the model knows."""
    for text in run_ranks(refusal, 2, name, None, settings):
        assert "2 rows can't be cut" in text
        assert "image_grid_thw" in text
        assert "use micro_batches=1 and ends='first_last'" in text


READ = [
    ("llava", None, ["hidden_states", "vision_tower.encoder.layers", "stacks=[...]"]),
    ("qwen3_vl", None, ["reads or changes the state between layers 0 and 1 of model.visual.blocks", "stacks=[...]"]),
    ("qwen3_vl", ["visual.blocks"], ["between layers 0 and 1 of model.visual.blocks"]),
    ("qwen3_vl", ["language_model.layers"], ["between layers 0 and 1 of model.language_model.layers"]),
]


@pytest.mark.parametrize(("name", "stacks", "words"), READ)
def test_states_that_are_read_between_layers(name: str, stacks: list[str] | None, words: list[str]) -> None:
    for text in run_ranks(refusal, 2, name, stacks, {}):
        for word in words:
            assert word in text
