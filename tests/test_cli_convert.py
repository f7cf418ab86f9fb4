"""`hf-layerpar convert`: there and back, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import BertTokenizer

from hf_layerpar.cli import main
from hf_layerpar.config import CONFIG_KEY
from hf_layerpar.loading import from_pretrained
from hf_layerpar.ode.convert import convert_to_ode
from tests import zoo


def saved(folder: Path, family: str, **changes: Any) -> tuple[Any, zoo.Inputs]:
    model, inputs = zoo.build(family, **changes)
    model.save_pretrained(folder)
    return model.eval(), zoo.without_labels(inputs)


def convert(*arguments: object) -> None:
    assert main(["convert", *map(str, arguments)]) == 0


def logits(model: Any, inputs: zoo.Inputs) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).logits


def test_split_form_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, inputs = saved(tmp_path / "stock", "llama")
    convert(tmp_path / "stock", tmp_path / "ode", "--step-size", 0.5, "--buffers", 1, 1, "--interpolation", "linear")
    said = capsys.readouterr().out
    assert "LlamaForCausalLM, 6 layers in model.layers, step size 0.5 (split form)" in said
    expected = convert_to_ode(model, step_size=0.5, buffers=(1, 1), interpolation="linear")
    assert torch.equal(logits(from_pretrained(tmp_path / "ode"), inputs), logits(expected, inputs))
    convert(tmp_path / "ode", tmp_path / "back", "--to-stock")
    assert CONFIG_KEY not in json.loads((tmp_path / "back" / "config.json").read_text())
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("ode", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert (logits(stock, inputs) - logits(expected, inputs)).abs().max() < 1e-5
    assert "pip install" not in (tmp_path / "back" / "README.md").read_text()


def test_step_size_1_there_and_back(tmp_path: Path) -> None:
    model, inputs = saved(tmp_path / "stock", "bert")
    convert(tmp_path / "stock", tmp_path / "ode")
    convert(tmp_path / "ode", tmp_path / "back", "--to-stock")
    for name in ("ode", "back"):
        stock = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / name)
        assert torch.equal(logits(stock, inputs), logits(model, inputs))
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config == json.loads((tmp_path / "stock" / "config.json").read_text())


def test_euler_form_and_the_files_beside_it(tmp_path: Path) -> None:
    saved(tmp_path / "stock", "bert")
    vocab = {token: index for index, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"])}
    BertTokenizer(vocab=vocab).save_pretrained(tmp_path / "stock")
    (tmp_path / "stock" / "LICENSE").write_text("free")
    (tmp_path / "stock" / "optimizer.pt").write_text("stays here")
    convert(tmp_path / "stock", tmp_path / "new" / "ode", "--num-steps", 6, "--step-size", 0.5, "--form", "euler")
    ode = tmp_path / "new" / "ode"
    names = {path.name for path in ode.iterdir()}
    assert {"modeling_hf_layerpar.py", "LICENSE", "tokenizer.json", "tokenizer_config.json", "README.md"} <= names
    assert "optimizer.pt" not in names
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["ode"]
    assert transformers.AutoTokenizer.from_pretrained(ode)("a b").input_ids == [2, 5, 6, 3]
    card = ModelCard.load(ode / "README.md")
    assert 'from_pretrained("ode", trust_remote_code=True)' in card.text
    assert str(tmp_path) not in card.content


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints to refuse: plain, euler and unfoldable split forms, one with a weight missing, an empty folder."""
    root = tmp_path_factory.mktemp("folders")
    saved(root / "plain", "bert")
    convert_to_ode(zoo.build("bert")[0], step_size=0.5).save_pretrained(root / "euler")
    convert_to_ode(zoo.build("gemma2")[0].bfloat16(), step_size=0.5).save_pretrained(root / "half")
    model, _ = zoo.build("bert")
    state = {name: t for name, t in model.state_dict().items() if "encoder.layer.1.output.dense.bias" not in name}
    model.save_pretrained(root / "torn", state_dict=state)
    (root / "empty").mkdir()
    weights = (root / "plain" / "model.safetensors").read_bytes()
    nested = b'{"model_type": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    changes = {"cut": ("model.safetensors", weights[: len(weights) // 2]), "nested": ("config.json", nested)}
    changes |= {"listed": ("config.json", b"[1]"), "typed": ("config.json", b'{"architectures": 5, "model_type": 3}')}
    for name, (file, content) in changes.items():
        shutil.copytree(root / "plain", root / name)
        (root / name / file).write_bytes(content)
    return root


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("plain", ["--to-stock"], "so it is no ODE form"),
        ("euler", ["--to-stock"], "step size 0.5 in the euler form, which has no exact plain form: stock layers step"),
        ("half", ["--to-stock"], "step size 0.5 in the split form, which has no exact plain form: its norms"),
        ("plain", ["--to-stock", "--step-size", "0.5"], "--to-stock takes the settings off; leave out --step-size"),
        ("plain", ["--step-size", "0.3"], "make 13.3333 steps, not a whole number"),
        ("plain", ["--form", "split"], "form='split' needs layers known to be pre-LN"),
        ("euler", ["--step-size", "0.25"], "contradicts step_size=0.5"),
        ("torn", [], "does not hold all weights of BertForMaskedLM, which its config.json names: 1 missing_keys"),
        ("empty", [], "config.json"),
        ("cut", [], "model.safetensors"),
        ("nested", [], "config.json"),
        ("nested", ["--to-stock"], "config.json"),
        ("listed", [], "config.json"),
        ("typed", [], "config.json"),
        ("plain", ["--step-size", "nan"], "step_size=nan must be in (0, 1]"),
        ("plain", ["--step-size", "1e-300"], "steps, and the limit is 100000; choose a larger step_size"),
        ("plain", ["--num-steps", "1000000000"], "num_steps=1000000000 must be at most 100000"),
        ("plain", ["--buffers", "-1", "0"], "buffers[0]=-1 must be an integer of at least 0"),
    ],
)
def test_what_is_refused(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, options: list[str], message: str
) -> None:
    assert main(["convert", str(folders / source), str(tmp_path / "new"), *options]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("hf-layerpar: ")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_target_is_left_alone(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there").mkdir()
    for target in (tmp_path / "there", folders / "plain"):
        assert main(["convert", str(folders / "plain"), str(target)]) == 2
        assert f"{target} exists; give the name of a new folder" in capsys.readouterr().err
    assert list((tmp_path / "there").iterdir()) == []
