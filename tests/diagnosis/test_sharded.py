"""Lipschitz estimates of a parallelized model's layers: those of the plain model, on any number of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_layerpar import LayerParallelConfig, convert_to_ode, parallelize
from hf_layerpar.diagnosis.layers import increment_of, lipschitz
from hf_layerpar.diagnosis.sharded import lipschitz_of_layers
from hf_layerpar.ode.convert import borrowed_view
from tests import zoo
from tests.multiproc import run_ranks


def estimates(name: str, training: bool) -> tuple[list[float], bool]:
    """And whether the random stream stayed where it was, with no gradient made."""
    model, inputs = zoo.build(name, layers=4)
    model.train(training)
    handle = parallelize(convert_to_ode(model), LayerParallelConfig(strategy="mgrit", coarsening=2))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    found = lipschitz_of_layers(handle, lambda: model(**inputs).loss)
    clean = torch.equal(torch.get_rng_state(), before) and all(p.grad is None for p in model.parameters())
    float(handle.train_step(inputs))  # and the solvers are those of before
    return found, clean


def read(name: str) -> list[float]:
    model, inputs = zoo.build(name, layers=4)
    found = []

    def reader(calls: Any, x: torch.Tensor) -> torch.Tensor:
        for n, call in enumerate(calls):
            generator = torch.Generator().manual_seed(n)
            found.append(lipschitz(increment_of(call), x, iterations=3, generator=generator))
            x = call.step(x, call.args, call.kwargs)
        return x

    with borrowed_view(model.eval()) as view, torch.no_grad():
        for stack in view.stacks:
            stack.solver = reader
        model(**inputs)
    return found


@pytest.mark.parametrize("name", ["gpt2", "deberta", "t5", "whisper"])  # position biases, states of another stack
def test_estimates_are_those_of_the_plain_model(name: str) -> None:
    expected = read(name)
    for world in (1, 2, 3):
        for found, clean in run_ranks(estimates, world, name, False):
            assert found == pytest.approx(expected, rel=1e-5)
            assert clean


def test_dropout_masks_do_not_depend_on_the_ranks() -> None:
    one = run_ranks(estimates, 1, "bert", True)[0]
    assert run_ranks(estimates, 2, "bert", True) == [one, one]
