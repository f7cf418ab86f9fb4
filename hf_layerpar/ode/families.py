"""What differs between layers: how they return their state, what the first one makes for all, what is refused.

Shapes: B batch, T tokens, D hidden, H heads; a state is `[B, T, D]`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_layerpar.errors import ConfigurationError, UnsupportedModelError
from hf_layerpar.ode.cache import find_cache


@dataclass(frozen=True)
class Packing:
    """How a layer returns its state: alone, or first in a tuple.

    beside: what stands behind the state in the tuple; None where the state is alone.
    """

    beside: tuple | None = None

    @classmethod
    def of(cls, output: Any, name: str, args: tuple, kwargs: dict[str, Any]) -> Packing:
        """As in `output`, which layer `name` returned for these arguments (beside the state)."""
        if not isinstance(output, tuple | list):
            return cls()
        given = {id(value): key for key, value in (*enumerate(args), *kwargs.items()) if value is not None}

        def found(place: int, leaf: Any) -> Any:
            if id(leaf) in given:
                return _Given(given[id(leaf)])
            return (
                _Made(f"the model uses item {place} of what {name} returns, {_TOO_EARLY}")
                if isinstance(leaf, Tensor)
                else leaf
            )

        return cls(tuple(tree_map(partial(found, place), value) for place, value in enumerate(output[1:], 1)))

    def pack(self, state: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What a layer that was called with these arguments returns with this state."""
        if self.beside is None:
            return state

        def found(leaf: Any) -> Any:
            if isinstance(leaf, _Given):
                return args[leaf.key] if isinstance(leaf.key, int) else kwargs[leaf.key]
            return later(torch.empty(()), leaf.what) if isinstance(leaf, _Made) else leaf

        return (state, *(tree_map(found, value) for value in self.beside))


@dataclass(frozen=True)
class _Given:
    """An argument that a layer returns again, such as a KV cache. key: its place or name."""

    key: int | str


@dataclass(frozen=True)
class _Made:
    """A tensor that a layer makes. what: says who may not use it."""

    what: str


def state_of(output: Any) -> Any:
    """The state in what a layer returns."""
    return output[0] if isinstance(output, tuple | list) and output else output


def with_state(output: Any, state: Tensor) -> Any:
    """The same return value with another state."""
    return (state, *output[1:]) if isinstance(output, tuple | list) else state


class Later(Tensor):
    """What the model's loop holds in place of a value that a solver will only make when all layers were called.

    A state may be asked for shape, dtype and device. Any other use raises UnsupportedModelError with the text `what`.
    """

    what: str
    is_state: bool

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        first = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Later))
        if first.is_state and (func in _FACTS or func in _PERHAPS_ITSELF):
            with torch._C.DisableTorchFunctionSubclass():
                found = func(*args, **(kwargs or {}))
            if func in _FACTS or found is first:
                return found
        raise UnsupportedModelError(first.what)


_FACTS = {
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.stride, Tensor.is_contiguous),
    *(torch.is_floating_point, torch.numel, Tensor.get_device),
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "layout")),
    *(getattr(Tensor, name).__get__ for name in ("is_cuda", "is_cpu", "is_meta", "is_quantized", "is_sparse")),
}
_PERHAPS_ITSELF = {
    *(Tensor.to, Tensor.contiguous, Tensor.type_as, Tensor.cuda, Tensor.cpu),
    *(Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16),
}
_TOO_EARLY = (
    "a tensor that is only made when a solver has evaluated all layers. Leave out what uses it, leave this stack out "
    "of the conversion (stacks=[...]), or run the model without parallelize"
)


def later(like: Tensor, what: str, *, is_state: bool = False) -> Later:
    found = Tensor._make_subclass(Later, like.detach())
    found.what, found.is_state = what, is_state
    return found


class Family:
    """What the first layer of a stack makes for all: nothing, for most."""

    shared_modules: tuple[str, ...] = ()
    """Names, inside the first layer, of modules that every layer depends on: they must stay on all ranks."""

    def shared(self, first: nn.Module, x: Tensor, args: tuple, kwargs: dict) -> tuple:
        """What the loop passes from the first layer on to the others beside the state; also behind it in a layer's
        return value."""
        return ()

    def with_shared(self, args: tuple, shared: tuple) -> tuple:
        """The arguments of a layer, with those values in their places."""
        return args


class T5(Family):
    """T5: `(state, self bias, cross bias)`, both biases `[1, H, T, keys]`, made by block 0 and handed on by the loop.

    The loop passes, after the state: mask, self bias, encoder states, encoder mask, cross bias.
    """

    shared_modules = ("layer.0.SelfAttention.relative_attention_bias",)

    def shared(self, first: nn.Module, x: Tensor, args: tuple, kwargs: dict) -> tuple:
        attention: Any = first.get_submodule("layer.0.SelfAttention")
        cache = find_cache((*args, *kwargs.values()))
        length, past = x.shape[1], 0 if cache is None else cache.get_seq_length()
        _, self_bias, encoder_states, *_ = args
        if self_bias is None and attention.has_relative_attention_bias:  # UDOP's encoder makes one before its blocks
            self_bias = attention.compute_bias(length, past + length, device=x.device, past_seen_tokens=past)
        elif self_bias is None:
            self_bias = x.new_zeros(1, attention.n_heads, length, past + length)
        if not first.is_decoder or encoder_states is None:
            return self_bias, None
        return self_bias, self_bias.new_zeros(1, attention.n_heads, length, encoder_states.shape[1])

    def with_shared(self, args: tuple, shared: tuple) -> tuple:
        return (args[0], shared[0], *args[2:4], shared[1], *args[5:])


