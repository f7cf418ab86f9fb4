"""The solver against exact solutions and the serial oracle, on one process in float64."""

import itertools
import math

import pytest
import torch
from torch import nn

from hf_layerpar.config import LayerParallelConfig
from tests.problems import F64, Linear, blocks, engine, gradients, loss_of, relative, serial, solve, state

OPERATORS = ("rediscretize", "aggregate", "identity", "mean", "linear")
GRIDS = ((2, 4), (2, 3), (3, (3, 2)), (3, 2), (4, 2))


def config(iterations: int, **settings) -> LayerParallelConfig:
    both = {"forward_iterations": iterations, "backward_iterations": iterations}
    return LayerParallelConfig(**({"strategy": "mgrit"} | both | settings))


def matrix(dim: int = 6) -> torch.Tensor:
    a = torch.randn(dim, dim, dtype=F64, generator=torch.Generator().manual_seed(0))
    return (a + a.T) / 4


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("strategy", ["serial", "mgrit"])
def test_linear_problem_has_its_closed_form(operator, strategy):
    a, h, n = matrix(), 1 / 16, 16
    layers = nn.ModuleList(Linear(a, h) for _ in range(n))
    x = state()
    y = solve(layers, x, engine(config(4, strategy=strategy, coarse_operator=operator), n))
    values, vectors = torch.linalg.eigh(a)
    exact = x @ vectors @ torch.diag((1 + h * values) ** n) @ vectors.T
    assert relative(y, exact) < 1e-13


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("relaxation", ["F", "FCF"])
@pytest.mark.parametrize(("levels", "coarsening"), GRIDS)
@pytest.mark.parametrize("num_layers", [16, 13])
def test_exact_after_as_many_iterations_as_intervals(operator, relaxation, levels, coarsening, num_layers):
    """n intervals: exact after n iterations (F) or ceil((n-1)/2)+1 (FCF), forward and adjoint; bit-equal, since a
    converged interval is never combined with a correction of zero."""
    layers, x = blocks(num_layers), state()
    exact = serial(layers, x)
    exact_grads = gradients(exact, [x, *layers.parameters()])
    first = coarsening if isinstance(coarsening, int) else coarsening[0]
    intervals = math.ceil(num_layers / first)
    enough = intervals if relaxation == "F" else math.ceil((intervals - 1) / 2) + 1
    settings = {"levels": levels, "coarsening": coarsening, "relaxation": relaxation, "coarse_operator": operator}
    y = solve(layers, x, engine(config(enough, **settings), num_layers))
    grads = gradients(y, [x, *layers.parameters()])
    assert torch.equal(y, exact)
    assert all(torch.equal(a, b) for a, b in zip(grads, exact_grads, strict=True))
    inexact = solve(layers, x, engine(config(enough - 1, **settings), num_layers))
    assert not torch.equal(inexact, exact)


@pytest.mark.parametrize("operator", OPERATORS)
def test_each_iteration_makes_one_more_interval_exact(operator):
    layers, x = blocks(12), state()
    exact = [x]
    for layer in layers:
        exact.append(layer(exact[-1]))
    for k in (1, 2, 3):  # layers that do nothing carry the state after interval k to the end
        idle = nn.ModuleList([*layers[: 4 * k], *(nn.Identity() for _ in range(12 - 4 * k))])
        for iterations in (1, 2, 3):
            y = solve(idle, x, engine(config(iterations, coarse_operator=operator), 12))
            # C-point k needs k corrections; the end of the last interval needs the C-point it starts at
            assert (relative(y, exact[4 * k]) < 1e-14) == (iterations >= min(k + 1, 3))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("relaxation", ["F", "FCF"])
def test_residuals_and_factors_show_convergence(operator, relaxation):
    layers, x = blocks(24, h=1 / 24), state()
    solver = engine(config(4, relaxation=relaxation, coarse_operator=operator), 24)
    y = solve(layers, x, solver)
    loss_of(y).backward()
    exact = serial(layers, x)
    errors = [
        relative(solve(layers, x, engine(config(k, relaxation=relaxation, coarse_operator=operator), 24)), exact)
        for k in (1, 2, 3, 4)
    ]
    for direction in ("forward", "backward"):
        report = solver.report(direction)
        assert report is not None
        assert report.mode == "mgrit"
        assert len(report.residuals) == report.iterations == 4
        observed = [b / a for a, b in itertools.pairwise(report.residuals)]
        assert report.convergence_factors == pytest.approx(observed)
        assert max(observed) < 0.5
    assert all(b < 0.5 * a for a, b in itertools.pairwise(errors))


