"""Layers evaluated together on one device, against the same steps evaluating them one at a time."""

import copy
import dataclasses
import warnings
from typing import ClassVar
from unittest.mock import patch

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from hf_layerpar import convert_to_ode, parallelize
from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.errors import ConfigurationError
from hf_layerpar.run.stackable import OneDevice
from tests.multiproc import run_ranks
from tests.problems import F64, Block, Solved, assert_same, blocks, gradients_of, relative, serial_results, state
from tests.zoo import build

OPERATORS = ("rediscretize", "aggregate", "identity")


def mgrit(**settings) -> LayerParallelConfig:
    return LayerParallelConfig(strategy="mgrit", **{"coarsening": 3} | settings)


def both(layers, config, x=None, side=None, **more) -> tuple[list[Solved], list[str]]:
    """A step one at a time and one stacked, and the warnings."""
    x = state() if x is None else x
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [
            gradients_of(dataclasses.replace(config, stacked=s), layers, x, side, seed=3, device=OneDevice(), **more)
            for s in (False, True)
        ]
    assert found[0].stacked == [False, False]
    return found, [str(w.message) for w in caught]


def assert_equal(found, bound=1e-10):
    assert_same(found[1].results, found[0].results, bound)
    assert found[1].loss == pytest.approx(found[0].loss, rel=max(bound, 1e-12))


def assert_stacked(found, bound=1e-10):
    (plain, stacked), said = found
    assert_equal((plain, stacked), bound)
    assert stacked.stacked == [True, True]
    assert not said


def assert_fallback(found, message):
    (plain, other), said = found
    assert other.stacked == [False, False]
    assert len(said) == 1
    assert said[0].startswith("stacked=True, but layers are evaluated one at a time: ")
    assert message in said[0]
    assert_same(other.results, plain.results)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    ("num_layers", "settings", "buffers"),
    [
        (9, {}, (0, 0)),
        (10, {"forward_iterations": 2}, (0, 0)),  # a short last interval
        (13, {"forward_iterations": 2, "backward_iterations": 2, "relaxation": "FCF"}, (1, 2)),
        (12, {"coarsening": (3, 2), "forward_iterations": 2, "backward_iterations": 2}, (0, 0)),
        (9, {"micro_batches": 2, "forward_iterations": 2}, (1, 1)),
        (8, {"forward_iterations": 3, "coarsening": 2}, (0, 0)),
        (13, {"forward_iterations": 2, "backward_iterations": 3, "acceleration": "krylov"}, (0, 4, 1)),
    ],
)
def test_equal_to_one_at_a_time(operator, num_layers, settings, buffers):
    assert_stacked(both(blocks(num_layers), mgrit(coarse_operator=operator, **settings), buffers=buffers))


def test_exact_forward_with_stacked_adjoint():
    found, said = both(blocks(9), mgrit(forward_iterations=0, coarse_operator="aggregate"))
    assert torch.equal(found[0].results["y"], found[1].results["y"])
    assert_equal(found)
    assert found[1].stacked == [False, True]
    assert not said


@pytest.mark.parametrize("operator", OPERATORS)
def test_enough_iterations_are_serial(operator):
    layers, x = blocks(9), state()
    config = mgrit(coarse_operator=operator, forward_iterations=3, backward_iterations=3, stacked=True)
    solved = gradients_of(config, layers, x, device=OneDevice())
    assert solved.stacked == [True, True]
    assert_same(solved.results, serial_results(layers, x), 1e-12)


ODES = ({}, {"step_size": 0.5}, {"step_size": 0.25, "form": "split", "buffers": (1, 2)})


def model_run(name, config, ode):
    model, inputs = build(name, layers=6)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    model = convert_to_ode(model.double(), **ode).eval()
    handle = parallelize(model, config)
    loss = handle.train_step(inputs)
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return loss, grads, handle.report().stacked


