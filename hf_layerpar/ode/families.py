"""What differs between layers: where they have their state, what the first one makes for all, what is refused.

Shapes: B batch, T tokens, D hidden, H heads; a state is `[B, T, D]`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_layerpar.compat.transformers import GradientCheckpointingLayer
from hf_layerpar.errors import ConfigurationError, UnsupportedModelError
from hf_layerpar.ode.cache import find_cache


class Family:
    """Of most layers: the state is the first argument and the first thing returned, and all else that a layer is given
    the model makes before its first layer.

    A family of other layers is a subclass with an instance in `FAMILIES`.
    """

    state: tuple[str, ...] = ()
    """Names of the arguments that make up the state `[B, T1, D], [B, T2, D], ...` where it is several tensors. They are
    solved as one, `[B, T1 + T2 + ..., D]`."""

    returned: tuple[int, ...] = (0,)
    """Where they stand in what a layer returns. One that is None there stays as it was (SD3's last layer)."""

    shared_modules: tuple[str, ...] = ()
    """Names, inside the first layer, of modules that every layer depends on: they must stay on all ranks."""

    def shared(self, first: nn.Module, x: Tensor, args: tuple, kwargs: dict) -> tuple:
        """What the loop passes from the first layer on to the others beside the state; also behind it in a layer's
        return value.

        Inside, all parameters of `first` but those of the shared modules read as zeros, as a rank may lack them.
        """
        return ()

    def with_shared(self, args: tuple, kwargs: dict[str, Any], shared: tuple) -> tuple[tuple, dict[str, Any]]:
        """The arguments of a layer, with those values in their places."""
        return args, kwargs

    def parts_of(self, output: Any) -> tuple:
        """The state in what a layer returns, in its parts."""
        if type(output) is dict:
            output = tuple(output.values())
        if not isinstance(output, tuple | list):
            return (output,)
        return tuple(output[i] if i < len(output) else output for i in self.returned)

    def with_parts(self, output: Any, parts: Sequence[Tensor]) -> Any:
        """The same return value with another state."""
        if not isinstance(output, dict | tuple | list):
            return parts[0]
        values = list(output.values()) if isinstance(output, dict) else list(output)
        for i, part in zip(self.returned, parts, strict=True):
            values[i] = None if values[i] is None else part
        return dict(zip(output, values, strict=True)) if isinstance(output, dict) else tuple(values)


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

    def with_shared(self, args: tuple, kwargs: dict[str, Any], shared: tuple) -> tuple[tuple, dict[str, Any]]:
        return (args[0], shared[0], *args[2:4], shared[-1], *args[5:]), kwargs


class LongT5(T5):
    """T5 whose encoder attends to blocks of tokens; behind the self bias stands what T5 leaves out, the weights."""

    shared_modules = (
        *T5.shared_modules,
        "layer.0.LocalSelfAttention.relative_attention_bias",
        "layer.0.TransientGlobalSelfAttention.relative_attention_bias",
        "layer.0.TransientGlobalSelfAttention.global_relative_attention_bias",
    )

    def shared(self, first: nn.Module, x: Tensor, args: tuple, kwargs: dict) -> tuple:
        if first.is_decoder:
            self_bias, cross_bias = super().shared(first, x, args, kwargs)
            return self_bias, None, cross_bias
        attention = next(first.get_submodule("layer.0").children())
        with torch.random.fork_rng([x.device] if x.is_cuda else []):  # dropout that stock draws in the layer alone
            return attention(x.new_zeros(x.shape), args[0])[1], None


class WavLM(Family):
    """WavLM: `(state, position bias)`, the bias `[B * H, T, T]` made by layer 0 and handed on by the loop."""

    shared_modules = ("attention.rel_attn_embed",)

    def shared(self, first: nn.Module, x: Tensor, args: tuple, kwargs: dict) -> tuple:
        bias = first.get_submodule("attention").compute_bias(x.shape[1], x.shape[1])  # pyright: ignore
        return (bias.repeat(len(x), 1, 1),)

    def with_shared(self, args: tuple, kwargs: dict[str, Any], shared: tuple) -> tuple[tuple, dict[str, Any]]:
        return args, kwargs | {"position_bias": shared[0]}


class Joint(Family):
    """Two streams that attend to each other in every layer."""

    def __init__(self, state: tuple[str, ...], returned: tuple[int, ...]) -> None:
        self.state, self.returned = state, returned


_PLAIN = Family()
FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("T5Block", "MT5Block", "Pop2PianoBlock", "SwitchTransformersBlock", "UdopBlock"), T5()),
    "LongT5Block": LongT5(),
    **dict.fromkeys(("WavLMEncoderLayer", "WavLMEncoderLayerStableLayerNorm"), WavLM()),
    "PegasusXEncoderLayer": Joint(("hidden_states", "global_hidden_states"), (0, 1)),
    **dict.fromkeys(  # of diffusers: SD3, Flux
        ("JointTransformerBlock", "FluxTransformerBlock", "FluxSingleTransformerBlock"),
        Joint(("hidden_states", "encoder_hidden_states"), (1, 0)),
    ),
}
"""By the name of the layers' class, or of one that it is derived from."""


