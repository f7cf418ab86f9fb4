"""Layers that are evaluated together: their states, and operators for which vmap's rules make too many kernels.

Shapes: K layers, of which each has B rows of T tokens; D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode


class InOne(TorchFunctionMode):
    """Inside vmap: each of these operators is one call for all layers, forward and backward.

    Attention has no weights, so the layers go into the batch; vmap's own rules cover some of its backends only, and run
    layer after layer on the others (all of the CPU's). Of linear maps and layer norms every layer has its own weights:
    vmap makes twice as many kernels of them as a single layer takes, and weight gradients that have to be copied.
    """

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        # a dropout is left to vmap, which refuses it
        if func is scaled_dot_product_attention and not (kwargs.get("dropout_p") or any(args[4:5])):
            return _attention(*args, **kwargs)
        if func is functional.linear:
            return _linear(*args, **kwargs)
        if func is torch.addmm and not kwargs and args[0].ndim == 1:  # transformers' Conv1D
            bias, x, weight = args
            return _linear(x, weight.t(), bias)
        if func is functional.layer_norm:
            return _layer_norm(*args, **kwargs)
        return func(*args, **kwargs)


def _batched(t: Tensor, dim: int | None, size: int) -> Tensor:
    """`[K, ...]`; of what all layers share without a copy."""
    return t.movedim(dim, 0) if dim is not None else t.expand(size, *t.shape)


def lying_together(tensors: Sequence[Tensor]) -> Tensor | None:
    """`[K, ...]` on the same memory, where tensors of one shape lie one after the other, as a wave leaves them."""
    first = tensors[0]
    memory, size, at = first.untyped_storage().data_ptr(), first.numel(), first.storage_offset()
    for i, t in enumerate(tensors):
        if not (
            t.untyped_storage().data_ptr() == memory
            and t.storage_offset() == at + i * size
            and t.is_contiguous()
            and (t.shape, t.dtype) == (first.shape, first.dtype)
        ):
            return None
    return first.as_strided((len(tensors), *first.shape), (size, *first.stride()))


def _summed(t: Tensor) -> Tensor:
    """`[K, n, m]` -> `[K, 1, m]`. By a product: a GPU's kernel for sums over rows is the slower one."""
    return torch.bmm(_ones(t.shape[1], t).expand(len(t), 1, -1), t)


_made: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}


def _ones(count: int, like: Tensor) -> Tensor:
    """A part of the longest that were made; shorter ones are kept, as CUDA graphs may read them."""
    made = _made.setdefault((like.device, like.dtype), [])
    if not made or len(made[-1]) < count:
        found = like.new_ones(1 << (count - 1).bit_length())
        if like.is_cuda and torch.cuda.is_current_stream_capturing():
            return found[:count]  # they aren't ones before the graph is replayed
        made.append(found)
    return made[-1][:count]


# ---- attention
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **more: Any,
) -> Tensor:
    return _Attention.apply(q, k, v, attn_mask, is_causal, more)  # type: ignore[return-value]


class _Attention(torch.autograd.Function):
    """scaled_dot_product_attention with a batching rule; only vmap calls it, which autograd looks through."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, more: dict[str, Any]) -> Tensor:
        return scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, **more)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, more: dict
    ) -> tuple[Tensor, int]:
        size = info.batch_size

        def folded(t: Tensor, dim: int | None) -> Tensor:
            """`[K, B, ...]` -> `[K B, ...]`."""
            return _batched(t, dim, size).flatten(0, 1)

        q, k, v = (folded(t, dim) for t, dim in zip((q, k, v), in_dims, strict=False))
        if mask is not None and in_dims[3] is not None:
            mask = mask.movedim(in_dims[3], 0)
            mask = mask.reshape(size, *(1,) * (q.ndim + 1 - mask.ndim), *mask.shape[1:])
            mask = mask.expand(size, q.shape[0] // size, *mask.shape[2:]).flatten(0, 1)
        elif mask is not None and mask.ndim == q.ndim and mask.shape[0] > 1:
            mask = folded(mask, None)
        y = scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, **more)
        return y.unflatten(0, (size, -1)), 0


# ---- linear maps
def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    kind = input.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        input, weight = input.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return _Linear.apply(input, weight, bias)  # type: ignore[return-value]


class _Linear(torch.autograd.Function):
    """x `[..., in]` by a weight `[out, in]`; only vmap calls it, which autograd looks through."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def vmap(info: Any, in_dims: tuple, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, int]:
        size = info.batch_size
        x, weight = _batched(x, in_dims[0], size), _batched(weight, in_dims[1], size)
        bias = None if bias is None else _batched(bias, in_dims[2], size)
        y = _LinearInOne.apply(x.reshape(size, -1, x.shape[-1]), weight, bias)
        return y.view(*x.shape[:-1], -1), 0  # type: ignore[union-attr]


class _LinearInOne(torch.autograd.Function):
    """x `[K, n, in]` by weights `[K, out, in]`, biases `[K, out]`. Weight gradients lie like the weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        transposed = weight.transpose(1, 2)
        return torch.bmm(x, transposed) if bias is None else torch.baddbmm(bias.unsqueeze(1), x, transposed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        of_x = of_weight = of_bias = None
        if wants_x:
            of_x = torch.bmm(grad, weight)
        if wants_weight and weight.stride(-1) == 1:
            of_weight = torch.bmm(grad.transpose(1, 2), x)
        elif wants_weight:  # a transposed view of what is stored `[K, in, out]`
            of_weight = torch.bmm(x.transpose(1, 2), grad).transpose(1, 2)
        if wants_bias:
            of_bias = _summed(grad).squeeze(1)
        return of_x, of_weight, of_bias


# ---- layer norms
def _layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    shape = tuple(normalized_shape)
    kind = input.device.type
    if len(shape) != 1 or weight is None or bias is None:
        return functional.layer_norm(input, shape, weight, bias, eps)
    if torch.is_autocast_enabled(kind):  # as autocast does it
        input, weight, bias = input.float(), weight.float(), bias.float()
    return _LayerNorm.apply(input, weight, bias, eps)  # type: ignore[return-value]


class _LayerNorm(torch.autograd.Function):
    """x `[..., D]`, weight and bias `[D]`; only vmap calls it, which autograd looks through."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:], weight, bias, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def vmap(info: Any, in_dims: tuple, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, int]:
        size = info.batch_size
        x, weight, bias = (_batched(t, dim, size) for t, dim in zip((x, weight, bias), in_dims, strict=False))
        y = _LayerNormInOne.apply(x.reshape(size, -1, x.shape[-1]), weight.unsqueeze(1), bias.unsqueeze(1), eps)
        return y.view(x.shape), 0  # type: ignore[union-attr]


class _LayerNormInOne(torch.autograd.Function):
    """x `[K, n, D]`, weights and biases `[K, 1, D]`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        normal, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
        ctx.save_for_backward(x, weight, normal, mean, rstd)
        return torch.addcmul(bias, normal, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:  # type: ignore[override]
        x, weight, normal, mean, rstd = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        of_x = of_weight = of_bias = None
        if wants_x:
            of_x, _, _ = torch.ops.aten.native_layer_norm_backward(
                grad * weight, x, x.shape[-1:], mean, rstd, None, None, [True, False, False]
            )
        if wants_weight:
            of_weight = _summed(grad * normal)
        if wants_bias:
            of_bias = _summed(grad)
        return of_x, of_weight, of_bias, None
