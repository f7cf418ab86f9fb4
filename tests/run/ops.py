"""What a CUDA graph does, on the CPU: the operators of a piece of work recorded, and done again on the same memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_layerpar.compat.torch import TorchDispatchMode, tree_leaves, tree_map


class RecordedOps:
    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple, dict[str, Any], list[Tensor]]] = []

    def replay(self) -> None:
        with torch.no_grad():
            for function, args, kwargs, results in self.calls:
                made = [t for t in tree_leaves(function(*args, **kwargs)) if isinstance(t, Tensor)]
                for mine, new in zip(results, made, strict=True):
                    if mine.data_ptr() != new.data_ptr():
                        mine.copy_(new)


class OpRecorder:
    """In the place of `hf_layerpar.run.captured.CudaRecorder`; here work is done when it is recorded, too."""

    def record(self, work: Callable[[], None]) -> RecordedOps:
        ops = RecordedOps()
        with _Recording(ops):
            work()
        return ops

    def random_state(self) -> Tensor:
        return torch.random.get_rng_state()


class _Recording(TorchDispatchMode):
    def __init__(self, ops: RecordedOps) -> None:
        super().__init__()
        self.ops = ops

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        bare = tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, (args, kwargs))
        made = [t.detach() for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.ops.calls.append((func, *bare, made))
        return result