def family_of(layer: nn.Module) -> Family:
    """The family of a layer, by the first of its classes that has one."""
    return next((FAMILIES[kind.__name__] for kind in type(layer).__mro__ if kind.__name__ in FAMILIES), _PLAIN)


def shared_modules(layer: nn.Module) -> tuple[str, ...]:
    """Names inside `layer` of modules that all layers of its stack depend on; they must stay on all lp ranks."""
    modules = dict(layer.named_modules())
    return tuple(name for name in family_of(layer).shared_modules if name in modules)


def find_stacks(model: nn.Module, chosen: Sequence[str] | None = None) -> dict[str, Sequence[nn.Module]]:
    """The layer lists of a model by name.

    chosen: names of the ModuleLists (or nn.Sequentials) to take, or their last parts. By default every ModuleList made
    only of `GradientCheckpointingLayer`s that can keep a state's shape; where there is none, those whose members are of
    one class and as many as the config says that the model has layers. Of a model that isn't transformers' those of
    more than one member, of one class, that are in no other. A layer that is called again and again stands in its list
    as often (ALBERT).

    Raises:
        UnsupportedModelError: there is none, or one lies inside a layer of another.
        ConfigurationError: no ModuleList has a chosen name.
    """
    is_stock = isinstance(model, PreTrainedModel)
    every = {n: m for n, m in model.named_modules() if n and isinstance(m, nn.ModuleList | nn.Sequential) and len(m)}
    lists: dict[str, Sequence[nn.Module]] = {
        n: [*m.children()]
        for n, m in every.items()
        if isinstance(m, nn.ModuleList) or not is_stock or any(_is_called(n, name) for name in chosen or ())
    }
    config = getattr(model, "config", None)
    depth, groups = (getattr(config, key, None) for key in ("num_hidden_layers", "num_hidden_groups"))
    for name, layers in lists.items():
        if depth and groups and len(layers) == groups and name.endswith("_layer_groups"):
            lists[name] = [layers[int(i / (depth / groups))] for i in range(depth)]  # as ALBERT does
    if chosen is None:
        stacks = {n: layers for n, layers in lists.items() if _are_layers(layers)}
        stacks = stacks or {n: layers for n, layers in lists.items() if _look_like_layers(n, lists, model, is_stock)}
    else:
        taken: set[str] = set()
        for name in chosen:
            called = [n for n in lists if _is_called(n, name)]
            taken |= {n for n in called if isinstance(every[n], nn.ModuleList)} or set(called)
            if not called:
                raise ConfigurationError(
                    f"stacks: {type(model).__name__} has no ModuleList {name!r}; it has {', '.join(lists) or 'none'}"
                )
        stacks = {n: layers for n, layers in lists.items() if n in taken}
    if not stacks:
        whole = [n for n, layers in lists.items() if len(layers) == depth]
        parts = next((found for n in whole if len(found := _beside(n, lists)) > 2), None)
        raise UnsupportedModelError(
            f"{type(model).__name__} has no stack: "
            + (
                f"its layers are no modules, as {', '.join(parts)} hold their parts. Use another model"
                if parts
                else "no ModuleList of layers of one kind, as many as the model has, was found in it. "
                + (f"Name one with stacks=[...], of {', '.join(lists)}, or use" if lists else "Use")
                + " another model"
            )
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


def _look_like_layers(name: str, lists: Mapping[str, Sequence[nn.Module]], model: nn.Module, is_stock: bool) -> bool:
    layers = lists[name]
    if len({type(layer) for layer in layers}) > 1 or not list(layers[0].children()):
        return False
    if any(name.startswith(outer + ".") for outer in lists):
        return False
    if not is_stock:
        return len(layers) > 1
    keys = ("num_hidden_layers", "encoder_layers", "decoder_layers")
    return len(layers) in {getattr(model.config, key, None) for key in keys} and len(_beside(name, lists)) == 1


def _beside(name: str, lists: Mapping[str, Sequence[nn.Module]]) -> list[str]:
    """Lists of the same module and length: several are parts of one layer in lists of their own (XLM)."""
    parent = name.rpartition(".")[0]
    return [n for n, others in lists.items() if n.rpartition(".")[0] == parent and len(others) == len(lists[name])]


def _is_called(path: str, name: str) -> bool:
    """A checkpoint may be loaded as the model with its head or without."""
    return path == name or path.endswith("." + name) or name.endswith("." + path)


def _layerdrops(model: nn.Module) -> Iterator[tuple[str, float]]:
    for name, module in model.named_modules():
        for owner, values in (
            (name or "model", vars(module)),
            ("config", getattr(getattr(module, "config", None), "__dict__", {})),
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
