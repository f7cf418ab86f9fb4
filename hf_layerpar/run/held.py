"""How many bytes of tensors are alive while something runs, by what torch's operators return."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from hf_layerpar.compat.torch import TorchDispatchMode, tree_leaves


class Held(TorchDispatchMode):
    """Inside, storages that operators return count as long as they live: saved for a backward too, but not what a
    kernel takes for itself. On any device, forward and backward.

    before: tensors that were there before, and don't count. most: the most bytes that there were at once.
    """

    def __init__(self, before: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.most = 0
        self._before = WeakIdKeyDictionary({t.untyped_storage(): 0 for t in before})
        self._alive = WeakIdKeyDictionary()

    @property
    def now(self) -> int:
        return sum(self._alive.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        made = func(*args, **(kwargs or {}))
        found = False
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage()) not in self._before:
                found = found or storage not in self._alive
                self._alive[storage] = storage.nbytes()
        if found:
            self.most = max(self.most, self.now)
        return made
