"""`diagnose` on tiny models: its figures against plain gradients, and a model that comes back as it was."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from transformers import BatchEncoding

from hf_layerpar import LayerParallelConfig, convert_to_ode, diagnose, gradient_agreement, ode_view, parallelize
from hf_layerpar.diagnosis.diagnose import ACCELERATED, ITERATIONS
from hf_layerpar.diagnosis.readings import FORMAT
from hf_layerpar.errors import ConfigurationError, UnsupportedModelError
from hf_layerpar.plan.costs import Costs
from hf_layerpar.plan.operators import OPERATORS
from hf_layerpar.report.diagnosis import draw_diagnosis, print_diagnosis
from tests import zoo

UNIT = Costs()


def small(name: str, layers: int = 6, **changes):
    model, inputs = zoo.build(name, layers=layers, **changes)
    return model.train(), inputs


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "whisper", "deberta", "vit"])
def test_a_model_comes_back_as_it_was(name):
    model, inputs = small(name)
    model(**inputs)  # stock ViT notes the kind of its labels in its config
    untouched = copy.deepcopy(model)
    forwards = {path: "forward" in vars(module) for path, module in model.named_modules()}
    torch.manual_seed(7)
    before = torch.get_rng_state()
    found = diagnose(model, inputs, ranks=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert {path: "forward" in vars(module) for path, module in model.named_modules()} == forwards
    assert model.config.to_dict() == untouched.config.to_dict()
    with pytest.raises(UnsupportedModelError, match="not converted"):
        ode_view(model)
    for a, b in zip(model.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(a, b)
    stacks = {layer.stack for layer in found.layers}
    assert len(stacks) == (2 if name in zoo.ENCODER_DECODERS else 1)
    assert len(found.layers) == 6 * len(stacks)
    assert set(found.costs) == stacks
    assert all(costs.step > 0 for costs in found.costs.values())
    assert [r.config for r in found.settings] == [replace_pieces(p.config) for p in found.predictions]
    assert len(found.settings) == len(OPERATORS) * len(ITERATIONS) + 2 * len(ACCELERATED)
    assert all(math.isfinite(r.cosine) and r.bias_to_noise is not None for r in found.settings)


def replace_pieces(config: LayerParallelConfig) -> LayerParallelConfig:
    return LayerParallelConfig.from_dict(config.to_dict() | {"micro_batches": 1})


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_settings_are_those_of_the_solver_and_the_exact_gradient(name):
    """Against `gradient_agreement`, with everything but the layers frozen, dropout on."""
    model, inputs = small(name, layers=11)
    found = diagnose(model, inputs, ranks=4, buffers=(1, 1), coarsenings=[3], costs=UNIT)
    model = convert_to_ode(model, buffers=(1, 1)).requires_grad_(False)
    handle = parallelize(model)
    for stack in ode_view(model).stacks:
        torch.nn.ModuleList(stack.layers).requires_grad_(True)
    for reading in found.settings:
        handle.config = reading.config
        expected = gradient_agreement(model, inputs)
        assert reading.cosine == pytest.approx(expected["cosine"], abs=2e-6)
        assert reading.norm_ratio == pytest.approx(expected["norm_ratio"], rel=1e-5)
        assert reading.loss_error == pytest.approx(abs(expected["loss"] / expected["loss_exact"] - 1), abs=1e-6)
        exact_forward = reading.config.forward_iterations == 0
        assert (reading.forward_factor is None) == exact_forward == (reading.state_error == 0)


def test_factors_are_read_with_a_second_iteration():
    model, inputs = small("llama", layers=8)
    before = torch.get_rng_state()
    found = diagnose(model, inputs, coarsenings=[2], costs=UNIT)
    settings = {
        (r.config.coarse_operator, r.config.forward_iterations, r.config.backward_iterations): r for r in found.settings
    }
    handle = parallelize(convert_to_ode(model, buffers=found.buffers), settings["aggregate", 2, 2].config)
    torch.set_rng_state(before)  # the same dropout masks
    handle.train_step(inputs)
    report = handle.report().sweeps["model.layers"]
    for iterations in ((1, 1), (2, 1), (2, 2)):
        reading = settings["aggregate", *iterations]
        assert reading.forward_factor == pytest.approx(report["forward"].convergence_factors[0], rel=1e-4)
    for iterations in ((1, 1), (2, 2)):
        reading = settings["aggregate", *iterations]
        assert reading.backward_factor == pytest.approx(report["backward"].convergence_factors[0], rel=1e-4)


def test_noise_is_half_the_distance_of_the_halves():
    model, inputs = small("gpt2")
    model.eval()
    inputs = {k: torch.cat([v[:1], v[:1].flip(1)]) for k, v in inputs.items()}  # as many tokens in both halves
    assert inputs["attention_mask"].all()
    found = diagnose(model, inputs, costs=UNIT)
    layers = list(model.transformer.h.parameters())

    def gradient(rows):
        loss = model(**{k: v[rows] for k, v in inputs.items()}).loss
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, layers)])

    whole, first, second = gradient(slice(0, 2)), gradient(slice(0, 1)), gradient(slice(1, 2))
    assert found.noise == pytest.approx(float((first - second).norm() / 2 / whole.norm()), rel=1e-4)
    one_row = diagnose(model, {k: v[:1] for k, v in inputs.items()}, costs=UNIT)
    assert one_row.noise is None
    assert all(r.bias_to_noise is None for r in one_row.settings)
    assert one_row.pipeline.config.micro_batches == 1


def test_a_tokenizers_batch_is_cut_as_any_other():
    model, inputs = small("gpt2")
    assert diagnose(model, BatchEncoding(inputs), costs=UNIT).pipeline.config.micro_batches == 2


def test_what_is_suggested_was_measured_on_every_batch():
    model, inputs = small("modernbert", layers=8)  # at its start nearly the identity: friendly
    other = {k: v.flip(0) for k, v in inputs.items()}
    single = diagnose(model, inputs, ranks=4, costs=UNIT)
    found = diagnose(model, [inputs, other], ranks=4, costs=UNIT)
    assert found.suggestion.friendly
    best = found.suggestion.best
    assert best is not None
    assert best.batches == 2
    assert best in found.settings
    (alone,) = [r for r in single.settings if r.config == best.config]
    assert best.cosine <= alone.cosine
    assert found.suggestion.config.coarse_operator == best.config.coarse_operator
    # and it can be used as it is
    handle = parallelize(convert_to_ode(model, buffers=found.suggestion.buffers), found.suggestion.config)
    assert handle.config == found.suggestion.config


def test_a_converted_model_keeps_its_buffers_and_step_size():
    model, inputs = small("gpt2", layers=4)
    model = convert_to_ode(model, step_size=1 / 4, buffers=(1, 1))
    solvers = [stack.solver for stack in ode_view(model).stacks]
    found = diagnose(model, inputs, costs=UNIT, ranks=99)
    assert found.buffers == (1, 1)
    assert found.ranks == 10
    assert [layer.step_size for layer in found.layers] == [1.0, *[0.25] * 8, 1.0]
    inner = [layer for layer in found.layers if layer.step_size != 1]
    assert max(layer.lipschitz for layer in inner) < min(found.layers[0].lipschitz, found.layers[-1].lipschitz)
    assert [stack.solver for stack in ode_view(model).stacks] == solvers
    model(**inputs).loss.backward()


def test_a_short_stack_is_for_the_pipeline():
    model, inputs = small("gpt2", layers=2)
    found = diagnose(model, inputs, costs=UNIT)
    assert found.settings == ()
    assert not found.suggestion.friendly
    assert "too short" in found.verdict
    assert found.suggestion.config.strategy == "pipeline"


def test_it_is_stored_printed_and_drawn(tmp_path):
    model, inputs = small("t5", layers=6)
    found = diagnose(model, [inputs, inputs], ranks=3, costs=UNIT)
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert values["format"] == FORMAT
    assert values["suggestion"]["verdict"] == found.verdict
    assert len(values["settings"]) == len(found.settings)
    first = values["settings"][0]
    assert LayerParallelConfig.from_dict(first["config"] | {"coarsening": 2}) == found.settings[0].config
    assert first["predicted"]["share"] == found.predictions[0].share
    with (tmp_path / "out.txt").open("w") as file:
        print_diagnosis(found, file)
    text = (tmp_path / "out.txt").read_text()
    for stack in ("encoder.block.0", "decoder.block.5"):
        assert stack in text
    assert all(r.name in text for r in found.settings)
    assert " ".join(text.split()).endswith(found.verdict[1:])
    draw_diagnosis(found, tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_numbers_that_are_none_become_null():
    model, inputs = small("gpt2")
    found = diagnose(model, inputs, costs=Costs(bandwidth=float("inf")))
    assert found.to_dict()["costs"]["transformer.h"]["bandwidth"] is None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batches": []}, ConfigurationError, "0 batches"),
        ({"ranks": 0}, ConfigurationError, "ranks=0"),
        ({"coarsenings": [6]}, ConfigurationError, "coarsening 6 doesn't fit 6 layers"),
        ({"buffers": (3, 3)}, ConfigurationError, r"buffers=\(3, 3\) leave 0 of 6 layers"),
        ({"buffers": (-1, 0)}, ConfigurationError, r"buffers\[0\]=-1"),
        ({"batches": {"use_cache": False}}, ConfigurationError, "holds no tensor"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    model, inputs = small("gpt2")
    with pytest.raises(error, match=message):
        diagnose(model, **({"batches": inputs, "costs": UNIT} | change))
    assert "forward" not in vars(model)


def test_models_that_can_not_be_diagnosed():
    model, inputs = small("gpt2")
    with pytest.raises(ConfigurationError, match=r"returned no loss for a batch of \['attention_mask', 'input_ids'\]"):
        diagnose(model, zoo.without_labels(inputs), costs=UNIT)
    with pytest.raises(ConfigurationError, match="0 of the parameters in the 6 layers"):
        diagnose(model.requires_grad_(False), inputs, costs=UNIT)
    with pytest.raises(UnsupportedModelError, match="Linear has no stack"):
        diagnose(torch.nn.Linear(2, 2), inputs)
