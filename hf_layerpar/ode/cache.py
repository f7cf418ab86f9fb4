"""The KV cache of a stack whose layers live on several ranks: each keeps keys and values of its own layers only.

Before a model calls its layers it asks the cache how long it is, and asks the first layer of a kind, which may live
elsewhere. So the layers of other ranks get stand-ins: of the right length, one number a token.

Shapes: B batch, T tokens, D hidden; a state is `[B, T, D]`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache

from hf_layerpar.errors import UnsupportedModelError


def find_cache(values: Iterable[Any]) -> Cache | None:
    """The cache among a layer's arguments."""
    return next((value for value in values if isinstance(value, Cache)), None)


def is_splittable(cache: Cache) -> bool:
    """Whether every rank can keep its own layers' part: the cache grows by the tokens it is given, nothing else."""
    cache = _self_attention(cache)
    known = (DynamicLayer, DynamicSlidingWindowLayer)
    return isinstance(cache, DynamicCache) and all(type(layer) in known for layer in cache.layers)


def add_stand_in(cache: Cache, layer: nn.Module, x: Tensor) -> None:
    """Counts the tokens of `x` `[B, T, D]` as cached for a layer that was evaluated on another rank.

    Raises UnsupportedModelError for a layer that doesn't say which part of the cache is its own.
    """
    places = {place for module in layer.modules() if isinstance(place := getattr(module, "layer_idx", None), int)}
    if len(places) != 1:
        raise UnsupportedModelError(
            f"{type(layer).__name__} has {len(places)} places in the KV cache (layer_idx), not one, so the cache can't "
            "be spread over lp ranks; generate with use_cache=False, or without parallelize"
        )
    (place,) = places
    numbers = x.new_zeros(x.shape[0], 1, x.shape[1], 1)
    _self_attention(cache).update(numbers, numbers, place)
    if isinstance(cache, EncoderDecoderCache) and not cache.is_updated.get(place):
        one = numbers[:, :, :1]  # nobody asks how many encoder states there are
        cache.cross_attention_cache.update(one, one, place)
        cache.is_updated[place] = True


def _self_attention(cache: Cache) -> Cache:
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
