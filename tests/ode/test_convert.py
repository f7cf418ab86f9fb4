"""Conversion: what it refuses, both forms against written-out loops, copies, wrappers, restored settings."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from accelerate import Accelerator
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_layerpar import from_pretrained, parallelize
from hf_layerpar.config import CONFIG_KEY, OdeSettings
from hf_layerpar.errors import ConfigurationError, UnsupportedModelError
from hf_layerpar.ode.convert import convert_to_ode, ode_view
from tests import zoo
from tests.multiproc import run_ranks
from tests.ode.helpers import SerialSolver, assert_same, training_step, use_solver, without_cache

# --- refusals


def refused(error: type[Exception], *words: str) -> Any:
    """`pytest.raises` for a message that holds all the words, in this order."""
    return pytest.raises(error, match="(?s)" + ".*".join(words))


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


# --- misbehaving loops, with a solver


def solved_llama() -> tuple[Any, zoo.Inputs, SerialSolver]:
    model, inputs = zoo.build("llama")
    ours = convert_to_ode(model)
    return ours, inputs, use_solver(ours, SerialSolver())


def test_exception_midway_leaves_nothing_behind():
    model, inputs, solver = solved_llama()
    expected = training_step(model, inputs, True)

    def fail(*_: Any) -> None:
        raise KeyError("midway")

    hook = model.model.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="midway"):
        model(**inputs, output_hidden_states=False)
    hook.remove()
    (stack,) = ode_view(model).stacks
    assert stack.serial_reason is None
    stack.check_complete()
    assert_same(training_step(model, inputs, True), expected)
    hook = model.model.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="midway"):
        model(**inputs, output_hidden_states=True)
    hook.remove()
    assert stack.serial_reason is None
    assert_same(training_step(model, inputs, True), expected)
    assert solver.runs == [4] * 4


def test_exception_in_a_loop_called_directly():
    """BertEncoder isn't a PreTrainedModel, so nothing of ours sees its forward end."""
    model, inputs = zoo.build("bert")
    stock = copy.deepcopy(model)
    use_solver(convert_to_ode(model), SerialSolver())

    def fail(*_: Any) -> None:
        raise KeyError("midway")

    hook = model.bert.encoder.layer[2].register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="midway"):
        model.bert.encoder(torch.zeros(1, 2, 32))
    hook.remove()
    assert_same(training_step(model, inputs, True), training_step(stock, inputs, True))


def test_layers_left_out_or_repeated():
    model, inputs, solver = solved_llama()
    model.config.num_hidden_layers = 3
    with refused(UnsupportedModelError, "stops there", "num_hidden_layers"):
        model(**inputs)
    model.config.num_hidden_layers = 4
    model.model.layers[2], model.model.layers[1] = model.model.layers[1], model.model.layers[2]
    with refused(UnsupportedModelError, r"model.layers.2 \(LlamaDecoderLayer\)", "layer 1 was expected", "in order"):
        model(**inputs)
    model.model.layers[2], model.model.layers[1] = model.model.layers[1], model.model.layers[2]
    assert model(**inputs).loss.isfinite()
    assert solver.runs == [4]


def test_what_a_sharded_stack_refuses():
    model, inputs, solver = solved_llama()
    for stack in ode_view(model).stacks:
        stack.foreign = frozenset({3})
    for option in ("use_cache", "output_hidden_states", "output_attentions"):
        with refused(UnsupportedModelError, option, "model.layers", f"{option}=False"):
            model.set_attn_implementation("eager")
            model(**inputs, **{option: True})
    assert solver.runs == []
    assert model(**inputs).loss.isfinite()
    deberta, inputs = zoo.build("deberta")  # gathers its hidden states itself
    use_solver(convert_to_ode(deberta), solver)
    ode_view(deberta).stacks[0].foreign = frozenset({3})
    with refused(UnsupportedModelError, "output_hidden_states", "deberta.encoder.layer"):
        deberta(**inputs, output_hidden_states=True)
    assert solver.runs == [4]


