"""Steps against exact solutions and the serial oracle, on one process in float64."""

import itertools
import math

import pytest
import torch
from torch import nn

from hf_layerpar.config import LayerParallelConfig
from tests.problems import (
    F64,
    Linear,
    Solved,
    assert_same,
    blocks,
    gradients_of,
    loss_of,
    relative,
    seeded_with,
    serial,
    serial_results,
    state,
)

OPERATORS = ("rediscretize", "aggregate", "identity")
GRIDS = (4, 3, (3, 2), (2, 2), (2, 2, 2))


def mgrit(iterations: int, **settings) -> LayerParallelConfig:
    both = {"forward_iterations": iterations, "backward_iterations": iterations}
    return LayerParallelConfig(**({"strategy": "mgrit"} | both | settings))


def matrix(dim: int = 6) -> torch.Tensor:
    a = torch.randn(dim, dim, dtype=F64, generator=torch.Generator().manual_seed(0))
    return (a + a.T) / 4


@pytest.mark.parametrize(
    "config", [LayerParallelConfig(), *(mgrit(4, coarse_operator=o) for o in OPERATORS)], ids=lambda c: c.strategy
)
def test_linear_problem_has_its_closed_form(config):
    """Forward x (I + h A)^n, and backward lam (I + h A)^n, as A is symmetric."""
    a, h, n = matrix(), 1 / 16, 16
    layers = nn.ModuleList(Linear(a, h) for _ in range(n))
    x, lam = state(), state(seed=2)
    found = gradients_of(config, layers, x, loss=seeded_with(lam)).results
    values, vectors = torch.linalg.eigh(a)
    power = vectors @ torch.diag((1 + h * values) ** n) @ vectors.T
    assert relative(found["y"], x @ power) < 1e-13
    assert relative(found["x"], lam @ power) < 1e-13


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("relaxation", ["F", "FCF"])
@pytest.mark.parametrize("coarsening", GRIDS)
@pytest.mark.parametrize("num_layers", [16, 13])
def test_exact_after_as_many_iterations_as_intervals(operator, relaxation, coarsening, num_layers):
    """n intervals: exact after n iterations (F) or ceil((n-1)/2)+1 (FCF), forward and adjoint; bit-equal, since a
    converged interval is never combined with a correction of zero."""
    layers, x = blocks(num_layers), state()
    exact = serial_results(layers, x)
    first = coarsening if isinstance(coarsening, int) else coarsening[0]
    intervals = math.ceil(num_layers / first)
    enough = intervals if relaxation == "F" else math.ceil((intervals - 1) / 2) + 1
    settings = {"coarsening": coarsening, "relaxation": relaxation, "coarse_operator": operator}
    assert_same(gradients_of(mgrit(enough, **settings), layers, x).results, exact)
    fewer = gradients_of(mgrit(enough - 1, **settings), layers, x).results
    assert not torch.equal(fewer["y"], exact["y"])
    exact_forward = mgrit(enough - 1, **settings | {"forward_iterations": enough})
    fewer = gradients_of(exact_forward, layers, x).results
    assert torch.equal(fewer["y"], exact["y"])
    if num_layers % first != 1 or operator == "identity":  # else the adjoint starts with a coarse step that is exact
        assert not torch.equal(fewer["x"], exact["x"])


@pytest.mark.parametrize("operator", OPERATORS)
def test_each_iteration_makes_one_more_interval_exact(operator):
    layers, x = blocks(12), state()
    exact = [x]
    for layer in layers:
        exact.append(layer(exact[-1]))
    for k in (1, 2, 3):  # layers that do nothing carry the state after interval k to the end
        idle = nn.ModuleList([*layers[: 4 * k], *(nn.Identity() for _ in range(12 - 4 * k))])
        for iterations in (1, 2, 3):
            y = gradients_of(mgrit(iterations, coarse_operator=operator), idle, x).results["y"]
            # C-point k needs k corrections; the end of the last interval needs the C-point it starts at
            assert (relative(y, exact[4 * k]) < 1e-14) == (iterations >= min(k + 1, 3))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("relaxation", ["F", "FCF"])
