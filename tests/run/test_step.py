"""Steps of a bare stack on one process: what layers, arguments and batches they take, and what they leave behind."""

import copy
import dataclasses
import weakref
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_layerpar import convert_to_ode, parallelize
from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.errors import ConfigurationError, UnsupportedModelError
from hf_layerpar.plan.part import RankPart
from hf_layerpar.plan.step import Anatomy, build_step
from hf_layerpar.run.layers import Common
from hf_layerpar.run.stackable import OneDevice
from hf_layerpar.run.step import Step
from hf_layerpar.run.transport import LocalTransport
from recipes.benchmarks.bare import BareStack
from tests import zoo
from tests.problems import (
    F64,
    Block,
    Call,
    assert_same,
    blocks,
    calls_of,
    gradients_of,
    loss_of,
    relative,
    seeded_with,
    serial,
    serial_results,
    state,
)

EXACT = LayerParallelConfig()
MGRIT = LayerParallelConfig(strategy="mgrit", coarsening=3, forward_iterations=2, backward_iterations=2)
SPLIT = LayerParallelConfig(schedule="zb_h1", micro_batches=2)
"""Weight gradients apart from input gradients."""


def enough(config):
    """As many iterations as intervals."""
    return dataclasses.replace(config, forward_iterations=3, backward_iterations=3)


# ---- gradients
def test_gradients_are_added_to_what_is_there():
    layers, x = blocks(8), state()
    once = serial_results(layers, x)
    for config in (EXACT, enough(MGRIT)):
        gradients_of(config, layers, x)
        twice = gradients_of(config, layers, x, added=True).results
        assert_same(twice, {name: t if name == "y" else t + t for name, t in once.items()})


def test_gradients_are_handed_over_not_copied():
    """As many copies in a step as plain torch makes: autograd clones a gradient that is held elsewhere."""
    layers, x = blocks(4), state().detach()
    stack = BareStack(calls_of(layers), x, lambda y, rows: loss_of(y))
    plan = stack.plan(EXACT, (0,) * 4, 1)
    counts = []
    for run in (lambda: stack.step(plan, LocalTransport()), lambda: loss_of(serial(layers, x)).backward()):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            run()
        counts.append(sum(e.count for e in profile.key_averages() if e.key in ("aten::clone", "aten::copy_")))
        layers.zero_grad()
    assert counts[0] <= counts[1]


def test_frozen_layers_and_inputs():
    layers, x = blocks(6), state().detach()
    for layer in list(layers)[::2]:
        layer.requires_grad_(False)
    for config in (EXACT, SPLIT, dataclasses.replace(MGRIT, coarsening=2)):
        found = gradients_of(enough(config), layers, x).results
        assert_same(found, serial_results(layers, x), 0.0 if config.micro_batches == 1 else 1e-14)
    layers.requires_grad_(False)
    assert set(gradients_of(EXACT, layers, x).results) == {"y"}


@pytest.mark.parametrize(
    "config",
    [
        EXACT,
        dataclasses.replace(SPLIT, micro_batches=1),
        LayerParallelConfig(strategy="mgrit", coarsening=2, forward_iterations=2, backward_iterations=2, stacked=True),
    ],
    ids=["exact", "split", "stacked"],
)
def test_hooks_of_parameters_are_called(config):
    """As in any backward: a hook changes the gradient before it is added, another one looks at the sum."""
    layers, x = blocks(4), state()
    expected = serial_results(layers, x)
    weight, seen = layers[1].inner.weight, []
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    layers[1].inner.bias.register_hook(lambda grad: 2 * grad)
    weight.register_hook(lambda grad: 2 * grad)
    found = gradients_of(config, layers, x, device=OneDevice()).results
    assert len(seen) == 1
    for name in ("1.inner.weight", "1.inner.bias"):
        expected[name] = 2 * expected[name]
    assert_same(found, expected, 1e-12 if config.stacked else 0.0)
    assert torch.equal(found["1.inner.weight"], seen[0])


