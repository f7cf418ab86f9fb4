"""What of accelerate is replaced or told otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DynamoBackend

from hf_layerpar.compat import looking_into, unsupported

with looking_into("accelerate"):
    from accelerate.utils.memory import clear_device_cache

__all__ = ["clear_device_cache"]

_ATTRIBUTES = (
    *("prepare_model", "gather_for_metrics", "native_amp", "scaler", "device", "mixed_precision", "sync_gradients"),
    *("state.device_mesh", "state.dynamo_plugin.backend", "state.dynamo_plugin.mode", "dataloader_config.data_seed"),
    *("dataloader_config.dispatch_batches", "gradient_state.end_of_dataloader", "gradient_state.remainder"),
    "gradient_state.active_dataloader",
)


def check_accelerator(accelerator: Any) -> None:
    """Raises UnsupportedVersionError for one that lacks what is relied on."""
    for name in _ATTRIBUTES:
        try:
            attrgetter(name)(accelerator)
        except AttributeError:
            raise unsupported("accelerate", f"its Accelerator has no {name}") from None


def keep_unwrapped(accelerator: Any, is_parallel: Callable[[Any], bool]) -> None:
    """Makes `accelerator.prepare` leave models alone whose gradients are averaged elsewhere: no DDP around them, and no
    other device. is_parallel: whether a model is one."""
    stock = accelerator.prepare_model

    def prepare_model(model: Any, device_placement: bool | None = None, evaluation_mode: bool = False) -> Any:
        if is_parallel(model):
            device_placement, evaluation_mode = False, True
        return stock(model, device_placement=device_placement, evaluation_mode=evaluation_mode)

    accelerator.prepare_model = prepare_model


def before_state_files(check: Callable[[str, Sequence[Any]], None]) -> None:
    """From now on every Accelerator calls check(method, models and optimizers) before it writes or reads their state
    in files that have what one process holds."""
    for name in ("save_state", "load_state", "save_model"):
        setattr(Accelerator, name, _checked(getattr(Accelerator, name), check))


def _checked(stock: Any, check: Callable[[str, Sequence[Any]], None]) -> Any:
    @wraps(stock)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        named = [*args[:1], *(value for name, value in kwargs.items() if name == "model")]
        held = named if stock.__name__ == "save_model" else [*self._models, *self._optimizers]
        check(stock.__name__, held)
        return stock(self, *args, **kwargs)

    return method


def compiler_asked_for(accelerator: Any) -> dict[str, str]:
    """The backend and mode by which accelerate would compile the whole model, which it then doesn't; empty
    where it wouldn't."""
    asked = accelerator.state.dynamo_plugin
    if asked.backend == DynamoBackend.NO:
        return {}
    backend, asked.backend = asked.backend.value.lower(), DynamoBackend.NO
    return {"backend": backend, "mode": asked.mode}


def set_scaler(accelerator: Any, scaler: Any) -> None:
    """Makes it compute in fp16, with this scaler of losses, also on a CPU."""
    accelerator.native_amp, accelerator.scaler = True, scaler


class BatchSharing:
    """What accelerate reads of a device mesh to shard a dataloader: ranks along "tp" are given the same batches."""

    mesh_dim_names = ("dp_replicate", "tp")

    def __init__(self, dp_size: int, batch_size: int) -> None:
        """batch_size: processes that share a batch."""
        self._sizes = {"dp_replicate": dp_size, "tp": batch_size}

    def __getitem__(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(size=lambda: self._sizes[name])
