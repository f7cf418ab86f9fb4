"""Custom code for checkpoints that stock classes can't run: those with a step size that doesn't fold into weights.

Such a checkpoint says so in its config.json: its model type is "ode-<type>" and its `auto_map` points to a small module
beside it, written by `modeling_source`, which names the stock classes. So `AutoModelFor...from_pretrained(path,
trust_remote_code=True)` gives a converted model of the stock class with the stock config class, and transformers
itself refuses to load it without `trust_remote_code`.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from hf_layerpar.compat.transformers import auto_mappings, build_from
from hf_layerpar.errors import UnsupportedModelError
from hf_layerpar.ode.convert import convert_to_ode

MODEL_TYPE_PREFIX = "ode-"
MODULE_NAME = "modeling_hf_layerpar"

_MODULE_HEAD = '''"""Loads this checkpoint: layers stepped with a step size other than 1, which no stock class computes.

Needs the package hf_layerpar (pip install hf_layerpar).
"""

import transformers
from hf_layerpar.ode.remote import OdeModel


class OdeConfig(transformers.{config}):
    model_type = "{model_type}"
'''
_MODULE_CLASS = """

class {name}(OdeModel):
    stock_class = transformers.{name}
"""


class OdeModel:
    """What an `auto_map` entry names: builds `stock_class` and converts it with the settings in its config."""

    stock_class: ClassVar[type[PreTrainedModel]]

    @classmethod
    def from_pretrained(cls, path: str, *args: Any, config: PreTrainedConfig, **kwargs: Any) -> Any:
        return converted(cls.stock_class.from_pretrained(path, *args, config=_stock_config(config), **kwargs))

    @classmethod
    def _from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> PreTrainedModel:
        return converted(build_from(cls.stock_class, _stock_config(config), **kwargs))

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Called by the Auto classes, to have a model's code copied at its next save; `save_pretrained` writes ours."""


def converted(loaded: Any) -> Any:
    """A loaded model (or the pair that `output_loading_info=True` gives), converted with its config's settings."""
    if isinstance(loaded, tuple):
        model, info = loaded
        return convert_to_ode(model), info
    return convert_to_ode(loaded)


def auto_classes(model: PreTrainedModel) -> dict[str, str]:
    """Names of the Auto classes that know the model's config class, and of the stock class that each one loads."""
    found = {}
    for name, mapping in auto_mappings().items():
        if type(model.config) not in mapping:
            continue
        classes = mapping[type(model.config)]
        if isinstance(classes, tuple):
            classes = type(model) if type(model) in classes else classes[0]
        if getattr(transformers, classes.__name__, None) is classes:  # not one registered by the user
            found[name] = classes.__name__
    return found


def auto_map(model: PreTrainedModel) -> dict[str, str]:
    """config.json's `auto_map` of the checkpoint."""
    return {"AutoConfig": f"{MODULE_NAME}.OdeConfig"} | {
        auto: f"{MODULE_NAME}.{name}" for auto, name in auto_classes(model).items()
    }


def modeling_source(model: PreTrainedModel) -> str:
    """Source of the module beside the checkpoint. Raises UnsupportedModelError for a config class of custom code."""
    config = type(model.config)
    if getattr(transformers, config.__name__, None) is not config:
        raise UnsupportedModelError(
            f"{config.__name__} isn't a config class of transformers: a model of custom code can only be saved with "
            "step_size=1, or in the split form"
        )
    head = _MODULE_HEAD.format(config=config.__name__, model_type=MODEL_TYPE_PREFIX + config.model_type)
    names = sorted(set(auto_classes(model).values()))
    return head + "".join(_MODULE_CLASS.format(name=name) for name in names)


def _stock_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same settings as an instance of the stock class that the checkpoint's `OdeConfig` derives from.

    Keys of the weights are converted by model type, and the model is saved by config class, so neither may be ours.
    """
    config = copy.deepcopy(config)
    config.__class__ = type(config).__mro__[1]
    delattr(config, "auto_map")
    return config
