"""One rank's Python value on all ranks of a group, tensors inside by collectives."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_layerpar.run.transport import peer_loss


@peer_loss("the sharing of a value")
def share(value: Any, group: dist.ProcessGroup, device: torch.device, source: int = 0) -> Any:
    """`value` of the group's rank `source`, on every rank of the group. Collective.

    Tensors inside (in any picklable structure) keep their dtype, travel without a copy through the host, and arrive on
    `device`; the source gets its own object back.
    """
    mine, source = dist.get_rank(group) == source, dist.get_global_rank(group, source)
    if mine:
        stream = io.BytesIO()
        pickler = _TensorsApart(stream, protocol=pickle.HIGHEST_PROTOCOL)
        pickler.dump(value)
        payload = torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8).to(device)
        size = torch.tensor([payload.numel()], device=device)
    else:
        pickler, payload, size = None, None, torch.empty(1, dtype=torch.int64, device=device)
    dist.broadcast(size, source, group=group)
    if payload is None:
        payload = torch.empty(int(size), dtype=torch.uint8, device=device)
    dist.broadcast(payload, source, group=group)
    if pickler is not None:
        for tensor in pickler.tensors:
            dist.broadcast(tensor.detach().to(device).contiguous(), source, group=group)
        return value
    unpickler = _TensorsApartAgain(io.BytesIO(payload.cpu().numpy().tobytes()))
    unpickler.device = device
    value = unpickler.load()
    for tensor in unpickler.tensors:
        dist.broadcast(tensor, source, group=group)
    return value


class _TensorsApart(pickle.Pickler):
    """Replaces every tensor by its place in `tensors`, dtype and shape."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tensors: list[Tensor] = []
        self._places: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, Tensor):
            return None
        place = self._places.setdefault(id(obj), len(self.tensors))
        if place == len(self.tensors):
            self.tensors.append(obj)
        return place, obj.dtype, tuple(obj.shape)


class _TensorsApartAgain(pickle.Unpickler):
    """Puts an empty tensor in each such place; `tensors` has them in the sender's order."""

    device: torch.device

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.tensors: list[Tensor] = []

    def persistent_load(self, pid: Any) -> Tensor:
        place, dtype, shape = pid
        if place == len(self.tensors):
            self.tensors.append(torch.empty(shape, dtype=dtype, device=self.device))
        return self.tensors[place]
