"""The fitted coarse operators: what they learn, when, and what they leave alone."""

import copy
import math

import pytest
import torch
from torch import nn

from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.run.fits import RunningFits
from tests.problems import F64, Linear, blocks, engine, gradients, relative, serial, solve, state

FITTED = ("mean", "linear")


class Drift(nn.Module):
    """x + b: every increment is a constant."""

    def __init__(self, dim: int, seed: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(dim, dtype=F64, generator=torch.Generator().manual_seed(seed)))

    def forward(self, x):
        return x + self.shift


def mgrit(operator: str, iterations: int = 1, **settings) -> LayerParallelConfig:
    both = {"forward_iterations": iterations, "backward_iterations": iterations}
    return LayerParallelConfig(strategy="mgrit", coarse_operator=operator, **(both | settings))


def learn(layers, solver, solves: int = 2) -> None:
    for seed in range(solves):
        x = state(seed=10 + seed)
        gradients(solve(layers, x, solver), [x])


def both_errors(layers, solver) -> tuple[float, float]:
    """Of the end state and of the gradient at the start, on a state that the fits have not seen."""
    x = state()
    y, exact = solve(layers, x, solver), serial(layers, x)
    return relative(y, exact), relative(gradients(y, [x])[0], gradients(exact, [x])[0])


@pytest.mark.parametrize("operator", FITTED)
def test_before_anything_is_learnt_it_is_the_identity(operator):
    layers, x = blocks(12), state()
    plain, fitted = (solve(layers, x, engine(mgrit(o, 2), 12)) for o in ("identity", operator))
    assert torch.equal(plain, fitted)
    plain, fitted = (
        gradients(solve(layers, x, engine(mgrit(o, 2), 12)), [x, *layers.parameters()]) for o in ("identity", operator)
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, fitted, strict=True))


@pytest.mark.parametrize("levels", [2, 3])
def test_a_constant_drift_is_learnt_by_one_solve(levels):
    layers = nn.ModuleList(Drift(6, n) for n in range(12))
    solver = engine(mgrit("mean", levels=levels, coarsening=2), 12)
    assert both_errors(layers, solver)[0] > 0.1
    assert both_errors(layers, solver)[0] < 1e-14


@pytest.mark.parametrize("levels", [2, 3])
def test_linear_layers_are_learnt_in_both_directions(levels):
    """To the ridge of the regression."""
    generator = torch.Generator().manual_seed(0)
    layers = nn.ModuleList(Linear(torch.randn(6, 6, dtype=F64, generator=generator) / 3, 1 / 4) for _ in range(12))
    solver = engine(mgrit("linear", levels=levels, coarsening=2), 12)
    before = both_errors(layers, solver)
    learn(layers, solver, 8)
    after = both_errors(layers, solver)
    assert all(a < 0.05 * b for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("relaxation", ["F", "FCF"])
@pytest.mark.parametrize("operator", FITTED)
@pytest.mark.parametrize(("levels", "coarsening"), [(2, 4), (2, 3), (3, (3, 2))])
def test_exact_after_as_many_iterations_as_intervals_whatever_was_learnt(operator, relaxation, levels, coarsening):
    layers, x = blocks(13), state()
    exact = serial(layers, x)
    expected = [exact, *gradients(exact, [x, *layers.parameters()])]
    first = coarsening if isinstance(coarsening, int) else coarsening[0]
    intervals = math.ceil(13 / first)
    enough = intervals if relaxation == "F" else math.ceil((intervals - 1) / 2) + 1
    for iterations, is_exact in ((enough, True), (enough - 1, False)):
        settings = {"levels": levels, "coarsening": coarsening, "relaxation": relaxation}
        solver = engine(mgrit(operator, iterations, **settings), 13)
        learn(layers, solver)
        y = solve(layers, x, solver)
        found = [y, *gradients(y, [x, *layers.parameters()])]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)) == is_exact


