"""Run in a fresh interpreter: `python load_stock.py FOLDER`. Loads what the names of the files in FOLDER say from the
Hub, as a user with nothing but transformers would, and prints JSON: how far its logits are from those kept in the file.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from huggingface_hub import hf_hub_download

torch.set_num_threads(1)


def report(repo_id: str, file: Path) -> dict:
    inputs, expected = torch.load(file)
    config = json.loads(Path(hf_hub_download(repo_id, "config.json")).read_text())
    (name,) = config["architectures"]
    kind = {"MaskedLM": "MaskedLM", "CausalLM": "CausalLM", "Classification": "SequenceClassification"}
    auto = getattr(transformers, "AutoModelFor" + next(v for k, v in kind.items() if name.endswith(k)))
    refused, trust = None, {}
    try:
        model = auto.from_pretrained(repo_id)
    except ValueError as error:
        refused, trust = str(error), {"trust_remote_code": True}
        model = auto.from_pretrained(repo_id, **trust)
    with torch.no_grad():
        distance = (model(**inputs).logits - expected).abs().max().item()
    return {"distance": distance, "refused": refused, "class": type(model).__name__}


if __name__ == "__main__":
    assert "hf_layerpar" not in sys.modules
    files = sorted(Path(sys.argv[1]).glob("*.pt"))
    print("REPORT" + json.dumps({(name := f.stem.replace("--", "/")): report(name, f) for f in files}))
