"""Layers evaluated together on one device, against the same engine evaluating them one at a time."""

import copy
import dataclasses
import warnings
from typing import ClassVar

import pytest
import torch
from torch import nn

from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.errors import ConfigurationError
from hf_layerpar.ode.convert import convert_to_ode
from hf_layerpar.sharding import parallelize
from tests.multiproc import run_ranks
from tests.problems import F64, Block, Call, blocks, engine, gradients, loss_of, relative, serial, solve, state
from tests.zoo import build

OPERATORS = ("rediscretize", "aggregate", "identity")


def mgrit(**settings) -> LayerParallelConfig:
    return LayerParallelConfig(strategy="mgrit", **{"coarsening": 3} | settings)


def both(layers, config, run=solve, x=None, **more):
    """[state, gradients...] one at a time and stacked; whether forward and backward ran stacked; the warnings."""
    x = state() if x is None else x
    results, reports = [], []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for stacked in (False, True):
            solver = engine(dataclasses.replace(config, stacked=stacked), len(layers), **more)
            torch.manual_seed(3)
            y = run(layers, x, solver)
            results.append([y, *gradients(y, [x, *(p for p in layers.parameters() if p.requires_grad)])])
            reports.append([solver.report(d).stacked for d in ("forward", "backward")])
    assert reports[0] == [False, False]
    return results, reports[1], [str(w.message) for w in caught]


def assert_equal(results, bound=1e-10):
    assert max(relative(b, a) for a, b in zip(*results, strict=True)) < bound


def assert_fallback(found, message):
    results, reports, said = found
    assert reports == [False, False]
    assert len(said) == 1
    assert said[0].startswith("stacked=True, but layers are evaluated one at a time: ")
    assert message in said[0]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    ("num_layers", "settings", "buffers"),
    [
        (9, {}, (0, 0)),
        (10, {"forward_iterations": 2}, (0, 0)),  # a short last interval
        (13, {"forward_iterations": 2, "backward_iterations": 2, "relaxation": "FCF"}, (1, 2)),
        (12, {"levels": 3, "coarsening": (3, 2), "forward_iterations": 2, "backward_iterations": 2}, (0, 0)),
        (9, {"micro_batches": 2, "forward_iterations": 2}, (1, 1)),
        (8, {"damping": 0.3, "forward_iterations": 3, "coarsening": 2}, (0, 0)),
    ],
)
def test_equal_to_one_at_a_time(operator, num_layers, settings, buffers):
    results, reports, said = both(blocks(num_layers), mgrit(coarse_operator=operator, **settings), buffers=buffers)
    assert_equal(results)
    assert reports == [True, True]
    assert not said


def test_exact_forward_with_stacked_adjoint():
    results, reports, said = both(blocks(9), mgrit(forward_iterations=0, coarse_operator="aggregate"))
    assert torch.equal(results[0][0], results[1][0])
    assert_equal(results)
    assert reports == [False, True]
    assert not said


@pytest.mark.parametrize("operator", OPERATORS)
def test_enough_iterations_are_serial(operator):
    layers, x = blocks(9), state()
    config = mgrit(coarse_operator=operator, forward_iterations=3, backward_iterations=3, stacked=True)
    y = solve(layers, x, engine(config, 9))
    expected = serial(layers, x)
    inputs = [x, *layers.parameters()]
    assert_equal([[y, *gradients(y, inputs)], [expected, *gradients(expected, inputs)]], 1e-12)


ODES = ({}, {"step_size": 0.5}, {"step_size": 0.25, "form": "split", "buffers": (1, 2)})


def model_run(name, config, ode):
    model, inputs = build(name, layers=6)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    model = convert_to_ode(model.double(), **ode).eval()
    handle = parallelize(model, config)
    loss = model(**inputs).loss
    loss.backward()
    (sweeps,) = handle.report().values()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return loss, grads, [sweeps[d].stacked for d in ("forward", "backward")]


@pytest.mark.parametrize("ode", ODES, ids=str)
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit", "gemma3"])
def test_models(name, ode):
    """Gemma alternates two kinds of layers: intervals of 2 hold one of each."""
    if ode.get("form") == "split" and name == "bert":
        ode = {"step_size": 0.25, "buffers": (1, 2)}  # post-LN
    for operator in OPERATORS:
        for iterations in (1, 2):
            config = mgrit(coarse_operator=operator, forward_iterations=iterations, coarsening=2)
            loss, grads, plain = model_run(name, config, ode)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                other, found, stacked = model_run(name, dataclasses.replace(config, stacked=True), ode)
            assert plain == [False, False]
            assert stacked == [True, True]
            assert relative(other, loss) < 1e-10
            assert list(found) == list(grads)
            norm = sum(float(g.norm()) ** 2 for g in grads.values()) ** 0.5
            assert max(float((found[n] - g).norm()) for n, g in grads.items()) < 1e-10 * norm


def test_side_arguments_shared_and_of_their_own():
    layers = blocks(9)
    shared = state(batch=1, seed=9).detach()
    assert_equal(both(layers, mgrit(), lambda ls, x, s: solve(ls, x, s, shared))[0])
    own = [state(seed=n).detach() for n in range(9)]

    def with_own(layers, x, solver):
        return solver([Call(layer, (side,)) for layer, side in zip(layers, own, strict=True)], x)

    for micro_batches in (1, 2):
        results, reports, _ = both(layers, mgrit(micro_batches=micro_batches), with_own)
        assert_equal(results)
        assert reports == [True, True]


