"""Bytes that a step holds: counted as tensors live, and predicted from what one layer holds."""

from __future__ import annotations

import dataclasses
import gc
from typing import Any

import pytest
import torch

from hf_layerpar import LayerParallelConfig, convert_to_ode, parallelize
from hf_layerpar.diagnosis.measure import Bench
from hf_layerpar.ode.convert import ode_view
from hf_layerpar.plan.simulate import simulate
from hf_layerpar.run.calibrate import calibrate
from hf_layerpar.run.held import Held
from tests import zoo
from tests.multiproc import run_ranks

SETTINGS: tuple[dict[str, Any], ...] = (
    {"schedule": "1f1b", "micro_batches": 4},
    {"schedule": "zb_h1", "micro_batches": 2},
    {"strategy": "mgrit", "coarsening": 2, "coarse_operator": "aggregate"},
    {"strategy": "mgrit", "coarsening": 2, "micro_batches": 2, "backward_iterations": 2},
)


def test_bytes_count_as_long_as_they_are_needed() -> None:
    x, kept = torch.ones(100, requires_grad=True), torch.ones(10)
    with Held([x, kept]) as held:
        y = x.exp()  # keeps its result
        y = y.sum()
        assert held.now == 404
        kept.add_(1)
        y.backward()
        assert held.now == 404  # the sum, and the gradient in place of the result
        assert held.most >= 404 + 400
        del y
        assert held.now == 400


def build(name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    wide: dict[str, Any] = {"n_embd": 128} if name == "gpt2" else {"hidden_size": 128, "intermediate_size": 256}
    model, batch = zoo.build(name, layers=6, **wide)  # or masks were as large as states
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return convert_to_ode(model.train()), {key: torch.cat([rows] * 4) for key, rows in batch.items()}


def predicted_and_held(name: str) -> dict[tuple[int, bool], tuple[float, float, float]]:
    """By setting and checkpointing what this rank's activations are predicted to take over what they do; the predicted
    and the real bytes of its parameters."""
    model, batch = build(name)
    bench = Bench(model, ode_view(model).stacks)
    (entry,) = bench.entries(batch).values()
    measured = dataclasses.replace(calibrate(entry.calls, entry.x, seconds=0.01), **bench.end_bytes(batch))
    found = {}
    for number, settings in enumerate(SETTINGS):
        model, batch = build(name)
        handle = parallelize(model, LayerParallelConfig(**settings))
        handle.train_step(batch)  # so that gradients are there
        params = list(model.parameters())
        for again, costs in ((False, measured), (True, measured.recomputed())):
            if again:
                model.activation_checkpointing_enable()
            gc.collect()
            grads = [p.grad for p in params if p.grad is not None]
            with Held([*params, *grads, *batch.values()]) as held:
                handle.train_step(batch)
            assert handle.stepper.last is not None
            plan = handle.stepper.last[1]
            peak = simulate(plan, costs.cut(plan.micro_batches)).peaks[handle.lp_rank]
            bytes_here = float(sum(p.numel() * p.element_size() for p in params))
            # what is new in a step: activations, and parts of gradients that are kept apart
            new = peak.activations + peak.gradients - bytes_here
            found[number, again] = new / held.most, peak.parameters, bytes_here
    return found


@pytest.mark.parametrize(
    ("name", "world"),
    [
        ("gpt2", 2),
        pytest.param("bert", 1, marks=pytest.mark.slow),
        pytest.param("llama", 2, marks=pytest.mark.slow),
        pytest.param("llama", 3, marks=pytest.mark.slow),
    ],
)
def test_predictions_are_what_a_step_holds(name: str, world: int) -> None:
    for rank in run_ranks(predicted_and_held, world, name):
        for key, (share, predicted, real) in rank.items():
            assert 0.8 < share < 1.2, (SETTINGS[key[0]], key[1], share)
            assert predicted == real or world == 1  # there a tied head and embedding are one, and count as two
