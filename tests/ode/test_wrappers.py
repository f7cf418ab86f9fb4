"""Copies and wrappers of converted models: deepcopy and pickle, PEFT, torch.compile, accelerate."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import peft
import pytest
import torch
from accelerate import Accelerator
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.state import AcceleratorState
from torch import nn

from hf_layerpar.errors import UnsupportedModelError
from hf_layerpar.ode.convert import convert_to_ode, ode_view
from tests import zoo
from tests.ode.helpers import SerialSolver, assert_same, refused, training_step, use_solver, without_cache


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
