"""Linear modules whose weight gradients can be computed later than their input gradients.

A final vjp is half input gradients, which other ranks wait for, and half weight gradients, which nobody waits for.
Split apart, the second half fills the gaps of the first (as zero-bubble pipelines do, arXiv 2401.10241).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_layerpar.compat.torch import OF_COMPILED, children_of, compiled_call, saved_elsewhere


class Record:
    """What the vjps of one graph leave to do. wanted: whether the vjp that runs now adds to it.

    The graph's nodes hold their record: autograd may run them on a thread of its own (it does on accelerators), which
    sees no context of the caller's.
    """

    def __init__(self) -> None:
        self.wanted = False
        self.pending: list[PendingGradient] = []


_recording: ContextVar[Record | None] = ContextVar("recording", default=None)


@dataclass(slots=True)
class PendingGradient:
    """What a linear module's weight gradient needs: `inputs` `[rows, in]` and cotangents `outputs` `[rows, out]`."""

    module: nn.Module
    inputs: Tensor
    outputs: Tensor

    def gradients(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """(parameter, gradient) pairs, by the products that autograd would have used. Call it under no_grad."""
        weight: Any = self.module.weight
        bias: Any = self.module.bias
        if weight.requires_grad:
            if _is_transposed(self.module):
                gradient = self.inputs.t().mm(self.outputs)
            else:
                gradient = self.outputs.t().mm(self.inputs)
            yield weight, gradient.to(weight.dtype)
        if bias is not None and bias.requires_grad:
            yield bias, self.outputs.sum(0).to(bias.dtype)


@contextmanager
def recording(record: Record) -> Iterator[None]:
    """Linear modules made deferrable leave their weights out of the graphs made inside, and note them in `record`."""
    token = _recording.set(record)
    try:
        yield
    finally:
        _recording.reset(token)


def make_deferrable(layer: nn.Module) -> None:
    """Lets the linear modules inside a layer (torch's, and GPT-2's transposed ones) be recorded without their weights.

    Outside of `recording` they stay as they are. Modules with a forward of their own are left alone, and what is
    compiled: there a module with another forward is compiled anew.
    """
    for module in _uncompiled(layer):
        known = type(module) is nn.Linear or _is_transposed(module)
        if known and "forward" not in vars(module):
            module.__dict__["forward"] = _Forward(module)


def _uncompiled(module: nn.Module) -> Iterator[nn.Module]:
    """The module and those inside, without what torch.compile (`_orig_mod`) or its own `compile` made of any."""
    if compiled_call(module) is None and OF_COMPILED not in children_of(module):
        yield module
        for child in module.children():
            yield from _uncompiled(child)


@dataclass(slots=True)
class _Forward:
    """The `forward` put on a linear module; plain data, so that deepcopy and pickle follow it."""

    module: nn.Module

    def __call__(self, x: Tensor) -> Tensor:
        module: Any = self.module
        if torch.compiler.is_compiling():  # later than this was put here; code would leave out what is noted beside it
            return type(module).forward(module, x)
        trainable = module.weight.requires_grad or (module.bias is not None and module.bias.requires_grad)
        record = _recording.get()
        # an input without gradient (relative positions) has no backward that would note the weights; for one that isn't
        # contiguous autograd sums in another order: then it does it all itself
        fits = trainable and torch.is_grad_enabled() and x.requires_grad and x.is_contiguous()
        # checkpointing runs a layer's parts again in the backward, where nothing is recorded, and compares
        if record is None or not fits or saved_elsewhere():
            return type(module).forward(module, x)
        weight = module.weight.detach()
        bias = None if module.bias is None else module.bias.detach()
        kind = x.device.type
        if not torch.is_autocast_enabled(kind):
            return _InputOnly.apply(x, weight, bias, module, record)  # type: ignore[return-value]
        dtype = torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            bias = None if bias is None else bias.to(dtype)
            return _InputOnly.apply(x.to(dtype), weight.to(dtype), bias, module, record)  # type: ignore[return-value]


class _InputOnly(torch.autograd.Function):
    """y = x W^T + b whose backward gives the gradient of x alone and notes the rest."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, module: nn.Module, record: Record) -> Tensor:
        if _is_transposed(module):
            weight = weight.t()
        ctx.module, ctx.record = module, record
        ctx.save_for_backward(x, weight)
        # a view made in here could not be changed in place outside, as DeBERTa does; .data is none
        return functional.linear(x, weight, bias).data

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        outputs = grad.reshape(-1, grad.shape[-1])
        if ctx.record.wanted:
            # detached: through its graph the input would hold the record that holds it, and no collector sees that
            inputs = x.detach().reshape(-1, x.shape[-1])
            ctx.record.pending.append(PendingGradient(ctx.module, inputs, outputs.detach()))
        return (outputs.mm(weight).view(x.shape) if ctx.needs_input_grad[0] else None), None, None, None, None


def _is_transposed(module: nn.Module) -> bool:
    """transformers' Conv1D, by name: this package part knows nothing of transformers."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"
