"""Layers as compiled code: one artefact for each kind of layer, made by torch.compile of the class's `forward`.

The layer itself is an argument of the code, so all layers of a class share it. Hooks on a layer, its Euler step and the
solver stay outside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from hf_layerpar.compat.torch import compiled
from hf_layerpar.config import shown
from hf_layerpar.errors import ConfigurationError

_OWN_GRAPHS = ("cudagraphs", "reduce-overhead", "max-autotune")
"""Backends and modes that write every result to the same memory, where a solver keeps the states of several calls."""

_MOST_CODE = 64
"""Of one kind of layer: with and without gradients, in training or not, for every precision and shape of a state."""


@dataclass(frozen=True)
class Compiler:
    """How layers are compiled: `backend` and `mode` of torch.compile.

    Raises ConfigurationError for a backend or a mode that torch doesn't know, or that can't run under a solver.
    """

    backend: str = "inductor"
    mode: str = "default"

    def __post_init__(self) -> None:
        for name in ("backend", "mode"):
            value = getattr(self, name)
            if value in _OWN_GRAPHS:
                raise ConfigurationError(
                    f"{name}={shown(value)} runs layers as CUDA graphs, which write each result over the last one; a "
                    "solver keeps the states of all layers. Use backend='inductor' with mode='default' or "
                    "'max-autotune-no-cudagraphs'"
                )
        try:
            self(_nothing)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise ConfigurationError(f"layers can't be compiled with {self}: {error}") from error

    def __call__(self, forward: Any) -> Callable[..., Any]:
        """A layer class's `forward`, compiled; the same artefact for the same function. It is made when it is first
        called, and does no gradient checkpointing."""
        while forward.__code__.co_name == "forward_with_checkpointing":
            forward = forward.__wrapped__  # transformers puts one function around the forwards of all layers
        return _compiled(forward, self.backend, self.mode)


def _nothing() -> None: ...


@lru_cache(maxsize=256)
def _compiled(forward: Callable[..., Any], backend: str, mode: str) -> Callable[..., Any]:
    return compiled(forward, backend, mode, _MOST_CODE)
