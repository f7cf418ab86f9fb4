"""Checkpoints that `hf_layerpar.ode.saving` wrote, and plain ones, as transformers' own classes load them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

from hf_layerpar.config import CONFIG_KEY, OdeSettings
from hf_layerpar.errors import CheckpointError
from hf_layerpar.ode import remote
from hf_layerpar.ode.files import check_whole, reading

DOWNLOAD_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)


def load_stock(path: str | os.PathLike[str], **kwargs: Any) -> Any:
    """A checkpoint as its stock class, not converted, with the weights as they are stored.

    kwargs: for that class's `from_pretrained`. Raises CheckpointError as `stock_form`.
    """
    stock_class, kwargs = stock_form(path, **kwargs)
    return stock_class.from_pretrained(path, **kwargs)


def stock_form(path: str | os.PathLike[str], **kwargs: Any) -> tuple[type[PreTrainedModel], dict[str, Any]]:
    """The class of transformers that loads a checkpoint, and the arguments with which its `from_pretrained` does.

    Raises:
        CheckpointError: there is no config.json, it names no class of transformers, or a file is damaged.
    """
    values = stored_config(path, **kwargs)
    if not values:
        raise CheckpointError(f"there is no {CONFIG_NAME} in {path}, so no checkpoint; was its save cut short?")
    stock_class = stock_class_of(values, f"{CONFIG_NAME} of {path}")
    model_type = str(values.get("model_type", ""))
    if model_type.startswith(remote.MODEL_TYPE_PREFIX) and "config" not in kwargs:
        dtype = {key: kwargs[key] for key in ("dtype", "torch_dtype") if key in kwargs}
        with reading(Path(path, CONFIG_NAME)):
            del values["model_type"], values["auto_map"]
            config_class = CONFIG_MAPPING[model_type.removeprefix(remote.MODEL_TYPE_PREFIX)]
        # the config swallows a given dtype, which must also reach the class
        config, unused = config_class.from_dict(values, **kwargs, return_unused_kwargs=True)
        kwargs = {"config": config} | unused | dtype  # pyright: ignore[reportOperatorIssue]
    return stock_class, kwargs


def stock_class_of(values: Mapping[str, Any], whose: str) -> type[PreTrainedModel]:
    """The class that a config names. Raises CheckpointError where it is none of transformers."""
    names = values.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    stock_class = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(stock_class, type) and issubclass(stock_class, PreTrainedModel)):
        raise CheckpointError(
            f"{whose} has architectures={names}, which names no class of transformers; set it, or "
            "load the model with its own class and call convert_to_ode(model)"
        )
    return stock_class


def stored_config(path: str | os.PathLike[str], **kwargs: Any) -> dict[str, Any]:
    """What config.json of a checkpoint says; empty where there is none. kwargs: those of `from_pretrained`.

    Raises CheckpointError for a folder with a damaged file.
    """
    folder = Path(path, kwargs.get("subfolder") or "")
    if folder.is_dir():
        check_whole(folder, kwargs.get("variant"))
    download = {name: kwargs[name] for name in DOWNLOAD_ARGUMENTS if name in kwargs}
    values, _ = PreTrainedConfig.get_config_dict(path, **download)
    if CONFIG_KEY in values:
        with reading(folder / CONFIG_NAME):
            OdeSettings.from_dict(values[CONFIG_KEY])
    return values
