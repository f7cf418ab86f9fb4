"""What a converted model's save_pretrained leaves behind: for stock transformers, for us, and when it is damaged."""

from __future__ import annotations

import copy
import json
import logging
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import BertTokenizer

from hf_layerpar.config import OdeSettings
from hf_layerpar.errors import CheckpointError, ConfigurationError, UnsupportedModelError
from hf_layerpar.loading import from_pretrained
from hf_layerpar.ode import remote
from hf_layerpar.ode.convert import convert_to_ode, ode_view
from tests import zoo
from tests.fresh import report_of

torch.set_num_threads(1)

POST_NORM = tuple(name for name in zoo.NAMES if name not in zoo.SPLIT)
GEMMA = ("gemma2", "gemma3")


def build(name: str, **changes: Any) -> tuple[Any, zoo.Inputs]:
    """A model with no weight at its initial zero or one, in eval mode, and inputs without labels."""
    model, inputs = zoo.build(name, layers=3, **changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # Marian's sinusoids aren't saved
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval(), inputs


def converted(name: str, **settings: Any) -> tuple[Any, zoo.Inputs]:
    """A converted model that keeps its depth of 3 at any step size."""
    model, inputs = build(name)
    buffers = settings.get("buffers", (0, 0))
    return convert_to_ode(model, num_steps=3 - sum(buffers), **settings), inputs


@torch.no_grad()
def logits(model: Any, inputs: zoo.Inputs) -> Tensor:
    return model.eval()(**inputs).logits


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def saved_config(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())


def files(path: Path) -> set[str]:
    return set(os.listdir(path))


@pytest.fixture
def warnings_of_transformers() -> Iterator[list[str]]:
    """What transformers logs as a warning during the test, whatever its verbosity is set to elsewhere."""
    seen: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record.getMessage())

    handler, logger, level = (
        Keep(logging.WARNING),
        logging.getLogger("transformers"),
        transformers.logging.get_verbosity(),
    )
    logger.addHandler(handler)
    transformers.logging.set_verbosity_warning()
    yield seen
    transformers.logging.set_verbosity(level)
    logger.removeHandler(handler)


# Step size 1


@pytest.mark.parametrize("name", zoo.in_every_version(zoo.NAMES, "vit"))
@pytest.mark.parametrize("max_shard_size", ["50GB", "60KB"])
def test_at_step_size_one_the_stock_class_loads_the_same_model(name: str, max_shard_size: str, tmp_path: Path) -> None:
    model, inputs = build(name)
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path / "stock", max_shard_size=max_shard_size)
    convert_to_ode(model, buffers=(1, 1)).save_pretrained(tmp_path / "ours", max_shard_size=max_shard_size)
    loaded, info = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert torch.equal(logits(loaded, inputs), expected)
    assert not any(info.values())
    assert files(tmp_path / "ours") == files(tmp_path / "stock")
    for file in files(tmp_path / "ours") - {"config.json"}:
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "stock" / file).read_bytes(), file
    config = saved_config(tmp_path / "ours")
    assert OdeSettings.from_dict(config.pop("hf_layerpar")) == ode_view(model).settings
    assert config == saved_config(tmp_path / "stock")


def test_at_step_size_one_the_auto_classes_need_no_trust(tmp_path: Path, warnings_of_transformers: list[str]) -> None:
    model, inputs = converted("bert", buffers=(1, 0))
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    again = convert_to_ode(loaded)
    assert ode_view(again).settings == ode_view(model).settings
    assert warnings_of_transformers == []


# Split form: folded


@pytest.mark.parametrize("step_size", [0.5, 1 / 3])
@pytest.mark.parametrize("name", zoo.in_every_version(zoo.SPLIT, "llama"))
def test_split_form_is_saved_folded(name: str, step_size: float, tmp_path: Path) -> None:
    model, inputs = converted(name, step_size=step_size, form="split", buffers=(1, 0))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not ode_view(model).settings.folded
    assert not model.config.hf_layerpar["folded"]
    assert saved_config(tmp_path)["hf_layerpar"]["folded"]

    stock = type(model).from_pretrained(tmp_path)
    assert distance(logits(stock, inputs), expected) < 1e-5

    ours = from_pretrained(tmp_path)
    assert type(ours) is type(model)
    assert ode_view(ours).settings == ode_view(model).settings
    assert distance(logits(ours, inputs), expected) < 1e-5
    exact = step_size == 0.5 and name not in GEMMA
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0 if exact else 1e-6, atol=0 if exact else 1e-6)
    again = convert_to_ode(stock)
    assert all(torch.equal(value, ours.state_dict()[key]) for key, value in again.state_dict().items())


