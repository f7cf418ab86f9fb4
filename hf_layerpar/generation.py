"""`generate` of a model whose layers live on several lp ranks: they call it together, and choose the same tokens.

Every forward inside is solved by all ranks, so none may choose another token or stop at another time than the rest.
Before the first forward the inputs are compared and the random streams of lp rank 0 taken over; the scores come from
the one rank that has the head.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, MaxTimeCriteria, PreTrainedModel

from hf_layerpar.compat.torch import tree_leaves
from hf_layerpar.errors import ConfigurationError
from hf_layerpar.run.transport import Attempt, Transport

_CACHES = (None, "dynamic", "offloaded", "hybrid")  # stock takes the last one, which old configs have, for none


@dataclass(slots=True, eq=False)
class SharedGenerate:
    """The `generate` put on a model that is spread over lp ranks. Plain data, so that it follows a deepcopy."""

    model: PreTrainedModel
    transport: Transport
    whole: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    def stock(self) -> Callable[..., Any]:
        return type(self.model).generate.__get__(self.model)  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.stock)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What stock `generate` returns, on every lp rank. Collective.

        Raises:
            ConfigurationError: a stopping time or a kind of KV cache that the ranks can't have in common.
            RankMismatchError: the lp ranks were given different inputs or settings.
        """
        given = dict(zip(inspect.signature(self.stock).parameters, args, strict=False)) | kwargs
        refused = Attempt(lambda: self._refuse(given))
        device = self.model.device
        facts = {f"generate: {name}": [_fact(leaf) for leaf in tree_leaves(value)] for name, value in given.items()}
        facts["generate: the model's generation_config"] = _fact(self.model.generation_config)
        self.transport.agree(facts, refused.error)
        self._take_streams_of_first_rank(device)
        with self.whole():  # dp ranks may generate other numbers of tokens, so none of them is for all
            return self.stock(**given)

    def _refuse(self, given: dict[str, Any]) -> None:
        configs = (given.get("generation_config"), self.model.generation_config)

        def setting(name: str) -> Any:
            values = (given.get(name), *(getattr(config, name, None) for config in configs))
            return next((value for value in values if value is not None), None)

        criteria = given.get("stopping_criteria") or ()
        if setting("max_time") is not None or any(isinstance(c, MaxTimeCriteria) for c in criteria):
            raise ConfigurationError(
                "generate with max_time on a model that is spread over lp ranks: their clocks would stop them at "
                "different tokens; use max_new_tokens"
            )
        if (cache := setting("cache_implementation")) not in _CACHES:
            raise ConfigurationError(
                f"cache_implementation={cache!r} on a model that is spread over lp ranks, where each keeps the keys "
                "and values of its own layers; leave it out (a DynamicCache), or use use_cache=False"
            )

    def _take_streams_of_first_rank(self, device: torch.device) -> None:
        sources: list[tuple[Callable[[], Tensor], Callable[[Tensor], None]]]
        sources = [(torch.get_rng_state, torch.set_rng_state)]
        if device.type != "cpu":
            module = torch.get_device_module(device)
            sources.append((lambda: module.get_rng_state(device), lambda state: module.set_rng_state(state, device)))
        for read, write in sources:
            state = read().to(device)
            self.transport.broadcast(state, 0)
            write(state.cpu())


def share_generation(
    model: nn.Module, transport: Transport, whole: Callable[[], AbstractContextManager[None]] = nullcontext
) -> None:
    """Put our `generate` on every HuggingFace model in `model` that has one. whole: in which parameters are whole."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.can_generate():
            object.__setattr__(module, "generate", SharedGenerate(module, transport, whole))


def _fact(value: Any) -> Any:
    """What lp ranks compare of an argument: all of it where it is small or chooses tokens, else its kind."""
    if isinstance(value, Tensor):
        # floats may have been computed, with other last bits on every device
        exact = not value.is_floating_point()
        content = value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if exact else b""
        return tuple(value.shape), str(value.dtype), hashlib.sha256(content).hexdigest()[:16] if exact else None
    if isinstance(value, GenerationConfig):
        return value.to_json_string()
    return value if value is None or isinstance(value, bool | int | float | str) else type(value).__name__