@pytest.mark.parametrize("ode", ODES, ids=str)
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit", "gemma3"])
def test_models(name, ode):
    """Gemma alternates two kinds of layers: intervals of 2 hold one of each."""
    if ode.get("form") == "split" and name == "bert":
        ode = {"step_size": 0.25, "buffers": (1, 2)}  # post-LN
    for operator, iterations in (("rediscretize", 1), ("aggregate", 2), ("identity", 2)):
        config = mgrit(coarse_operator=operator, forward_iterations=iterations, coarsening=2)
        loss, grads, plain = model_run(name, config, ode)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            other, found, stacked = model_run(name, dataclasses.replace(config, stacked=True), ode)
        assert not plain
        assert stacked
        assert relative(other, loss) < 1e-10
        assert list(found) == list(grads)
        norm = sum(float(g.norm()) ** 2 for g in grads.values()) ** 0.5
        assert max(float((found[n] - g).norm()) for n, g in grads.items()) < 1e-10 * norm


def test_micro_batches_of_a_model():
    """Which share the stacked weights; masks of theirs are arguments of their own."""
    found = []
    for stacked in (False, True):
        model, inputs = build("bert", layers=6)
        config = mgrit(coarse_operator="aggregate", micro_batches=2, coarsening=2, stacked=stacked)
        handle = parallelize(convert_to_ode(model.double().eval()), config)
        handle.train_step(inputs)
        assert handle.report().stacked is stacked
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    norm = sum(float(g.norm()) ** 2 for g in found[0].values()) ** 0.5
    assert max(float((found[1][n] - g).norm()) for n, g in found[0].items()) < 1e-10 * norm


def test_weights_in_stacks_train_and_save(tmp_path):
    """They are laid into stacks once; an optimizer, a cast and a checkpoint notice nothing."""
    losses, weights = [], []
    for stacked in (False, True):
        model, inputs = build("gpt2", layers=6)
        model = convert_to_ode(model.double().eval())
        handle = parallelize(model, mgrit(coarse_operator="aggregate", coarsening=2, stacked=stacked))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses.append([])
        for _ in range(4):
            losses[-1].append(float(handle.train_step(inputs)))
            optimizer.step()
            optimizer.zero_grad()
        weights.append(model.state_dict())
        if stacked:
            with patch.object(torch, "stack", side_effect=torch.stack) as stack:
                handle.train_step(inputs)
            parameters = {tuple(p.shape) for p in model.transformer.h[0].parameters()}
            assert not parameters & {tuple(call.args[0][0].shape) for call in stack.call_args_list}
            model.zero_grad()
            model.save_pretrained(tmp_path)
            again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
            assert_same(again.state_dict(), model.state_dict())
            model.float()
            handle.train_step(inputs)
            assert handle.report().stacked
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert max(relative(weights[1][name], t) for name, t in weights[0].items()) < 1e-6


def test_side_arguments_shared_and_of_their_own():
    layers = blocks(9)
    shared = state(batch=1, seed=9).detach()
    own = [state(seed=n).detach() for n in range(9)]
    for side in (shared, own):
        for micro_batches in (1, 2):
            assert_stacked(both(layers, mgrit(micro_batches=micro_batches), side=side))


def test_frozen_layers():
    layers = blocks(9)
    for n in (0, 4, 7):
        layers[n].requires_grad_(False)
    layers[3].inner.weight.requires_grad_(False)
    assert_stacked(both(layers, mgrit(coarse_operator="aggregate")))


def test_gradients_are_added_to_what_is_there():
    layers, x, device = blocks(9), state(), OneDevice()
    config = mgrit(coarse_operator="aggregate", stacked=True)
    once = {k: t.clone() for k, t in gradients_of(config, layers, x, device=device).results.items()}
    twice = gradients_of(config, layers, x, device=device, added=True).results
    assert_same(twice, {name: t if name == "y" else t + t for name, t in once.items()}, 1e-14)


@pytest.mark.parametrize("settings", [{"forward_iterations": 2}, {"micro_batches": 2, "coarse_operator": "identity"}])
def test_recomputation(settings):
    layers, config = blocks(9), mgrit(**settings)
    assert_stacked(both(layers, config, recompute=True))
    kept, recomputed = (both(layers, config, recompute=r)[0][1] for r in (False, True))
    assert_equal((kept, recomputed))


