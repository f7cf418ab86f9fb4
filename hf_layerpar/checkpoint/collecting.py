"""The tensors of a model that is spread over lp ranks, collected in one process; and a full state dict spread again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_layerpar.errors import CheckpointError
from hf_layerpar.run.data_shards import copy_full, full_tensor

if TYPE_CHECKING:
    from hf_layerpar.sharding import LayerParallel


def collect(handle: LayerParallel, names: Iterable[str]) -> dict[str, Tensor]:
    """`LayerParallel.state_dict` of the tensors of these names, the same on all lp ranks. Collective over the lp
    ranks."""
    handle.agree({"about to": "collect the state dict"})
    with handle.whole():
        return _collect(handle, names)


def _collect(handle: LayerParallel, names: Iterable[str]) -> dict[str, Tensor]:
    rank, transport = handle.lp_rank, handle.stepper.transport
    here = {name: t for name, t in handle._model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    on_host: dict[int, Tensor] = {}  # by identity, so that tied tensors stay tied
    full: dict[str, Tensor] = {}
    for name in names:  # one tensor at a time: no second copy of the model
        shape, dtype = handle._layout[name]
        owner = handle.owner_of.get(name, 0)
        if owner == 0:
            if rank == 0:
                tensor = here[name]
                if id(tensor) not in on_host:
                    on_host[id(tensor)] = full_tensor(tensor.detach()).cpu()
                    if handle.is_sharded_over_dp:  # whole for a while only
                        on_host[id(tensor)] = on_host[id(tensor)].clone()
                full[name] = on_host[id(tensor)]
        elif rank == owner:
            transport.wait(transport.send(full_tensor(here[name].detach()).contiguous(), 0))
        elif rank == 0:
            buffer = torch.empty(shape, dtype=dtype, device=handle.device)
            transport.wait(transport.receive(buffer, owner))
            full[name] = buffer.cpu()
    return full


def copy_own(handle: LayerParallel, full: Mapping[str, Tensor]) -> None:
    """Copies what this rank holds out of a full state dict.

    Raises CheckpointError when names are missing or unknown or shapes differ, before anything is copied.
    """
    layout, tied = handle._layout, handle._tied
    missing = [n for n in layout if n not in full and not any(alias in full for alias in tied.get(n, ()))]
    unknown = [n for n in full if n not in layout]
    wrong = [n for n, (shape, _) in layout.items() if n in full and tuple(full[n].shape) != shape]
    if missing or unknown or wrong:
        raise CheckpointError(
            f"the state dict doesn't fit {type(handle._model).__name__}: {len(missing)} missing {missing[:4]}, "
            f"{len(unknown)} unknown {unknown[:4]}, {len(wrong)} of another shape {wrong[:4]}; load a "
            f"checkpoint of this model (same architecture, depth and head)"
        )
    with torch.no_grad(), handle.whole(writes=True):
        for name, tensor in handle._model.state_dict(keep_vars=True).items():
            if isinstance(tensor, Tensor) and name in full:
                copy_full(tensor.data, full[name])
