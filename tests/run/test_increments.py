"""The increment penalty against serial autograd of loss + penalty, in float64."""

import pytest
import torch
from torch import Tensor, nn

from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.run.engine import StackEngine
from tests.problems import blocks, engine, gradients, loss_of, relative, solve, state

ALPHA = 3.0


def serial_with_penalty(layers: nn.ModuleList, x: Tensor, buffers=(0, 0), sizes=None) -> tuple[Tensor, Tensor]:
    """(x_N, R) by plain autograd; `sizes`: the |x_n,t|^2 to divide by, those of this trajectory by default."""
    penalty = torch.zeros((), dtype=x.dtype)
    for n, layer in enumerate(layers):
        y = layer(x)
        if buffers[0] <= n < len(layers) - buffers[1]:
            size = x.detach().square().sum(-1) if sizes is None else sizes[n]
            penalty = penalty + ALPHA / 2 * ((y - x).square().sum(-1) / size).mean()
        x = y
    return x, penalty


def penalised(x: Tensor, num_layers: int, **settings) -> StackEngine:
    engine_settings = {k: settings.pop(k) for k in ("buffers", "recompute") if k in settings}
    return engine(LayerParallelConfig(increment_penalty=ALPHA, **settings), num_layers, **engine_settings)


MGRIT = {"strategy": "mgrit", "forward_iterations": 3, "backward_iterations": 3}


@pytest.mark.parametrize(
    "settings",
    [
        {"strategy": "serial"},
        {"strategy": "pipeline", "micro_batches": 2},
        {"strategy": "pipeline", "buffers": (1, 2)},
        {"strategy": "pipeline", "recompute": True},
        *({**MGRIT, "coarse_operator": o} for o in ("rediscretize", "aggregate", "identity", "mean", "linear")),
        {**MGRIT, "relaxation": "FCF", "buffers": (2, 1), "micro_batches": 3, "recompute": True},
        {**MGRIT, "levels": 3, "coarsening": (4, 2)},
    ],
    ids=str,
)
def test_gradients_are_those_of_loss_and_penalty(settings):
    """Also of MGRIT with as many iterations as intervals: coarse steps are built of the same affine steps."""
    layers, x = blocks(10), state()
    solver = penalised(x, 10, **settings)
    y = solve(layers, x, solver)
    grads = gradients(y, [x, *layers.parameters()])
    exact, penalty = serial_with_penalty(layers, x, settings.get("buffers", (0, 0)))
    expected = torch.autograd.grad(loss_of(exact) + penalty, [x, *layers.parameters()])
    assert relative(y, exact) < 1e-14
    assert all(relative(a, b) < 1e-12 for a, b in zip(grads, expected, strict=True))
    report = solver.report("forward")
    assert report is not None
    assert report.penalty == pytest.approx(float(penalty.detach()), rel=1e-12)


def test_the_penalty_matters_and_is_off_by_default():
    layers, x = blocks(6), state()
    with_penalty = gradients(solve(layers, x, penalised(x, 6)), [x, *layers.parameters()])
    solver = engine(LayerParallelConfig(), 6)
    without = gradients(solve(layers, x, solver), [x, *layers.parameters()])
    assert all(relative(a, b) > 1e-4 for a, b in zip(with_penalty, without, strict=True))
    report = solver.report("forward")
    assert report is not None
    assert report.penalty is None


def test_gradcheck_of_the_penalty_alone():
    """With a loss of zero the node's gradient is the penalty's own: compared with differences of its value."""
    layers, x = blocks(4, dim=3), state(batch=2, tokens=2, dim=3)
    y = solve(layers, x, penalised(x, 4))
    (grad,) = torch.autograd.grad(y, x, torch.zeros_like(y))
    points = [x.detach()]
    for layer in layers:
        points.append(layer(points[-1]).detach())
    sizes = [point.square().sum(-1) for point in points]
    direction = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    step = 1e-6
    up, down = (serial_with_penalty(layers, x + sign * step * direction, sizes=sizes)[1] for sign in (1, -1))
    assert float((grad * direction).sum()) == pytest.approx(float((up - down).detach()) / (2 * step), rel=1e-7)


def test_the_penalty_is_scaled_as_the_loss():
    """Two accumulated halves, each with half of the loss."""
    layers, x = blocks(6), state()
    solver = penalised(x, 6)
    whole = gradients(solve(layers, x, solver), [*layers.parameters()])
    solver.settings.loss_scale = 0.5
    parts = [torch.autograd.grad(0.5 * loss_of(solve(layers, x, solver)), list(layers.parameters())) for _ in range(2)]
    assert all(relative(a + b, c) < 1e-14 for a, b, c in zip(*parts, whole, strict=True))


def test_a_token_whose_state_is_zero_counts_nothing():
    layers, x = blocks(4), state().detach()
    x[0, 0] = 0
    x.requires_grad_()
    solver = penalised(x, 4, strategy="pipeline", buffers=(0, 3))
    grads = gradients(solve(layers, x, solver), [x, *layers.parameters()])
    report = solver.report("forward")
    assert report is not None
    assert 0 < report.penalty < float("inf")
    assert all(grad.isfinite().all() for grad in grads)


def test_evaluation_has_no_penalty():
    layers, x = blocks(6), state()
    solver = penalised(x, 6)
    with torch.no_grad():
        solve(layers, x, solver)
    report = solver.report("forward")
    assert report is not None
    assert report.penalty is None


def test_inexact_and_exact_solves_penalise_alike():
    """The inexact gradient nears that of loss + penalty, not that of the loss."""
    layers, x = blocks(12, h=1 / 12), state()
    exact, penalty = serial_with_penalty(layers, x)
    expected = torch.autograd.grad(loss_of(exact) + penalty, x)[0]
    errors = []
    for iterations in (1, 2):
        both = {"forward_iterations": iterations, "backward_iterations": iterations}
        solver = penalised(x, 12, strategy="mgrit", coarse_operator="aggregate", **both)
        errors.append(relative(gradients(solve(layers, x, solver), [x])[0], expected))
    assert errors[1] < 0.1 * errors[0] < 0.01
