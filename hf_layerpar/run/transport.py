"""What the ranks of one layer axis say to each other: states point to point, results to all, and a check beforehand."""

from __future__ import annotations

import dataclasses
import hashlib
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import Enum
from typing import Any, Generic, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hf_layerpar.compat.torch import is_alive, timeout_of
from hf_layerpar.errors import ConfigurationError, PeerLostError, RankMismatchError

Result = TypeVar("Result")


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
    # gloo raises bare RuntimeErrors that name its source files, or what became of the connection of a pair
    is_gloo = "gloo" in text or "pair clos" in text or "operation timed out" in text
    return (isinstance(error, dist.DistError) or is_gloo) and "out of memory" not in text


# ---- groups
_groups: dict[tuple[tuple[int, ...], str, str | None], dist.ProcessGroup] = {}


def group_of(ranks: Sequence[int], purpose: str, backend: str | None = None) -> dist.ProcessGroup:
    """The process group of these world ranks for a purpose: made once, since every group keeps connections for as long
    as the process lives, and as patient as the default group. Collective over `ranks`."""
    key = (tuple(ranks), purpose, backend)
    # one of a default group that was destroyed is of no use
    if key not in _groups or not is_alive(_groups[key]):
        made: Any = dist.new_group(
            list(ranks), backend=backend, timeout=timeout_of(dist.group.WORLD), use_local_synchronization=True
        )
        _groups[key] = made
    return _groups[key]


# ---- what ranks compare
ALIKE = (
    "the ranks of one lp group must get the same batch and settings, and the same random seed (torch.manual_seed) "
    "before training"
)


class Attempt(Generic[Result]):
    """What a function gave, or the error that it raised instead, for the ranks to agree on before it is raised."""

    def __init__(self, function: Callable[[], Result]) -> None:
        self.value: Result | None = None
        self.error: Exception | None = None
        try:
            self.value = function()
        except Exception as error:
            self.error = error

    def given(self) -> Result:
        assert self.value is not None
        return self.value


