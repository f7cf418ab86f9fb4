"""Checkpoints turned into other checkpoints: plain ones into ODE form, ODE forms into plain ones.

What is written appears in one rename, with the source's tokenizer, processor and license files, and a model card.
"""

from __future__ import annotations

import fnmatch
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_layerpar.config import CONFIG_KEY, OdeSettings
from hf_layerpar.errors import CheckpointError
from hf_layerpar.hub.card import CardFacts, facts_of_class, make_card
from hf_layerpar.hub.upload import CARD_NAME
from hf_layerpar.ode.checkpoint import load_stock, stored_config
from hf_layerpar.ode.convert import convert_to_ode, ode_view
from hf_layerpar.ode.pushing import facts_for_card, hub_name
from hf_layerpar.ode.remote import MODEL_TYPE_PREFIX
from hf_layerpar.ode.saving import sync

logger = logging.get_logger(__name__)

CARRIED = (
    *("tokenizer*", "*vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "bpe.codes"),
    *("*.tiktoken", "spiece.model", "*sentencepiece*.model", "*.spm", "normalizer.json", "chat_template*"),
    *("*processor_config.json", "LICENSE*"),
)
"""Names of the files beside weights and config that belong to a model."""

_HOW = {
    "plain": "an ordinary checkpoint",
    "folded": "stock classes load it as it is, with the step size in its weights",
    "code": "Auto classes load it with trust_remote_code=True",
}


def to_ode(source: str, target: Path, **settings: Any) -> str:
    """Writes the checkpoint `source` (a folder or a name on the Hub) to the new folder `target` in its ODE form.

    settings: those of `convert_to_ode`. Returns a line about what was written.

    Raises what `convert_to_ode` raises, and CheckpointError where `target` exists or `source` can't be loaded whole.
    """
    _check_new(target)
    model = convert_to_ode(_load_whole(source), **settings)
    with _written(target) as folder:
        model.save_pretrained(folder)
        _carry(source, folder)
        _write_card(folder, target, source, facts_for_card(model))
    stacks = ", ".join(f"{len(stack.layers)} layers in {stack.path}" for stack in ode_view(model).stacks)
    ode = ode_view(model).settings
    how = _HOW[facts_for_card(model)["kind"]]
    return f"{type(model).__name__}, {stacks}, step size {ode.step_size:g} ({ode.form} form); {how}"


def to_stock(source: str, target: Path) -> None:
    """Writes a checkpoint of ours to the new folder `target` without our settings, as a plain one; weights stay.

    Raises CheckpointError where `source` isn't one of ours, or has no plain form: stock layers step with size 1.
    """
    _check_new(target)
    config = stored_config(source)
    stored = config.get(CONFIG_KEY)
    if stored is None:
        raise CheckpointError(f"{source} has no settings of hf_layerpar in its config.json, so it is no ODE form")
    settings = OdeSettings.from_dict(stored)
    if str(config.get("model_type")).startswith(MODEL_TYPE_PREFIX):
        why = "stock layers step with size 1; load it as it is, with trust_remote_code=True, or train it at step size 1"
        if settings.form == "split":
            why = (
                "its norms can't contain a step size in half precision; save what hf_layerpar.from_pretrained"
                f"({source!r}, dtype=torch.float32) gives, and convert that"
            )
        raise CheckpointError(
            f"{source} has step size {settings.step_size:g} in the {settings.form} form, which has no exact plain "
            f"form: {why}"
        )
    model = _load_whole(source)
    delattr(model.config, CONFIG_KEY)
    with _written(target) as folder:
        model.save_pretrained(folder)
        _carry(source, folder)
        _write_card(folder, target, source, facts_of_class(type(model).__name__))


def _check_new(target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise CheckpointError(f"{target} exists; give the name of a new folder, or remove it first")


def _load_whole(source: str) -> PreTrainedModel:
    model, info = load_stock(source, output_loading_info=True)
    lost = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "mismatched_keys") if info[kind]}
    if lost:
        raise CheckpointError(
            f"{source} does not hold all weights of {type(model).__name__}, which its config.json names: "
            + "; ".join(f"{len(names)} {kind} {names[:4]}" for kind, names in lost.items())
        )
    if unused := sorted(map(str, info["unexpected_keys"])):
        logger.warning(f"{len(unused)} weights of {source} are no part of {type(model).__name__}: {unused[:4]}")
    return model


@contextmanager
def _written(target: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `target` at the end, or goes away."""
    target = Path(os.path.abspath(target))
    folder = target.parent / f".{target.name}.converting-{uuid.uuid4().hex[:8]}"
    try:
        yield folder
        for path in folder.iterdir():
            sync(path)
        folder.rename(target)
        sync(target.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _carry(source: str, folder: Path) -> None:
    """Copies the files beside the weights; those that were just written stay."""
    here = Path(source) if os.path.isdir(source) else Path(snapshot_download(source, allow_patterns=list(CARRIED)))
    for path in here.iterdir():
        known = any(fnmatch.fnmatchcase(path.name, pattern) for pattern in CARRIED)
        if known and path.is_file() and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)


def _write_card(folder: Path, target: Path, source: str, facts: dict[str, Any]) -> None:
    facts = facts | {"name": target.name, "base_model": hub_name(source)}
    make_card(CardFacts(**facts)).save(folder / CARD_NAME)
