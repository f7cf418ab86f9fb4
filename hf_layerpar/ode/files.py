"""Which files make a checkpoint, by their names."""

from __future__ import annotations

import re

from hf_layerpar.ode.remote import MODULE_NAME


def makes_loadable(name: str) -> bool:
    """Whether weights load as soon as this file is there: the only weight file, or the index of several."""
    return (
        re.search(r"-\d{5}-of-\d{5}\.", name) is None
        and re.search(r"\.(safetensors|bin)(\.index.*)?$", name) is not None
    )


def is_of_a_checkpoint(name: str, variant: str | None = None) -> bool:
    """Whether a file would be read, or left over, beside new weights of this variant."""
    dotted = re.escape(f".{variant}") if variant else ""
    shard = r"(-\d{5}-of-\d{5})?"
    weights = rf"(model|pytorch_model){dotted}{shard}\.(safetensors|bin)"
    index = rf"(model\.safetensors|pytorch_model\.bin)\.index{dotted}\.json"
    return re.fullmatch(rf"{weights}|{index}|{MODULE_NAME}\.py", name) is not None
