"""What differs between layer classes: a layer's return value, what the first layer makes for all, what is refused.

Shapes: B batch, T tokens, D hidden, H heads; a state is `[B, T, D]`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_layerpar.errors import UnsupportedModelError
from hf_layerpar.ode.cache import find_cache


class Family:
    """Layers that return their state as a bare tensor: most of them.

    A solved stack hands values back to the model's loop before any layer was evaluated. `shared` makes what the loop
    passes from the first layer on to the others beside the state, `pack` builds a layer's return value from a state and
    those values, and `with_shared` puts them into a layer's recorded arguments.
    """

    shared_modules: tuple[str, ...] = ()
    """Names, inside the first layer, of modules that every layer depends on: they must stay on all ranks."""

    def state(self, output: Any) -> Tensor:
        """The state `[B, T, D]` in a layer's return value."""
        return output

    def with_state(self, output: Any, state: Tensor) -> Any:
        """The same return value with another state."""
        return state

    def shared(self, first: nn.Module, x: Tensor, args: tuple, kwargs: dict) -> tuple:
        return ()

    def pack(self, state: Tensor, shared: tuple) -> Any:
        return state

    def with_shared(self, args: tuple, shared: tuple) -> tuple:
        return args


class LeadingState(Family):
    """Layers that return a tuple whose first element is the state."""

    def state(self, output: Any) -> Tensor:
        return output[0]

    def with_state(self, output: Any, state: Tensor) -> Any:
        return (state, *output[1:])


class Deberta(LeadingState):
    """DeBERTa: `(state, attention probabilities or None)`."""

    def pack(self, state: Tensor, shared: tuple) -> Any:
        return (state, None)


class T5(LeadingState):
    """T5: `(state, self bias, cross bias)`, both biases `[1, H, T, keys]`, made by block 0 and handed on by the loop.

    The loop passes, after the state: mask, self bias, encoder states, encoder mask, cross bias.
    """

    shared_modules = ("layer.0.SelfAttention.relative_attention_bias",)

    def shared(self, first: nn.Module, x: Tensor, args: tuple, kwargs: dict) -> tuple:
        attention: Any = first.get_submodule("layer.0.SelfAttention")
        cache = find_cache((*args, *kwargs.values()))
        length, past = x.shape[1], 0 if cache is None else cache.get_seq_length()
        self_bias = attention.compute_bias(length, past + length, device=x.device, past_seen_tokens=past)
        encoder_states = args[2]
        if not first.is_decoder or encoder_states is None:
            return self_bias, None
        return self_bias, self_bias.new_zeros(1, attention.n_heads, length, encoder_states.shape[1])

    def pack(self, state: Tensor, shared: tuple) -> Any:
        return (state, *shared)

    def with_shared(self, args: tuple, shared: tuple) -> tuple:
        return (args[0], shared[0], *args[2:4], shared[1], *args[5:])


_TENSOR = Family()
LEADING_STATE = LeadingState()
_FAMILIES: dict[str, Family] = {
    "T5Block": T5(),
    "MT5Block": T5(),
    "DebertaLayer": Deberta(),
    "DebertaV2Layer": Deberta(),
}


def family_of(layer: nn.Module) -> Family:
    """The family of a layer, by its class name; classes not listed return a bare tensor (checked when they run)."""
    return _FAMILIES.get(type(layer).__name__, _TENSOR)


def shared_modules(layer: nn.Module) -> tuple[str, ...]:
    """Names inside `layer` of modules that all layers of its stack depend on; they must stay on all lp ranks."""
    modules = dict(layer.named_modules())
    return tuple(name for name in family_of(layer).shared_modules if name in modules)


def find_stacks(model: nn.Module) -> dict[str, Sequence[nn.Module]]:
    """The layer lists of a model by name: every ModuleList made only of `GradientCheckpointingLayer`s.

    Raises:
        UnsupportedModelError: there is none, or one lies inside a layer of another.
    """
    stacks: dict[str, Sequence[nn.Module]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 0:
            layers = list(module)
            if all(isinstance(layer, GradientCheckpointingLayer) for layer in layers):
                stacks[name] = layers
    if not stacks:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no stack: no ModuleList of GradientCheckpointingLayer was found in it. "
            "Use a model whose transformer blocks are such layers (most of transformers' models are)"
        )
    for inner in stacks:
        for outer in stacks:
            if inner.startswith(outer + "."):
                raise UnsupportedModelError(
                    f"{type(model).__name__} has a stack inside a layer of another: {inner} in {outer}. States of "
                    "nested stacks differ in shape, so they are not steps of one ODE; use a model with flat stacks"
                )
    return stacks


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