class Roughly(float):
    """A number of which every rank may have computed other last digits."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Roughly) and abs(float(self) - float(other)) <= 0.01

    __hash__ = float.__hash__


def fact(value: Any) -> Any:
    """What ranks compare of any value: plain data, and the names of what isn't."""
    if isinstance(value, Enum):
        return value.value
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, Mapping):
        return {str(key): fact(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [fact(v) for v in value]
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    return getattr(value, "__qualname__", type(value).__qualname__)


def _differing(said: Sequence[Any], name: str = "") -> Iterator[tuple[str, Sequence[Any]]]:
    """(name, what each rank has there) of the innermost entries that differ."""
    if all(value == said[0] or repr(value) == repr(said[0]) for value in said):
        return
    if all(dataclasses.is_dataclass(value) for value in said):
        said = [vars(value) for value in said]
    if all(isinstance(value, Mapping) for value in said):
        for key in dict.fromkeys(key for value in said for key in value):
            yield from _differing([value.get(key) for value in said], f"{name}.{key}" if name else str(key))
    elif all(isinstance(v, list | tuple) for v in said) and len({len(v) for v in said}) == 1:
        for i, entries in enumerate(zip(*said, strict=True)):
            yield from _differing(entries, f"{name}[{i}]")
    else:
        yield name, said


_RECORD = 32
"""Bytes that ranks exchange to compare: those of a sha256."""
_MOST_NAMED = 8
_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = 200
_brief.maxlist = _brief.maxtuple = _brief.maxdict = _MOST_NAMED


def _by_rank(said: Sequence[Any]) -> str:
    """What each rank said; of many ranks, which of them said it."""
    texts = [_brief.repr(value) for value in said]
    if len(texts) <= _MOST_NAMED:
        return f"[{', '.join(texts)}]"
    ranks: dict[str, list[int]] = {}
    for rank, text in enumerate(texts):
        ranks.setdefault(text, []).append(rank)
    return "; ".join(f"{text} of {_brief.repr(found)}" for text, found in list(ranks.items())[:_MOST_NAMED])


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

    def agree(self, facts: dict[str, Any], error: Exception | None = None, remedy: str = ALIKE) -> None:
        """Raises RankMismatchError on every rank if `facts` differ between the ranks. Collective.

        error: what kept this rank from going on, instead of raising it alone: it is raised where all ranks have one,
        and is else told to all, so that none waits for a rank that gave up.
        """
        ...

    def agree_in_common(self, facts: dict[str, Any], remedy: str = ALIKE) -> None:
        """`agree`, of what several ranks have a fact of. Collective."""
        ...

    def any_of(self, doing: str, flags: Sequence[bool]) -> list[bool]:
        """Of each flag, whether it is set on any rank. Collective; raises RankMismatchError on every rank where some
        are not `doing` this."""
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

    def agree(self, facts: dict[str, Any], error: Exception | None = None, remedy: str = ALIKE) -> None:
        if error is not None:
            raise error

    def agree_in_common(self, facts: dict[str, Any], remedy: str = ALIKE) -> None: ...

    def any_of(self, doing: str, flags: Sequence[bool]) -> list[bool]:
        return list(flags)


class GroupTransport:
    """The ranks of a torch.distributed process group.

    The order in which posts are safe is the plan's (`hf_layerpar.plan.part`). What the transport adds for NCCL and its
    like: messages have a group of their own, so that none is queued behind a collective of somebody else's; the
    communicator of each pair of ranks, which is made at its first message while both programs stand still, is made
    beforehand in one order for all ranks; and facts are compared on the host, by a gloo group, without a wait for the
    device.

    names: what its ranks are called.
    """

    def __init__(self, group: dist.ProcessGroup, names: str = "lp ranks") -> None:
        self.group, self.names = group, names
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._world_rank = [dist.get_global_rank(group, r) for r in range(self.size)]
        self._backends = _backends_of(group)
        self._messages = self._host = group
        self._timeout: tuple[Any, ...] = ()  # of messages, where it must be said
        if self.size > 1 and not self._is_gloo:
            self._messages = group_of(self._world_rank, "messages")
            if self._backends.get("cpu") != "gloo":
                self._host = group_of(self._world_rank, "host", "gloo")
        self._opened: set[tuple[int, int]] = set()
        self._broken: str | None = None

    def open(self, pairs: Iterable[tuple[int, int]], device: torch.device) -> None:
        self._timeout = (timeout_of(self.group),) if self._is_gloo else ()  # see compat's `set_timeout`
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

    @property
    def _is_gloo(self) -> bool:
        return set(self._backends.values()) == {"gloo"}

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
            handle.wait(*self._timeout)

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

    def agree(self, facts: dict[str, Any], error: Exception | None = None, remedy: str = ALIKE) -> None:
        if error is not None:
            facts = facts | {"error": f"{type(error).__name__}: {error}"}
        record = hashlib.sha256(repr(sorted(facts.items())).encode()).digest()
        if not self._are_alike(self._exchange(record)):
            said = self._all_say(facts)
            if error is None or not all("error" in s for s in said):  # named first: other differences come of it
                self._refuse_differing([{"error": s.get("error")} | s for s in said], remedy)
        if error is not None:
            raise error

    def agree_in_common(self, facts: dict[str, Any], remedy: str = ALIKE) -> None:
        said = self._all_say(facts)
        first = {name: value for s in said[::-1] for name, value in s.items()}
        self._refuse_differing([first | s for s in said], remedy)

    def any_of(self, doing: str, flags: Sequence[bool]) -> list[bool]:
        tag = _RECORD - len(flags)
        every = self._exchange(hashlib.sha256(doing.encode()).digest()[:tag] + bytes(flags))
        if not self._are_alike(every[:, :tag]):
            self._refuse_differing(self._all_say({"about to": doing}), ALIKE)
        return every[:, tag:].any(0).tolist()

    def _exchange(self, mine: bytes) -> Tensor:
        """What all ranks say, `[ranks, 32]`. All that is compared goes this way first, so that a rank that compares
        something else is found out, whatever it is."""
        self._check()
        record = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
        if self.size == 1:  # its group may carry nothing of the host's
            return record[None]
        every = torch.empty(self.size, _RECORD, dtype=torch.uint8)
        with peer_loss("the comparison of what the ranks are about to do"):
            dist.all_gather(list(every), record, group=self._host)
        return every

    @staticmethod
    def _are_alike(records: Tensor) -> bool:
        return bool((records == records[0]).all())

    def _all_say(self, facts: dict[str, Any]) -> list[dict[str, Any]]:
        if self.size == 1:
            return [facts]
        said: list[Any] = [None] * self.size
        with peer_loss("the comparison of what the ranks are about to do"):
            dist.all_gather_object(said, facts, group=self._host)
        return said

    def _refuse_differing(self, said: Sequence[Mapping[str, Any]], remedy: str) -> None:
        differing = dict(_differing(said))
        if not differing:
            return  # numbers that are roughly alike, or another order
        told = ", ".join(f"{name!r}: {_by_rank(values)}" for name, values in list(differing.items())[:_MOST_NAMED])
        more = f" and {len(differing) - _MOST_NAMED} more" if len(differing) > _MOST_NAMED else ""
        raise RankMismatchError(f"the {self.size} {self.names} disagree on {{{told}}}{more} (by rank); {remedy}")

    def __deepcopy__(self, memo: dict) -> GroupTransport:
        return self  # a copied model speaks through the same process group


def _backends_of(group: dist.ProcessGroup) -> dict[str, str]:
    """Device type -> backend, such as {"cpu": "gloo", "cuda": "nccl"}."""
    return dict(part.split(":") for part in str(dist.get_backend_config(group)).split(","))
