"""Conversion: what it refuses, both forms against written-out loops, which layers it takes, restored settings."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from hf_layerpar import from_pretrained
from hf_layerpar.config import CONFIG_KEY, OdeSettings
from hf_layerpar.errors import ConfigurationError, UnsupportedModelError
from hf_layerpar.ode.convert import convert_to_ode, ode_view
from tests import zoo
from tests.ode.helpers import SerialSolver, assert_same, refused, training_step, use_solver, without_cache

# --- refusals


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"step_size": 0.0}, ConfigurationError, ("step_size=0.0", r"\(0, 1\]")),
        ({"step_size": 1.5}, ConfigurationError, ("step_size=1.5", r"\(0, 1\]")),
        ({"step_size": 0.3}, ConfigurationError, ("4 inner layers", "0.3", "13.3", "num_steps")),
        ({"num_steps": 2.5}, ConfigurationError, ("num_steps=2.5", "integer")),
        ({"num_steps": True}, ConfigurationError, ("num_steps=True", "integer")),
        ({"num_steps": 0}, ConfigurationError, ("num_steps=0", "at least 1")),
        ({"buffers": (2, 2)}, ConfigurationError, (r"\(2, 2\)", "0 of 4 layers", "use fewer")),
        ({"buffers": (-1, 0)}, ConfigurationError, (r"buffers\[0\]=-1", "at least 0")),
        ({"buffers": (1,)}, ConfigurationError, (r"\(1,\)", "two integers")),
        ({"buffers": (1, 0, 1)}, ConfigurationError, (r"\(1, 0, 1\)", "place 0 comes after 0", "ascending")),
        ({"buffers": (0, 3, 1)}, ConfigurationError, (r"\(0, 3, 1\) of 4 layers", "layer 3", "from 0 to 2")),
        ({"form": "implicit"}, ConfigurationError, ("implicit", "euler, split")),
        ({"interpolation": "cubic"}, ConfigurationError, ("cubic", "constant, linear")),
        ({"form": "split"}, UnsupportedModelError, ("form='split'", "BertLayer", "form='euler'")),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_bad_settings(arguments, error, words):
    model, _ = zoo.build("bert")
    with refused(error, *words):
        convert_to_ode(model, **arguments)
    assert not hasattr(model.config, CONFIG_KEY)
    assert "forward" not in vars(model)


def test_layerdrop():
    model, _ = zoo.build("bart", decoder_layerdrop=0.1)
    with refused(UnsupportedModelError, "decoder_layerdrop=0.1", "set it to 0"):
        convert_to_ode(model)
    model, _ = zoo.build("whisper")
    model.model.encoder.layerdrop = 0.2
    with refused(UnsupportedModelError, "model.encoder.layerdrop=0.2", "set it to 0"):
        convert_to_ode(model)


def test_models_without_flat_stacks():
    with refused(UnsupportedModelError, "Linear has no stack"):
        convert_to_ode(nn.Linear(2, 2))
    with refused(UnsupportedModelError, "got int"):
        convert_to_ode(3)  # type: ignore[type-var]
    with refused(UnsupportedModelError, "XLMModel has no stack", "attentions, .*ffns.* hold their parts"):
        convert_to_ode(hf.XLMModel(hf.XLMConfig(vocab_size=9, emb_dim=8, n_layers=2, n_heads=2)))
    swin = hf.SwinModel(hf.SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 1]))
    with refused(UnsupportedModelError, "stack inside a layer of another", "flat ones", "stacks="):
        convert_to_ode(swin)


def test_deberta_convolution():
    model, _ = zoo.build("deberta_v2", conv_kernel_size=3, conv_act="gelu")
    with refused(UnsupportedModelError, "deberta.encoder.conv", "conv_kernel_size=3", "layers 0 and 1"):
        convert_to_ode(model)


def test_twice():
    model = convert_to_ode(zoo.build("bert")[0])
    with refused(UnsupportedModelError, "already converted", "step_size=1.0", "ode_view"):
        convert_to_ode(model, step_size=0.5)
    with refused(UnsupportedModelError, "not converted", "convert_to_ode"):
        ode_view(zoo.build("bert")[0])


# --- the forms


def language_model(name: str) -> tuple[Any, Tensor]:
    model, inputs = zoo.build(name, seed=1)
    return model.eval(), inputs["input_ids"]


def bert_by_hand(model: Any, ids: Tensor, h: list[float]) -> Tensor:
    x = model.bert.embeddings(ids)
    for step_size, layer in zip(h, model.bert.encoder.layer, strict=True):
        x = x + step_size * (layer(x) - x)
    return model.cls(x)


def gpt2_by_hand(model: Any, ids: Tensor, h: list[float], split: bool) -> Tensor:
    body = model.transformer
    x = body.wte(ids) + body.wpe(torch.arange(ids.shape[1]))
    for step_size, block in zip(h, body.h, strict=True):
        if split:
            x = x + step_size * block.attn(block.ln_1(x))[0]
            x = x + step_size * block.mlp(block.ln_2(x))
        else:
            x = x + step_size * (block(x) - x)
    return model.lm_head(body.ln_f(x))


HAND_LOOPS = {
    "bert-euler": ("bert", "euler", bert_by_hand),
    "gpt2-euler": ("gpt2", "euler", lambda *args: gpt2_by_hand(*args, split=False)),
    "gpt2-split": ("gpt2", "split", lambda *args: gpt2_by_hand(*args, split=True)),
}


@pytest.mark.parametrize("solved", [False, True])
@pytest.mark.parametrize("buffers", [(0, 0), (1, 2)])
@pytest.mark.parametrize("case", HAND_LOOPS)
def test_half_steps_are_the_loop_written_out(case, buffers, solved):
    name, form, loop = HAND_LOOPS[case]
    stock, ids = language_model(name)
    inner = 4 - sum(buffers)
    ours = convert_to_ode(copy.deepcopy(stock), step_size=0.5, num_steps=inner, form=form, buffers=buffers)
    (stack,) = ode_view(ours).stacks
    h = [1.0] * buffers[0] + [0.5] * inner + [1.0] * buffers[1]
    assert list(stack.step_sizes) == h
    if solved:
        use_solver(ours, SerialSolver())
    expected = loop(stock, ids, h)
    logits = ours(ids, use_cache=False).logits if name == "gpt2" else ours(ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(logits, stock(ids).logits, atol=1e-3)
    expected.square().mean().backward()
    logits.square().mean().backward()
    for (key, mine), theirs in zip(ours.named_parameters(), stock.parameters(), strict=True):
        if theirs.grad is None:
            assert mine.grad is None
        else:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_auto_form(name):
    model, inputs = zoo.build(name)
    ours = convert_to_ode(model, step_size=0.5, num_steps=4)
    assert ode_view(ours).settings.form == ("split" if name in zoo.SPLIT else "euler")
    in_line = training_step(ours, inputs, True, **without_cache(ours))
    use_solver(ours, SerialSolver())
    assert_same(training_step(ours, inputs, True), in_line)


# --- which lists of layers


def test_layers_of_any_class():
    """MPNet's are not made for gradient checkpointing."""
    sizes: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    stock = hf.MPNetForMaskedLM(hf.MPNetConfig(vocab_size=zoo.VOCAB, num_hidden_layers=3, **sizes))
    ours = convert_to_ode(copy.deepcopy(stock))
    assert [stack.path for stack in ode_view(ours).stacks] == ["mpnet.encoder.layer"]
    solver = use_solver(ours, SerialSolver())
    assert_same(training_step(ours, zoo.text(), True), training_step(stock, zoo.text(), True))
    assert solver.runs == [3]


