"""Layers as compiled code: the gradients of eager layers on every number of ranks, from one artefact for each kind."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from hf_layerpar import LayerParallelConfig, convert_to_ode, layer_parallel, parallelize
from hf_layerpar.diagnosis.layers import LayerReader
from hf_layerpar.errors import ConfigurationError, UnsupportedModelError
from tests import zoo
from tests.multiproc import run_ranks
from tests.training import runs

SETTINGS: tuple[dict[str, Any], ...] = (
    {"schedule": "zb_h1"},
    {"strategy": "mgrit", "coarsening": 2, "coarse_operator": "aggregate", "backward_iterations": 2},
    {"increment_penalty": 0.1},
)


def gradients(name: str, settings: dict[str, Any], backend: str | None) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of a training step with dropout."""
    model, batch = zoo.build(name, layers=6)
    batch = {key: torch.cat([rows[-1:]] * 2) for key, rows in batch.items()}  # both with padding, so masks are alike
    handle = parallelize(convert_to_ode(model.train()), LayerParallelConfig(**settings, micro_batches=2))
    if backend is not None:
        handle.compile_layers(backend)
    torch.manual_seed(1)
    loss = float(handle.train_step(batch))
    return loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def deviations(name: str, backend: str) -> tuple[list[float], int]:
    """By setting how far loss and gradients with compiled layers are from those with eager ones; and the graphs."""
    torch._dynamo.reset()
    found = []
    for settings in SETTINGS:
        expected, eager = gradients(name, settings, None)
        counters.clear()
        loss, grads = gradients(name, settings, backend)
        assert set(grads) == set(eager)
        whole = sum(float(g.square().sum()) for g in eager.values()) ** 0.5
        error = max(float((grads[n] - g).norm()) for n, g in eager.items()) / whole
        found.append((max(abs(loss - expected) / expected, error), counters["stats"]["unique_graphs"]))
    return [error for error, _ in found], sum(graphs for _, graphs in found)


@pytest.mark.parametrize(
    ("name", "world", "backend", "kinds"),
    [
        ("llama", 2, "aot_eager", 1),
        pytest.param("llama", 1, "aot_eager", 1, marks=pytest.mark.slow),
        pytest.param("bart", 1, "aot_eager", 2, marks=pytest.mark.slow),
        pytest.param("bart", 2, "aot_eager", 2, marks=pytest.mark.slow),
        pytest.param("gpt2", 1, "inductor", 1, marks=pytest.mark.slow),
        pytest.param("bert", 2, "inductor", 1, marks=pytest.mark.slow),
    ],
)
def test_gradients_equal_those_of_eager_layers(name: str, world: int, backend: str, kinds: int) -> None:
    """The graphs: one for each kind of layer with gradients, and one without for the sweeps of a rank that has any."""
    for errors, graphs in run_ranks(deviations, world, name, backend, timeout=600):
        assert max(errors) < 1e-5
        assert 1 <= graphs <= 2 * kinds


def test_forwards_readings_and_copies() -> None:
    """A call without gradients runs compiled, one with a cache doesn't, and second derivatives are to be had."""
    stock, batch = zoo.build("llama")
    model, _ = zoo.build("llama")
    handle = parallelize(convert_to_ode(model.eval()), LayerParallelConfig(strategy="mgrit", coarsening=2))
    handle.compile_layers("aot_eager")
    counters.clear()
    expected = stock.eval()(**batch, use_cache=False)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch, use_cache=False).logits, expected.logits)
        assert counters["stats"]["unique_graphs"] == 1
        assert model.generate(batch["input_ids"][:1, :4], max_new_tokens=3).shape == (1, 7)
    assert counters["stats"]["unique_graphs"] == 1
    stack = handle.stacks[0]
    reader = LayerReader(stack, iterations=1)
    stack.solver, before = reader, stack.solver
    with torch.no_grad():
        model(**batch, use_cache=False)
    stack.solver = before
    assert all(reading.lipschitz > 0 for reading in reader.readings)
    assert pickle.loads(pickle.dumps(stack.compiler)) == stack.compiler


def test_what_is_refused() -> None:
    model, batch = zoo.build("llama")
    handle = parallelize(convert_to_ode(model), LayerParallelConfig(strategy="mgrit", coarsening=2, stacked=True))
    for settings, message in (
        ({"backend": "nothing"}, "nothing"),
        ({"mode": "fast"}, "fast"),
        ({"mode": "reduce-overhead"}, "CUDA graphs"),
        ({"backend": "cudagraphs"}, "CUDA graphs"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            handle.compile_layers(**settings)
    assert handle.stacks[0].compiler is None
    handle.compile_layers("aot_eager")
    with pytest.raises(ConfigurationError, match="stacked=True evaluates layers together"):
        handle.train_step(batch)
    other, _ = zoo.build("llama")
    layer = other.model.layers[1]
    layer.forward = layer.forward
    parallelize(convert_to_ode(other))
    with pytest.raises(UnsupportedModelError, match=r"layers\.1 .* has a forward of its own"):
        layer_parallel(other).compile_layers()


def test_the_trainer_compiles_the_layers_and_not_the_model(tmp_path) -> None:
    eager = runs.train(str(tmp_path), "llama", {"max_steps": 2})
    counters.clear()
    settings = {"max_steps": 2, "torch_compile": True, "torch_compile_backend": "aot_eager"}
    compiled = runs.train(str(tmp_path), "llama", settings)
    assert counters["stats"]["unique_graphs"] >= 1
    assert compiled["losses"] == pytest.approx(eager["losses"], abs=1e-5)