def test_layers_are_called_with_their_hooks():
    layers, x = blocks(4), state()
    seen = []
    layers[2].register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    gradients_of(EXACT, layers, x)
    (output,) = seen
    assert torch.equal(output, serial(layers[:3], x))


@pytest.mark.parametrize(("config", "late"), [(EXACT, False), (SPLIT, False), (SPLIT, True)])
def test_compiled_layers(config, late):
    """They keep their weight gradients where others leave them for later; also if they did so before (late)."""
    layers, x = blocks(3), state()
    expected = {name: tensor.clone() for name, tensor in gradients_of(config, layers, x).results.items()}
    torch._dynamo.reset()
    fresh = copy.deepcopy(layers) if late else blocks(3)
    for layer in fresh:
        layer.compile(backend="aot_eager")
    assert_same(gradients_of(config, fresh, x).results, expected, 1e-14)
    torch._dynamo.reset()


@pytest.mark.parametrize("config", [EXACT, SPLIT, MGRIT], ids=["exact", "split", "mgrit"])
def test_recomputing_changes_nothing(config):
    layers, x = blocks(8, dropout=0.2).train(), state()
    side = state(seed=4)
    evaluated = Counter()
    for n, layer in enumerate(layers):
        layer.register_forward_hook(lambda module, args, output, n=n: evaluated.update([n]))
    kept = gradients_of(config, layers, x, side, seed=7).results
    once = dict(evaluated)
    for again in (True, lambda layer: layer in layers[1::3]):  # all layers, or some of them
        evaluated.clear()
        assert_same(gradients_of(config, layers, x, side, recompute=again, seed=7).results, kept)
        more = {n for n, count in evaluated.items() if count > once[n]}
        assert more == (set(range(8)) if again is True else {1, 4, 7})


@pytest.mark.parametrize(
    "config", [EXACT, SPLIT, enough(MGRIT), dataclasses.replace(enough(MGRIT), stacked=True)], ids=str
)
def test_one_layer_in_all_places(config):
    layers, x = nn.ModuleList([*blocks(1)] * 9), state()
    found = gradients_of(config, layers, x, device=OneDevice())
    assert found.stacked == [config.stacked] * 2
    assert_same(found.results, serial_results(layers, x), 1e-13)


class Checkpointed(Block):
    """Runs itself again in the backward."""

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


@pytest.mark.parametrize("config", [EXACT, SPLIT, enough(MGRIT)], ids=["exact", "split", "mgrit"])
def test_layers_that_are_checkpointed_by_themselves(config):
    plain, x = blocks(8), state()
    layers = nn.ModuleList(Checkpointed(6, 0.25) for _ in range(8)).to(F64)
    layers.load_state_dict(plain.state_dict())
    assert_same(gradients_of(config, layers, x).results, gradients_of(config, plain, x).results)


# ---- batches and states
@pytest.mark.parametrize("batch", [1, 3, 5])
@pytest.mark.parametrize("micro_batches", [1, 2, 8])
@pytest.mark.parametrize("strategy", ["pipeline", "mgrit"])
def test_any_number_of_rows_and_micro_batches(batch, micro_batches, strategy):
    layers, x = blocks(8), state(batch=batch)
    config = LayerParallelConfig(strategy=strategy, micro_batches=micro_batches, coarsening=3)
    solved = gradients_of(enough(config), layers, x)
    assert solved.plan.micro_batches == min(batch, micro_batches) == len(solved.outcome.losses)
    expected = serial_results(layers, x)
    assert_same(solved.results, expected, 1e-14)
    assert solved.loss == pytest.approx(float(loss_of(expected["y"])), rel=1e-13)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved_1f1b", "zb_h1", "zb_v", "list"])
def test_no_sum_depends_on_the_schedule(schedule):
    layers, x, side = blocks(6), state(batch=5), state(batch=5, seed=8)
    one = LayerParallelConfig(micro_batches=3)
    expected = gradients_of(one, layers, x, side).results
    assert_same(gradients_of(dataclasses.replace(one, schedule=schedule), layers, x, side).results, expected)


