"""What is private in torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hf_layerpar.compat import looking_into

with looking_into("torch"):
    from torch._C import DisableTorchFunction, DisableTorchFunctionSubclass
    from torch._C._autograd import _top_saved_tensors_default_hooks
    from torch.distributed import distributed_c10d
    from torch.distributed.fsdp import fully_shard
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import (
        keystr,
        tree_flatten,
        tree_flatten_with_path,
        tree_is_leaf,
        tree_leaves,
        tree_leaves_with_path,
        tree_map,
        tree_map_with_path,
        tree_unflatten,
    )

    _queue_callback = torch.autograd.Variable._execution_engine.queue_callback
    _make_subclass = Tensor._make_subclass
    _norm, _mul_ = torch._foreach_norm, torch._foreach_mul_  # pyright: ignore
    _copy_, _add_ = torch._foreach_copy_, torch._foreach_add_  # pyright: ignore
    _set_pg_timeout, _world = distributed_c10d._set_pg_timeout, distributed_c10d._world
    _fsdp_state: Callable[[nn.Module], Any] = fully_shard.state  # type: ignore[attr-defined]
    _ = DistributedDataParallel._active_ddp_module, nn.Module._call_impl, nn.Module._compiled_call_impl
    _ = torch.amp.GradScaler._unscale_grads_, torch.amp.GradScaler._check_scale_growth_tracker

__all__ = [
    "DisableTorchFunction",
    "DisableTorchFunctionSubclass",
    "TorchDispatchMode",
    "keystr",
    "tree_flatten",
    "tree_flatten_with_path",
    "tree_is_leaf",
    "tree_leaves",
    "tree_leaves_with_path",
    "tree_map",
    "tree_map_with_path",
    "tree_unflatten",
]

T = TypeVar("T", bound=Tensor)

# ---- modules
CALL = "_call_impl"
COMPILED_CALL = "_compiled_call_impl"
"""Attributes of a module by which it is called, from Python and by what `module.compile()` made."""
OWN_TENSORS = ("_parameters", "_buffers", "_modules")
"""Attributes of a module that hold its tensors and parts."""
OF_COMPILED = "_orig_mod"
"""The part of what `torch.compile(module)` returns that is the module."""


def parameter_slots(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The module's own parameters by key, as it holds them: what is written there is what it has."""
    return module._parameters


def buffer_slots(module: nn.Module) -> dict[str, Tensor | None]:
    return module._buffers


