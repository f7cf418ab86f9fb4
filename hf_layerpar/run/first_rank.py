"""Work that the first rank of a group does for all, such as an upload: the others wait, and learn how it ended."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch
import torch.distributed as dist

from hf_layerpar.errors import HubError
from hf_layerpar.run.transport import peer_loss

Result = TypeVar("Result")

BEAT_SECONDS = 20.0
"""The ranks speak this often while they wait, since a process group gives up on a longer silence."""


def on_first_rank(
    action: Callable[[], Result], doing: str, group: dist.ProcessGroup | None, device: torch.device
) -> Result | None:
    """Calls `action` on the group's first rank alone; returns its result there, None elsewhere. Collective.

    `action` runs in a thread and must not talk to other ranks. Without a group it is simply called.

    Raises what `action` raised on the first rank, HubError that quotes it on the others, PeerLostError where a rank
    died meanwhile.
    """
    if group is None or dist.get_world_size(group) == 1:
        return action()
    source = dist.get_global_rank(group, 0)
    done = torch.zeros(1, dtype=torch.int32, device=device)
    with ThreadPoolExecutor(max_workers=1) as pool:
        future = pool.submit(action) if dist.get_rank(group) == 0 else None
        while not done:
            if future is not None:
                wait([future], timeout=BEAT_SECONDS)
                done.fill_(future.done())
            with peer_loss(doing):
                dist.broadcast(done, source, group=group)
    failure = None if future is None else future.exception()
    said = [None if failure is None else f"{type(failure).__name__}: {failure}"]
    with peer_loss(doing):
        dist.broadcast_object_list(said, source, group=group, device=device)
    if future is not None:
        return future.result()
    if said[0] is not None:
        raise HubError(f"world rank {source} failed at {doing}: {said[0]}")
    return None
