"""Layer-parallel (parallel-in-depth) training of HuggingFace transformers by multigrid in time."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_layerpar.agreement import gradient_agreement
    from hf_layerpar.config import LayerParallelConfig
    from hf_layerpar.diagnosis.diagnose import diagnose
    from hf_layerpar.errors import LayerParallelError
    from hf_layerpar.loading import from_pretrained
    from hf_layerpar.ode.convert import convert_to_ode, ode_view
    from hf_layerpar.sharding import layer_parallel, parallelize
    from hf_layerpar.training.arguments import LayerParallelTrainingArguments
    from hf_layerpar.training.trainer import LayerParallelTrainer

__version__ = "0.1.0"

_HOME = {
    "LayerParallelConfig": "config",
    "LayerParallelError": "errors",
    "convert_to_ode": "ode.convert",
    "ode_view": "ode.convert",
    "from_pretrained": "loading",
    "parallelize": "sharding",
    "layer_parallel": "sharding",
    "gradient_agreement": "agreement",
    "diagnose": "diagnosis.diagnose",
    "LayerParallelTrainer": "training.trainer",
    "LayerParallelTrainingArguments": "training.arguments",
}

__all__ = [  # noqa: RUF022 (in the order a user meets them)
    "convert_to_ode",
    "from_pretrained",
    "ode_view",
    "LayerParallelConfig",
    "parallelize",
    "layer_parallel",
    "gradient_agreement",
    "diagnose",
    "LayerParallelTrainer",
    "LayerParallelTrainingArguments",
    "LayerParallelError",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
