"""What stock's `fsdp` and accelerate's launch flags and `ParallelismConfig` ask for, in this package's words.

That is: whether dp ranks keep pieces of the parameters, and the size of the tp axis. What would mean something else
here is refused by name.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from accelerate import ParallelismConfig

from hf_layerpar.compat.trainer import strtobool
from hf_layerpar.config import shown
from hf_layerpar.errors import ConfigurationError

_FLAGS = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG")
_IN_ENVIRONMENT = {
    "version": "FSDP_VERSION",
    "cpu_offload": "FSDP_OFFLOAD_PARAMS",
    "activation_checkpointing": "FSDP_ACTIVATION_CHECKPOINTING",
    "cpu_ram_efficient_loading": "FSDP_CPU_RAM_EFFICIENT_LOADING",
    "min_num_params": "FSDP_MIN_NUM_PARAMS",
    "ignored_modules": "FSDP_IGNORED_MODULES",
}
"""Settings of `fsdp_config`, and where `accelerate launch` puts them."""
_MEANINGLESS = {
    "reshard_after_forward",  # parameters are whole for a step, whichever
    "state_dict_type",  # checkpoints are this package's own
    *("auto_wrap_policy", "transformer_layer_cls_to_wrap"),  # the layers are known
    *("forward_prefetch", "backward_prefetch", "use_orig_params", "sync_module_states"),  # FSDP2 knows none of them
}
_ALIKE: dict[str, tuple[str, str]] = {
    "version": ("2", "there is FSDP2 only: version 2 (accelerate launch: --fsdp_version 2)"),
    "cpu_offload": ("false", "parameters stay on their device; leave it out"),
    "activation_checkpointing": ("false", "use activation_checkpointing=True of the training arguments"),
    "cpu_ram_efficient_loading": (
        "false",
        "from_pretrained would leave weights empty; switch it off (--fsdp_cpu_ram_efficient_loading false)",
    ),
    "min_num_params": ("0", "every layer is a group; leave it out"),
    "ignored_modules": ("none", "all parameters are cut; leave it out"),
    **dict.fromkeys(("xla", "xla_fsdp_v2", "xla_fsdp_grad_ckpt"), ("false", "there is no XLA here; leave it out")),
}
"""What else a setting may say (as text), and what to do about other values."""


def fsdp_of_launcher() -> dict[str, str] | None:
    """The `fsdp_config` of `accelerate launch --use_fsdp`; None where that didn't start this process."""
    if not strtobool(os.environ.get(_FLAGS[0], "false")):
        return None
    return {name: os.environ[key] for name, key in _IN_ENVIRONMENT.items() if key in os.environ}


def check_fsdp(settings: Mapping[str, Any]) -> None:
    """Raises ConfigurationError for a setting of `fsdp_config` that says something else than what is done here."""
    for name, value in settings.items():
        said = str(value).lower()
        if name in _MEANINGLESS or (name in _ALIKE and said == _ALIKE[name][0]):
            continue
        remedy = _ALIKE[name][1] if name in _ALIKE else "leave it out"
        raise ConfigurationError(f"fsdp_config: {name}={shown(value)} is not supported: {remedy}")


def axis_sizes(asked: ParallelismConfig | None) -> dict[str, int]:
    """The sizes of the axes in accelerate's `ParallelismConfig`, or in that of `accelerate launch
    --use_parallelism_config`; all 1 where neither says any."""
    if asked is None and strtobool(os.environ.get(_FLAGS[1], "false")):
        asked = ParallelismConfig()
    return {name: getattr(asked, f"{name}_size", None) or 1 for name in ("dp_replicate", "dp_shard", "tp", "cp", "sp")}


def check_axes(sizes: Mapping[str, int], dp_size: int) -> None:
    """Raises ConfigurationError where accelerate's axes are not those that there are."""
    replicas, shards = sizes["dp_replicate"], sizes["dp_shard"]
    refused = {
        f"cp_size={sizes['cp']}": (sizes["cp"] > 1, "there is no context parallelism; leave it out"),
        f"sp_size={sizes['sp']}": (sizes["sp"] > 1, "there is no sequence parallelism; leave it out"),
        f"dp_replicate_size={replicas} with dp_shard_size={shards}": (
            replicas > 1 and shards > 1,
            "parameters are cut over all dp ranks or over none; set one of them to 1",
        ),
        f"dp_replicate_size={replicas}": (
            replicas not in (1, dp_size),
            f"{dp_size} dp ranks remain beside lp_size and tp_size; say so, or leave it out",
        ),
        f"dp_shard_size={shards}": (
            shards not in (1, dp_size),
            f"{dp_size} dp ranks remain beside lp_size and tp_size; say so, or leave it out",
        ),
    }
    for name, (odd, remedy) in refused.items():
        if odd:
            raise ConfigurationError(f"parallelism_config: {name} is not supported: {remedy}")


@contextmanager
def unseen_by_accelerate() -> Iterator[None]:
    """accelerate, which would wrap models and make meshes of its own, sees none of these flags inside."""
    before = {name: os.environ.pop(name, None) for name in _FLAGS}
    try:
        yield
    finally:
        os.environ.update({name: value for name, value in before.items() if value is not None})