def test_residuals_and_errors_show_convergence(operator, relaxation):
    layers, x = blocks(24, h=1 / 24), state()

    def solved(iterations: int) -> Solved:
        return gradients_of(mgrit(iterations, relaxation=relaxation, coarse_operator=operator), layers, x)

    exact, runs = serial_results(layers, x), [solved(k) for k in (1, 2, 3, 4)]
    assert runs[1].residuals("forward") == pytest.approx(runs[3].residuals("forward")[:2], rel=1e-12)
    for direction, name in (("forward", "y"), ("backward", "x")):
        residuals = runs[3].residuals(direction)
        assert len(residuals) == 4
        errors = [relative(run.results[name], exact[name]) for run in runs]
        for found in (residuals, errors):
            assert all(b < 0.5 * a for a, b in itertools.pairwise(found))


def test_a_diverging_sweep_shows_in_the_residuals():
    """Layers far from one another at h = 1: rediscretised corrections grow."""
    layers, x = blocks(32, h=2.0), state()
    for layer in layers:
        for p in layer.parameters():
            p.data *= 2
    residuals = gradients_of(mgrit(3, coarse_operator="rediscretize"), layers, x).residuals("forward")
    assert max(b / a for a, b in itertools.pairwise(residuals)) > 1


def test_an_exact_step_has_no_residuals():
    layers, x = blocks(8), state()
    for config in (LayerParallelConfig(), mgrit(0)):
        assert gradients_of(config, layers, x).outcome.residuals == {}
    half = gradients_of(mgrit(0, backward_iterations=2), layers, x)
    assert [len(half.residuals(d)) for d in ("forward", "backward")] == [0, 2]


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
    exact_forward = mgrit(iterations, **settings | {"forward_iterations": 0})
    adjoint = gradients_of(exact_forward, layers, x, loss=seeded_with(lam)).results["x"]
    reversed_solve = gradients_of(mgrit(iterations, **settings), transposed, lam).results["y"]
    left, right = (adjoint * v).sum(), (reversed_solve * v).sum()
    assert abs(left - right) <= 1e-12 * abs(right)
    exact = serial_results(layers, x, loss=seeded_with(lam))["x"]
    assert relative(adjoint, exact) > 1e-6  # inexact indeed


@pytest.mark.parametrize("operator", OPERATORS)
def test_adjoint_dot_product_identity_with_the_tangent(operator):
    """<adjoint(lam), v> = <lam, J v>, with J v by forward-mode differentiation of the serial stack."""
    layers, x, lam, v = blocks(10), state(seed=1), state(seed=2), state(seed=3)
    _, tangent = torch.func.jvp(lambda t: serial(layers, t), (x.detach(),), (v.detach(),))
    adjoint = gradients_of(mgrit(3, coarse_operator=operator), layers, x, loss=seeded_with(lam)).results["x"]
    left, right = (adjoint * v).sum(), (lam * tangent).sum()
    assert abs(left - right) <= 1e-12 * abs(right)


@pytest.mark.parametrize("strategy", ["pipeline", "mgrit"])
@pytest.mark.parametrize("micro_batches", [1, 2, 3])
def test_gradients_are_differences_of_the_loss(strategy, micro_batches):
    """By the state and by all parameters at once, along a random direction."""
    layers, x = blocks(6, dim=3), state(batch=3, tokens=2, dim=3)
    config = mgrit(3, strategy=strategy, coarsening=2, micro_batches=micro_batches)
    found = gradients_of(config, layers, x).results
    generator = torch.Generator().manual_seed(2)
    leaves = {"x": x, **dict(layers.named_parameters())}
    ways = {name: torch.randn(leaf.shape, dtype=F64, generator=generator) for name, leaf in leaves.items()}
    values = []
    with torch.no_grad():
        for shift in (1e-6, -2e-6):
            for name, leaf in leaves.items():
                leaf += shift * ways[name]
            values.append(float(loss_of(serial(layers, x))))
    slope = sum(float((found[name] * way).sum()) for name, way in ways.items())
    assert slope == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-7)
