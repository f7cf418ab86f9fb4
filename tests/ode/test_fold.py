"""The split form against the stock model: the fold computes the same function, and unfolding gives the weights back."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_layerpar.errors import CheckpointError, UnsupportedModelError
from hf_layerpar.ode.fold import can_fold, folded_state_dict, has_split_form, install_scaling, unfold_
from tests import zoo

torch.set_num_threads(1)

GEMMA = ("gemma2", "gemma3")


def layers_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def build(name: str, **changes: Any) -> tuple[Any, zoo.Inputs]:
    """A model with no weight at its initial zero or one, in eval mode."""
    model, inputs = zoo.build(name, layers=3, **changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval(), inputs


def scaled(model: Any, step_size: float) -> Any:
    model = copy.deepcopy(model)
    for layer in layers_of(model):
        install_scaling(layer, step_size)
    return model


@torch.no_grad()
def logits(model: Any, inputs: zoo.Inputs) -> Tensor:
    return model(**inputs).logits


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def changed_keys(a: nn.Module, b: nn.Module) -> set[str]:
    return {key for key, value in a.state_dict().items() if not torch.equal(value, b.state_dict()[key])}


@pytest.mark.parametrize("name", zoo.SPLIT)
def test_every_branch_is_scaled(name: str) -> None:
    """With a tiny h a layer must hand its state back; a branch missing from the table would be added in full."""
    model, inputs = build(name)
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(layer: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        seen.append((x, output[0] if isinstance(output, tuple) else output))

    model = scaled(model, 2.0**-30)
    for layer in layers_of(model):
        layer.register_forward_hook(keep, with_kwargs=True)
    logits(model, inputs)
    assert len(seen) == len(layers_of(model))
    for x, y in seen:
        torch.testing.assert_close(y, x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("step_size", [0.5, 1 / 3])
@pytest.mark.parametrize("name", zoo.SPLIT)
def test_folded_weights_compute_the_scaled_function(name: str, step_size: float) -> None:
    model, inputs = build(name)
    split = scaled(model, step_size)
    stock = copy.deepcopy(model)
    stock.load_state_dict(folded_state_dict(split))
    expected = logits(split, inputs)
    assert distance(logits(stock, inputs), expected) < 1e-5
    assert distance(logits(model, inputs), expected) > 1e-2
    assert not changed_keys(model, split)


@pytest.mark.parametrize("step_size", [0.5, 2.0**-6, 1 / 3])
@pytest.mark.parametrize("name", zoo.SPLIT)
def test_unfold_gives_the_weights_back(name: str, step_size: float) -> None:
    model, _ = build(name)
    split = scaled(model, step_size)
    split.load_state_dict(folded_state_dict(split))
    assert changed_keys(model, split)
    unfold_(split)
    if step_size != 1 / 3 and name not in GEMMA:
        assert not changed_keys(model, split)
    for key, weight in model.state_dict().items():
        # Gemma's stored weight is an offset from 1, and the fold rounds it at h
        torch.testing.assert_close(split.state_dict()[key], weight, rtol=1e-6, atol=1e-7 / step_size)


@pytest.mark.parametrize("name", ["gpt2", "t5", "whisper"])
def test_gradients_are_those_of_the_unfolded_weights(name: str) -> None:
    """W' = h W, so the gradient by W is h times the one by W'; all others agree."""
    model, inputs = build(name)
    h = 0.25
    split = scaled(model, h)
    stock = copy.deepcopy(model)
    folded = folded_state_dict(split)
    stock.load_state_dict(folded)
    split(**inputs).loss.backward()
    stock(**inputs).loss.backward()
    own = {key for key, value in split.state_dict().items() if not torch.equal(value, folded[key])}
    assert own
    of_stock = dict(stock.named_parameters())
    for key, parameter in split.named_parameters():
        expected = of_stock[key].grad
        if expected is not None:
            torch.testing.assert_close(parameter.grad, expected * (h if key in own else 1), rtol=1e-4, atol=1e-6)


def test_step_size_one_installs_nothing() -> None:
    model, _ = build("gpt2")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in scaled(model, 1.0).modules())


def test_only_the_layers_asked_for_are_scaled() -> None:
    model, _ = build("llama")
    install_scaling(model.model.layers[1], 0.5)
    folded = folded_state_dict(model)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, folded[key])}
    assert changed == {f"model.layers.1.{name}.weight" for name in ("self_attn.o_proj", "mlp.down_proj")}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_scale_on_their_own(copied: Any) -> None:
    model, inputs = build("gpt2")
    original = scaled(model, 0.5)
    other = copied(original)
    expected = logits(original, inputs)
    assert torch.equal(logits(other, inputs), expected)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(logits(original, inputs), expected)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["c_proj"], fan_in_fan_out=True), other)
    logits(other, inputs)  # moves the other's hooks, not ours
    assert torch.equal(logits(original, inputs), expected)


@pytest.mark.parametrize(("name", "targets"), [("gpt2", ["c_proj"]), ("opt", ["fc2", "out_proj"])])
def test_adapters_on_a_scaled_projection_are_scaled_with_it(name: str, targets: list[str]) -> None:
    """PEFT replaces the projection; h must apply to the adapted output, so that merging doesn't change the function."""
    model, inputs = build(name)
    split = scaled(model, 0.25)
    logits(split, inputs)
    adapted = peft.get_peft_model(
        split, peft.LoraConfig(target_modules=targets, init_lora_weights=False, fan_in_fan_out=name == "gpt2")
    )
    adapted.eval()
    expected = logits(adapted, inputs)
    merged = adapted.merge_and_unload()
    assert distance(logits(merged, inputs), expected) < 1e-5
    stock = copy.deepcopy(model)
    stock.load_state_dict(folded_state_dict(merged))
    assert distance(logits(stock, inputs), expected) < 1e-5
    assert distance(logits(scaled(model, 0.25), inputs), expected) > 1e-3


