"""Layers whose matrices are split over tp ranks, by transformers' own `tp_plan`, in place.

A layer takes and returns whole states, the same on all tp ranks, and sends its messages itself, as the plan has it: so
for everything around it nothing changes. What is outside the layers every tp rank has whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from hf_layerpar.compat.torch import parameter_slots
from hf_layerpar.compat.transformers import has_adapters, tensor_plan, tensor_style
from hf_layerpar.errors import ConfigurationError
from hf_layerpar.ode.stack import LayerStack
from hf_layerpar.ode.stand_ins import shadowed

PARTIAL = "replicated_with_grad_allreduce"
"""The style of parameters that every tp rank has whole, and of whose gradient each computes a part."""
_STYLES = {"colwise", "rowwise", PARTIAL}


def split_layers(model: nn.Module, stacks: Sequence[LayerStack], mesh: DeviceMesh) -> None:
    """Leaves this rank of the mesh its part of the own layers' matrices. No rank talks.

    Raises ConfigurationError for models and plans that can't be split so, before anything is.
    """
    size, kind = mesh.size(), type(model).__name__
    if not isinstance(model, PreTrainedModel) or has_adapters(model):
        raise ConfigurationError(
            f"tp_size={size} with a {kind}: transformers' tp_plan is for its own models without adapters; use tp_size=1"
        )
    inside = tuple(f"{stack.path}.{i}." for stack in stacks for i in range(len(stack.layers)) if i not in stack.foreign)
    plan = {name: style for name, style in tensor_plan(model).items() if name.startswith(inside)}
    if not plan:
        raise ConfigurationError(f"tp_size={size}: {kind} has no tp_plan for its layers; use tp_size=1")
    if odd := sorted(set(plan.values()) - _STYLES):
        raise ConfigurationError(
            f"tp_size={size}: the tp_plan of {kind} has the styles {odd}, of which the gradients are not known to come "
            f"out right here; use tp_size=1 (known are {sorted(_STYLES)})"
        )
    config = model.config.get_text_config()
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if isinstance(heads, int) and heads % size:
            raise ConfigurationError(f"tp_size={size} does not divide {name}={heads} of {kind}; use one that does")
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters(remove_duplicate=False))
    for name, style in plan.items():
        if style == PARTIAL:
            if name in modules:
                modules[name].forward = _Summing(modules[name], modules[name].forward, mesh.get_group())
        elif name in parameters:
            owner, _, key = name.rpartition(".")
            tensor_style(style).shard_param(modules[owner], key, mesh)
        else:
            tensor_style(style).install_forward(modules[name], mesh)


@dataclass(slots=True, eq=False)
class _Summing:
    """The `forward` put on a module each gradient of whose parameters is a sum over the ranks of a group."""

    module: nn.Module
    stock: Callable[..., Any]
    group: dist.ProcessGroup

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        held = parameter_slots(self.module)
        summed = (((self.module, key), _Summed.apply(p, self.group)) for key, p in held.items() if p is not None)
        with shadowed(summed):  # type: ignore[arg-type]
            return self.stock(*args, **kwargs)


class _Summed(torch.autograd.Function):
    """A parameter whose gradient is summed over a group."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None
