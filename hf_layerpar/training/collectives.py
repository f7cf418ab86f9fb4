"""What a training step says over the dp axis: gradients and predictions."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import recursively_apply
from torch import Tensor, nn

from hf_layerpar.run.data_shards import local
from hf_layerpar.run.transport import peer_loss
from hf_layerpar.sharding import LayerParallel

BUCKET_BYTES = 8 << 20
"""Gradients travel in flat buckets of about this size: large enough to fill a link, small enough to overlap."""
_UNDER_WAY = 4
"""So many of them at a time: they are copies, and all together another model's memory."""

Layer = tuple[int, int]
"""(stack, place in it)."""


class GradientAverage:
    """Replaces every `.grad` by its mean over the group, beside the backward that makes them, in flat buckets.

    layers: parameters whose gradients come with a layer's; None for those that come last. All ranks of the group must
    give the same ones, in the same order: that of the all-reduces, whichever gradients are there first. A parameter
    without a gradient on some ranks (an unused branch) counts as zero there; without one on all it stays without.
    """

    def __init__(self, layers: Iterable[tuple[Layer | None, Iterable[nn.Parameter]]], group: dist.ProcessGroup) -> None:
        self.group, self.size = group, dist.get_world_size(group)
        layers_of: dict[nn.Parameter, set[Layer | None]] = {}
        for layer, members in layers:
            for parameter in members:
                layers_of.setdefault(parameter, set()).add(layer)
        self._parameters = list(layers_of)
        self._coming = deque(_buckets(self._parameters))
        self._awaited = deque(set[Layer | None]().union(*(layers_of[p] for p in bucket)) for bucket in self._coming)
        self._done: set[Layer | None] = set()
        self._used: dict[nn.Parameter, bool] = {}
        self._under_way: deque[tuple[list[nn.Parameter], Tensor, Any]] = deque()
        self._without: list[tuple[nn.Parameter, Tensor]] = []

    @peer_loss("the averaging of gradients")
    def done(self, layer: Layer) -> None:
        """A layer's gradients are all there. Never waits for another rank: its backward may wait for this one's."""
        self._done.add(layer)
        if self.size > 1:
            while self._under_way and self._under_way[0][2].is_completed():
                self._finish_one()
            while self._coming and len(self._under_way) < _UNDER_WAY and self._awaited[0] <= self._done:
                self._start_one()

    @peer_loss("the averaging of gradients")
    def finish(self) -> None:
        """All gradients are there. Collective."""
        if self.size == 1 or not self._parameters:
            return
        while self._coming:
            if len(self._under_way) >= _UNDER_WAY:
                self._finish_one()
            self._start_one()
        flags = [self._used[p] for p in self._parameters]
        used = torch.tensor(flags, dtype=torch.int32, device=local(self._parameters[0]).device)
        dist.all_reduce(used, op=dist.ReduceOp.MAX, group=self.group)
        while self._under_way:
            self._finish_one()
        elsewhere = dict(zip(self._parameters, used.tolist(), strict=True))
        for parameter, piece in self._without:
            if elsewhere[parameter]:
                parameter.grad = torch.zeros_like(parameter)
                local(parameter.grad).copy_(piece)

    @torch.no_grad()
    def _start_one(self) -> None:
        bucket = self._coming.popleft()
        self._awaited.popleft()
        self._used |= {p: p.grad is not None for p in bucket}
        flat = torch.cat([_zeros(p) if p.grad is None else local(p.grad).reshape(-1) for p in bucket])
        self._under_way.append((bucket, flat, dist.all_reduce(flat, group=self.group, async_op=True)))

    @torch.no_grad()
    def _finish_one(self) -> None:
        bucket, flat, work = self._under_way.popleft()
        work.wait()
        flat.div_(self.size)
        for parameter, piece in zip(bucket, flat.split([local(p).numel() for p in bucket]), strict=True):
            piece = piece.view_as(local(parameter))
            if parameter.grad is None:
                self._without.append((parameter, piece.clone()))
            else:
                local(parameter.grad).copy_(piece)


@contextmanager
def averaged_gradients(model: nn.Module, handle: LayerParallel, group: dist.ProcessGroup | None) -> Iterator[None]:
    """Around the last backward of a step: behind it gradients are means over the group. None: over nobody."""
    if group is None or dist.get_world_size(group) == 1:
        yield
        return
    shards = handle.stepper.shards
    left = [p for p in model.parameters() if p.requires_grad]
    members: list[tuple[Layer, list[nn.Parameter]]] = []
    if shards is None:
        outside = {end.value for end in handle.ends}
        for s, stack in [*enumerate(handle.stacks)][::-1]:  # as a backward comes by them
            for i, layer in [*enumerate(stack.layers)][::-1]:
                members.append(((s, i), [p for p in layer.parameters() if p.requires_grad and p not in outside]))
    else:
        left = shards.uncut
    known = {p for _, layer in members for p in layer}
    average = GradientAverage([*members, (None, [p for p in left if p not in known])], group)
    handle.stepper.finished = average.done
    try:
        yield
    finally:
        handle.stepper.finished = None
    if shards is not None:
        shards.reduce()
    average.finish()


def average_gradients(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup) -> None:
    """`GradientAverage` of gradients that are all there. Collective."""
    GradientAverage([(None, parameters)], group).finish()


def _zeros(parameter: nn.Parameter) -> Tensor:
    like = local(parameter)
    return like.new_zeros(like.numel())


def _buckets(tensors: Iterable[Any]) -> list[list[Any]]:
    """Tensors of one dtype and device together, cut at about `BUCKET_BYTES`, of what this rank has of them."""
    buckets: list[list[Tensor]] = []
    open_bucket: dict[Any, tuple[list[Tensor], int]] = {}
    for tensor in tensors:
        kind, held = (tensor.dtype, tensor.device), local(tensor)
        bucket, filled = open_bucket.get(kind, ([], 0))
        if not bucket:
            buckets.append(bucket)
        bucket.append(tensor)
        filled += held.numel() * held.element_size()
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


def gather_samples(data: Any, group: dist.ProcessGroup, kept: int | None, *, as_objects: bool = False) -> Any:
    """The first `kept` samples (None: all) of the group's ranks, in their order. Collective.

    data: nested tensors, as of `gather_rows`; what isn't, or `as_objects`, counts as a list with an item a sample.
    """
    if as_objects or not _all_tensors(data):
        parts: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(parts, data, group=group)
        return [item for part in parts for item in part][:kept]
    return recursively_apply(lambda rows: rows[:kept], gather_rows(data, group))


def _all_tensors(data: Any) -> bool:
    try:
        recursively_apply(lambda tensor: tensor, data, error_on_other_type=True)
    except TypeError:
        return False
    return True
