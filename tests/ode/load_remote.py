"""Run in a fresh interpreter by test_checkpoint.py: `python load_remote.py DIRECTORY`.

Loads every checkpoint below DIRECTORY as a user with nothing but transformers would, and prints JSON: for each one what
the Auto classes did without and with trust_remote_code, and what is left of the mapping of its stock config class.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoTokenizer

torch.set_num_threads(1)


def refusal(auto, directory):
    try:
        auto.from_pretrained(directory)
    except ValueError as error:
        return str(error)
    return None


def report(directory: Path) -> dict:
    inputs, expected = torch.load(directory.with_suffix(".pt"))
    config = json.loads((directory / "config.json").read_text())
    (name,) = config["architectures"]
    auto = getattr(transformers, next(a for a, ref in config["auto_map"].items() if ref.endswith(f".{name}")))
    refused = refusal(auto, directory)
    model = auto.from_pretrained(directory, trust_remote_code=True)
    with torch.no_grad():
        same = torch.equal(model(**inputs).logits, expected)
    stock = auto.from_config(type(model.config)(**type(model.config).from_dict(dict(config)).to_dict()))
    return {
        "refused": refused,
        "class": [type(model).__module__, type(model).__name__],
        "config": [type(model.config).__module__, type(model.config).__name__, hasattr(model.config, "auto_map")],
        "same": same,
        "settings": model.config.hf_layerpar,
        "base": type(AutoModel.from_pretrained(directory, trust_remote_code=True)).__name__,
        "of_stock_config": [type(stock).__module__, hasattr(stock, "_hf_layerpar_view")],
        "auto_config": type(AutoConfig.from_pretrained(directory, trust_remote_code=True)).__name__,
    }


def tokenizers(directory: Path) -> list[list]:
    return [
        [type(tokenizer).__name__, tokenizer("a b").input_ids]
        for tokenizer in (
            AutoTokenizer.from_pretrained(directory, **trust) for trust in ({}, {"trust_remote_code": True})
        )
    ]


if __name__ == "__main__":
    imported_before = "hf_layerpar" in sys.modules
    root = Path(sys.argv[1])
    found = {path.name: report(path) for path in sorted(root.iterdir()) if path.is_dir()}
    out = {"imported_before": imported_before, "models": found, "tokenizers": tokenizers(root / "bert")}
    print("REPORT" + json.dumps(out))