def test_a_step_needs_few_evaluations():
    """Stacked, a wave of n layers is one call of the layer's code; a kept graph isn't evaluated again."""
    calls = []

    class Counted(Block):
        def forward(self, x):
            calls.append(1)
            return super().forward(x)

    torch.manual_seed(0)
    layers, x, device = nn.ModuleList(Counted(6, 0.25) for _ in range(16)).to(F64), state(), OneDevice()
    config = mgrit(coarse_operator="aggregate", coarsening=4, stacked=True)
    gradients_of(config, layers, x, device=device)  # with the trial
    calls.clear()
    gradients_of(config, layers, x, device=device)
    # coarse steps, places, and coarse vjps, which evaluate other sets of layers than the last relaxation
    assert len(calls) == 3 + 4 + 3


def test_gradients_are_handed_over_not_copied():
    """As many copies between layers and `.grad` as there are waves, not layers."""
    layers, x, device = blocks(12), state().detach(), OneDevice()
    config = mgrit(coarse_operator="identity", stacked=True)
    gradients_of(config, layers, x, device=device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        gradients_of(config, layers, x, device=device)
    assert sum(e.count for e in profile.key_averages() if e.key == "aten::clone") <= 3 * 4
    assert all(p.grad.is_contiguous() for p in layers.parameters())


def test_autocast_and_bfloat16():
    """Both round alike; a matrix product and its bias are rounded once or twice."""
    x = state().detach().float().requires_grad_()
    layers = blocks(9).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = both(layers, mgrit(), x)
    assert_stacked(found, 0.03)
    results = [solved.results for solved in found[0]]
    assert {k: t.dtype for k, t in results[1].items()} == {k: t.dtype for k, t in results[0].items()}
    full = gradients_of(mgrit(), layers, x).results
    errors = [max(relative(tensor, full[name]) for name, tensor in r.items()) for r in results]
    assert errors[0] > 1e-4  # it is on
    assert errors[1] < 2 * errors[0]
    assert_stacked(both(blocks(9).bfloat16(), mgrit(), x.detach().bfloat16().requires_grad_()), 0.03)


# ---- falling back
def test_dropout_falls_back_in_training_only():
    layers = blocks(9, dropout=0.2)
    assert_fallback(both(layers.train(), mgrit()), "(Block) draw random numbers (dropout in training mode)")
    assert_stacked(both(layers.eval(), mgrit()))
    assert_stacked(both(blocks(9).train(), mgrit()))  # of probability 0


def test_one_device_follows_the_mode_and_warns_once():
    layers, x, device = blocks(9, dropout=0.2), state(), OneDevice()
    for mode, expected, warned in ((True, False, 1), (False, True, 0), (True, False, 0)):
        layers.train(mode)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            solved = gradients_of(mgrit(stacked=True), layers, x, seed=0, device=device)
        assert solved.stacked == [expected, expected]
        assert len(caught) == warned


def test_side_gradients_fall_back():
    found = both(blocks(9), mgrit(), side=state(batch=1, seed=9))
    assert_fallback(found, "layer arguments require grad")


def test_a_model_whose_layers_can_not_be_stacked_warns_and_trains():
    """T5's position biases are sides."""
    found = []
    for stacked in (False, True):
        model, inputs = build("t5")
        handle = parallelize(convert_to_ode(model.double().eval()), mgrit(coarsening=2, stacked=stacked))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            handle.train_step(inputs)
            handle.train_step(inputs)
        said = [str(w.message) for w in caught if "stacked=True" in str(w.message)]
        assert len(said) == stacked
        assert not handle.report().stacked
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert_same(found[1], found[0])


def test_unlike_layers_fall_back():
    def changed(change, every=range(1, 9)):
        layers = blocks(9)
        for n in every:
            change(layers[n], n)
        return layers

    def wider(layer, n):
        layer.inner, layer.outer = nn.Linear(6, 6 + n, dtype=F64), nn.Linear(6 + n, 6, dtype=F64)

    def other_step(layer, n):
        layer.h = 0.25 / (1 + n)

    def hooked(layer, n):
        layer.inner.register_forward_hook(lambda module, args, output: output * (1 + n / 10))

    for change, message in (
        (wider, "layer 1 is unlike layer 0"),
        (other_step, "h differs"),
        (hooked, "inner._forward_hooks differs"),
    ):
        assert_fallback(both(changed(change), mgrit()), message)


def test_unlike_layers_are_left_alone_among_others():
    layers = blocks(9)
    layers[4] = nn.Sequential(Block(6, 0.5).to(F64))
    assert_stacked(both(layers, mgrit(coarse_operator="aggregate", forward_iterations=2)))


class Numbered(Block):
    """Knows its place in the stack, as HuggingFace's layers do."""

    def __init__(self, place: int, used: bool) -> None:
        super().__init__(6, 0.25)
        self.layer_idx, self.used = place, used

    def forward(self, x):
        return super().forward(x) / (1 + self.layer_idx / 100 if self.used else 1)


@pytest.mark.parametrize("used", [False, True])
def test_a_layers_number_may_differ_but_not_matter(used):
    torch.manual_seed(0)
    layers = nn.ModuleList(Numbered(n, used) for n in range(9)).to(F64)
    found = both(layers, mgrit())
    if used:
        assert_fallback(found, "no attribute 'layer_idx'")
    else:
        assert_stacked(found)
    assert [layer.layer_idx for layer in layers] == list(range(9))


class Peeking(Block):
    """Looks at its state's values, which vmap can't batch."""

    def forward(self, x):
        return super().forward(x) if x.sum().item() > -1e9 else x


class Unequal(Block):
    """Gives the layers other functions behind its attributes' back."""

    functions: ClassVar[dict[int, float]] = {}

    def forward(self, x):
        return super().forward(x) * self.functions.get(id(self), 1.0)


def test_what_only_the_trial_finds():
    torch.manual_seed(0)
    peeking = nn.ModuleList(Peeking(6, 0.25) for _ in range(9)).to(F64)
    assert_fallback(both(peeking, mgrit()), ".item()")
    unequal = nn.ModuleList(Unequal(6, 0.25) for _ in range(9)).to(F64)
    Unequal.functions = {id(unequal[4]): 1.01}
    assert_fallback(both(unequal, mgrit()), "layer 4 (Unequal) gives other values among others than alone")


class WithoutRule(Block):
    def forward(self, x):
        # vmap runs this one slice after slice
        return super().forward(x) + 0 * torch.histc(x.detach(), bins=4).sum()


def test_operations_without_batching_rule_fall_back():
    torch.manual_seed(0)
    layers = nn.ModuleList(WithoutRule(6, 0.25) for _ in range(9)).to(F64)
    assert_fallback(both(layers, mgrit()), "batching rule for aten::histc")


def test_changed_layers_are_looked_at_again():
    layers, x, device = blocks(9), state(), OneDevice()

    def changed():
        solved = gradients_of(mgrit(stacked=True), layers, x, device=device)
        assert_same(solved.results, gradients_of(mgrit(), layers, x).results, 1e-12)
        return sum(task.wave >= 0 for task in solved.plan.tasks)

    alike = changed()
    layers[4].outer.register_forward_hook(lambda module, args, output: 2 * output)
    assert 0 < changed() < alike
    layers[5].inner = nn.Sequential(copy.deepcopy(layers[5].inner))
    assert 0 < changed() < alike


def refusals():
    found = []
    model = convert_to_ode(build("bert")[0])
    try:
        parallelize(model, mgrit(coarsening=2, stacked=True))
    except ConfigurationError as error:
        found.append(str(error))
    handle = parallelize(model, mgrit(coarsening=2))
    try:
        handle.config = mgrit(coarsening=2, stacked=True)
    except ConfigurationError as error:
        found.append(str(error))
    return found


def test_several_ranks_are_refused_before_anything_is_spread():
    for found in run_ranks(refusals, 2):
        assert len(found) == 2
        assert all("stacked=True with lp_size=2" in text and "use stacked=False or lp_size=1" in text for text in found)
