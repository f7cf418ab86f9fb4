"""The autograd node on one process: what a plain training loop may do to it."""

import copy
import gc
import weakref

import pytest
import torch

from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.errors import ConfigurationError, UnsupportedModelError
from tests.problems import F64, Call, blocks, engine, gradients, loss_of, relative, serial, solve, state

EXACT = LayerParallelConfig()
MGRIT = LayerParallelConfig(strategy="mgrit", coarsening=3, forward_iterations=2, backward_iterations=2)
FITTED = LayerParallelConfig(strategy="mgrit", coarsening=3, coarse_operator="linear")


def test_two_backwards_accumulate():
    layers, x = blocks(8), state()
    solver = engine(EXACT, 8)
    for _ in range(2):
        loss_of(solve(layers, x, solver)).backward()
    once = gradients(serial(layers, x), [x, *layers.parameters()])
    assert x.grad is not None
    for grad, expected in zip([x.grad, *(p.grad for p in layers.parameters())], once, strict=True):
        assert torch.equal(grad, expected + expected)


@pytest.mark.parametrize("config", [EXACT, MGRIT, FITTED])
@pytest.mark.parametrize("recompute", [False, True])
def test_second_backward_through_a_retained_graph(config, recompute):
    layers, x = blocks(8, dropout=0.2).train(), state()
    loss = loss_of(solve(layers, x, engine(config, 8, recompute=recompute)))
    inputs = [x, *layers.parameters()]
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("config", [EXACT, MGRIT])
def test_recomputing_changes_nothing(config):
    layers, x = blocks(8, dropout=0.2).train(), state()
    results = []
    for recompute in (False, True):
        torch.manual_seed(7)
        y = solve(layers, x, engine(config, 8, recompute=recompute))
        results.append([y, *gradients(y, [x, *layers.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_another_batch_size_and_dtype_just_work():
    layers = blocks(8)
    solver = engine(LayerParallelConfig(micro_batches=2), 8)
    for batch in (3, 1, 5):
        x = state(batch=batch)
        y = solve(layers, x, solver)
        assert relative(y, serial(layers, x)) < 1e-15
        assert relative(gradients(y, [x])[0], gradients(serial(layers, x), [x])[0]) < 1e-14
    single = copy.deepcopy(layers).float()
    x32 = state().detach().float().requires_grad_()
    y = solve(single, x32, solver)
    assert y.dtype == torch.float32
    assert relative(y, serial(single, x32)) < 1e-6


@pytest.mark.parametrize("config", [EXACT, MGRIT, LayerParallelConfig(micro_batches=3)])
def test_non_contiguous_gradient_and_state(config):
    layers = blocks(8)
    x = state(tokens=5).detach().transpose(0, 1).requires_grad_()
    assert not x.is_contiguous()
    lam = torch.randn(3, 5, 6, dtype=F64).transpose(0, 1)
    solver = engine(LayerParallelConfig(**config.to_dict() | {"forward_iterations": 3, "backward_iterations": 3}), 8)
    (grad,) = torch.autograd.grad(solve(layers, x, solver), x, lam)
    (expected,) = torch.autograd.grad(serial(layers, x), x, lam)
    assert relative(grad, expected) < 1e-14


@pytest.mark.parametrize("micro_batches", [1, 2, 3, 8])
def test_side_inputs_get_the_sum_of_their_gradients(micro_batches):
    layers, x = blocks(6), state(batch=3)
    per_row = state(batch=3, seed=8)
    shared = state(batch=1, seed=9)
    for side in (per_row, shared):
        solver = engine(LayerParallelConfig(micro_batches=micro_batches), 6)
        grads = gradients(solve(layers, x, solver, side), [x, side, *layers.parameters()])
        expected = gradients(serial(layers, x, side), [x, side, *layers.parameters()])
        assert all(relative(a, b) < 1e-13 for a, b in zip(grads, expected, strict=True))


def test_side_input_that_no_micro_batch_rule_fits_is_refused():
    layers, x = blocks(6), state(batch=4)
    calls = [Call(layer, (torch.ones(8, 1, 1, dtype=F64),)) for layer in layers]
    with pytest.raises(ConfigurationError, match=r"shape \(8, 1, 1\).*micro_batches=1"):
        engine(LayerParallelConfig(micro_batches=2), 6)(calls, x)


@pytest.mark.parametrize("config", [EXACT, MGRIT, LayerParallelConfig(micro_batches=2)])
def test_dropout_masks_are_the_same_in_every_evaluation(config):
    """With enough iterations MGRIT equals the exact solve of the same draw; another draw differs."""
    layers, x = blocks(9, dropout=0.3).train(), state()
    enough = LayerParallelConfig(
        **config.to_dict() | {"forward_iterations": 3, "backward_iterations": 3, "coarse_operator": "aggregate"}
    )
    exact = LayerParallelConfig(micro_batches=config.micro_batches)
    results = []
    for chosen in (enough, exact):
        torch.manual_seed(11)
        y = solve(layers, x, engine(chosen, 9))
        results.append([y, *gradients(y, [x, *layers.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    another = solve(layers, x, engine(exact, 9))
    assert relative(another, results[0][0]) > 1e-3


def test_layers_and_micro_batches_have_masks_of_their_own():
    layers, x = blocks(2, dropout=0.5).train(), torch.ones(2, 4, 6, dtype=F64)
    layers[1].load_state_dict(layers[0].state_dict())
    both = engine(LayerParallelConfig(micro_batches=2), 2)
    torch.manual_seed(0)
    y = solve(layers, x, both)
    assert not torch.equal(y[0], y[1])  # equal rows, different micro-batches
    first = solve(layers[:1], x, engine(EXACT, 1)) - x
    second = solve(layers[1:], x, engine(EXACT, 1)) - x
    assert not torch.equal(first, second)


def test_one_draw_from_the_main_stream_in_training_none_in_evaluation():
    layers, x = blocks(4, dropout=0.5), state()
    solver = engine(MGRIT, 4)
    torch.manual_seed(5)
    torch.randint(2**62, ())
    after_one_draw = torch.get_rng_state()
    torch.manual_seed(5)
    loss_of(solve(layers.train(), x, solver)).backward()
    assert torch.equal(torch.get_rng_state(), after_one_draw)
    loss_of(solve(layers.eval(), x, solver)).backward()
    assert torch.equal(torch.get_rng_state(), after_one_draw)


def test_no_grad_forward_is_exact_and_keeps_nothing():
    layers, x = blocks(8).eval(), state()
    solver = engine(LayerParallelConfig(strategy="mgrit", coarse_operator="identity"), 8)
    with torch.no_grad():
        y = solve(layers, x, solver)
    assert torch.equal(y, serial(layers, x))
    report = solver.report("forward")
    assert report is not None
    assert report.mode == "exact"


def test_frozen_layers_and_inputs():
    layers, x = blocks(6), state().detach()
    for layer in list(layers)[::2]:
        layer.requires_grad_(False)
    trainable = [p for p in layers.parameters() if p.requires_grad]
    grads = gradients(solve(layers, x, engine(EXACT, 6)), trainable)
    expected = gradients(serial(layers, x), trainable)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
    layers.requires_grad_(False)  # nothing local is trainable: the node must still be there for the other ranks
    assert solve(layers, x, engine(EXACT, 6)).requires_grad


def test_graphs_are_freed_with_the_loss():
    layers, x = blocks(6), state()
    calls = [Call(layer) for layer in layers]
    kept = weakref.ref(calls[0])
    loss = loss_of(engine(EXACT, 6)(calls, x))
    del calls
    assert kept() is not None
    del loss
    gc.collect()
    assert kept() is None


def test_autocast_is_the_same_in_forward_and_recomputation():
    layers, x = blocks(6).float(), state().detach().float().requires_grad_()
    results = []
    for recompute in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = solve(layers, x, engine(EXACT, 6, recompute=recompute))
        assert y.dtype == torch.float32
        results.append([y, *gradients(y, [x, *layers.parameters()])])  # backward outside autocast, as the Trainer's
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = serial(layers, x)
    results.append([y, *gradients(y, [x, *layers.parameters()])])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_bfloat16_states_converge_to_the_serial_ones():
    layers, x = blocks(8).bfloat16(), state().detach().bfloat16().requires_grad_()
    config = LayerParallelConfig(strategy="mgrit", coarsening=2, forward_iterations=4, backward_iterations=4)
    assert torch.equal(solve(layers, x, engine(config, 8)), serial(layers, x))


def test_buffers_are_exact():
    layers, x = blocks(10), state()
    config = LayerParallelConfig(strategy="mgrit", coarsening=3, coarse_operator="identity")
    inexact = solve(layers, x, engine(config, 10, buffers=(2, 2)))
    middle = solve(layers[2:8], serial(layers[:2], x), engine(config, 6))
    assert torch.equal(inexact, serial(layers[8:], middle))
    assert not torch.equal(inexact, serial(layers, x))
    with pytest.raises(ConfigurationError, match="buffers=\\(5, 5\\) leave 0 of 10 layers"):
        solve(layers, x, engine(config, 10, buffers=(5, 5)))


def test_a_layer_that_changes_the_shape_is_refused():
    layers = torch.nn.ModuleList([*blocks(3), torch.nn.Linear(6, 5).to(F64), *blocks(2)])
    with pytest.raises(UnsupportedModelError, match=r"layer 3 \(Linear\).*\(3, 4, 6\) to \(3, 4, 5\)"):
        solve(layers, state(), engine(EXACT, 6))


def test_gradients_are_handed_over_not_copied():
    """As many copies in a backward as plain torch makes: autograd clones a gradient that is held elsewhere."""
    layers, x = blocks(4), state()
    counts = []
    for run in (lambda: solve(layers, x, engine(EXACT, 4)), lambda: serial(layers, x)):
        loss = loss_of(run())
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            loss.backward()
        counts.append(sum(e.count for e in profile.key_averages() if e.key in ("aten::clone", "aten::copy_")))
        layers.zero_grad()
        x.grad = None
    assert counts[0] <= counts[1]