_PLAIN = Family()
_T5 = T5()
_FAMILIES: dict[str, Family] = dict.fromkeys(
    ("T5Block", "MT5Block", "Pop2PianoBlock", "SwitchTransformersBlock", "UdopBlock"), _T5
)


def family_of(layer: nn.Module) -> Family:
    """The family of a layer, by its class name."""
    return _FAMILIES.get(type(layer).__name__, _PLAIN)


def shared_modules(layer: nn.Module) -> tuple[str, ...]:
    """Names inside `layer` of modules that all layers of its stack depend on; they must stay on all lp ranks."""
    modules = dict(layer.named_modules())
    return tuple(name for name in family_of(layer).shared_modules if name in modules)


def find_stacks(model: nn.Module, chosen: Sequence[str] | None = None) -> dict[str, Sequence[nn.Module]]:
    """The layer lists of a model by name.

    chosen: names of the ModuleLists to take (or their last parts). By default every ModuleList made only of
    `GradientCheckpointingLayer`s that can keep a state's shape; where there is none, those whose members are of one
    class and as many as the config says that the model has layers.

    Raises:
        UnsupportedModelError: there is none, or one lies inside a layer of another.
        ConfigurationError: no ModuleList has a chosen name.
    """
    lists: dict[str, Sequence[nn.Module]] = {
        n: list(m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)
    }
    if chosen is None:
        stacks = {n: layers for n, layers in lists.items() if _are_layers(layers)}
        stacks = stacks or {n: layers for n, layers in lists.items() if _look_like_layers(n, lists, model)}
    else:
        stacks = {n: layers for n, layers in lists.items() if any(_is_called(n, name) for name in chosen)}
        for name in chosen:
            if not any(_is_called(n, name) for n in stacks):
                raise ConfigurationError(
                    f"stacks: {type(model).__name__} has no ModuleList {name!r}; it has {', '.join(lists) or 'none'}"
                )
    if not stacks:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no stack: no ModuleList of transformer layers was found in it (one layer that "
            f"is called again and again is none). Name one with stacks=[...], of {', '.join(lists) or 'none'}, or use "
            "another model"
        )
    for inner in stacks:
        for outer in stacks:
            if inner.startswith(outer + "."):
                raise UnsupportedModelError(
                    f"{type(model).__name__} has a stack inside a layer of another: {inner} in {outer}. States of "
                    "nested stacks differ in shape, so they are not steps of one ODE; choose flat ones with "
                    "stacks=[...], or use a model that has some"
                )
    return stacks


def _are_layers(layers: Sequence[nn.Module]) -> bool:
    if not all(isinstance(layer, GradientCheckpointingLayer) for layer in layers):
        return False
    # a strided convolution shortens the sequence, as in the feature extractors of speech models
    children = (child for layer in layers for child in layer.children())
    return not any(isinstance(child, nn.Conv1d) and max(child.stride) > 1 for child in children)


def _look_like_layers(name: str, lists: Mapping[str, Sequence[nn.Module]], model: nn.Module) -> bool:
    layers, parent = lists[name], name.rpartition(".")[0]
    config = getattr(model, "config", None)
    depths = {getattr(config, key, None) for key in ("num_hidden_layers", "encoder_layers", "decoder_layers")}
    if len(layers) not in depths or len({type(layer) for layer in layers}) > 1 or not list(layers[0].children()):
        return False
    # the parts of one layer as lists of their own (XLM)
    beside = [n for n, others in lists.items() if n.rpartition(".")[0] == parent and len(others) == len(layers)]
    return len(beside) == 1 and not any(name.startswith(outer + ".") for outer in lists)


def _is_called(path: str, name: str) -> bool:
    """A checkpoint may be loaded as the model with its head or without."""
    return path == name or path.endswith("." + name) or name.endswith("." + path)


def _layerdrops(model: nn.Module) -> Iterator[tuple[str, float]]:
    for name, module in model.named_modules():
        for owner, values in (
            (name or "model", vars(module)),
            ("config", vars(getattr(module, "config", None) or object)),
        ):
            for key, value in values.items():
                if key.endswith("layerdrop") and isinstance(value, int | float) and value > 0:
                    yield f"{owner}.{key}", value


def check_supported(model: nn.Module) -> None:
    """Refuses models whose loop does more between its layers than pass the state on.

    Raises:
        UnsupportedModelError: layerdrop above 0, or DeBERTa-v2's convolution after layer 0.
    """
    for name, value in _layerdrops(model):
        raise UnsupportedModelError(
            f"{name}={value}: a layer dropped at random leaves no fixed sequence of steps; set it to 0 "
            "(load the model with that config value set to 0)"
        )
    for name, module in model.named_modules():
        if type(module).__name__ == "DebertaV2Encoder" and getattr(module, "conv", None) is not None:
            size = getattr(getattr(model, "config", None), "conv_kernel_size", None)
            raise UnsupportedModelError(
                f"{name}.conv (conv_kernel_size={size}) changes the state between layers 0 and 1, so they are not "
                "one sequence of steps; use a checkpoint with conv_kernel_size=0"
            )