def test_a_second_round_trip_changes_nothing(tmp_path: Path) -> None:
    model, _ = converted("gpt2", step_size=0.25, form="split")
    model.save_pretrained(tmp_path / "a")
    from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    for name in files(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_gemma_in_half_precision_is_not_folded(tmp_path: Path) -> None:
    stock, inputs = build("gemma2")
    stock.bfloat16().save_pretrained(tmp_path / "stock")
    model = convert_to_ode(type(stock).from_pretrained(tmp_path / "stock"), step_size=1 / 16, num_steps=3)
    assert ode_view(model).settings.form == "split"
    model.save_pretrained(tmp_path / "ours")
    assert saved_config(tmp_path / "ours")["model_type"] == "ode-gemma2"
    assert not saved_config(tmp_path / "ours")["hf_layerpar"]["folded"]
    loaded = from_pretrained(tmp_path / "ours")
    assert loaded.dtype is torch.bfloat16
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


# Euler form: custom code


@pytest.fixture(scope="module")
def euler_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("euler")
    for name in zoo.NAMES:
        model, inputs = converted(name, step_size=0.5, form="euler")
        model.save_pretrained(root / name)
        torch.save((inputs, logits(model, inputs)), root / f"{name}.pt")
    vocab = {token: index for index, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"])}
    BertTokenizer(vocab=vocab).save_pretrained(root / "bert")
    return root


@pytest.fixture(scope="module")
def remote_report(euler_checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    environment = {"HF_MODULES_CACHE": str(tmp_path_factory.mktemp("modules")), "HF_HUB_OFFLINE": "1"}
    return report_of(Path(__file__).with_name("load_remote.py"), euler_checkpoints, environment, timeout=120)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_euler_form_loads_with_trust_remote_code_in_a_fresh_interpreter(name: str, remote_report: dict) -> None:
    assert not remote_report["imported_before"]
    model, _ = zoo.build(name, layers=3)
    got = remote_report["models"][name]
    assert got["refused"] is not None
    assert "trust_remote_code=True" in got["refused"]
    assert got["class"] == [type(model).__module__, type(model).__name__]
    assert got["config"] == [type(model.config).__module__, type(model.config).__name__, False]
    assert got["same"]
    assert got["settings"] == OdeSettings(step_size=0.5, form="euler").to_dict()
    assert got["base"] == transformers.AutoModel.from_config(model.config).__class__.__name__
    assert got["auto_config"] == "OdeConfig"
    # what a plain config gives is still the plain model
    assert got["of_stock_config"] == [type(model).__module__, False]


def test_tokenizers_beside_custom_code_load_with_and_without_trust(remote_report: dict) -> None:
    assert remote_report["tokenizers"] == [["BertTokenizer", [2, 5, 6, 3]]] * 2


@pytest.mark.parametrize("name", ["bert", "vit", "bart", "gpt2"])
def test_our_from_pretrained_needs_no_trust(name: str, euler_checkpoints: Path) -> None:
    inputs, expected = torch.load(euler_checkpoints / f"{name}.pt")
    model = from_pretrained(euler_checkpoints / name)
    assert torch.equal(logits(model, inputs), expected)
    assert ode_view(model).settings == OdeSettings(step_size=0.5, form="euler")
    assert type(model.config).__module__.startswith("transformers.")
    assert not hasattr(model.config, "auto_map")


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_saving_a_loaded_model_writes_the_same_files(name: str, euler_checkpoints: Path, tmp_path: Path) -> None:
    from_pretrained(euler_checkpoints / name).save_pretrained(tmp_path)
    assert remote.MODULE_NAME + ".py" in files(tmp_path)
    for file in files(tmp_path):
        assert (tmp_path / file).read_bytes() == (euler_checkpoints / name / file).read_bytes(), file


def test_a_stock_class_warns_about_the_model_type(euler_checkpoints: Path, warnings_of_transformers: list[str]) -> None:
    inputs, expected = torch.load(euler_checkpoints / "bert.pt")
    stock = transformers.BertForMaskedLM.from_pretrained(euler_checkpoints / "bert")
    assert any("`ode-bert`" in line and "`bert`" in line for line in warnings_of_transformers)
    assert distance(logits(stock, inputs), expected) > 1e-2  # which is what the warning is about


def test_another_head_can_be_put_on_custom_code(
    euler_checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    auto = transformers.AutoModelForSequenceClassification
    model, info = auto.from_pretrained(
        euler_checkpoints / "bert", trust_remote_code=True, num_labels=5, output_loading_info=True
    )
    assert type(model) is transformers.BertForSequenceClassification
    assert model.config.num_labels == 5
    assert "classifier.weight" in info["missing_keys"]
    assert ode_view(model).settings.step_size == 0.5


def test_a_config_of_custom_code_can_not_be_saved_in_euler_form(tmp_path: Path) -> None:
    class MyConfig(transformers.BertConfig):
        pass

    model = transformers.BertForMaskedLM(MyConfig(**zoo.config("bert").to_dict()))
    convert_to_ode(model, step_size=0.5, num_steps=4)
    with pytest.raises(UnsupportedModelError, match=r"MyConfig isn't a config class.*step_size=1"):
        model.save_pretrained(tmp_path / "x")
    assert files(tmp_path) == set()


# Refined models


@pytest.mark.parametrize(("name", "form"), [("gpt2", "split"), ("bert", "euler"), ("bart", "euler")])
def test_a_refined_model_comes_back_refined(name: str, form: Any, tmp_path: Path) -> None:
    original, inputs = build(name)
    model = convert_to_ode(original, step_size=0.5, form=form, buffers=(1, 0))
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert [len(stack.layers) for stack in ode_view(loaded).stacks] == [5] * len(ode_view(model).stacks)
    assert distance(logits(loaded, inputs), logits(model, inputs)) < 1e-6
    if form == "split":
        assert distance(logits(type(model).from_pretrained(tmp_path), inputs), logits(model, inputs)) < 1e-5


# from_pretrained


@pytest.mark.compat
def test_from_pretrained_of_a_plain_checkpoint(tmp_path: Path) -> None:
    stock, inputs = build("vit")
    stock.save_pretrained(tmp_path)
    model = from_pretrained(str(tmp_path))
    assert ode_view(model).settings == OdeSettings(form="split")
    assert torch.equal(logits(model, inputs), logits(stock, inputs))


@pytest.mark.parametrize(("name", "form"), [("gpt2", "split"), ("gpt2", "euler")])
def test_arguments_reach_the_stock_class(name: str, form: Any, tmp_path: Path) -> None:
    model, _ = converted(name, step_size=0.5, form=form)
    model.save_pretrained(tmp_path / "sub")
    loaded, info = from_pretrained(
        tmp_path,
        subfolder="sub",
        dtype=torch.bfloat16,
        attn_implementation="eager",
        resid_pdrop=0.7,
        output_loading_info=True,
    )
    assert loaded.dtype is torch.bfloat16
    assert loaded.config._attn_implementation == "eager"
    assert loaded.transformer.h[0].mlp.dropout.p == 0.7
    assert not info["missing_keys"]
    assert ode_view(loaded).settings == ode_view(model).settings


def test_a_class_that_transformers_does_not_have_is_refused(tmp_path: Path) -> None:
    model, _ = build("bert")
    model.save_pretrained(tmp_path)
    for names in (["MyBert"], None):
        config = saved_config(tmp_path) | {"architectures": names}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=r"architectures=.*names no class.*convert_to_ode"):
            from_pretrained(tmp_path)


# Copies


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_saves_its_own_weights(copied: Callable[[Any], Any], tmp_path: Path) -> None:
    model, inputs = converted("gpt2", step_size=0.5, form="split")
    other = copied(model)
    with torch.no_grad():
        other.transformer.h[1].mlp.c_proj.weight.zero_()
    other.save_pretrained(tmp_path / "other")
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(logits(from_pretrained(tmp_path / "other"), inputs), logits(other, inputs))
    assert torch.equal(logits(from_pretrained(tmp_path / "model"), inputs), logits(model, inputs))


# Damage


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "missing"])
def test_damaged_files_are_named(damage: str, tmp_path: Path) -> None:
    model, _ = converted("llama", step_size=0.5, form="euler")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    names = ["config.json", "generation_config.json", "model.safetensors.index.json"]
    names.append(sorted(path.name for path in (tmp_path / "sharded").glob("model-*"))[1])
    for name in names:
        folder = shutil.copytree(tmp_path / "sharded", tmp_path / damage / name)
        file = folder / name
        if damage == "truncated":
            os.truncate(file, file.stat().st_size // 2)
        elif damage == "empty":
            os.truncate(file, 0)
        elif damage == "garbage":
            file.write_bytes(bytes(range(128, 256)) * 8)
        elif name in (
            "config.json",
            names[-1],
        ):  # stock knows what to say of a lost index, and goes on without the other
            file.unlink()
        else:
            continue
        with pytest.raises(CheckpointError, match=re.escape(name)):
            from_pretrained(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["logging"]},
        {"architectures": "LlamaForCausalLM"},
        {"architectures": [7]},
        {"model_type": "ode-nothing"},
        {"auto_map": None, "model_type": "ode-"},
        {"hf_layerpar": {"step_size": 0.5, "form": "split", "steps": 3}},
        {"hf_layerpar": 7},
    ],
)
def test_a_config_that_says_something_else(changes: dict[str, Any], tmp_path: Path) -> None:
    model, _ = converted("llama", step_size=0.5, form="euler")
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises((CheckpointError, ConfigurationError)):
        from_pretrained(tmp_path)