def test_cache_is_off_only_where_it_was_not_asked_for():
    model, inputs, solver = solved_llama()
    ids = inputs["input_ids"]
    assert model(ids).past_key_values is None
    assert model.model(ids).past_key_values is None
    assert model(ids, use_cache=None).past_key_values is None
    assert solver.runs == [4] * 3
    cache = model(ids, use_cache=True).past_key_values
    assert cache.get_seq_length() == 12
    assert model(ids[:, :1], past_key_values=cache).past_key_values.get_seq_length() == 13
    assert model(ids, None, None, None, None, None, True).past_key_values is not None
    assert solver.runs == [4] * 3
    assert model.config.use_cache is True


class OddLayer(GradientCheckpointingLayer):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, scale: float | Tensor = 1.0, hidden_states: Tensor | None = None) -> tuple[Tensor, str]:
        state = scale if hidden_states is None else hidden_states
        assert isinstance(state, Tensor)
        return self.linear(state), "aside"


class NamedLayer(GradientCheckpointingLayer):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor, shift: Tensor) -> Tensor:
        return self.linear(hidden_states) + shift


class ToyModel(hf.PreTrainedModel):
    """A loop that a transformers model could have: `call` evaluates one layer."""

    config_class = hf.PreTrainedConfig

    def __init__(self, layer_class: Any, depth: int, call: Any) -> None:
        super().__init__(hf.PreTrainedConfig())
        torch.manual_seed(0)
        self.layers = nn.ModuleList([layer_class() for _ in range(depth)])
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.call(layer, x)
        return x


def test_state_given_by_name():
    shift, x = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    model = ToyModel(NamedLayer, 3, lambda layer, x: layer(shift=shift, hidden_states=x))
    plain = copy.deepcopy(model)
    expected = x
    for layer in plain.layers:
        expected = expected + 0.5 * (layer(expected, shift) - expected)
    ours = convert_to_ode(model, step_size=0.5, num_steps=3)
    assert torch.equal(ours(x), expected)
    solver = use_solver(ours, SerialSolver())
    assert torch.equal(ours(x), expected)
    assert solver.runs == [3]


def test_layers_that_return_a_tuple():
    x = torch.randn(2, 3, 8)
    model = ToyModel(OddLayer, 2, lambda layer, x: layer(x)[0])
    plain = copy.deepcopy(model)
    expected = x
    for layer in plain.layers:
        expected = expected + 0.5 * (layer(expected)[0] - expected)
    ours = convert_to_ode(model, step_size=0.5, num_steps=2)
    assert torch.equal(ours(x), expected)
    solver = use_solver(ours, SerialSolver())
    assert torch.equal(ours(x), expected)
    assert solver.runs == [2]


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


def packed_rows() -> list[float]:
    """Losses of two rows one behind the other, told apart by their positions: of stock without and with its KV cache
    (which is its default), of a step, and of calls with gradients and without."""
    model, _ = zoo.build("llama")
    stock, ids = copy.deepcopy(model).eval(), zoo.tokens(2, 6).view(1, -1)
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(6).repeat(2)[None]}
    handle = parallelize(convert_to_ode(model).eval())
    found = [stock(**batch, use_cache=False).loss, stock(**batch).loss, handle.train_step(batch), model(**batch).loss]
    with torch.no_grad():
        return [float(loss) for loss in (*found, model(**batch).loss)]


def test_packed_rows_in_a_loop_of_ones_own():
    """With its cache stock makes tokens see the row before."""
    for right, wrong, step, call, without_gradients in run_ranks(packed_rows, 2):
        assert wrong != pytest.approx(right, rel=1e-3)
        assert [step, call, without_gradients] == pytest.approx([right] * 3, rel=1e-6)
    right, _, step, *_ = packed_rows()
    assert step == pytest.approx(right, rel=1e-6)


# --- copies and wrappers


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("name", ["bert", "t5"])
def test_copies_are_independent(name, how):
    model, inputs = zoo.build(name)
    ours = convert_to_ode(model, step_size=0.5, num_steps=4)
    before = training_step(ours, inputs, True, **without_cache(ours))
    twin = how(ours)
    assert ode_view(twin) is not ode_view(ours)
    mine = {id(module) for module in ours.modules()}
    for stack in ode_view(twin).stacks:
        assert stack.layers == list(twin.get_submodule(stack.path))
        assert not any(id(layer) in mine for layer in stack.layers)
    solver = use_solver(twin, SerialSolver())
    assert_same(training_step(twin, inputs, True), before)
    assert len(solver.runs) == len(ode_view(twin).stacks)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert_same(training_step(ours, inputs, True, **without_cache(ours)), before)
    assert len(solver.runs) == len(ode_view(twin).stacks)