def test_frozen_layers():
    layers = blocks(9)
    for n in (0, 4, 7):
        layers[n].requires_grad_(False)
    layers[3].inner.weight.requires_grad_(False)
    results, reports, _ = both(layers, mgrit(coarse_operator="aggregate"))
    assert_equal(results)
    assert reports == [True, True]


@pytest.mark.parametrize("recompute", [False, True])
def test_two_backwards_and_recomputation(recompute):
    layers, x = blocks(9), state()
    config = mgrit(coarse_operator="aggregate", forward_iterations=2, stacked=True)
    loss = loss_of(solve(layers, x, engine(config, 9, recompute=recompute)))
    inputs = [x, *layers.parameters()]
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs)
    plain = solve(layers, x, engine(dataclasses.replace(config, stacked=False), 9, recompute=recompute))
    expected = torch.autograd.grad(loss_of(plain), inputs)
    assert_equal([first, second])
    assert_equal([expected, first])


def test_a_step_needs_few_evaluations():
    """Stacked, a wave of n layers is one call of the layer's code; a kept graph isn't evaluated again."""
    calls = []

    class Counted(Block):
        def forward(self, x):
            calls.append(1)
            return super().forward(x)

    torch.manual_seed(0)
    layers, x = nn.ModuleList(Counted(6, 0.25) for _ in range(16)).to(F64), state()
    solver = engine(mgrit(coarse_operator="aggregate", coarsening=4, stacked=True), 16)
    solve(layers, x, solver)  # with the trial
    calls.clear()
    y = solve(layers, x, solver)
    assert len(calls) == 3 + 4  # coarse steps, places
    calls.clear()
    gradients(y, [x, *layers.parameters()])
    assert len(calls) == 3  # coarse vjps evaluate other sets of layers than the last relaxation


def test_gradients_are_handed_over_not_copied():
    """As many copies between solver and `.grad` as there are waves, not layers."""
    layers, x = blocks(12), state()
    solver = engine(mgrit(coarse_operator="identity", stacked=True), 12)
    loss_of(solve(layers, x, solver)).backward()
    layers.zero_grad()
    loss = loss_of(solve(layers, x, solver))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss.backward()
    assert sum(e.count for e in profile.key_averages() if e.key == "aten::clone") <= 3 * 4
    assert all(p.grad.is_contiguous() for p in layers.parameters())


def test_autocast_and_bfloat16():
    """Both round alike; a matrix product and its bias are rounded once or twice."""

    def under_autocast(layers, x, solver):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return solve(layers, x, solver)

    x = state().detach().float().requires_grad_()
    layers = blocks(9).float()
    results, reports, _ = both(layers, mgrit(), under_autocast, x)
    assert reports == [True, True]
    assert [t.dtype for t in results[1]] == [t.dtype for t in results[0]]
    assert_equal(results, 0.03)
    full = both(layers, mgrit(), x=x)[0][0]
    errors = [max(relative(a, b) for a, b in zip(r, full, strict=True)) for r in results]
    assert errors[0] > 1e-4  # it is on
    assert errors[1] < 2 * errors[0]
    results, reports, _ = both(blocks(9).bfloat16(), mgrit(), x=x.detach().bfloat16().requires_grad_())
    assert reports == [True, True]
    assert_equal(results, 0.03)


# ---- falling back
def test_dropout_falls_back_in_training_only():
    layers = blocks(9, dropout=0.2)
    assert_fallback(both(layers.train(), mgrit()), "(Block) draw random numbers (dropout in training mode)")
    assert both(layers.eval(), mgrit())[1:] == ([True, True], [])
    assert both(blocks(9).train(), mgrit())[1:] == ([True, True], [])  # of probability 0


def test_one_engine_follows_the_mode_and_warns_once():
    layers, x = blocks(9, dropout=0.2), state()
    solver = engine(mgrit(stacked=True), 9)
    for mode, expected, warned in ((True, False, 1), (False, True, 0), (True, False, 0)):
        layers.train(mode)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            solve(layers, x, solver)
        assert solver.report("forward").stacked is expected
        assert len(caught) == warned


def test_side_gradients_fall_back():
    side = state(batch=1, seed=9)
    found = both(blocks(9), mgrit(), lambda layers, x, solver: solve(layers, x, solver, side))
    assert_fallback(found, "layer arguments require grad")


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
    results, reports, said = both(layers, mgrit(coarse_operator="aggregate", forward_iterations=2))
    assert_equal(results)
    assert reports == [True, True]
    assert not said


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
        assert_equal(found[0])
        assert found[1:] == ([True, True], [])
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
    layers, x = blocks(9), state()
    solver = engine(mgrit(stacked=True), 9)
    solve(layers, x, solver)
    layers[4].outer.register_forward_hook(lambda module, args, output: 2 * output)
    y = solve(layers, x, solver)
    assert relative(y, solve(layers, x, engine(mgrit(), 9))) < 1e-12
    copied = copy.deepcopy(layers[4].inner)
    layers[4].inner = nn.Sequential(copied)
    y = solve(layers, x, solver)
    assert relative(y, solve(layers, x, engine(mgrit(), 9))) < 1e-12


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