def tensor_slots(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both of them."""
    return module._parameters, module._buffers


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """Its parts by name; faster than `get_submodule`."""
    return module._modules


def call_uncompiled(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """As `module(...)` does where nothing was put in place of that: hooks and all."""
    return type(module)._call_impl(module, *args, **kwargs)


def compiled_call(module: nn.Module) -> Callable[..., Any] | None:
    return module._compiled_call_impl  # type: ignore[return-value]


def hook_counts(module: nn.Module) -> tuple[int, int]:
    """(forward hooks, forward pre-hooks)."""
    return len(module._forward_hooks), len(module._forward_pre_hooks)


def forward_pre_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    return list(module._forward_pre_hooks.values())


# ---- tensors
def as_subclass(kind: type[T], tensor: Tensor) -> T:
    """A tensor of a subclass on the same memory, without going through the subclass's `__torch_function__`."""
    return _make_subclass(kind, tensor)


def norms_of(tensors: list[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """The 2-norm `[]` of each, all at once."""
    return _norm(tensors, dtype=dtype) if tensors else ()


def scale_(tensors: list[Tensor], factor: float) -> None:
    if tensors:
        _mul_(tensors, factor)  # pyright: ignore[reportCallIssue, reportArgumentType]


def copies_of(tensors: list[Tensor]) -> list[Tensor]:
    """Each with memory of its own, all filled at once."""
    copies = [torch.empty_like(t) for t in tensors]
    if copies:
        _copy_(copies, tensors)
    return copies


def add_(totals: list[Tensor], terms: list[Tensor]) -> None:
    if totals:
        _add_(totals, terms)


def autocast_of(x: Tensor) -> torch.dtype | None:
    """The dtype of the autocast that is on for a tensor's device, or None."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


# ---- autograd
def has_gradient_hooks(parameter: nn.Parameter) -> bool:
    """Whether somebody waits for its gradient."""
    held: Any = parameter
    return bool(held._backward_hooks or held._post_accumulate_grad_hooks)


def saved_elsewhere() -> bool:
    """Whether somebody handles what graphs save, as torch.utils.checkpoint does."""
    return _top_saved_tensors_default_hooks(False) is not None


def after_backward(callback: Callable[[], None]) -> None:
    """Calls it at the end of the backward that is running."""
    _queue_callback(callback)


# ---- optimizers
class SharedScaler(torch.amp.GradScaler):
    """A scaler of losses for which a gradient that isn't finite on one process isn't on any: all skip the same steps,
    and have the same scale. Its processes are those of the default group."""

    def _unscale_grads_(self, *args: Any, **kwargs: Any) -> dict[torch.device, Tensor]:
        found = super()._unscale_grads_(*args, **kwargs)
        if not found:  # nothing here has a gradient
            scale, _ = self._check_scale_growth_tracker("unscale_")
            found[scale.device] = torch.zeros((), dtype=torch.float32, device=scale.device)
        (flag,) = found.values()
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return found


# ---- compilers
def compiled(function: Callable[..., Any], backend: str, mode: str, most: int) -> Callable[..., Any]:
    """By torch.compile, for a backward that may run several times. most: pieces of code that there may be of it.

    Random numbers are drawn as without a compiler: code with and without gradients, of all ranks, sees the same masks.
    """
    import torch._dynamo.config
    import torch._functorch.config
    import torch._inductor

    # a sweep goes back through one graph several times, and code that gives buffers away after the first can't
    torch._functorch.config.donated_buffer = False
    how: dict[str, Any] = {"mode": mode}
    if backend == "inductor":
        how = {"options": torch._inductor.list_mode_options(mode) | {"fallback_random": True}}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        how["recompile_limit"] = most
    else:  # before torch 2.13, for all code
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, most)
    return torch.compile(function, backend=backend, **how)


# ---- processes
DDP_READS_FIRST = "_ddp_params_and_buffers_to_ignore"
"""The attribute of a module that DistributedDataParallel looks at before anything else."""


def inside_ddp() -> bool:
    """Whether a DistributedDataParallel runs its forward now."""
    return DistributedDataParallel._active_ddp_module is not None


def is_alive(group: dist.ProcessGroup) -> bool:
    """Whether a group is of the present default group, not of one that was destroyed."""
    return group in _world.pg_map


def timeout_of(group: Any) -> timedelta | None:
    """How long the ranks of a group wait for each other; None where its backend doesn't say."""
    options: list[Any] = [getattr(group._get_backend(device), "options", None) for device in group._device_types]
    return min((o._timeout for o in options if hasattr(o, "_timeout")), default=None)


def set_timeout(group: dist.ProcessGroup, timeout: timedelta) -> None:
    """Of collectives; connections that messages go by keep the one that they were made with."""
    _set_pg_timeout(timeout, group)


# ---- FSDP2 without its forward
def start_fsdp(root: nn.Module) -> None:
    """What the first forward of a module does on which `fully_shard` was called."""
    _fsdp_state(root)._lazy_init()


def find_fsdp_memory(root: nn.Module) -> None:
    """Makes FSDP use the memory in which its pieces lie now; `model.to` moves them."""
    for group in _fsdp_groups(root):
        for parameter in group.fsdp_params:
            parameter.reset_sharded_param()


def reduce_fsdp(root: nn.Module) -> None:
    """What FSDP2 does at the end of a backward, as torch.distributed.pipelining calls it."""
    for group in _fsdp_groups(root):
        group.post_backward()
    _fsdp_state(root)._root_post_backward_final_callback()


def _fsdp_groups(root: nn.Module) -> Iterator[Any]:
    for state in _fsdp_state(root)._state_ctx.all_states:
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:  # older torch has one or none
            groups = [state._fsdp_param_group] if state._fsdp_param_group is not None else []
        yield from groups