def test_the_tail_in_pieces():
    """As `ends="spread"` has it: here all of them on one rank."""
    layers, x = blocks(4), state(batch=5)
    stack = BareStack(calls_of(layers), x, lambda y, rows: loss_of(y, rows, 5))
    stack.micro_batches = 2
    anatomy = dataclasses.replace(Anatomy.of_stack((0,) * 4), tail_pieces=2)
    plan = build_step(LayerParallelConfig(micro_batches=2), anatomy, 2, 2)
    here = dataclasses.replace(plan, num_ranks=1, tasks=tuple(dataclasses.replace(t, rank=0) for t in plan.tasks))
    outcome = stack.step(here, LocalTransport())
    assert set(outcome.losses) == {(m, i) for m in range(2) for i in range(2)}
    expected = serial_results(layers, x)
    assert float(sum(outcome.losses.values())) == pytest.approx(float(loss_of(expected["y"])), rel=1e-13)
    assert relative(x.grad, expected["x"]) < 1e-14


def test_float32_and_bfloat16_keep_their_dtype():
    layers, x = blocks(8), state().detach()
    single = copy.deepcopy(layers).float()
    x32 = x.float().requires_grad_()
    found = gradients_of(EXACT, single, x32).results
    assert_same(found, serial_results(single, x32))
    half, x16 = copy.deepcopy(layers).bfloat16(), x.bfloat16().requires_grad_()
    config = LayerParallelConfig(strategy="mgrit", coarsening=2, forward_iterations=4, backward_iterations=4)
    assert_same(gradients_of(config, half, x16).results, serial_results(half, x16))
    # residuals are summed wider
    fewer = gradients_of(dataclasses.replace(config, forward_iterations=1), half, x16).outcome.residuals
    assert {t.dtype for t in fewer.values()} == {torch.float32}


@pytest.mark.parametrize("config", [EXACT, SPLIT, MGRIT, LayerParallelConfig(micro_batches=3)])
def test_non_contiguous_state_and_adjoint(config):
    layers = blocks(8)
    x = state(tokens=5).detach().transpose(0, 1).requires_grad_()
    assert not x.is_contiguous()
    lam = torch.randn(3, 5, 6, dtype=F64).transpose(0, 1)
    found = gradients_of(enough(config), layers, x, loss=seeded_with(lam)).results
    assert_same(found, serial_results(layers, x, loss=seeded_with(lam)), 1e-14)


# ---- arguments
@pytest.mark.parametrize("config", [EXACT, SPLIT, enough(MGRIT)], ids=["exact", "split", "mgrit"])
@pytest.mark.parametrize("micro_batches", [1, 2, 3, 8])
def test_side_inputs_get_the_sum_of_their_gradients(config, micro_batches):
    layers, x = blocks(7), state(batch=3)
    config = dataclasses.replace(config, micro_batches=micro_batches)
    per_row, shared = state(batch=3, seed=8), state(batch=1, seed=9)
    table = torch.ones((), dtype=F64, requires_grad=True)
    one_each = [state(batch=3, seed=20 + n) for n in range(7)]
    two = [per_row, shared, per_row, per_row, table, shared, per_row]
    for side in (per_row, shared, table, one_each):
        assert_same(gradients_of(config, layers, x, side).results, serial_results(layers, x, side), 1e-13)
    named = {"per row": per_row, "shared": shared, "table": table}
    expected = torch.autograd.grad(loss_of(serial(layers, x, two)), list(named.values()))
    gradients_of(config, layers, x, two)
    for tensor, grad in zip(named.values(), expected, strict=True):
        assert relative(tensor.grad, grad) < 1e-13


def test_side_inputs_with_a_graph_behind_them():
    """Which the backward walks on."""
    layers, x, source = blocks(5), state(batch=4), state(batch=4, seed=3)
    (expected,) = torch.autograd.grad(loss_of(serial(layers, x, torch.tanh(source))), source)
    gradients_of(EXACT, layers, x, torch.tanh(source))
    assert torch.equal(source.grad, expected)


class Keywords(Block):
    def forward(self, x, side=None, *, scale=1.0, more=None):
        return super().forward(x, side) * (scale * more["factor"][0])


