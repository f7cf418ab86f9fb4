"""Refined and coarsened models: where each weight comes from, and that the result is an ordinary net of its class."""

from __future__ import annotations

import copy
import itertools
import json
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from hf_layerpar.config import OdeSettings
from hf_layerpar.errors import ConfigurationError, UnsupportedModelError
from hf_layerpar.loading import from_pretrained
from hf_layerpar.ode.convert import convert_to_ode, ode_view
from hf_layerpar.ode.families import find_stacks
from hf_layerpar.ode.refine import Source, sources
from tests import zoo
from tests.ode.helpers import SerialSolver, assert_same, training_step, use_solver, without_cache

FIRST_LAYER_DIFFERS = ("modernbert",)  # its layer 0 has no attn_norm: it can't be repeated, but can be a buffer
GENERATORS = zoo.DECODERS + zoo.ENCODER_DECODERS


def randomized(name: str, layers: int = 4, **changes: Any) -> tuple[Any, zoo.Inputs]:
    """A model with no two layers alike, norms included, in eval mode."""
    model, inputs = zoo.build(name, layers, **changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval(), inputs


# --- where weights come from


def test_sources():
    def places(depth: int, steps: int, **settings: Any) -> list[tuple[int, float]]:
        return [(s.low, s.weight) for s in sources(depth, steps, OdeSettings(**settings))]

    assert places(2, 4) == [(0, 0), (0, 0), (1, 0), (1, 0)]
    assert places(4, 2) == [(0, 0), (2, 0)]
    assert places(2, 3) == [(0, 0), (0, 0), (1, 0)]
    assert places(2, 4, interpolation="linear") == [(0, 0), (0, 0.5), (1, 0), (1, 0.5)]
    assert places(4, 4, buffers=(1, 1)) == [(0, 0), (1, 0), (1, 0), (2, 0), (2, 0), (3, 0)]
    linear = sources(4, 4, OdeSettings(interpolation="linear", buffers=(1, 1)))
    assert linear[2] == Source(1, 2, 0.5)
    assert linear[4] == Source(2, 2, 0.5)  # clamped at the last inner layer, not taken from the buffer
    # a buffer between stays where its layer was, and nothing is blended across it
    assert places(5, 8, buffers=(0, 2, 0)) == [(n, 0) for n in (0, 0, 1, 1, 2, 3, 3, 4, 4)]
    linear = sources(5, 8, OdeSettings(interpolation="linear", buffers=(0, 2, 0)))
    assert [(s.low, s.high, s.weight) for s in linear[2:6]] == [(1, 1, 0), (1, 1, 0.5), (2, 2, 0), (3, 4, 0)]
    assert places(5, 2, buffers=(0, 2, 0)) == [(0, 0), (2, 0), (3, 0)]


def test_a_buffer_between_keeps_its_layer_and_its_step(tmp_path):
    """The settings say where it is now; loaded again, folded and in stock it is the same model."""
    old, inputs = randomized("gpt2")
    new = convert_to_ode(old, step_size=0.5, buffers=(0, 1, 1))
    (stack,) = ode_view(new).stacks
    assert stack.settings.buffers == (0, 2, 1)
    assert list(stack.step_sizes) == [0.5, 0.5, 1, 0.5, 0.5, 1]
    weights = [layer.attn.c_attn.weight for layer in old.transformer.h]
    made = [layer.attn.c_attn.weight for layer in stack.layers]
    assert [next(n for n, w in enumerate(weights) if torch.equal(w, own)) for own in made] == [0, 0, 1, 2, 2, 3]
    new.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["hf_layerpar"]["buffers"] == [0, 2, 1]
    expected = new(**inputs).logits
    torch.testing.assert_close(type(old).from_pretrained(tmp_path).eval()(**inputs).logits, expected)
    torch.testing.assert_close(from_pretrained(tmp_path, buffers=(0, 2, 1)).eval()(**inputs).logits, expected)
    with pytest.raises(ConfigurationError, match=r"buffers=\(0, 1, 1\) contradicts buffers=\(0, 2, 1\)"):
        from_pretrained(tmp_path, buffers=(0, 1, 1))


def unshared(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if "relative_attention_bias" not in key}


@pytest.mark.parametrize("steps", [8, 16, 2])
@pytest.mark.parametrize("name", [name for name in zoo.NAMES if name not in FIRST_LAYER_DIFFERS])
def test_constant_weights(name, steps):
    old, inputs = randomized(name)
    before = copy.deepcopy(old.state_dict())
    new = convert_to_ode(old, num_steps=steps)
    assert new is not old
    assert type(new) is type(old)
    old_stacks, new_stacks = find_stacks(old), find_stacks(new)
    assert list(new_stacks) == list(old_stacks)
    for path, layers in new_stacks.items():
        assert len(layers) == steps
        for n, layer in enumerate(layers):
            source = old_stacks[path][n * 4 // steps]
            theirs, mine = unshared(source.state_dict()), unshared(layer.state_dict())
            assert list(mine) == list(theirs)
            assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    after = new.state_dict()
    ends = [key for key in before if not key.startswith(tuple(old_stacks))]
    assert ends
    assert all(torch.equal(after[key], before[key]) for key in ends)
    # the old model is as it was, and shares nothing with the new one
    assert all(torch.equal(value, before[key]) for key, value in old.state_dict().items())
    assert "forward" not in vars(old)
    old_storage = {parameter.data_ptr() for parameter in old.parameters()}
    assert not any(parameter.data_ptr() in old_storage for parameter in new.parameters())
    # an ordinary net: stock builds it from the config, with the same keys and ties
    stock = type(new)(new.config)
    assert list(stock.state_dict()) == list(after)
    assert [key for key, _ in stock.named_parameters()] == [key for key, _ in new.named_parameters()]
    stock.load_state_dict(after)
    expected = training_step(stock, inputs, True, **without_cache(stock))
    assert_same(training_step(new, inputs, True, **without_cache(new)), expected)
    solver = use_solver(new, SerialSolver())
    assert_same(training_step(new, inputs, True), expected)
    assert solver.runs == [steps] * len(new_stacks)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_linear_weights_between_buffers(name):
    old, inputs = randomized(name)
    new = convert_to_ode(old, step_size=0.5, interpolation="linear", buffers=(1, 1))
    mixes = [(0, 0, 0.0), (1, 1, 0.0), (1, 2, 0.5), (2, 2, 0.0), (2, 2, 0.5), (3, 3, 0.0)]
    for path, layers in find_stacks(new).items():
        states = [unshared(layer.state_dict()) for layer in find_stacks(old)[path]]
        assert len(layers) == len(mixes)
        for layer, (low, high, weight) in zip(layers, mixes, strict=True):
            for key, value in unshared(layer.state_dict()).items():
                torch.testing.assert_close(value, (1 - weight) * states[low][key] + weight * states[high][key])
    assert [list(stack.step_sizes) for stack in ode_view(new).stacks] == [[1, 0.5, 0.5, 0.5, 0.5, 1]] * len(
        ode_view(new).stacks
    )
    assert new(**inputs).loss.isfinite()


def test_stacks_of_different_depth():
    old, _ = zoo.build("bart", encoder_layers=2, decoder_layers=4)
    depths = {stack.path: len(stack.layers) for stack in ode_view(convert_to_ode(old, step_size=0.5)).stacks}
    assert depths == {"model.encoder.layers": 4, "model.decoder.layers": 8}
    new = convert_to_ode(old, num_steps=4)
    assert {len(stack.layers) for stack in ode_view(new).stacks} == {4}
    assert (new.config.encoder_layers, new.config.decoder_layers) == (4, 4)
    assert new.get_parameter("model.decoder.layers.3.fc1.weight").equal(
        old.get_parameter("model.decoder.layers.3.fc1.weight")
    )


# --- what depends on a layer's place


def test_layer_types_are_repeated():
    old, _ = zoo.build("gemma3")
    sliding, full = "sliding_attention", "full_attention"
    assert old.config.layer_types == [sliding, full] * 2
    new = convert_to_ode(old, step_size=0.5)
    assert new.config.layer_types == [sliding, sliding, full, full] * 2
    assert [layer.self_attn.is_sliding for layer in new.model.layers] == [True, True, False, False] * 2
    assert convert_to_ode(old, num_steps=2).config.layer_types == [sliding, sliding]
    assert old.config.layer_types == [sliding, full] * 2


@pytest.mark.parametrize("form", ["euler", "auto"])
@pytest.mark.parametrize("name", GENERATORS)
def test_cache_of_a_refined_model(name, form):
    """The layers have their own places in the KV cache: what it gives is what recomputation gives."""
    old, inputs = randomized(name)
    new = convert_to_ode(old, step_size=0.5, form=form)
    options: dict[str, Any] = zoo.without_labels(inputs) | {
        "min_new_tokens": 6,
        "max_new_tokens": 6,
        "do_sample": False,
    }
    options |= {"output_logits": True, "return_dict_in_generate": True}
    cached, recomputed = (new.generate(**options, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached.sequences, recomputed.sequences)
    for a, b in zip(cached.logits, recomputed.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    coarse = old.generate(**options, use_cache=True)
    assert not torch.allclose(coarse.logits[0], cached.logits[0], atol=1e-3)


def test_relative_bias_of_t5():
    old, _ = randomized("t5")
    new = convert_to_ode(old, step_size=0.25)
    biases = [key for key, _ in new.named_parameters() if "relative_attention_bias" in key]
    assert biases == [
        f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight" for side in ("encoder", "decoder")
    ]
    assert all(torch.equal(new.get_parameter(key), old.get_parameter(key)) for key in biases)


# --- the refined net as an ODE


@pytest.mark.parametrize("solved", [False, True])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_refined_constant_model_is_the_loop_written_out(name, solved):
    """Euler form, h = 1/8: eight steps per old layer with that layer's weights."""
    old, inputs = randomized(name, layers=2)
    ids = inputs["input_ids"]
    new = convert_to_ode(old, step_size=1 / 8, form="euler")
    if solved:
        use_solver(new, SerialSolver())
    body: Any = old.bert if name == "bert" else old.transformer
    layers = body.encoder.layer if name == "bert" else body.h
    x = body.embeddings(ids) if name == "bert" else body.wte(ids) + body.wpe(torch.arange(ids.shape[1]))
    for n in range(16):
        x = x + 1 / 8 * (layers[n // 8](x) - x)
    expected = old.cls(x) if name == "bert" else old.lm_head(body.ln_f(x))
    torch.testing.assert_close(new(ids, **without_cache(new)).logits, expected, rtol=1e-5, atol=1e-5)


def test_refinement_converges_to_the_ode():
    """Halving h halves the distance between successive nets: Euler's method is of first order."""
    old, inputs = randomized("llama", layers=2)
    with torch.no_grad():
        logits = [
            convert_to_ode(old, step_size=1 / k, num_steps=2 * k)(**inputs).logits if k > 1 else old(**inputs).logits
            for k in (1, 2, 4, 8, 16, 32)
        ]
    gaps = [(b - a).norm().item() for a, b in itertools.pairwise(logits)]
    assert all(1.6 < a / b < 2.5 for a, b in itertools.pairwise(gaps[2:])), gaps


# --- what else is carried over


def test_modes_dtypes_and_flags_are_kept():
    old, _ = zoo.build("gpt2", attention="eager")
    old.bfloat16().train()
    old.transformer.wte.requires_grad_(False)
    old.transformer.h[1].mlp.requires_grad_(False)
    old.transformer.ln_f.float()
    old.generation_config.max_new_tokens = 5
    old.activation_checkpointing_enable({"use_reentrant": True})
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    new = convert_to_ode(old, step_size=0.5)
    assert torch.equal(torch.rand(1), expected)  # the random stream is left alone
    assert new.training
    assert new.lm_head.weight is new.transformer.wte.weight
    assert not new.transformer.wte.weight.requires_grad
    frozen = [n for n, block in enumerate(new.transformer.h) if not block.mlp.c_fc.weight.requires_grad]
    assert frozen == [2, 3]
    assert new.transformer.h[2].attn.c_attn.weight.requires_grad
    assert new.transformer.h[7].mlp.c_fc.weight.dtype == torch.bfloat16
    assert new.transformer.ln_f.weight.dtype == torch.float32
    assert new.generation_config.max_new_tokens == 5
    assert new.generation_config is not old.generation_config
    assert new.config._attn_implementation == "eager"
    assert new.is_activation_checkpointing
    assert all(block._gradient_checkpointing_func.keywords == {"use_reentrant": True} for block in new.transformer.h)
    assert convert_to_ode(zoo.build("gpt2")[0].eval(), step_size=0.5).training is False


def test_untied_weights_stay_untied():
    old, _ = zoo.build("llama", tie_word_embeddings=False)
    new = convert_to_ode(old, step_size=0.5)
    assert new.lm_head.weight is not new.model.embed_tokens.weight
    assert torch.equal(new.lm_head.weight, old.lm_head.weight)
    # from_pretrained unties weights that differ in the checkpoint, whatever the config says
    old, _ = zoo.build("gpt2")
    old.lm_head.weight = nn.Parameter(2 * old.lm_head.weight.detach())
    with refused("lm_head.weight", "refine the model before"):
        convert_to_ode(old, step_size=0.5)
    del old.all_tied_weights_keys["lm_head.weight"]
    new = convert_to_ode(old, step_size=0.5)
    assert torch.equal(new.lm_head.weight, 2 * new.transformer.wte.weight)


# --- refusals


def refused(*words: str) -> Any:
    return pytest.raises(UnsupportedModelError, match="(?s)" + ".*".join(words))


@pytest.mark.parametrize("name", FIRST_LAYER_DIFFERS)
def test_first_layer_with_a_part_less(name):
    old, inputs = zoo.build(name)
    with refused("new layer 1 of model.layers", "attn_norm", "'LayerNorm'", "source layer 0", "'Identity'", "buffers"):
        convert_to_ode(old, step_size=0.5)
    assert convert_to_ode(old, step_size=0.5, buffers=(1, 0))(**inputs).loss.isfinite()


def test_layers_that_compute_by_their_place():
    old, _ = zoo.build("gpt2", scale_attn_by_inverse_layer_idx=True)
    with refused("new layer 1 of transformer.h", "attn.scaling", "source layer 0"):
        convert_to_ode(old, step_size=0.5)


def test_models_changed_by_hand():
    old, _ = zoo.build("bert")
    old.bert.encoder.layer[1].output.dropout.p = 0.5
    with refused("output.dropout.p = 0.1", "source layer 1 has 0.5", "config"):
        convert_to_ode(old, step_size=0.5)
    old, _ = zoo.build("bert")
    old.adapter = nn.Linear(2, 2)
    with refused("adapter.bias", "adapter.weight", "before adding modules"):
        convert_to_ode(old, step_size=0.5)
    old, _ = zoo.build("bert")
    old.bert.embeddings.word_embeddings = nn.Embedding(7, 32)
    with refused("word_embeddings", r"\(99, 32\)", r"\(7, 32\)", "by hand"):
        convert_to_ode(old, step_size=0.5)
    old, _ = zoo.build("bert")
    old.bert.encoder.layer = old.bert.encoder.layer[:3]
    with refused("config.num_hidden_layers=4 is not the 3 layers of bert.encoder.layer", "num_steps"):
        convert_to_ode(old, num_steps=6)
    assert "forward" not in vars(old)


def test_adapters_and_dispatched_models():
    old, _ = zoo.build("llama")
    old.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    with refused("PEFT adapters", "refine the model first"):
        convert_to_ode(old, step_size=0.5)
    assert convert_to_ode(old) is old
    old, _ = zoo.build("llama")
    old.hf_device_map = {"model.embed_tokens": "cpu", "model.layers": "disk"}
    with refused("dispatched", "cpu", "disk", "one device"):
        convert_to_ode(old, step_size=0.5)
