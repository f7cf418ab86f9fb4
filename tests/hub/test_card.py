"""What cards say, by the kind of checkpoint and by what is known of the run."""

from __future__ import annotations

import dataclasses

import pytest
from huggingface_hub import ModelCard

from hf_layerpar.config import LayerParallelConfig, OdeSettings
from hf_layerpar.hub.card import CardFacts, facts_of_class, is_hub_name, make_card, merged, solver_facts

ODE = OdeSettings(step_size=0.25, form="euler", buffers=(1, 2)).to_dict()
FULL = CardFacts(
    name="me/mine",
    kind="code",
    base_model="owner/base",
    datasets=("nyu-mll/glue",),
    license="mit",
    tags=("extra",),
    ode=ODE,
    layers={"bert.encoder.layer": 19},
    solver=solver_facts(LayerParallelConfig(strategy="mgrit", ends="spread").to_dict(), lp_size=2, controller="raise"),
    changes=((0, "mgrit c=4"), (500, "exact")),
    training={"max_steps": 100, "num_train_epochs": 3.0, "learning_rate": 1e-4},
    metrics={"validation": {"loss": 0.123456, "accuracy": 0.75}, "test": {"accuracy": 0.5}},
    evaluation=tuple({"step": step, "loss": 1 / (1 + step)} for step in range(40)),
    versions={"torch": "2.13.0"},
    **facts_of_class("BertForSequenceClassification"),
)


def test_metadata() -> None:
    data = make_card(FULL).data
    assert (data.library_name, data.license, data.base_model) == ("transformers", "mit", "owner/base")
    assert data.pipeline_tag == "text-classification"
    assert data.tags == ["hf_layerpar", "layer-parallel", "neural-ode", "extra", "mgrit"]
    assert data.metrics == ["loss", "accuracy"]
    found = {(r.dataset_type, r.dataset_split, r.metric_type): r.metric_value for r in data.eval_results}
    assert found == {
        ("nyu-mll/glue", "validation", "loss"): 0.123456,
        ("nyu-mll/glue", "validation", "accuracy"): 0.75,
        ("nyu-mll/glue", "test", "accuracy"): 0.5,
    }


def test_text() -> None:
    text = make_card(FULL).text
    for row in (
        "| step size | 0.25 |",
        "| steps in `bert.encoder.layer` | 16 |",
        "| open and close layers at step size 1 | 1 and 2 |",
        "| lp_size | 2 |",
        "| 500 | exact |",
        "| max_steps | 100 |",
        "| validation | loss | 0.1235 |",
        "| 0 | 1 |",
        "| 39 | 0.025 |",
        "- torch 2.13.0",
    ):
        assert f"\n{row}\n" in text
    assert "num_train_epochs" not in text
    assert "coarse_operator" not in text  # the controller chose others
    unchanged = make_card(dataclasses.replace(FULL, changes=())).text
    for row in ("| coarse_operator | aggregate |", "| ends | spread |"):
        assert f"\n{row}\n" in unchanged
    assert sum(line.startswith("| ") and line.count("|") == 3 and line[2].isdigit() for line in text.split("\n")) == 14


def test_solver_settings_that_had_no_part_are_left_out() -> None:
    pipeline = {"strategy": "pipeline", "micro_batches": 4}
    assert solver_facts(LayerParallelConfig(micro_batches=4).to_dict(), lp_size=2) == pipeline | {"lp_size": 2}
    unusual = {"schedule": "zb_v", "increment_penalty": 0.1}
    found = solver_facts(LayerParallelConfig(micro_batches=4, coarsening=8, **unusual).to_dict(), lp_size=2)
    assert found == pipeline | unusual | {"lp_size": 2}
    mgrit = solver_facts(LayerParallelConfig(strategy="mgrit", schedule="zb_v").to_dict(), lp_size=1)
    assert "schedule" not in mgrit
    assert mgrit["coarsening"] == 4


@pytest.mark.parametrize(
    ("kind", "ode", "snippet", "said"),
    [
        ("plain", {"step_size": 1.0}, 'Classification.from_pretrained("me/mine")\n', "This is an ordinary checkpoint"),
        ("folded", {"form": "split"}, 'Classification.from_pretrained("me/mine")\n', "contain the step size"),
        ("code", {}, 'from_pretrained("me/mine", trust_remote_code=True)\n', "pip install hf_layerpar"),
        ("adapters", {"step_size": 1.0}, '.from_pretrained("owner/base"), "me/mine")\n', "These are adapters alone"),
        ("adapters", {}, '    step_size=0.25,\n    form="euler",\n', "these adapters give other outputs"),
    ],
)
def test_how_to_load_each_kind(kind, ode, snippet, said) -> None:
    text = make_card(dataclasses.replace(FULL, kind=kind, ode=ODE | ode)).text
    code = text.partition("```python\n")[2].partition("```")[0]
    compile(code, "snippet", "exec")
    assert snippet in code
    assert said in text
    assert ("trust_remote_code" in text) == (kind == "code")


def test_little_is_known() -> None:
    card = make_card(CardFacts(name="mine"))
    assert card.data.to_dict() == {"library_name": "transformers"}
    assert 'AutoModel.from_pretrained("mine")' in card.text
    for absent in ("Euler", "## Results", "## How it was trained", "## Versions", "None"):
        assert absent not in card.text


def test_cards_of_people_are_kept() -> None:
    made = make_card(FULL)
    theirs = ModelCard("---\ntags: [theirs]\n---\nWords.\n")
    assert merged(made, theirs).text == "Words.\n"
    assert merged(made, theirs).data.tags == ["theirs", *made.data.tags]
    assert merged(made, make_card(CardFacts(name="mine", tags=("older",)))).text == made.text
    assert "older" in made.data.tags


@pytest.mark.parametrize(
    ("architecture", "auto_class", "task"),
    [
        ("BertForMaskedLM", "AutoModelForMaskedLM", "fill-mask"),
        ("GPT2LMHeadModel", "AutoModelForCausalLM", "text-generation"),
        ("ViTForImageClassification", "AutoModelForImageClassification", "image-classification"),
        ("MarianMTModel", "AutoModelForSeq2SeqLM", "text2text-generation"),
        ("BertModel", "AutoModel", None),
        ("NoSuchModel", None, None),
    ],
)
def test_auto_classes(architecture: str, auto_class: str | None, task: str | None) -> None:
    expected = {"architecture": architecture, "auto_class": auto_class, "task": task}
    assert facts_of_class(architecture) == expected


def test_hub_names() -> None:
    assert is_hub_name("owner/name")
    assert not any(map(is_hub_name, ("minilm", "/a/folder", "a/b/c", "offline movies", "")))