def test_a_diverging_sweep_reports_factors_above_one():
    """Layers far from one another at h = 1: rediscretised corrections grow, and the report says so."""
    layers, x = blocks(32, h=2.0), state()
    for layer in layers:
        for p in layer.parameters():
            p.data *= 2
    solver = engine(config(3, coarse_operator="rediscretize"), 32)
    solve(layers, x, solver)
    report = solver.report("forward")
    assert report is not None
    assert max(report.convergence_factors) > 1


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("relaxation", ["F", "FCF"])
@pytest.mark.parametrize("iterations", [1, 2])
def test_adjoint_is_mgrit_on_the_reversed_transposed_stack(operator, relaxation, iterations):
    """<adjoint(lam), v> = <lam, A v> where A is known: for linear layers the inexact adjoint sweep must be the same
    MGRIT run forward on the reversed stack of transposed layers (alike within an interval, so that its first layer
    is the first from both ends)."""
    generator = torch.Generator().manual_seed(5)
    interval = [torch.randn(6, 6, dtype=F64, generator=generator) / 3 for _ in range(4)]
    matrices = [interval[n // 4] for n in range(16)]
    layers = nn.ModuleList(Linear(a, 1 / 4) for a in matrices)
    transposed = nn.ModuleList(Linear(a.T, 1 / 4) for a in reversed(matrices))
    x, lam, v = state(seed=1), state(seed=2), state(seed=3)
    settings = {"relaxation": relaxation, "coarse_operator": operator}
    exact_forward = engine(config(0, backward_iterations=iterations, **settings), 16)
    (adjoint,) = torch.autograd.grad(solve(layers, x, exact_forward), x, lam)
    reversed_solve = solve(transposed, lam, engine(config(iterations, **settings), 16))
    left, right = (adjoint * v).sum(), (reversed_solve * v).sum()
    assert abs(left - right) <= 1e-12 * abs(right)
    (exact,) = torch.autograd.grad(serial(layers, x), x, lam)
    assert relative(adjoint, exact) > 1e-6  # inexact indeed


@pytest.mark.parametrize("operator", OPERATORS)
def test_adjoint_dot_product_identity_with_the_tangent(operator):
    """<adjoint(lam), v> = <lam, J v>, with J v by forward-mode differentiation of the serial stack."""
    layers, x, lam, v = blocks(10), state(seed=1), state(seed=2), state(seed=3)
    _, tangent = torch.func.jvp(lambda t: serial(layers, t), (x.detach(),), (v.detach(),))
    solver = engine(config(3, coarse_operator=operator), 10)
    (adjoint,) = torch.autograd.grad(solve(layers, x, solver), x, lam)
    left, right = (adjoint * v).sum(), (lam * tangent).sum()
    assert abs(left - right) <= 1e-12 * abs(right)


def test_damping_scales_the_correction():
    layers, x = blocks(8), state()
    plain, half, none = (
        solve(layers, x, engine(config(2, coarse_operator="identity", damping=g), 8)) for g in (0.0, 0.5, 1 - 1e-12)
    )
    # with two intervals and two iterations the result is exact whatever the damping: interval 0 has converged
    assert torch.equal(plain, half)
    assert torch.equal(plain, none)
    layers = blocks(12)
    plain, half, none = (
        solve(layers, x, engine(config(2, coarse_operator="identity", damping=g), 12)) for g in (0.0, 0.5, 1 - 1e-12)
    )
    assert relative(plain, half) > 1e-6
    assert relative(half, none) > 1e-6


@pytest.mark.parametrize(
    ("strategy", "micro_batches"), [("serial", 1), *itertools.product(["pipeline", "mgrit"], [1, 2, 3])]
)
def test_gradcheck(strategy, micro_batches):
    layers = blocks(6, dim=3)
    x = state(batch=3, tokens=2, dim=3)
    solver = engine(config(3, strategy=strategy, coarsening=2, micro_batches=micro_batches), 6)
    assert torch.autograd.gradcheck(lambda t: solve(layers, t, solver), (x,))