def test_feature_extractors_of_speech_models_are_no_stacks():
    sizes: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    convolutions = {"conv_dim": (16, 16, 16), "conv_stride": (4, 4, 4), "conv_kernel": (8, 8, 8)}
    config = hf.Wav2Vec2Config(
        **(sizes | convolutions),
        num_hidden_layers=3,
        num_conv_pos_embeddings=16,
        layerdrop=0.0,
        mask_time_prob=0.0,
        vocab_size=9,
    )
    torch.manual_seed(0)
    stock = hf.Wav2Vec2ForCTC(config)
    inputs = {"input_values": torch.randn(2, 1000), "labels": torch.tensor([[1, 2], [3, 4]])}
    ours = convert_to_ode(copy.deepcopy(stock))
    assert [stack.path for stack in ode_view(ours).stacks] == ["wav2vec2.encoder.layers"]
    solver = use_solver(ours, SerialSolver())
    assert_same(training_step(ours, inputs, True), training_step(stock, inputs, True))
    assert solver.runs == [3]


def test_chosen_stacks(tmp_path):
    stock, inputs = zoo.build("bart")
    ours = convert_to_ode(copy.deepcopy(stock).eval(), step_size=0.5, num_steps=4, stacks=["decoder.layers"])
    assert [stack.path for stack in ode_view(ours).stacks] == ["model.decoder.layers"]
    solver = use_solver(ours, SerialSolver())
    logits = ours(**inputs).logits
    assert solver.runs == [4]
    assert not torch.allclose(logits, stock.eval()(**inputs).logits)
    ours.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path).eval()
    assert ode_view(again).settings == ode_view(ours).settings
    assert torch.equal(again(**inputs, use_cache=False).logits, logits)
    with refused(ConfigurationError, "no ModuleList 'middle'", "model.decoder.layers"):
        convert_to_ode(stock, stacks=["middle"])
    with refused(ConfigurationError, r"stacks='decoder.layers'", "list of names"):
        convert_to_ode(stock, stacks="decoder.layers")
    loaded = zoo.build("bart")[0]
    loaded.config.hf_layerpar = OdeSettings(stacks=("decoder.layers",)).to_dict()
    with refused(ConfigurationError, r"stacks=\['encoder.layers'\] contradicts", "leave stacks out"):
        convert_to_ode(loaded, stacks=["encoder.layers"])


