"""What a training step says over the dp axis: gradients and predictions."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import recursively_apply
from torch import Tensor, nn

from hf_layerpar.run.transport import peer_loss

BUCKET_BYTES = 8 << 20
"""Gradients travel in flat buckets of about this size: large enough to fill a link, small enough to overlap."""
_UNDER_WAY = 4
"""So many of them at a time: they are copies, and all together another model's memory."""


@peer_loss("the averaging of gradients")
def average_gradients(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Replaces every `.grad` by its mean over the group, in flat buckets. Collective.

    A parameter without a gradient on some ranks (an unused branch) counts as zero there; without one on all ranks it
    stays without. `parameters` must be the same list on all ranks.
    """
    size = dist.get_world_size(group)
    if size == 1 or not parameters:
        return
    used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
    dist.all_reduce(used, op=dist.ReduceOp.MAX, group=group)
    grads: list[Tensor] = []
    for parameter, is_used in zip(parameters, used.tolist(), strict=True):
        if is_used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            grads.append(parameter.grad)
    under_way: deque[tuple[list[Tensor], Tensor, Any]] = deque()

    def finish() -> None:
        bucket, flat, work = under_way.popleft()
        work.wait()
        flat.div_(size)
        for grad, piece in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
            grad.copy_(piece.view_as(grad))

    with torch.no_grad():
        for bucket in _buckets(grads):
            if len(under_way) == _UNDER_WAY:
                finish()
            flat = torch.cat([grad.reshape(-1) for grad in bucket])
            under_way.append((bucket, flat, dist.all_reduce(flat, group=group, async_op=True)))
        while under_way:
            finish()


def _buckets(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Tensors of one dtype and device together, cut at about `BUCKET_BYTES`."""
    buckets: list[list[Tensor]] = []
    open_bucket: dict[Any, tuple[list[Tensor], int]] = {}
    for tensor in tensors:
        kind = (tensor.dtype, tensor.device)
        bucket, filled = open_bucket.get(kind, ([], 0))
        if not bucket:
            buckets.append(bucket)
        bucket.append(tensor)
        filled += tensor.numel() * tensor.element_size()
        open_bucket[kind] = (bucket, filled) if filled < BUCKET_BYTES else ([], 0)
    return buckets


@peer_loss("the broadcast of the model")
@torch.no_grad()
def broadcast_model(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Gives every rank of the group the parameters and buffers of its first rank. Collective."""
    if dist.get_world_size(group) == 1:
        return
    source, first = dist.get_global_rank(group, 0), dist.get_rank(group) == 0
    tensors = [t.data for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values()]
    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        dist.broadcast(flat, source, group=group)
        if not first:
            for tensor, piece in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                tensor.copy_(piece.view_as(tensor))


@peer_loss("the gathering of predictions")
def gather_rows(data: Any, group: dist.ProcessGroup) -> Any:
    """Every tensor in nested `data` concatenated along dim 0 over the group's ranks, in their order. Collective.

    Scalars count as one row. Shapes must agree over the ranks.
    """
    size = dist.get_world_size(group)

    def gather(tensor: Tensor) -> Tensor:
        rows = (tensor[None] if tensor.ndim == 0 else tensor).contiguous()
        if size == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(size)]
        dist.all_gather(parts, rows, group=group)
        return torch.cat(parts)

    return recursively_apply(gather, data, error_on_other_type=True)