TARGETS = {"llama": ["q_proj", "v_proj"], "bert": ["query", "value"], "t5": ["q", "v"], "gpt2": ["c_attn"]}


def with_adapters(model: Any, name: str) -> Any:
    torch.manual_seed(3)
    config = peft.LoraConfig(target_modules=TARGETS[name], lora_dropout=0.1, init_lora_weights=False)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("first", ["peft", "convert"])
@pytest.mark.parametrize("name", TARGETS)
def test_peft(name, first):
    base, inputs = zoo.build(name)
    stock = with_adapters(copy.deepcopy(base), name)
    if first == "peft":
        ours = with_adapters(base, name)
        assert convert_to_ode(ours) is ours
    else:
        ours = with_adapters(convert_to_ode(base), name)
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert_same(training_step(ours, inputs, True), training_step(stock, inputs, True))
    solver = use_solver(ours, SerialSolver())
    expected = training_step(stock, inputs, True, **({} if name == "bert" else {"use_cache": False}))
    # PEFT calls the model's forward past its hooks; the cache must be off all the same
    assert_same(training_step(ours, inputs, True), expected)
    assert solver.runs == [4] * len(ode_view(ours).stacks)


def test_depth_of_a_peft_model_is_fixed():
    model = with_adapters(zoo.build("llama")[0], "llama")
    with refused(UnsupportedModelError, "adapters", "then wrap"):
        convert_to_ode(model, step_size=0.5)


def test_view_through_wrappers():
    model = convert_to_ode(zoo.build("bert")[0])
    view = ode_view(model)
    assert ode_view(nn.ModuleDict({"module": model})) is view
    assert ode_view(torch.compile(model)) is view  # pyright: ignore[reportArgumentType]
    assert ode_view(with_adapters(model, "bert")) is view


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_signatures_stay(name):
    stock, _ = zoo.build(name)
    ours = convert_to_ode(copy.deepcopy(stock))
    for (path, module), theirs in zip(ours.named_modules(), stock.modules(), strict=True):
        assert inspect.signature(module.forward) == inspect.signature(theirs.forward), path


@pytest.mark.parametrize("first", ["hooks", "convert"])
def test_accelerate_device_hooks(first):
    stock, inputs = zoo.build("llama")
    ours = copy.deepcopy(stock)

    def add_hooks() -> None:
        for module in list(ours.modules()):
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))

    if first == "hooks":
        add_hooks()
    convert_to_ode(ours)
    if first == "convert":
        add_hooks()
    twin = copy.deepcopy(ours)
    expected = training_step(stock, inputs, True, use_cache=False)
    for model in (ours, twin):
        solver = use_solver(model, SerialSolver())
        assert_same(training_step(model, inputs, True), expected)
        assert solver.runs == [4]


def test_accelerator_mixed_precision():
    stock, inputs = zoo.build("llama")
    ours = convert_to_ode(copy.deepcopy(stock))
    solver = use_solver(ours, SerialSolver())
    AcceleratorState._reset_state(reset_partial_state=True)  # another test may have settled the precision
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    signature = inspect.signature(stock.forward)
    expected = training_step(accelerator.prepare_model(stock), inputs, True, use_cache=False)
    ours = accelerator.prepare_model(ours)
    assert_same(training_step(ours, inputs, True), expected)
    assert solver.runs == [4]
    assert inspect.signature(ours.forward) == signature
    twin = copy.deepcopy(ours)
    twin_solver = use_solver(twin, SerialSolver())
    with torch.no_grad():
        ours.lm_head.weight.zero_()
    assert_same(training_step(twin, inputs, True), expected)
    assert (solver.runs, twin_solver.runs) == ([4], [4])
    plain = accelerator.unwrap_model(ours, keep_fp32_wrapper=False)
    assert inspect.signature(plain.forward) == signature
    assert plain(**inputs).past_key_values is None
    assert solver.runs == [4, 4]


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
