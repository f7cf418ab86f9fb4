"""Work whose outcome all ranks learn: what each does by itself, such as writing its file, and what the first does for
all, such as an upload."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from hf_layerpar.errors import CheckpointError, HubError, PeerLostError
from hf_layerpar.run.transport import peer_loss

Result = TypeVar("Result")

BEAT_SECONDS = 2.0
"""The ranks speak this often while they wait, since a process group gives up on a longer silence."""


@contextmanager
def together(failed: str, group: dist.ProcessGroup | None) -> Iterator[None]:
    """Around what every rank of the group does by itself (or, inside, together). Collective at its end, however that
    came: no rank goes on where one failed.

    failed: what is said then, such as "checkpoint-4 was not written".

    Raises CheckpointError on all ranks when something failed on one, with the causes by world rank; PeerLostError where
    a rank died meanwhile.
    """
    failure: Exception | None = None
    try:
        yield
    except PeerLostError as error:
        if _by_messages(group):  # by which it is known who is lost
            tell_all((None, str(error)), group, failed)
        raise
    except Exception as error:
        failure = error
    _agree(failed, tell_all((None, _said(failure)), group, failed), failure, group)


def all_give(action: Callable[[], Result], failed: str, group: dist.ProcessGroup | None) -> list[Result]:
    """What `action`, which talks to no other rank, gives on each rank of the group, in their order. Collective; raises
    as `together`."""
    result, failure = None, None
    try:
        result = action()
    except Exception as error:
        failure = error
    heard = tell_all((result, _said(failure)), group, failed)
    _agree(failed, heard, failure, group)
    return [heard[rank][0] for rank in sorted(heard)]


def _said(failure: Exception | None) -> str | None:
    if failure is None or isinstance(failure, CheckpointError):
        return failure and str(failure)
    return f"{type(failure).__name__}: {failure}"


def _agree(failed: str, heard: dict[int, Any], failure: Exception | None, group: dist.ProcessGroup | None) -> None:
    causes = {rank: text for rank, (_, text) in heard.items() if text is not None}
    if causes:
        same = len(causes) > 1 and len(set(causes.values())) == 1
        said = next(iter(causes.values())) if same or group is None else f"by world rank: {causes}"
        raise CheckpointError(f"{failed}: {said}") from failure


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
    source, ended = dist.get_global_rank(group, 0), None
    with ThreadPoolExecutor(max_workers=1) as pool:
        future = pool.submit(action) if dist.get_rank(group) == 0 else None
        while ended is None:
            if future is not None and wait([future], timeout=BEAT_SECONDS).done:
                failure = future.exception()
                ended = [None if failure is None else f"{type(failure).__name__}: {failure}"]
            ended = tell_all(ended, group, doing, device)[source]
    if future is not None:
        return future.result()
    if ended[0] is not None:
        raise HubError(f"world rank {source} failed at {doing}: {ended[0]}")
    return None


def tell_all(
    mine: Any, group: dist.ProcessGroup | None, doing: str, device: torch.device | None = None
) -> dict[int, Any]:
    """World rank -> what it says, for all ranks of the group. Collective.

    By way of the first rank where messages can be sent one by one, so that it is known who is lost: PeerLostError names
    that rank, on all that are left.
    """
    if group is None or dist.get_world_size(group) == 1:
        return {dist.get_rank() if dist.is_initialized() else 0: mine}
    ranks = dist.get_process_group_ranks(group)
    if not _by_messages(group):
        said = [None] * len(ranks)
        with nullcontext() if device is None else torch.get_device_module(device).device(device), peer_loss(doing):
            dist.all_gather_object(said, mine, group=group)
        return dict(zip(ranks, said, strict=True))
    me, first = dist.get_rank(), ranks[0]
    heard, lost = {me: mine}, {}
    if me == first:
        for rank in ranks[1:]:
            with _noting(rank, lost, doing):
                heard[rank] = _receive(rank, group)
        for rank in ranks[1:]:
            if rank not in lost:
                with _noting(rank, lost, doing):
                    dist.send_object_list([(heard, dict(lost))], rank, group, torch.device("cpu"))
    else:
        with _noting(first, lost, doing):
            dist.send_object_list([mine], first, group, torch.device("cpu"))
            heard, lost = _receive(first, group)
    if lost:
        names, causes = ", ".join(map(str, lost)), "; ".join(lost.values())
        raise PeerLostError(
            f"rank {me} of {dist.get_world_size()} lost world rank {names} during {doing}: {causes}. That rank's log "
            "has the cause; restart all ranks, from the last checkpoint if there is one"
        )
    return heard


def _by_messages(group: dist.ProcessGroup | None) -> bool:
    return group is not None and "cpu:gloo" in str(dist.get_backend_config(group))


def _receive(rank: int, group: dist.ProcessGroup) -> Any:
    said = [None]
    dist.recv_object_list(said, rank, group, torch.device("cpu"))
    return said[0]


@contextmanager
def _noting(rank: int, lost: dict[int, str], doing: str) -> Iterator[None]:
    """What it takes for a message to or from `rank`: a failure means that it is lost."""
    try:
        with peer_loss(doing):
            yield
    except PeerLostError as error:
        lost[rank] = str(error.__cause__)