def test_adapters_must_be_merged_before_folding() -> None:
    split = scaled(build("gpt2")[0], 0.5)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["c_proj"], fan_in_fan_out=True), split)
    with pytest.raises(CheckpointError, match=r"no such key.*merge PEFT adapters"):
        folded_state_dict(split)


def test_a_model_without_its_parameters_folds_a_given_state_dict() -> None:
    split = scaled(build("gpt2")[0], 0.5)
    full = {key: value.clone() for key, value in split.state_dict().items()}
    before = {key: value.clone() for key, value in full.items()}
    expected = folded_state_dict(split)
    for module in layers_of(split)[1].modules():
        for name in module._parameters:
            module._parameters[name] = None
    folded = folded_state_dict(split, full)
    assert folded.keys() == expected.keys()
    assert all(torch.equal(folded[key], expected[key]) for key in expected)
    assert all(torch.equal(full[key], before[key]) for key in full)
    unfold_(split)  # does what there is to do


@pytest.mark.parametrize("name", [name for name in zoo.NAMES if name not in zoo.SPLIT])
def test_post_norm_layers_have_no_split_form(name: str) -> None:
    layer = layers_of(zoo.build(name)[0])[0]
    assert not has_split_form(layer)
    with pytest.raises(UnsupportedModelError, match=rf"{type(layer).__name__} has no split form.*form='euler'"):
        install_scaling(layer, 0.5)


def test_opt_350m_is_post_norm() -> None:
    model, _ = zoo.build("opt", do_layer_norm_before=False)
    assert not has_split_form(layers_of(model)[0])


def test_gemma_norms_fold_in_full_precision_only() -> None:
    model, _ = build("gemma2")
    split = scaled(model, 1 / 16)
    assert can_fold(split, split.state_dict())
    half = split.bfloat16()
    assert not can_fold(half, half.state_dict())
    llama = scaled(build("llama")[0], 1 / 16).bfloat16()
    assert can_fold(llama, llama.state_dict())


@pytest.mark.parametrize("change", [lambda w: w.to("meta"), lambda w: w.to(torch.int8)])
def test_weights_without_floating_point_data_do_not_fold(change: Any) -> None:
    split = scaled(build("gpt2")[0], 0.5)
    values = dict(split.state_dict())
    key = "transformer.h.2.mlp.c_proj.weight"
    values[key] = change(values[key])
    assert not can_fold(split, values)
    with pytest.raises(CheckpointError, match=r"h\.2\.mlp\.c_proj\.weight.*dtype"):
        folded_state_dict(split, values)


def test_quantized_models_do_not_fold() -> None:
    split = scaled(build("gpt2")[0], 0.5)
    assert can_fold(split, split.state_dict())
    split.hf_quantizer = object()
    assert not can_fold(split, split.state_dict())