@pytest.mark.parametrize("config", [EXACT, SPLIT, enough(MGRIT)], ids=["exact", "split", "mgrit"])
def test_arguments_in_any_nest(config):
    layers = nn.ModuleList(Keywords(6, 0.25) for _ in range(7)).to(F64)
    x, side, factor = state(), state(seed=5), state(seed=6)
    kwargs = {"scale": 1.5, "more": {"factor": (factor, None)}}
    y = x
    for layer in layers:
        y = layer(y, side, **kwargs)
    expected = torch.autograd.grad(loss_of(y), [x, side, factor])
    stack = BareStack([Call(layer, (side,), kwargs) for layer in layers], x, lambda y, rows: loss_of(y, rows, 3))
    stack.step(stack.plan(config, (0,) * 7, 1), LocalTransport())
    for tensor, grad in zip((x, side, factor), expected, strict=True):
        assert relative(tensor.grad, grad) < 1e-13


def test_a_layer_that_changes_the_shape_is_refused():
    layers = nn.ModuleList([*blocks(3), nn.Linear(6, 5).to(F64), *blocks(2)])
    with pytest.raises(UnsupportedModelError, match=r"layer 3 \(Linear\).*\(3, 4, 6\) to \(3, 4, 5\)"):
        gradients_of(EXACT, layers, state())


# ---- dropout
@pytest.mark.parametrize("config", [EXACT, SPLIT, MGRIT, LayerParallelConfig(strategy="mgrit", micro_batches=2)])
@pytest.mark.parametrize("recompute", [False, True])
def test_dropout_masks_are_the_same_in_every_evaluation(config, recompute):
    """With enough iterations MGRIT equals the exact solve of the same draw; another draw differs."""
    layers, x = blocks(9, dropout=0.3).train(), state()
    exact = LayerParallelConfig(micro_batches=config.micro_batches)
    expected = gradients_of(exact, layers, x, seed=11).results
    assert_same(gradients_of(enough(config), layers, x, seed=11, recompute=recompute).results, expected)
    another = gradients_of(exact, layers, x, seed=12).results
    assert all(relative(another[name], expected[name]) > 1e-3 for name in ("y", "x"))


def test_layers_and_micro_batches_have_masks_of_their_own():
    layers, x = blocks(2, dropout=0.5).train(), torch.ones(2, 4, 6, dtype=F64)
    layers[1].load_state_dict(layers[0].state_dict())
    y = gradients_of(LayerParallelConfig(micro_batches=2), layers, x, seed=0).results["y"]
    assert not torch.equal(y[0], y[1])  # equal rows, different micro-batches
    seen = []
    for layer in layers:
        layer.dropout.register_forward_hook(lambda module, args, output: seen.append(output == 0))
    gradients_of(EXACT, layers, x, seed=0)
    first, second = seen
    assert not torch.equal(first, second)


@pytest.mark.parametrize("config", [EXACT, MGRIT], ids=["exact", "mgrit"])
def test_one_draw_from_the_main_stream_in_training_none_in_evaluation(config):
    model, batch = zoo.build("gpt2")
    handle = parallelize(convert_to_ode(model), dataclasses.replace(config, coarsening=2))
    torch.manual_seed(5)
    torch.randint(2**62, ())
    after_one_draw = torch.get_rng_state()
    losses = []
    for mode, seed in ((True, 5), (True, 5), (True, 6), (False, 5)):
        model.train(mode)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        losses.append(float(handle.train_step(batch)))
        assert torch.equal(torch.get_rng_state(), after_one_draw if mode else before) or seed == 6
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3


# ---- exactness where it is wanted
def test_a_forward_alone_is_exact_and_keeps_nothing():
    layers, x = blocks(8), state()
    ends = []
    stack = BareStack(calls_of(layers), x, lambda y, rows: ends.append(y) or loss_of(y))
    config = LayerParallelConfig(strategy="mgrit", coarse_operator="identity")
    plan = build_step(config, Anatomy.of_stack((0,) * 8), 1, trains=False)
    step = Step(RankPart.of(plan, 0), stack, LocalTransport(), Common(keeps=False), device=x.device)
    outcome = step.run()
    assert torch.equal(ends[0], serial(layers, x))
    assert not ends[0].requires_grad
    assert (outcome.losses, outcome.norms) == ({}, {})
    assert all(p.grad is None for p in (x, *layers.parameters()))


