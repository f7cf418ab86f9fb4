"""Damping chosen by residuals, on linear problems where undamped MGRIT diverges."""

import pytest
import torch
from torch import nn

from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.errors import ConfigurationError
from hf_layerpar.plan.damping import LARGEST, suggest_damping
from tests.problems import F64, Linear, engine, relative, serial, solve, state

LAYERS, COARSENING = 64, 4
INTERVALS = LAYERS // COARSENING


def contracting(strongest: float) -> nn.ModuleList:
    """Modes that shrink by 1 - h a a step, a from 0 to `strongest`: the identity overshoots each by another amount."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(6, 6, dtype=F64))[0]
    matrix = -basis @ torch.diag(torch.linspace(0, strongest, 6, dtype=F64)) @ basis.T
    return nn.ModuleList(Linear(matrix, 0.1) for _ in range(LAYERS))


def run(layers: nn.ModuleList, damping: float, iterations: int, operator: str = "identity"):
    """(error of the end state, report) of one forward."""
    settings = {"coarsening": COARSENING, "forward_iterations": iterations, "coarse_operator": operator}
    solver = engine(LayerParallelConfig(strategy="mgrit", damping=damping, **settings), LAYERS)
    x = state()
    y = solve(layers, x, solver)
    report = solver.report("forward")
    assert report is not None
    return relative(y, serial(layers, x)), report


@pytest.mark.parametrize("strongest", [0.8, 1.5, 2.5])
def test_the_suggestion_makes_a_diverging_sweep_converge(strongest):
    layers = contracting(strongest)
    before, undamped = run(layers, 0.0, 5)
    assert undamped.convergence_factors[0] > 1
    gamma = suggest_damping(undamped.residuals, INTERVALS)
    assert 0 < gamma < LARGEST
    after, damped = run(layers, gamma, 5)
    assert max(damped.convergence_factors) < 1
    assert after < 0.2 * before


def test_a_coarse_operator_that_amplifies_is_damped_more():
    """One step of rediscretize overshoots into growth (|g| > 1), which the rule doesn't assume: still it converges."""
    torch.manual_seed(0)
    layers = nn.ModuleList(Linear(-torch.diag(torch.linspace(0.1, 3, 6, dtype=F64)), 0.25) for _ in range(LAYERS))
    _, undamped = run(layers, 0.0, 3, "rediscretize")
    assert undamped.convergence_factors[0] > 1
    gamma = suggest_damping(undamped.residuals, INTERVALS)
    assert gamma > 0.5
    _, damped = run(layers, gamma, 3, "rediscretize")
    assert max(damped.convergence_factors) < 1


def test_one_mode_gives_its_overshoot_back():
    """With a single mode the model is exact: from any damping the same overshoot K is found, and K / 2 kept."""
    layers = nn.ModuleList(Linear(-torch.eye(6, dtype=F64), 0.1) for _ in range(LAYERS))
    overshoot = 1 - 0.9**COARSENING
    for damping in (0.0, 0.05, overshoot / 2):
        _, report = run(layers, damping, 2)
        assert suggest_damping(report.residuals, INTERVALS, damping) == pytest.approx(overshoot / 2)


def test_a_converging_sweep_is_left_alone():
    layers = contracting(0.05)
    _, report = run(layers, 0.0, 3)
    assert suggest_damping(report.residuals, INTERVALS) == 0
    _, report = run(layers, 0.01, 3)
    assert suggest_damping(report.residuals, INTERVALS, 0.01) == 0  # and one that needs no damping any more is freed


def test_extremes():
    assert suggest_damping([1.0, float("inf")], 8) == LARGEST
    assert suggest_damping([1.0, float("nan")], 8) == LARGEST
    assert suggest_damping([1.0, 1e9], 8) == LARGEST
    assert suggest_damping([0.0, 0.0], 8) == 0
    assert suggest_damping([1.0, 0.0], 2) == 0
    with pytest.raises(ConfigurationError, match=r"from 1 residuals on 8 intervals.*iterations to 2 or more"):
        suggest_damping([1.0], 8)
    with pytest.raises(ConfigurationError, match="on 0 intervals"):
        suggest_damping([1.0, 2.0], 0)
