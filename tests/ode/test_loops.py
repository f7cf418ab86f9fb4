"""The model's own loop over its layers, with a solver: errors midway, layers left out, caches, what layers return."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_layerpar import parallelize
from hf_layerpar.errors import UnsupportedModelError
from hf_layerpar.ode.convert import convert_to_ode, ode_view
from tests import zoo
from tests.multiproc import run_ranks
from tests.ode.helpers import SerialSolver, assert_same, refused, training_step, use_solver


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
