"""Steps against exact solutions and the serial oracle, on one process in float64."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch import nn

from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.plan.part import RankPart
from hf_layerpar.run.increments import Increments
from hf_layerpar.run.krylov import combinations, products, weights
from hf_layerpar.run.layers import Common
from hf_layerpar.run.step import Step
from hf_layerpar.run.transport import LocalTransport
from recipes.benchmarks.bare import BareStack
from tests.problems import (
    F64,
    Linear,
    Solved,
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


# ---- exact layers between, and Krylov acceleration
def far_apart(num_layers: int = 18) -> nn.ModuleList:
    """Layers with large steps, of which one grows the state: MGRIT of few iterations is far off."""
    layers = blocks(num_layers, h=1.0)
    with torch.no_grad():
        for p in layers[7].parameters():
            p *= 4
    return layers


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("relaxation", ["F", "FCF"])
@pytest.mark.parametrize("acceleration", ["none", "krylov"])
def test_exact_layers_between(operator, relaxation, acceleration):
    """Intervals 1-3, 4-5, 7-9, 10-11, 13-15 between exact layers: exact after five iterations, bit for bit, and after
    one if they do nothing."""
    layers, x = far_apart(), state()
    settings = {"coarsening": 3, "relaxation": relaxation, "coarse_operator": operator, "acceleration": acceleration}
    buffers = (1, 6, 12, 16, 1)
    assert_same(gradients_of(mgrit(5, **settings), layers, x, buffers=buffers).results, serial_results(layers, x))
    fewer = gradients_of(mgrit(0, **settings | {"backward_iterations": 2}), layers, x, buffers=buffers)
    assert relative(fewer.results["x"], serial_results(layers, x)["x"]) > 1e-6
    idle = nn.ModuleList(
        layer if n in (0, 6, 12, 16, 17) else Linear(matrix() * 0, 1.0) for n, layer in enumerate(layers)
    )
    once = gradients_of(mgrit(1, **settings), idle, x, buffers=buffers).results
    assert_same(once, serial_results(idle, x), 1e-12)


def richardson(layers, x, lam, c, operator, tries, row):
    """Iterations of the adjoint of one row, written out on lists: for each try the C-points, and the residuals at them,
    over the norms of the first try's. Linear in lam, so also what is left of it, F_j and G_j, as functions."""
    states = [x.detach()[row]]
    for layer in layers:
        states.append(layer(states[-1]).detach())

    def vjp(n, v):
        return torch.func.vjp(layers[n], states[n])[1](v)[0].detach()

    intervals = [range(max(0, b - c), b) for b in range(len(layers), 0, -c)]  # counted from the front, met from behind
    assert len(layers) % c == 0

    def fine(j, v):
        for n in reversed(intervals[j]):
            v = vjp(n, v)
        return v

    def coarse(j, v):
        own = {"aggregate": intervals[j], "rediscretize": intervals[j][:1], "identity": ()}[operator]
        weight = c if operator == "rediscretize" else 1
        return v + sum((weight * (vjp(n, v) - v) for n in own), torch.zeros_like(v))

    last = len(intervals) - 1
    guess = [lam[row]]
    for j in range(last):
        guess.append(coarse(j, guess[-1]))
    scale = torch.stack([v.norm() for v in guess[1:]])[:, None, None]

    def residual(points):
        return torch.stack([fine(j, points[j]) - points[j + 1] for j in range(last)])

    def correction(r):
        d = [torch.zeros_like(lam[row])]
        for j in range(last):
            d.append(coarse(j, d[-1]) + r[j])
        return torch.stack(d)

    points, found = torch.stack(guess), []
    for _ in range(tries):
        r = residual(points)
        found.append((points, r / scale))
        points = points + correction(r)
    return found, residual, correction, scale, fine


