"""`hf-layerpar check` on tiny models saved in a folder, with a text file."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_layerpar.cli import main
from hf_layerpar.diagnosis.batches import random_batches, text_batches, token_blocks
from hf_layerpar.errors import ConfigurationError
from tests import zoo

SPECIAL = ["[PAD]", "[BOS]", "[EOS]", "[MASK]", "[UNK]"]
WORDS = [f"w{n}" for n in range(zoo.VOCAB - len(SPECIAL))]


def make_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *WORDS])}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 1)])
    names = {"pad_token": "[PAD]", "bos_token": "[BOS]", "eos_token": "[EOS]"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, mask_token="[MASK]", unk_token="[UNK]", **names)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(" ".join(WORDS[(7 * n + k) % len(WORDS)] for k in range(11)) for n in range(40)))
    return path


@pytest.fixture
def labelled(tmp_path):
    path = tmp_path / "labelled.tsv"
    path.write_text("".join(f"{n % 3}\t{WORDS[n]} {WORDS[2 * n % 50]}\n" for n in range(12)))
    return path


def saved(tmp_path, name: str):
    folder = tmp_path / name
    zoo.build(name, layers=6)[0].save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


SIZE = ["--batch-size", "2", "--tokens", "8", "--ranks", "3"]


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_check_prints_stores_and_draws(name, tmp_path, text, capsys):
    folder = saved(tmp_path, name)
    files = ["--json", str(tmp_path / "out.json"), "--png", str(tmp_path / "out.png")]
    assert main(["check", str(folder), "--text", str(text), *SIZE, *files, "--coarsening", "3"]) == 0
    out = capsys.readouterr().out
    values = json.loads((tmp_path / "out.json").read_text())
    assert (values["rows"], values["tokens"], values["batches"], values["ranks"]) == (2, 8, 2, 3)
    assert values["training"] is True
    assert {s["config"]["coarsening"] for s in values["settings"]} == {3}
    assert " ".join(out.split()).endswith(values["suggestion"]["verdict"][1:])
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_a_new_head_learns_from_labelled_lines(tmp_path, labelled, capsys):
    folder = saved(tmp_path, "bert")
    task = ["--task", "sequence-classification", "--buffers", "1", "1"]
    assert main(["check", str(folder), "--text", str(labelled), *SIZE, *task]) == 0
    out = capsys.readouterr().out
    assert out.startswith("BertForSequenceClassification: 2 batches of 2 x 8, training mode")
    assert "buffers (1, 1)" in out


def test_random_tokens_on_request(tmp_path, capsys):
    assert main(["check", str(saved(tmp_path, "gpt2")), "--random", *SIZE, "--batches", "1"]) == 0
    assert "1 batch of 2 x 8" in capsys.readouterr().out


def test_what_can_not_be_checked_is_refused(tmp_path, text, labelled, capsys):
    def refused(*arguments: str) -> str:
        assert main(["check", *arguments]) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("hf-layerpar: ")
        return said

    gpt2, t5 = str(saved(tmp_path, "gpt2")), str(saved(tmp_path, "t5"))
    assert "hf_layerpar.diagnose(model, batches)" in refused(t5, "--text", str(text))
    assert "--tokens 65 is more than the 64 positions" in refused(gpt2, "--text", str(text), "--tokens", "65")
    assert "No such file" in refused(gpt2, "--text", str(tmp_path / "no.txt"))
    assert "has 440 tokens, but 200 rows of 8 take 1600" in refused(
        gpt2, "--text", str(text), "--tokens", "8", "--batch-size", "100"
    )
    assert "is not a label, a tab and a text" in refused(gpt2, "--text", str(text), "--task", "sequence-classification")
    assert "has 12 labelled lines, but 2 batches of 20 take 40" in refused(
        gpt2, "--text", str(labelled), "--task", "sequence-classification", "--batch-size", "20"
    )
    with pytest.raises(SystemExit):  # neither --text nor --random
        main(["check", gpt2])


def broken(folder, name: str, content: bytes):
    """A copy of a checkpoint with one file changed."""
    copy = folder.parent / f"broken-{len(list(folder.parent.iterdir()))}"
    shutil.copytree(folder, copy)
    (copy / name).write_bytes(content)
    return copy


DEEP = b"[" * 100_000 + b"]" * 100_000


def test_damaged_input_is_refused_in_one_line(tmp_path, text, labelled, capsys):
    def refused(*arguments: object) -> str:
        assert main(["check", *map(str, arguments)]) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        assert said.splitlines()[-1].startswith("hf-layerpar: ")
        return said.splitlines()[-1]

    gpt2 = saved(tmp_path, "gpt2")
    weights = (gpt2 / "model.safetensors").read_bytes()
    config = json.loads((gpt2 / "config.json").read_text())
    damaged = [
        ("model.safetensors", weights[: len(weights) // 2]),
        ("config.json", DEEP),
        ("config.json", b'{"model_type": ' + DEEP + b"}"),
        ("config.json", b"[1, 2]"),
        ("config.json", json.dumps(config | {"architectures": 5}).encode()),
        ("config.json", json.dumps(config | {"n_head": "x"}).encode()),
        ("config.json", json.dumps(config | {"hf_layerpar": [1]}).encode()),
        ("tokenizer.json", DEEP),
    ]
    for name, content in damaged:
        assert str(folder := broken(gpt2, name, content)) in refused(folder, "--text", text, *SIZE) or name
    latin = tmp_path / "latin.txt"
    latin.write_bytes("Bücher".encode("latin-1"))
    assert f"{latin} is no UTF-8 text (byte 1: invalid start byte)" in refused(gpt2, "--text", latin, *SIZE)
    task = ["--task", "sequence-classification"]
    assert "is no UTF-8 text" in refused(gpt2, "--text", latin, *SIZE, *task)
    labelled.write_text(f"{10**30}\tw1\n")
    assert "number the labels from 0 to at most 99999" in refused(gpt2, "--text", labelled, *SIZE, *task)
    assert "--tokens=1 must be an integer of at least 2" in refused(gpt2, "--text", text, "--tokens", 1)
    assert "--batch-size=1000000000000 must be at most" in refused(gpt2, "--text", text, "--batch-size", 10**12)
    assert "ends in .png" in refused(gpt2, "--text", text, "--png", tmp_path / "x.foo")


def test_rows_of_text_begin_with_bos_where_the_tokenizer_says_so():
    words = " ".join(WORDS[:12])
    plain = token_blocks(make_tokenizer(), words, "causal-lm", 2, 4)
    assert torch.equal(plain, torch.arange(5, 13).view(2, 4))
    begun = token_blocks(make_tokenizer(bos=True), words, "causal-lm", 2, 4)
    assert torch.equal(begun, torch.tensor([[1, 5, 6, 7], [1, 8, 9, 10]]))


def test_masked_batches_hide_some_tokens_of_every_row(text):
    (batch,) = text_batches(make_tokenizer(), "masked-lm", text, count=1, rows=20, tokens=4)
    hidden = batch["input_ids"] == 3
    assert hidden.any(1).all()
    assert torch.equal(hidden, batch["labels"] != -100)
    assert not hidden.all()
    whole = token_blocks(make_tokenizer(), text.read_text(), "masked-lm", 20, 4)
    assert torch.equal(torch.where(hidden, batch["labels"], batch["input_ids"]), whole)
    unmasked = make_tokenizer()
    unmasked.mask_token = None
    with pytest.raises(ConfigurationError, match="no mask token"):
        text_batches(unmasked, "masked-lm", text, count=1, rows=2, tokens=4)


def test_random_batches_hold_no_special_tokens():
    first, second = random_batches(make_tokenizer(), "causal-lm", num_labels=2, count=2, rows=8, tokens=16)
    assert first["input_ids"].min() >= len(SPECIAL)
    assert first["input_ids"].max() < zoo.VOCAB
    assert not torch.equal(first["input_ids"], second["input_ids"])
