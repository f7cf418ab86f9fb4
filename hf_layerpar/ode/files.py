"""Which files make a checkpoint, by their names, and whether they are whole."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from hf_layerpar.compat.transformers import ADAPTER_CONFIG_NAME
from hf_layerpar.errors import CheckpointError, LayerParallelError
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


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Around the reading of a file: whatever goes wrong becomes a CheckpointError that names it. Errors of this package
    stay what they are."""
    try:
        yield
    except LayerParallelError:
        raise
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise CheckpointError(
            f"{path} is damaged or can't be read ({why}); copy it anew, or use another checkpoint"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Raises CheckpointError for what is no JSON object."""
    with reading(path):
        values = json.loads(path.read_text("utf-8"))
        if not isinstance(values, dict):
            raise TypeError(f"a JSON object is expected, and not a {type(values).__name__}")
    return values


def check_whole(directory: Path, variant: str | None = None) -> None:
    """Raises CheckpointError for a file of a checkpoint (or of adapters) that is cut short or no file of its kind, and
    for a lost one that an index names."""
    for path in sorted(directory.iterdir()):
        name = path.name
        if name in (CONFIG_NAME, GENERATION_CONFIG_NAME, ADAPTER_CONFIG_NAME):
            read_json(path)
        elif not (is_of_a_checkpoint(name, variant) or name.startswith("adapter_model.")):
            continue
        elif name.endswith(".json"):
            index = read_json(path)
            with reading(path):
                lost = sorted({shard for shard in index["weight_map"].values() if not (directory / shard).is_file()})
            if lost:
                raise CheckpointError(f"{directory} lacks {lost}, which {name} names; copy them anew")
        elif name.endswith(".safetensors"):
            with reading(path), safe_open(path, "pt"):
                pass
        elif name.endswith(".bin"):
            with reading(path):
                torch.load(path, map_location="meta", weights_only=True)
