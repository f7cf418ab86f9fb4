"""Readings of single layers against what is known in closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_layerpar.diagnosis.layers import LayerReader, increment_of, lipschitz
from hf_layerpar.errors import UnsupportedModelError
from hf_layerpar.ode.convert import borrowed_view
from tests import zoo
from tests.problems import F64, Block, Linear


def start(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(1))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_a_linear_layer_has_the_spectral_norm_of_its_matrix():
    matrix = start(6, 6)
    layer = Linear(matrix, h=0.25)
    found = lipschitz(lambda x: layer(x) - x, start(3, 4, 6), iterations=60, generator=generator())
    assert found == pytest.approx(0.25 * float(torch.linalg.matrix_norm(matrix, 2)), rel=1e-6)


def test_it_grows_with_the_iterations_and_never_passes_the_true_value():
    layer, x = Block(6, h=1.0).to(F64), start(1, 2, 6)
    jacobian = torch.autograd.functional.jacobian(lambda s: layer(s) - s, x).view(12, 12)
    true = float(torch.linalg.matrix_norm(jacobian, 2))
    found = [lipschitz(lambda s: layer(s) - s, x, iterations=k, generator=generator()) for k in (1, 3, 10, 200)]
    assert found == sorted(found)
    assert found[0] < 0.99 * true
    assert found[-1] == pytest.approx(true, rel=1e-6)


def test_the_largest_row_of_the_batch_counts():
    scales = torch.tensor([1.0, 5.0, 2.0], dtype=F64).view(3, 1, 1)
    assert lipschitz(lambda x: scales * x, start(3, 2, 4)) == pytest.approx(5.0)


def test_a_constant_has_none():
    assert lipschitz(torch.ones_like, start(2, 3, 4)) == 0.0
    assert lipschitz(lambda x: 0 * x, start(2, 3, 4)) == 0.0
    assert lipschitz(lambda x: x - x.detach(), start(2, 3, 4)) == pytest.approx(1.0)


def test_dropout_is_one_mask():
    """Each evaluation of the layer would draw another mask; the estimate is that of a single one."""
    torch.manual_seed(0)
    dropout = torch.nn.Dropout(0.5)
    assert lipschitz(dropout, start(2, 3, 4), iterations=5) == pytest.approx(2.0)


def test_what_can_not_be_differentiated_twice_is_refused():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            return 2 * grad

    with pytest.raises(UnsupportedModelError, match="attn_implementation"):
        lipschitz(Once.apply, start(1, 2, 3))


@pytest.mark.parametrize("name", zoo.NAMES)
def test_every_family_can_be_read(name):
    """Also that the reader's forward is the model's own, and an exact Jacobian for one family's layer."""
    model, inputs = zoo.build(name, layers=3)
    model.eval()
    with torch.no_grad():
        expected = model(**inputs).loss
    with borrowed_view(model) as view:
        readers = [LayerReader(stack, iterations=3) for stack in view.stacks]
        for stack, reader in zip(view.stacks, readers, strict=True):
            stack.solver = reader
        with torch.no_grad():
            assert torch.equal(model(**inputs).loss, expected)
    for reader in readers:
        assert [(r.stack, r.index) for r in reader.readings] == [(reader.stack.path, n) for n in range(3)]
        for r in reader.readings:
            assert r.step_size == 1
            assert 0 < r.lipschitz < float("inf")
            assert r.outlier >= 1
            assert abs(r.growth - 1) <= r.increment + 1e-6  # the triangle inequality


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_real_layer_against_its_jacobian(attention):
    model, inputs = zoo.build("gpt2", layers=1, attention=attention)
    model.double().eval()
    calls = []

    def keep(recorded, x):
        calls.append((recorded[0], x))
        return x

    with borrowed_view(model) as view, torch.no_grad():
        view.stacks[0].solver = keep
        model(**{k: v[:1, :4] for k, v in inputs.items()})
        call, x = calls[0]
        with torch.enable_grad():
            jacobian = torch.autograd.functional.jacobian(increment_of(call), x).reshape(x.numel(), x.numel())
        found = lipschitz(increment_of(call), x, iterations=80, generator=generator())
    assert found == pytest.approx(float(torch.linalg.matrix_norm(jacobian, 2)), rel=1e-4)
