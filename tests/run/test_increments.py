"""The increment penalty against serial autograd of loss + penalty, in float64."""

import pytest
import torch
from torch import Tensor, nn

from hf_layerpar import convert_to_ode, parallelize
from hf_layerpar.config import LayerParallelConfig
from tests import zoo
from tests.problems import Solved, assert_same, blocks, gradients_of, leaves_of, loss_of, relative, seeded_with, state

ALPHA = 3.0
MGRIT = {"strategy": "mgrit", "forward_iterations": 3, "backward_iterations": 3}


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


def results_with_penalty(layers: nn.ModuleList, x: Tensor, buffers=(0, 0)) -> tuple[dict[str, Tensor], float]:
    leaves = leaves_of(layers, x)
    y, penalty = serial_with_penalty(layers, x, buffers)
    grads = torch.autograd.grad(loss_of(y) + penalty, list(leaves.values()))
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}, float(penalty.detach())


def penalised(layers: nn.ModuleList, x: Tensor, **settings) -> Solved:
    more = {k: settings.pop(k) for k in ("buffers", "recompute", "loss") if k in settings}
    return gradients_of(LayerParallelConfig(increment_penalty=ALPHA, **settings), layers, x, **more)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"micro_batches": 2},
        {"micro_batches": 2, "schedule": "zb_h1"},
        {"buffers": (1, 2)},
        {"recompute": True},
        *({**MGRIT, "coarse_operator": o} for o in ("rediscretize", "aggregate", "identity")),
        {**MGRIT, "relaxation": "FCF", "buffers": (2, 1), "micro_batches": 3, "recompute": True},
        {**MGRIT, "coarsening": (4, 2)},
    ],
    ids=str,
)
def test_gradients_are_those_of_loss_and_penalty(settings):
    """Also of MGRIT with as many iterations as intervals: coarse steps are built of the same affine steps."""
    layers, x = blocks(10), state()
    solved = penalised(layers, x, **settings)
    expected, penalty = results_with_penalty(layers, x, settings.get("buffers", (0, 0)))
    assert relative(solved.results["y"], expected["y"]) < 1e-14
    assert_same(solved.results, expected, 1e-12)
    assert solved.penalty == pytest.approx(penalty, rel=1e-12)
    assert solved.loss == pytest.approx(float(loss_of(expected["y"])), rel=1e-12)  # without the penalty


def test_the_penalty_matters_and_is_off_by_default():
    layers, x = blocks(6), state()
    with_penalty, without = penalised(layers, x), gradients_of(LayerParallelConfig(), layers, x)
    for name in leaves_of(layers, x):
        assert relative(with_penalty.results[name], without.results[name]) > 1e-4
    assert without.penalty is None


def test_differences_of_the_penalty_alone():
    """With a loss of zero the step's gradient is the penalty's own: compared with differences of its value."""
    layers, x = blocks(4, dim=3), state(batch=2, tokens=2, dim=3)
    grad = penalised(layers, x, loss=seeded_with(torch.zeros_like(x))).results["x"]
    points = [x.detach()]
    for layer in layers:
        points.append(layer(points[-1]).detach())
    sizes = [point.square().sum(-1) for point in points]
    direction = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    step = 1e-6
    up, down = (serial_with_penalty(layers, x + sign * step * direction, sizes=sizes)[1] for sign in (1, -1))
    assert float((grad * direction).sum()) == pytest.approx(float((up - down).detach()) / (2 * step), rel=1e-7)


def test_a_token_whose_state_is_zero_counts_nothing():
    layers, x = blocks(4), state().detach()
    x[0, 0] = 0
    x.requires_grad_()
    solved = penalised(layers, x, buffers=(0, 3))
    assert solved.penalty is not None
    assert 0 < solved.penalty < float("inf")
    assert all(tensor.isfinite().all() for tensor in solved.results.values())


def test_inexact_and_exact_steps_penalise_alike():
    """The inexact gradient nears that of loss + penalty, not that of the loss."""
    layers, x = blocks(12, h=1 / 12), state()
    expected, _ = results_with_penalty(layers, x)
    errors = []
    for iterations in (1, 2):
        both = {"forward_iterations": iterations, "backward_iterations": iterations}
        found = penalised(layers, x, strategy="mgrit", coarse_operator="aggregate", **both).results
        errors.append(relative(found["x"], expected["x"]))
    assert errors[1] < 0.1 * errors[0] < 0.01


# ---- of a model
def parallel(**settings):
    """(model, batch, handle), one buffer layer in front."""
    model, batch = zoo.build("gpt2")
    model = convert_to_ode(model.eval().double(), buffers=(1, 0))
    return model, batch, parallelize(model, LayerParallelConfig(**settings))


def model_step(micro_batches: int = 1, **scales: float) -> tuple[float, float, dict[str, Tensor]]:
    """Loss, penalty and gradients."""
    model, batch, handle = parallel(increment_penalty=ALPHA, micro_batches=micro_batches)
    loss = float(handle.train_step(batch, **scales))
    return loss, handle.report().penalty, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_the_penalty_is_scaled_as_the_loss():
    loss, penalty, whole = model_step()
    same_loss, same_penalty, half = model_step(scale=0.5)
    assert (loss, penalty) == (same_loss, same_penalty)
    assert penalty > 0
    assert_same({name: 2 * grad for name, grad in half.items()}, whole, 1e-12)


def test_the_penalty_may_be_scaled_apart():
    (_, _, whole), (_, _, of_loss), (_, _, of_penalty) = (
        model_step(),
        model_step(penalty_scale=0.0),
        model_step(scale=0.0, penalty_scale=1.0),
    )
    norm = sum(float(grad.square().sum()) for grad in whole.values()) ** 0.5
    for name, grad in whole.items():
        # the loss of causal heads is computed in float32
        assert float((of_loss[name] + of_penalty[name] - grad).norm()) < 1e-6 * norm
    assert max(float((of_loss[name] - grad).norm()) for name, grad in whole.items()) > 1e-3 * norm


def test_micro_batches_are_penalised_as_the_batch():
    _, penalty, whole = model_step()
    _, same_penalty, cut = model_step(2)
    assert same_penalty == pytest.approx(penalty, rel=1e-12)
    # the loss of causal heads is computed in float32
    norm = sum(float(grad.square().sum()) for grad in whole.values()) ** 0.5
    assert max(float((cut[name] - grad).norm()) for name, grad in whole.items()) < 1e-6 * norm


def test_the_loss_that_is_returned_is_without_it():
    model, batch, handle = parallel(increment_penalty=ALPHA)
    plain, _, exact = parallel()
    assert float(handle.train_step(batch)) == float(exact.train_step(batch))
    assert exact.report().penalty is None
    with torch.no_grad():
        assert float(model(**batch).loss) == float(plain(**batch).loss)
