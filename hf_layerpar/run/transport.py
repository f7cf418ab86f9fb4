"""What the ranks of one layer axis say to each other: states point to point, results to all, and a check beforehand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from hf_layerpar.errors import PeerLostError, RankMismatchError


@contextmanager
def peer_loss(doing: str) -> Iterator[None]:
    """Around collective calls (or on a function of them): a torch.distributed failure becomes PeerLostError."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLostError(
            f"rank {dist.get_rank()} of {dist.get_world_size()} lost another one during {doing}: {error}. The other "
            f"rank's log has the cause; restart all ranks, from the last checkpoint if there is one"
        ) from error


class Transport(Protocol):
    """The lp group as the executor sees it. All tensors stay on their device."""

    rank: int
    size: int

    def send(self, tensor: Tensor, target: int) -> Any:
        """Starts a non-blocking send; returns a handle for `wait`."""
        ...

    def receive(self, tensor: Tensor, source: int) -> Any:
        """Starts a non-blocking receive into `tensor`; messages of one source arrive in the order they were sent."""
        ...

    def wait(self, handle: Any) -> None: ...

    def is_done(self, handle: Any) -> bool:
        """Whether `wait` would return at once."""
        ...

    def broadcast(self, tensor: Tensor, source: int) -> None: ...

    def all_reduce(self, tensor: Tensor) -> None: ...

    def agree(self, facts: dict[str, Any], device: torch.device) -> None:
        """Raises RankMismatchError on every rank if `facts` differ between the ranks."""
        ...

    def same(self, facts: dict[str, Any], device: torch.device) -> bool:
        """Whether `facts` are alike on all ranks, where they may differ.

        Raises RankMismatchError on every rank where others state facts of another kind (other names).
        """
        ...


class LocalTransport:
    """One rank: nothing to say to anybody."""

    rank, size = 0, 1

    def send(self, tensor: Tensor, target: int) -> Any:
        raise AssertionError("a plan for one rank has no messages")

    def receive(self, tensor: Tensor, source: int) -> Any:
        raise AssertionError("a plan for one rank has no messages")

    def wait(self, handle: Any) -> None:
        raise AssertionError("a plan for one rank has no messages")

    def is_done(self, handle: Any) -> bool:
        return True

    def broadcast(self, tensor: Tensor, source: int) -> None: ...

    def all_reduce(self, tensor: Tensor) -> None: ...

    def agree(self, facts: dict[str, Any], device: torch.device) -> None: ...

    def same(self, facts: dict[str, Any], device: torch.device) -> bool:
        return True


class GroupTransport:
    """The ranks of a torch.distributed process group.

    NCCL has no tags: the messages between two ranks are matched first-in first-out, and one that waits holds up those
    behind it. So each way along the ranks has a group of its own there; the plan's order sees to the rest.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._world_rank = [dist.get_global_rank(group, r) for r in range(self.size)]
        self._downward = group
        if "nccl" in str(dist.get_backend_config(group)) and self.size > 1:
            downward: Any = dist.new_group(self._world_rank, use_local_synchronization=True)
            self._downward = downward
        # comparing inputs on the host costs no device synchronisation, where the group can
        self._on_host = "cpu:gloo" in str(dist.get_backend_config(group))

    def send(self, tensor: Tensor, target: int) -> Any:
        with peer_loss(f"a send to lp rank {target}"):
            return dist.isend(tensor, self._world_rank[target], group=self._way(self.rank, target))

    def receive(self, tensor: Tensor, source: int) -> Any:
        with peer_loss(f"a receive from lp rank {source}"):
            return dist.irecv(tensor, self._world_rank[source], group=self._way(source, self.rank))

    def _way(self, source: int, target: int) -> dist.ProcessGroup:
        return self.group if target > source else self._downward

    def wait(self, handle: Any) -> None:
        with peer_loss("the wait for a message"):
            handle.wait()

    def is_done(self, handle: Any) -> bool:
        return handle.is_completed()

    def broadcast(self, tensor: Tensor, source: int) -> None:
        with peer_loss(f"a broadcast from lp rank {source}"):
            dist.broadcast(tensor, self._world_rank[source], group=self.group)

    def all_reduce(self, tensor: Tensor) -> None:
        with peer_loss("a sum over the lp ranks"):
            dist.all_reduce(tensor, group=self.group)

    def agree(self, facts: dict[str, Any], device: torch.device) -> None:
        said = self._said_by_all(facts, device)
        if said is not None:
            self._raise_mismatch(said)

    def same(self, facts: dict[str, Any], device: torch.device) -> bool:
        said = self._said_by_all(facts, device)
        if said is not None and any(set(s) != set(facts) for s in said):
            self._raise_mismatch(said)
        return said is None

    def _said_by_all(self, facts: dict[str, Any], device: torch.device) -> list[dict[str, Any]] | None:
        """Everybody's facts, or None where they are alike."""
        device = torch.device("cpu") if self._on_host else device
        mine = torch.tensor(_fingerprint(facts), dtype=torch.int64, device=device)
        every = torch.empty(self.size * mine.numel(), dtype=torch.int64, device=device)
        with peer_loss("the comparison of inputs"):
            dist.all_gather(list(every.split(mine.numel())), mine, group=self.group)
        if bool((every.view(self.size, -1) == mine).all()):
            return None
        said: list[Any] = [None] * self.size
        with peer_loss("the comparison of inputs"):
            dist.all_gather_object(said, facts, group=self.group)
        return said

    def _raise_mismatch(self, said: list[dict[str, Any]]) -> None:
        names = dict.fromkeys(name for s in said for name in s)
        differing = {n: [s.get(n) for s in said] for n in names if len({repr(s.get(n)) for s in said}) > 1}
        remedy = (
            "the ranks of one lp group must get the same batch and settings, and the same random seed "
            "(torch.manual_seed) before training"
        )
        raise RankMismatchError(f"the {self.size} lp ranks disagree on {differing} (by lp rank); {remedy}")

    def __deepcopy__(self, memo: dict) -> GroupTransport:
        return self  # a copied model speaks through the same process group


def _fingerprint(facts: dict[str, Any]) -> list[int]:
    """Integers that are equal on all ranks iff the facts are (`hash` of a string differs between processes)."""
    text = repr(sorted(facts.items())).encode()
    text += b"\0" * (-len(text) % 8)
    words: Sequence[int] = memoryview(text).cast("q")
    fold = [0x345678, 0x9E3779B9]
    for word in words:
        fold[0] = (fold[0] * 1000003 ^ word) & 0x7FFFFFFFFFFFFFFF
        fold[1] = (fold[1] * 69069 + word) & 0x7FFFFFFFFFFFFFFF
    return [len(words), *fold]