# --- settings in the config


def test_settings_are_written_to_the_config():
    model = convert_to_ode(zoo.build("gpt2")[0], step_size=0.5, num_steps=2, buffers=(1, 1))
    settings = ode_view(model).settings
    assert settings == OdeSettings(step_size=0.5, form="split", buffers=(1, 1))
    assert model.config.to_dict()[CONFIG_KEY] == settings.to_dict()
    assert OdeSettings.from_dict(model.config.to_dict()[CONFIG_KEY]) == settings


@pytest.mark.parametrize(("name", "form"), [("gpt2", "split"), ("gpt2", "euler"), ("bert", "euler")])
def test_settings_come_back_with_the_checkpoint(name, form, tmp_path):
    model, inputs = zoo.build(name)
    ours = convert_to_ode(model.eval(), step_size=0.5, num_steps=2, buffers=(1, 1), form=form)
    ours.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert (loaded.config.hf_layerpar["folded"]) is (form == "split")
    again = convert_to_ode(loaded)
    assert again is loaded
    assert ode_view(again).settings == ode_view(ours).settings
    for (key, mine), theirs in zip(again.state_dict().items(), ours.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), key  # a fold by a power of two has an exact inverse
    assert torch.equal(again(**inputs).logits, ours(**inputs).logits)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"step_size": 1.0}, ("step_size=1.0 contradicts step_size=0.5", "leave step_size out")),
        ({"form": "euler"}, ("form='euler' contradicts form='split'",)),
        ({"interpolation": "linear"}, ("interpolation='linear' contradicts",)),
        ({"buffers": (0, 0)}, (r"buffers=\(0, 0\) contradicts buffers=\(1, 1\)",)),
        ({"num_steps": 4}, ("num_steps=4 contradicts", "2 inner steps|'transformer.h': 2", "refine the original")),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_stored_settings_are_not_contradicted(arguments, words):
    model, _ = zoo.build("gpt2")
    model.config.hf_layerpar = OdeSettings(step_size=0.5, form="split", buffers=(1, 1)).to_dict()
    with refused(ConfigurationError, *words):
        convert_to_ode(model, **arguments)
    same: dict[str, Any] = {"step_size": 0.5, "num_steps": 2, "form": "split", "buffers": (1, 1)}
    assert convert_to_ode(model, **same) is model


def test_unknown_stored_settings():
    model, _ = zoo.build("gpt2")
    model.config.hf_layerpar = {"step_size": 0.5, "curvature": 2}
    with refused(ConfigurationError, "curvature", "known keys"):
        convert_to_ode(model)
