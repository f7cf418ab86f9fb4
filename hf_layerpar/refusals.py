"""What would part the ranks of a parallelized model, refused where it is called: DistributedDataParallel around it,
methods that make parameters, optimizers that measure all parameters together, and files of what one rank holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from hf_layerpar.compat.accelerate import before_state_files
from hf_layerpar.compat.peft import before_adapters
from hf_layerpar.compat.torch import DDP_READS_FIRST
from hf_layerpar.errors import ConfigurationError, UnsupportedModelError

if TYPE_CHECKING:
    from hf_layerpar.sharding import LayerParallel

_CHANGES = ("resize_token_embeddings", "add_adapter", "load_adapter", "add_weighted_adapter")
"""Methods of transformers' and PEFT's models that make parameters, which no rank would own."""

_parallel: WeakSet[nn.Module] = WeakSet()
"""Parallelized models."""
_spread: WeakSet[nn.Module] = WeakSet()
"""Those of which other lp ranks have layers."""


def guard(model: nn.Module, handle: LayerParallel) -> None:
    """From now on a parallelized model refuses what would part its ranks."""
    object.__setattr__(model, DDP_READS_FIRST, _Unwrapped(handle))
    _parallel.add(model)
    if handle.lp_size > 1:
        _spread.add(model)
        before_adapters(_refuse_adapters)
        for module in model.modules():
            for name in _CHANGES:
                if hasattr(module, name):
                    object.__setattr__(module, name, _Refused(name))


def refused_wrapper(lp_size: int) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"DistributedDataParallel (of the stock Trainer, TRL or accelerator.prepare) around a model on {lp_size} lp "
        "ranks: it would copy rank 0's parameters over the other ranks' layers, and average nothing. Use "
        "LayerParallelTrainer; or leave the model out of accelerator.prepare, and average over dp ranks by "
        "hf_layerpar.training.collectives.average_gradients"
    )


@dataclass(slots=True, eq=False)
class _Unwrapped:
    """What DistributedDataParallel looks at first of a model, of one that it must not wrap."""

    handle: LayerParallel

    def __iter__(self) -> Iterator[str]:
        if self.handle.lp_size > 1 or self.handle.config.strategy == "mgrit":
            raise refused_wrapper(self.handle.lp_size)
        return iter(())


@dataclass(slots=True, eq=False)
class _Refused:
    """What stands in place of a method that makes parameters, on ranks of which each has a part of the model."""

    name: str

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise UnsupportedModelError(
            f"{self.name} of a model that is spread over several lp ranks: no rank would own the parameters that it "
            f"makes. Call {self.name} before parallelize (of a model that LayerParallelTrainer spreads: before the "
            "trainer is made)"
        )


def _is_spread(parameters: Iterable[Any]) -> bool:
    held = {id(p) for p in parameters}
    return any(id(p) in held for model in _spread for p in model.parameters())


def _of(held: Any) -> Iterable[Any]:
    """Parameters of a model, or of an optimizer."""
    return held.parameters() if isinstance(held, nn.Module) else (p for g in held.param_groups for p in g["params"])


def _refuse_adapters(model: nn.Module) -> None:
    if _is_spread(model.parameters()):
        _Refused("get_peft_model")()


def _is_in_pieces(parameters: Iterable[Any]) -> bool:
    """Whether dp ranks share a parallelized model's parameters (fsdp)."""
    pieces = {id(p) for p in parameters if isinstance(p, DTensor)}
    return bool(pieces) and any(id(p) in pieces for model in _parallel for p in model.parameters())


def _refuse_state_files(method: str, held: Sequence[Any]) -> None:
    if any(_is_spread(_of(each)) or _is_in_pieces(_of(each)) for each in held):
        raise UnsupportedModelError(
            f"{method} of accelerate with a model on several lp ranks (or with fsdp): its files have what one rank "
            "holds, without the others' layers and optimizer states. Use the checkpoints of LayerParallelTrainer; in a "
            "loop of your own model.save_pretrained, on all lp ranks, and optimizer.state_dict() in a file of each rank"
        )


def _refuse_whole_model_optimizers(optimizer: Any, args: Any, kwargs: Any) -> None:
    if isinstance(optimizer, torch.optim.LBFGS) and _is_spread(_of(optimizer)):
        raise ConfigurationError(
            "LBFGS of a model on several lp ranks: it measures all parameters together, of which each rank has "
            "some; use an optimizer that treats every parameter by itself (AdamW, SGD), or lp_size=1"
        )


register_optimizer_step_pre_hook(_refuse_whole_model_optimizers)
before_state_files(_refuse_state_files)
