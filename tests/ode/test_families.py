"""22 families: at step size 1 a converted model is the stock model, bit for bit, solved in line or by a solver."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from hf_layerpar.ode.convert import convert_to_ode, ode_view
from hf_layerpar.ode.families import find_stacks
from hf_layerpar.ode.stack import is_checkpointed
from tests import zoo
from tests.ode.helpers import SerialSolver, assert_same, same_tensors, training_step, use_solver, without_cache

CASES = [
    (name, attention)
    for name in zoo.NAMES
    for attention in ("eager", "sdpa")
    if not (attention == "sdpa" and name in zoo.EAGER_ONLY)
]
IN_EVERY_VERSION = [(name, "sdpa") for name in ("bert", "gpt2", "llama", "gemma3", "vit", "modernbert")]
"""Others draw for layerdrop between the layers in old versions of transformers, also where it is 0."""
GENERATORS = zoo.DECODERS + zoo.ENCODER_DECODERS
STOCK_FAILS_UNDER_AUTOCAST = ("deberta",)  # fills a bfloat16 mask with float32's lowest number
STOCK_FAILS_REENTRANT = ("deberta_v2",)  # its normed rel_embeddings are a keyword argument with a gradient


@pytest.mark.parametrize("name", zoo.EAGER_ONLY)
def test_stock_refuses_sdpa_too(name):
    with pytest.raises(ValueError, match="does not support an attention implementation through"):
        zoo.build(name, attention="sdpa")


@pytest.mark.parametrize(
    ("name", "attention"),
    [pytest.param(*case, marks=pytest.mark.compat) if case in IN_EVERY_VERSION else case for case in CASES],
)
def test_step_size_one_is_the_stock_model(name, attention):
    stock, inputs = zoo.build(name, attention=attention)
    ours = copy.deepcopy(stock)
    keys, model_class = list(stock.state_dict()), type(stock)
    assert convert_to_ode(ours) is ours
    assert type(ours) is model_class
    assert list(ours.state_dict()) == keys
    stacks = ode_view(ours).stacks
    assert [stack.path for stack in stacks] == list(find_stacks(stock))
    assert all(len(stack.layers) == 4 for stack in stacks)
    for train in (False, True):
        assert_same(training_step(ours, inputs, train), training_step(stock, inputs, train))
    solver = use_solver(ours, SerialSolver())
    for train in (False, True):
        options = without_cache(stock)
        assert_same(training_step(ours, inputs, train), training_step(stock, inputs, train, **options))
    assert solver.runs == [4] * len(stacks) * 2


@pytest.mark.parametrize("name", zoo.NAMES)
def test_dropout_is_on(name):
    model, inputs = zoo.build(name)
    model.train()
    torch.manual_seed(0)
    first = model(**inputs).loss
    assert not torch.equal(first, model(**inputs).loss)


@pytest.mark.parametrize("half", ["autocast", "bfloat16"])
@pytest.mark.parametrize("name", zoo.NAMES)
def test_half_precision(name, half):
    stock, inputs = zoo.build(name)
    if half == "bfloat16":
        stock = stock.bfloat16()
        inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    ours = convert_to_ode(copy.deepcopy(stock))
    use_solver(ours, SerialSolver())
    if half == "autocast" and name in STOCK_FAILS_UNDER_AUTOCAST:
        for model in (stock, ours):
            with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="without overflow"):
                model(**inputs)
        return
    with torch.autocast("cpu", torch.bfloat16, enabled=half == "autocast"):
        expected = training_step(stock, inputs, True, **without_cache(stock))
    with torch.autocast("cpu", torch.bfloat16, enabled=half == "autocast"):
        assert_same(training_step(ours, inputs, True), expected)


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("solved", [False, True])
@pytest.mark.parametrize(
    "how", [{"use_cache": True}, {"use_cache": False}, {"num_beams": 3}], ids=["cache", "no_cache", "beams"]
)
def test_generate(name, solved, how):
    stock, inputs = zoo.build(name)
    stock.eval()
    ours = convert_to_ode(copy.deepcopy(stock))
    solver = SerialSolver()
    if solved:
        use_solver(ours, solver)
    options: dict[str, Any] = (
        zoo.without_labels(inputs) | how | {"min_new_tokens": 6, "max_new_tokens": 8, "do_sample": False}
    )
    expected = stock.generate(**options)
    assert expected.shape[1] > 6
    assert torch.equal(ours.generate(**options), expected)
    # with a KV cache only the encoder, which has none, goes to the solver
    encoder_runs = int(name in zoo.ENCODER_DECODERS)
    if solved and how.get("use_cache") is False:
        assert len(solver.runs) > encoder_runs + 1
    else:
        assert len(solver.runs) == encoder_runs * solved


@pytest.mark.parametrize("solved", [False, True])
@pytest.mark.parametrize("wanted", ["hidden_states", "attentions"])
@pytest.mark.parametrize("name", zoo.NAMES)
def test_per_layer_outputs(name, wanted, solved):
    stock, inputs = zoo.build(name, attention="eager")
    stock.eval()
    ours = convert_to_ode(copy.deepcopy(stock))
    solver = SerialSolver()
    if solved:
        use_solver(ours, solver)
    with torch.no_grad():
        flags: dict[str, Any] = without_cache(stock) | {f"output_{wanted}": True}
        by_argument = stock(**inputs, **flags), ours(**inputs, **flags)
        for model in (stock, ours):
            for module in model.modules():
                if hasattr(module, "config"):
                    setattr(module.config, f"output_{wanted}", True)
        options = {} if solved else without_cache(stock)
        by_config = stock(**inputs, **without_cache(stock)), ours(**inputs, **options)
    assert solver.runs == []
    for theirs, mine in (by_argument, by_config):
        names = [name for name in theirs if name.endswith(wanted)]
        assert names
        assert any(len(theirs[key]) >= 4 for key in names)
        for key in names:
            assert same_tensors(mine[key], theirs[key])


class CountingCheckpoint:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return checkpoint(function, *args, **kwargs)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", zoo.NAMES)
def test_gradient_checkpointing(name, reentrant):
    stock, inputs = zoo.build(name)
    ours = convert_to_ode(copy.deepcopy(stock))
    stacks = ode_view(ours).stacks
    layers = [layer for stack in stacks for layer in stack.layers]
    assert not any(map(is_checkpointed, layers))
    plain = training_step(stock, inputs, True, **without_cache(stock))
    for model in (stock, ours):
        model.train()
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
    counter = CountingCheckpoint()
    for stack in stacks:
        for layer in stack.layers:
            layer._gradient_checkpointing_func = partial(counter, use_reentrant=reentrant)
    if reentrant and name in STOCK_FAILS_REENTRANT:
        for model in (stock, ours):
            with pytest.raises(RuntimeError, match="backward through the graph a second time"):
                training_step(model, inputs, True)
    else:
        expected = training_step(stock, inputs, True, **without_cache(stock))
        assert_same(training_step(ours, inputs, True, **without_cache(stock)), expected)
    assert counter.calls == 4 * len(stacks)
    solver = use_solver(ours, SerialSolver())
    assert all(map(is_checkpointed, layers))
    assert_same(training_step(ours, inputs, True), plain)
    assert counter.calls == 4 * len(stacks)  # none more: a solver recomputes by itself
    assert solver.runs == [4] * len(stacks)
    ours.eval()
    assert not any(map(is_checkpointed, layers))