def test_buffers_are_exact():
    layers, x = blocks(10), state()
    config = LayerParallelConfig(strategy="mgrit", coarsening=3, coarse_operator="identity")
    inexact = gradients_of(config, layers, x, buffers=(2, 2)).results["y"]
    middle = gradients_of(config, layers[2:8], serial(layers[:2], x).detach().requires_grad_()).results["y"]
    assert torch.equal(inexact, serial(layers[8:], middle))
    assert not torch.equal(inexact, serial(layers, x))
    with pytest.raises(ConfigurationError, match="buffers=\\(5, 5\\) leave 0 of 10 layers"):
        gradients_of(config, layers, x, buffers=(5, 5))


# ---- autocast
@pytest.mark.parametrize("config", [EXACT, SPLIT, enough(MGRIT)], ids=["exact", "split", "mgrit"])
@pytest.mark.parametrize("recompute", [False, True])
def test_autocast(config, recompute):
    """The same in every evaluation, and weights keep their gradients (a cast that an evaluation without graph cached
    would lose them)."""
    layers, x = blocks(6).float(), state().detach().float().requires_grad_()
    config = dataclasses.replace(config, micro_batches=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients_of(config, layers, x, recompute=recompute).results
        y = serial(layers, x)
    grads = torch.autograd.grad(loss_of(y), [x, *layers.parameters()])
    names = ["x", *(name for name, _ in layers.named_parameters())]
    assert_same(found, {"y": y.detach(), **dict(zip(names, grads, strict=True))})
    assert found["y"].dtype == torch.float32
    full = serial_results(layers, x)
    assert relative(found["0.inner.weight"], full["0.inner.weight"]) > 1e-4  # it is on


# ---- what is kept
class Held(torch.autograd.Function):
    """The identity; its node in a graph holds a token."""

    tokens: list

    @staticmethod
    def forward(ctx, x):
        ctx.token = Token()
        Held.tokens.append(weakref.ref(ctx.token))
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


class Token:
    pass


class Holding(Block):
    def forward(self, x):
        Held.held.append(sum(token() is not None for token in Held.tokens))
        return super().forward(Held.apply(x))


APART = dataclasses.replace(EXACT, schedule="zb_h1")


@pytest.mark.parametrize("config", [EXACT, MGRIT, APART], ids=["exact", "mgrit", "weights apart"])
def test_graphs_are_freed_with_the_last_backward_through_them(config):
    layers, x = nn.ModuleList(Holding(6, 0.25) for _ in range(6)).to(F64), state(batch=4)
    Held.tokens, Held.held = [], []
    solved = gradients_of(dataclasses.replace(config, micro_batches=4), layers, x)
    assert not any(token() is not None for token in Held.tokens)
    assert 1 < max(Held.held) <= (6 if config is EXACT else 4 * 6)
    if config is APART:
        assert any(t.kind == "weights" for t in solved.plan.tasks)


def test_recomputation_keeps_no_graph():
    layers, x = nn.ModuleList(Holding(6, 0.25) for _ in range(6)).to(F64), state(batch=4)
    Held.tokens, Held.held = [], []
    gradients_of(MGRIT, layers, x, recompute=True)
    assert max(Held.held) <= 3  # of one interval's place in the coarse adjoint, or of one layer
    assert Held.tokens


# ---- loss scale
def test_the_gradient_is_scaled_and_the_loss_is_not():
    found = []
    for scale in (1.0, 0.25):
        model, batch = zoo.build("llama")
        handle = parallelize(convert_to_ode(model.eval().double()), EXACT)
        loss = handle.train_step(batch, scale=scale)
        found.append((float(loss), [p.grad for p in model.parameters()]))
    assert found[0][0] == found[1][0]
    for whole, part in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(0.25 * whole, part)