def test_corrections_converge_faster_with_a_linear_fit():
    generator = torch.Generator().manual_seed(0)
    layers = nn.ModuleList(Linear(torch.randn(6, 6, dtype=F64, generator=generator) / 3, 1 / 8) for _ in range(24))
    residuals = {}
    for operator in ("identity", "linear"):
        solver = engine(mgrit(operator, 3), 24)
        learn(layers, solver, 8)
        both_errors(layers, solver)
        for direction in ("forward", "backward"):
            report = solver.report(direction)
            assert report is not None
            residuals[operator, direction] = report.residuals
    for direction in ("forward", "backward"):
        ratios = [a / b for a, b in zip(residuals["linear", direction], residuals["identity", direction], strict=True)]
        assert 0.1 > ratios[0] > ratios[1] > ratios[2]


@pytest.mark.parametrize("operator", FITTED)
def test_only_training_solves_are_learnt_from(operator):
    layers, x = blocks(12), state()
    solver = engine(mgrit(operator), 12)
    learn(layers, solver)
    before = solver.fits.state_dict()
    solve(layers.eval(), x, solver)
    with torch.no_grad():
        solve(layers.train(), x, solver)
    solver.learning = False
    solve(layers, x, solver)
    assert same(solver.fits.state_dict(), before)
    solver.learning = True
    solve(layers, x, solver)
    assert not same(solver.fits.state_dict(), before)


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(a, b) for k in one for a, b in zip(one[k], other[k], strict=True)
    )


@pytest.mark.parametrize("operator", FITTED)
def test_state_restores_every_bit(operator):
    layers, x = blocks(12), state()
    solver, other = engine(mgrit(operator), 12), engine(mgrit(operator), 12)
    learn(layers, solver)
    other.load_fits(copy.deepcopy(solver.fits.state_dict()))
    for _ in range(2):  # what the first one observes goes on from the restored state
        results = [[y := solve(layers, x, s), *gradients(y, [x])] for s in (solver, other)]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_fits_of_other_intervals_stay():
    """A change of coarsening starts new fits and keeps the old ones for the way back."""
    layers = blocks(12)
    solver = engine(mgrit("mean", coarsening=4), 12)
    learn(layers, solver)
    solver.settings.next_config = mgrit("mean", coarsening=6)
    learn(layers, solver)
    assert {key[2:] for key in solver.fits.state_dict()} == {(0, 4), (4, 8), (0, 6)}


@pytest.mark.parametrize("operator", FITTED)
def test_a_solve_that_overflowed_is_not_learnt(operator):
    layers = blocks(12)
    solver = engine(mgrit(operator), 12)
    learn(layers, solver)
    x = torch.full((3, 4, 6), float("nan"), dtype=F64, requires_grad=True)
    gradients(solve(layers, x, solver), [x])
    assert all(error < 1 for error in both_errors(layers, solver))


def test_a_sample_of_tokens_is_observed():
    """A sample of the tokens counts, from all over the batch."""
    positions = torch.arange(64, dtype=F64)[:, None].expand(32, 64, 16).clone()
    fits, key = RunningFits(), ("mean", "forward", 0, 4)
    fits.observe(key, 0, torch.zeros(32, 64, 16, dtype=F64), positions)
    count, total = fits.state_dict()[key]
    assert float(count) == 64
    assert float(total[0, 0] / count) == pytest.approx(float(positions.mean()), rel=0.2)


def test_a_channel_that_never_moves_is_no_obstacle():
    fits, key = RunningFits(), ("linear", "backward", 0, 4)
    start = torch.randn(4, 8, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    start[..., 1] = 0
    fits.observe(key, 0, start, 1.5 * start)
    fits.commit()
    assert relative(fits.apply(key, start), 1.5 * start) < 1e-2


@pytest.mark.parametrize("operator", FITTED)
def test_autocast_does_not_narrow_the_fits(operator):
    fits, key = (RunningFits(), RunningFits()), (operator, "forward", 0, 4)
    start = torch.randn(4, 8, 3, generator=torch.Generator().manual_seed(0))
    results = []
    for one, cast in zip(fits, (False, True), strict=True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
            one.observe(key, 0, start, 1.5 * start + 1)
            one.commit()
            results.append(one.apply(key, start))
    assert torch.equal(*results)


def test_sixteen_bit_states_keep_their_dtype():
    fits, key = RunningFits(), ("linear", "forward", 0, 4)
    start = torch.randn(4, 8, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    fits.observe(key, 0, start, 1.5 * start)
    fits.commit()
    assert fits.apply(key, start).dtype == torch.bfloat16
    assert relative(fits.apply(key, start).float(), 1.5 * start.float()) < 1e-2
