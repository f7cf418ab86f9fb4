"""What transformers' models have that is private, or in modules that its documentation doesn't name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from hf_layerpar.compat import looking_into, unsupported

with looking_into("transformers"):
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        build_glob_alternation,
        dot_natural_key,
        rename_source_key,
        revert_weight_conversion,
    )
    from transformers.initialization import no_init_weights
    from transformers.modelcard import TASK_MAPPING
    from transformers.modeling_layers import GradientCheckpointingLayer
    from transformers.modeling_utils import remove_tied_weights_from_state_dict
    from transformers.models.auto import modeling_auto
    from transformers.utils import output_capturing
    from transformers.utils.hub import cached_file
    from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME, find_adapter_config_file

    _collector = output_capturing._active_collector
    _ = PreTrainedModel._from_config, PreTrainedModel._init_weights, PreTrainedModel._get_dtype_plan
    _ = modeling_auto.AutoModel._model_mapping._model_mapping

try:
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES  # pyright: ignore
except ImportError:
    ALL_PARALLEL_STYLES = None

__all__ = [
    "ADAPTER_CONFIG_NAME",
    "TASK_MAPPING",
    "GradientCheckpointingLayer",
    "WeightConverter",
    "WeightRenaming",
    "build_glob_alternation",
    "cached_file",
    "dot_natural_key",
    "find_adapter_config_file",
    "get_model_conversion_mapping",
    "no_init_weights",
    "remove_tied_weights_from_state_dict",
    "rename_source_key",
    "revert_weight_conversion",
]

INITIALISES = "_init_weights"
"""The method of a model by which it draws the values of a module."""
IS_INITIALISED = "_is_hf_initialized"
"""How modules (and parameters) are marked whose values are not to be drawn."""
IGNORED_UNEXPECTED = "_keys_to_ignore_on_load_unexpected"
IGNORED_MISSING = "_keys_to_ignore_on_load_missing"
IGNORED_SAVING = "_keys_to_ignore_on_save"
"""Attributes of a model: patterns of names that a checkpoint may have, or may lack, and names that aren't written."""
CHECKPOINT_PATH = "_name_or_path"
"""The attribute of a config that says what it was read from."""


def build_from(model_class: type[PreTrainedModel], config: Any, **options: Any) -> PreTrainedModel:
    return model_class._from_config(config, **options)


def has_adapters(model: Any) -> bool:
    """Whether `add_adapter` or `load_adapter` of a model (not PEFT's wrapper) put some into it."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def was_split_while_loading(model: Any) -> bool:
    """Whether `from_pretrained` made each process load a part, by a tp_plan or distributed_config."""
    return getattr(model, "_device_mesh", None) is not None


def tensor_plan(model: PreTrainedModel) -> dict[str, str]:
    """The model's tp_plan, a style for each module and parameter by its full name.

    Raises UnsupportedVersionError where transformers is older than its plans.
    """
    if ALL_PARALLEL_STYLES is None or not hasattr(model, "_expand_parallel_plan"):
        raise unsupported("transformers", "a tensor-parallel axis (tp_size above 1) needs a later one")
    return model._expand_parallel_plan(model.tp_plan)


def tensor_style(name: str) -> Any:
    """What cuts parameters (`shard_param`) and puts messages around a module's forward (`install_forward`)."""
    assert ALL_PARALLEL_STYLES is not None
    return ALL_PARALLEL_STYLES[name]


def dtype_plan(model: PreTrainedModel, dtype: Any) -> dict[str, Any]:
    """Patterns of the parameters that the loader reads in a dtype of their own, and that."""
    return model._get_dtype_plan(dtype)


def collected_outputs() -> Any:
    """The per-layer outputs that the running forward was asked for, by name."""
    return _collector.get()


def auto_mappings() -> dict[str, Any]:
    """The Auto classes of models by name: the mapping of each from config to model class."""
    found = {name: getattr(auto, "_model_mapping", None) for name, auto in vars(modeling_auto).items()}
    return {name: mapping for name, mapping in found.items() if name.startswith("AutoModel") and mapping is not None}


def auto_names() -> dict[str, Mapping[str, Any]]:
    """The same with names: of the model type, and of the class (or a tuple of them)."""
    return {name: mapping._model_mapping for name, mapping in auto_mappings().items()}


def checkpoint_activations(model: PreTrainedModel, options: dict[str, Any]) -> None:
    """options: of torch.utils.checkpoint."""
    enable = (
        getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    )  # before 5.23
    enable(options)


def checkpoints_activations(model: PreTrainedModel) -> dict[str, Any] | None:
    """The options of torch.utils.checkpoint by which a model's layers run; None where they don't."""
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            return dict(module._gradient_checkpointing_func.keywords)  # type: ignore[union-attr]
    return None
