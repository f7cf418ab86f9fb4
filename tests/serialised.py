"""A transport as strict as NCCL on one stream, over gloo: for tests of what must not hang there."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_layerpar.run.transport import GroupTransport


class SerialisedTransport(GroupTransport):
    """Everything that a rank posts, collectives included, is worked one after the other. A send is through when its
    receiver has come to it; there are no tags."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self._posts: queue.SimpleQueue[tuple[Callable[[], None], threading.Event]] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            act, done = self._posts.get()
            act()
            done.set()

    def _post(self, act: Callable[[], None]) -> threading.Event:
        done = threading.Event()
        self._posts.put((act, done))
        return done

    def send(self, tensor: Tensor, target: int) -> Any:
        def act() -> None:
            dist.send(tensor, self._world_rank[target], group=self.group)
            dist.recv(torch.empty(1), self._world_rank[target], group=self.group)

        return self._post(act)

    def receive(self, tensor: Tensor, source: int) -> Any:
        def act() -> None:
            dist.recv(tensor, self._world_rank[source], group=self.group)
            dist.send(torch.zeros(1), self._world_rank[source], group=self.group)

        return self._post(act)

    def start_all_reduce(self, tensor: Tensor) -> Any:
        return self._post(lambda: dist.all_reduce(tensor, group=self.group))

    def wait(self, handle: Any) -> None:
        if not handle.wait(timeout=30):
            raise TimeoutError(f"lp rank {self.rank} waits for a message that isn't next in line anywhere")

    def is_done(self, handle: Any) -> bool:
        return handle.is_set()

    def broadcast(self, tensor: Tensor, source: int) -> None:
        self.wait(self._post(lambda: dist.broadcast(tensor, self._world_rank[source], group=self.group)))

    def all_reduce(self, tensor: Tensor) -> None:
        self.wait(self.start_all_reduce(tensor))