def by_gcr(found, residual, correction, scale):
    """The generalised conjugate residual method with MGRIT as preconditioner, from the first of the tries."""
    points, r = found[0]
    directions = []
    for _ in range(len(found) - 1):
        p = correction(r * scale)
        image = -residual(torch.cat([torch.zeros_like(p[:1]), p[1:]])) / scale
        for q, other in directions:
            along = (image * other).sum()
            p, image = p - along * q, image - along * other
        norm = image.norm()
        p, image = p / norm, image / norm
        directions.append((p, image))
        along = (r * image).sum()
        points, r = points + along * p, r - along * image
    return points, r


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("iterations", [2, 3, 4])
def test_krylov_acceleration_is_gcr(operator, iterations):
    """The adjoint of each row is what GCR gives with MGRIT as preconditioner; its residual is never larger than that of
    any of the iterations, and cutting the batch changes nothing."""
    layers, x, lam = far_apart(), state(), state(seed=2)
    config = mgrit(0, backward_iterations=iterations, coarsening=3, coarse_operator=operator, acceleration="krylov")
    solved = gradients_of(config, layers, x, loss=seeded_with(lam))
    squares = torch.zeros(())
    for row in range(len(x)):
        found, residual, correction, scale, fine = richardson(layers, x, lam.detach(), 3, operator, iterations, row)
        points, r = by_gcr(found, residual, correction, scale)
        assert all(r.norm() <= other.norm() * (1 + 1e-9) for _, other in found)
        assert relative(fine(len(points) - 1, points[-1]), solved.results["x"][row]) < 1e-7
        squares = squares + (r * scale).square().sum()
    assert solved.residuals("backward")[-1] == pytest.approx(float(squares.sqrt()), rel=1e-6)
    pieces = dataclasses.replace(config, micro_batches=3)
    assert relative(gradients_of(pieces, layers, x, loss=seeded_with(lam)).results["x"], solved.results["x"]) < 1e-12


@pytest.mark.parametrize("penalty", [0.0, 0.5])
def test_combined_tries_have_the_combined_residual(penalty):
    """Also where a penalty makes the adjoint affine: the weights add up to 1."""
    layers, x = far_apart(12), state()
    config = mgrit(0, backward_iterations=3, coarsening=2, acceleration="krylov", increment_penalty=penalty)
    stack = BareStack(calls_of(layers), x, lambda y, rows: loss_of(y, rows, len(x)))
    plan = stack.plan(config, (0,) * 12, 1)
    penalties = Increments(range(12), [len(x)], penalty, 1.0)
    step = Step(RankPart.of(plan, 0), stack, LocalTransport(), Common(), device=x.device, penalty=lambda k: penalties)
    step.work(step.part, keep=set(plan.values))
    (multiplied,) = (t for t in plan.tasks if t.kind == "products")
    gram = step.values[multiplied.output].sum(1)
    by_row = weights(gram, F64)
    assert torch.allclose(by_row.sum(1), torch.ones(len(x), dtype=F64))
    given = [step.values[v] for v in multiplied.inputs]
    residuals = [a - b for a, b in zip(given[::2], given[1::2], strict=True)]
    combined = [
        sum(w[:, None, None] * r for w, r in zip(by_row.T, residuals[3 * j : 3 * j + 3], strict=True)) for j in range(5)
    ]
    squares = sum(float(r.square().sum()) for r in combined)
    found = step.outcome.residuals[0, "backward"][-1]
    assert float(found) == pytest.approx(squares, rel=1e-9)
    none = gradients_of(dataclasses.replace(config, acceleration="none"), layers, x)
    assert float(found) ** 0.5 < none.residuals("backward")[-1]


def test_products_of_what_is_nothing_or_no_number():
    """A row whose adjoint is zero stays zero; one with an infinite try is NaN, as it would be without acceleration."""
    generator = torch.Generator().manual_seed(0)
    tries = [torch.randn(3, 2, 4, generator=generator) for _ in range(4)]
    for t in tries:
        t[0] = 0.0
    tries[2][1, 0, 0] = torch.inf
    gram = products(tries, [0], (1, 3, 3))
    found = weights(gram.sum(1), torch.float32)
    assert found[0].tolist() == [1.0, 0.0]
    assert found[1].isnan().all()
    (made,) = combinations(gram, tries[1::2])
    assert made[0].eq(0).all()
    assert made[1].isnan().all()
    assert made[2].isfinite().all()


@pytest.mark.parametrize("operator", OPERATORS)
def test_adjoint_dot_product_identity_with_the_tangent(operator):
    """<adjoint(lam), v> = <lam, J v>, with J v by forward-mode differentiation of the serial stack."""
    layers, x, lam, v = blocks(10), state(seed=1), state(seed=2), state(seed=3)
    _, tangent = torch.func.jvp(lambda t: serial(layers, t), (x.detach(),), (v.detach(),))
    left, right = [], (lam * tangent).sum()
    for settings, buffers in (({}, (0, 0)), ({"acceleration": "krylov"}, (1, 5, 0))):
        config = mgrit(3, coarse_operator=operator, **settings)
        adjoint = gradients_of(config, layers, x, loss=seeded_with(lam), buffers=buffers).results["x"]
        left.append((adjoint * v).sum())
    assert all(abs(found - right) <= 1e-12 * abs(right) for found in left)


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
