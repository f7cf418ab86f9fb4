"""What the ranks of one layer axis say to each other: states point to point, results to all, and a check beforehand."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from hf_layerpar.errors import ConfigurationError, PeerLostError, RankMismatchError


@contextmanager
def peer_loss(doing: str) -> Iterator[None]:
    """Around collective calls (or on a function of them): a failure of the process group becomes PeerLostError; other
    errors, such as a device that is out of memory, keep their names."""
    try:
        yield
    except RuntimeError as error:
        if not _is_of_a_group(error):
            raise
        raise PeerLostError(
            f"rank {dist.get_rank()} of {dist.get_world_size()} lost another one during {doing}: {error}. The other "
            f"rank's log has the cause; restart all ranks, from the last checkpoint if there is one"
        ) from error


def _is_of_a_group(error: RuntimeError) -> bool:
    text = str(error).lower()
    # gloo raises bare RuntimeErrors that name its source files
    return (isinstance(error, dist.DistError) or "gloo" in text) and "out of memory" not in text


class Transport(Protocol):
    """The lp group as the executor sees it. All tensors stay on their device."""

    rank: int
    size: int

    def open(self, pairs: Iterable[tuple[int, int]], device: torch.device) -> None:
        """Readies the ways between these pairs of ranks, the same on all ranks. Collective.

        Raises ConfigurationError on every rank where the group can't carry tensors of `device`.
        """
        ...

    def unbroken(self) -> AbstractContextManager[None]:
        """Around sends and receives that belong together. Where they break off with an error, messages of theirs may
        still be under way: whatever comes after would take them for its own, so it raises PeerLostError instead."""
        ...

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

    def start_all_reduce(self, tensor: Tensor) -> Any:
        """Starts a non-blocking sum over all ranks, in place; returns a handle for `wait`."""
        ...

    def agree(self, facts: dict[str, Any]) -> None:
        """Raises RankMismatchError on every rank if `facts` differ between the ranks."""
        ...


class LocalTransport:
    """One rank: nothing to say to anybody."""

    rank, size = 0, 1

    def open(self, pairs: Iterable[tuple[int, int]], device: torch.device) -> None: ...

    def unbroken(self) -> AbstractContextManager[None]:
        return nullcontext()

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

    def start_all_reduce(self, tensor: Tensor) -> Any: ...

    def agree(self, facts: dict[str, Any]) -> None: ...


class GroupTransport:
    """The ranks of a torch.distributed process group.

    The order in which posts are safe is the plan's (`hf_layerpar.plan.part`). What the transport adds for NCCL and its
    like: messages have a group of their own, so that none is queued behind a collective of somebody else's; the
    communicator of each pair of ranks, which is made at its first message while both programs stand still, is made
    beforehand in one order for all ranks; and facts are compared on the host, by a gloo group, without a wait for the
    device.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._world_rank = [dist.get_global_rank(group, r) for r in range(self.size)]
        self._backends = _backends_of(group)
        self._messages = self._host = group
        if self.size > 1 and set(self._backends.values()) != {"gloo"}:
            self._messages = self._beside(None)
            if self._backends.get("cpu") != "gloo":
                self._host = self._beside("gloo")
        self._opened: set[tuple[int, int]] = set()
        self._broken: str | None = None

    def _beside(self, backend: str | None) -> dist.ProcessGroup:
        """Another group of the same ranks."""
        made: Any = dist.new_group(self._world_rank, backend=backend, use_local_synchronization=True)
        return made

    def open(self, pairs: Iterable[tuple[int, int]], device: torch.device) -> None:
        backend = self._backends.get(device.type)
        if self.size > 1 and (backend is None or (backend == "gloo" and device.type != "cpu")):
            raise ConfigurationError(
                f"the process group of {self.size} lp ranks sends by {self._backends} (device to backend), which can't "
                f"send tensors of a {device.type!r} device; start it with a backend that can (for CUDA "
                "init_process_group('cpu:gloo,cuda:nccl')), or keep the model on the CPU"
            )
        if backend == "gloo":
            return  # connected from the beginning
        for a, b in sorted(set(pairs) - self._opened):
            self._opened.add((a, b))
            if self.rank in (a, b):
                token, other = torch.zeros(1, device=device), a + b - self.rank
                for first in (a, b):
                    self.wait(self.send(token, other) if self.rank == first else self.receive(token, other))
                torch.get_device_module(device).synchronize(device)

    @contextmanager
    def unbroken(self) -> Iterator[None]:
        self._check()
        try:
            yield
        except BaseException as error:
            self._broken = f"{type(error).__name__}: {str(error)[:500]}"
            raise

    def _check(self) -> None:
        if self._broken is not None:
            raise PeerLostError(
                f"an earlier step of lp rank {self.rank} broke off half way ({self._broken}), and the other ranks may "
                "be anywhere in it; mend the cause and restart all ranks, from the last checkpoint if there is one"
            )

    def send(self, tensor: Tensor, target: int) -> Any:
        with peer_loss(f"a send to lp rank {target}"):
            return dist.isend(tensor, self._world_rank[target], group=self._messages)

    def receive(self, tensor: Tensor, source: int) -> Any:
        with peer_loss(f"a receive from lp rank {source}"):
            return dist.irecv(tensor, self._world_rank[source], group=self._messages)

    def wait(self, handle: Any) -> None:
        with peer_loss("the wait for a message"):
            handle.wait()

    def is_done(self, handle: Any) -> bool:
        return handle.is_completed()

    def broadcast(self, tensor: Tensor, source: int) -> None:
        self._check()
        with peer_loss(f"a broadcast from lp rank {source}"):
            dist.broadcast(tensor, self._world_rank[source], group=self.group)

    def all_reduce(self, tensor: Tensor) -> None:
        self._check()
        with peer_loss("a sum over the lp ranks"):
            dist.all_reduce(tensor, group=self.group)

    def start_all_reduce(self, tensor: Tensor) -> Any:
        with peer_loss("a sum over the lp ranks"):
            return dist.all_reduce(tensor, group=self.group, async_op=True)

    def agree(self, facts: dict[str, Any]) -> None:
        said = self._said_by_all(facts)
        if said is not None:
            self._raise_mismatch(said)

    def _said_by_all(self, facts: dict[str, Any]) -> list[dict[str, Any]] | None:
        """Everybody's facts, or None where they are alike."""
        self._check()
        mine = torch.frombuffer(
            bytearray(hashlib.sha256(repr(sorted(facts.items())).encode()).digest()), dtype=torch.uint8
        )
        every = torch.empty(self.size * mine.numel(), dtype=torch.uint8)
        with peer_loss("the comparison of inputs"):
            dist.all_gather(list(every.split(mine.numel())), mine, group=self._host)
        if bool((every.view(self.size, -1) == mine).all()):
            return None
        said: list[Any] = [None] * self.size
        with peer_loss("the comparison of inputs"):
            dist.all_gather_object(said, facts, group=self._host)
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


def _backends_of(group: dist.ProcessGroup) -> dict[str, str]:
    """Device type -> backend, such as {"cpu": "gloo", "cuda": "nccl"}."""
    return dict(part.split(":") for part in str(dist.get_backend_config(group)).split(","))
