"""Depth refinement: a model with another number of layers, built by its own constructor, with weights taken in depth.

New layer n of a stack that goes from N to M inner layers sits at t = n N / M in the old one. It gets the weights of
layer floor(t) ("constant"), or a mean of floor(t) and floor(t) + 1 weighted by distance ("linear"; clamped at the last
layer before a buffer). The new layers have parameters of their own: the result is an ordinary deeper (or shallower)
net.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_layerpar.compat.torch import parameter_slots
from hf_layerpar.compat.transformers import (
    checkpoint_activations,
    checkpoints_activations,
    has_adapters,
    no_init_weights,
)
from hf_layerpar.config import Buffers, OdeSettings, buffer_places
from hf_layerpar.errors import UnsupportedModelError
from hf_layerpar.ode.families import find_stacks, shared_modules


@dataclass(frozen=True)
class Source:
    """Where a new layer's weights come from: (1 - weight) layer[low] + weight layer[high] of the old stack."""

    low: int
    high: int
    weight: float


def sources(depth: int, steps: int, settings: OdeSettings) -> list[Source]:
    """The source of every layer of a stack of `depth` layers that gets `steps` inner ones (buffers stay as they
    are)."""
    places = buffer_places(settings.buffers, depth)
    buffers = [Source(n, n, 0.0) for n in sorted(places)]
    inner = [n for n in range(depth) if n not in places]
    found = []
    for n in range(steps):
        place, remainder = divmod(n * len(inner), steps)
        low = inner[place]
        while buffers and buffers[0].low < low:
            found.append(buffers.pop(0))
        weight = remainder / steps if settings.interpolation == "linear" else 0.0
        high = low if low + 1 in places or low + 1 == depth else low + 1
        found.append(Source(low, high, weight))
    return found + buffers


def refined_buffers(depth: int, steps: int, settings: OdeSettings) -> Buffers:
    """The buffers of a stack that `sources` made deeper: those between have other places there."""
    opening, *between, closing = settings.buffers
    moved = [n for n, source in enumerate(sources(depth, steps, settings)) if source.low in between]
    return opening, *moved, closing


def refined(model: PreTrainedModel, steps: Mapping[str, int], settings: OdeSettings) -> PreTrainedModel:
    """A new model of the same class with `steps[path]` inner layers in each stack; `model` itself isn't touched.

    A model whose layers are on the meta device gives one of the same kind, which has the tensors outside the layers
    together with it.

    Its weights, frozen flags, dtypes, devices and train/eval mode are those of `model`.

    Raises:
        UnsupportedModelError: the class can't be built from its config with this depth, or not with the layers that the
            old model has (adapters, quantised weights, layers that differ by their place).
    """
    _check_plain(model)
    stacks = find_stacks(model, settings.stacks)
    plan = {path: sources(len(layers), steps[path], settings) for path, layers in stacks.items()}
    config = _deeper_config(model.config, {path: len(layers) for path, layers in stacks.items()}, plan)
    lacks_layers = any(p.is_meta for p in model.parameters())
    with torch.random.fork_rng(devices=[]), no_init_weights(), _on_meta(model) if lacks_layers else nullcontext():
        new = type(model)(config)
    new_stacks = find_stacks(new, settings.stacks)
    for path, layers in plan.items():
        if len(new_stacks.get(path, ())) != len(layers):
            raise UnsupportedModelError(
                f"{type(model).__name__} built from its config has {len(new_stacks.get(path, ()))} layers in {path}, "
                f"not {len(layers)}; build the model of that depth yourself and convert it with num_steps={steps[path]}"
            )
        for index, source in enumerate(layers):
            _check_same_kind(path, index, new_stacks[path][index], source.low, stacks[path][source.low])
    # no_init_weights leaves out the tying; weights that the old model found untied in its checkpoint stay so
    old_ties = model.all_tied_weights_keys
    ties = {k: v for k, v in new.all_tied_weights_keys.items() if k in old_ties or _place(k, plan) is not None}
    new.all_tied_weights_keys = ties
    new.tie_weights(recompute_mapping=False)
    _copy_weights(model, new, plan, lacks_layers)
    new.train(model.training)
    if model.can_generate():
        new.generation_config = copy.deepcopy(model.generation_config)
    options = checkpoints_activations(model)
    if options is not None:
        checkpoint_activations(new, options)
    return new


def _check_plain(model: PreTrainedModel) -> None:
    if has_adapters(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} holds PEFT adapters, which belong to its layers; refine the model first, then add "
            "them"
        )
    if getattr(model, "is_quantized", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is quantised, so its weights can't be copied to other layers; refine it "
            "unquantised"
        )
    places = set((getattr(model, "hf_device_map", None) or {}).values())
    if len(places) > 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} is dispatched over {sorted(map(str, places))}; load it on one device to refine it"
        )


def _deeper_config(
    config: PreTrainedConfig, depths: Mapping[str, int], plan: Mapping[str, list[Source]]
) -> PreTrainedConfig:
    new = copy.deepcopy(config)
    for path, layers in plan.items():
        name = _depth_name(config, path)
        if getattr(config, name, None) != depths[path]:
            raise UnsupportedModelError(
                f"config.{name}={getattr(config, name, None)!r} is not the {depths[path]} layers of {path}, so it's "
                f"unknown how to build a {type(config).__name__} model of another depth; build it yourself and convert "
                "it with num_steps equal to its inner layers"
            )
        setattr(new, name, len(layers))
        for key, values in vars(config).items():
            # layer_types and its likes: one entry per layer
            if "layer" in key and isinstance(values, list) and len(values) == depths[path]:
                setattr(new, key, [copy.deepcopy(values[source.low]) for source in layers])
    return new


def _depth_name(config: PreTrainedConfig, path: str) -> str:
    for side in ("encoder", "decoder"):
        if side in path.split("."):
            for name in (f"{side}_layers", f"num_{side}_layers"):
                if hasattr(config, name):
                    return name
    return "num_hidden_layers"  # with config.attribute_map: n_layer, n_layers, num_layers


def _check_same_kind(path: str, index: int, layer: nn.Module, low: int, source: nn.Module) -> None:
    """Refuses a new layer that would not compute what its source does with the same weights."""
    shared = shared_modules(source)

    def relevant(traits: Iterator[tuple[str, Any]]) -> dict[str, Any]:
        # T5: only the first block has a relative_attention_bias, and a flag has_relative_attention_bias
        return {k: v for k, v in traits if not any(k.replace(".has_", ".").startswith(name) for name in shared)}

    theirs, ours = relevant(_traits(source)), relevant(_traits(layer))
    for key in [*theirs, *ours]:
        if theirs.get(key, "absent") != ours.get(key, "absent"):
            raise UnsupportedModelError(
                f"new layer {index} of {path} has {key} = {ours.get(key, 'absent')!r}, its source layer {low} has "
                f"{theirs.get(key, 'absent')!r}. If the model gives layers at some places a part of their own, keep "
                "those as buffers (buffers=(1, 1)); if it was changed by hand, change it in the config instead"
            )


def _traits(layer: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in layer.named_modules():
        yield f"{name}.class" if name else "class", type(module).__name__
        for key, value in vars(module).items():
            if key.startswith("_") or key in _NOT_TRAITS or not isinstance(value, bool | int | float | str | None):
                continue
            yield f"{name}.{key}" if name else key, value


_NOT_TRAITS = {"training", "gradient_checkpointing", "layer_idx", "layer_id"}


@contextmanager
def _on_meta(model: PreTrainedModel) -> Iterator[None]:
    """Models are built inside as transformers builds those that it loads."""
    with ExitStack() as stack:
        for context in type(model).get_init_context(model.dtype, False, False, None):
            stack.enter_context(context)
        yield


@torch.no_grad()
def _copy_weights(
    model: PreTrainedModel, new: PreTrainedModel, plan: Mapping[str, list[Source]], lacks_layers: bool
) -> None:
    old: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    old |= dict(model.named_buffers(remove_duplicate=False))
    used = set()

    def fetch(name: str, like: Tensor) -> Tensor:
        low, high, weight = _locate(name, plan)
        used.add(low)
        for key in (low, high) if weight else (low,):
            if key not in old or old[key].shape != like.shape:
                raise UnsupportedModelError(
                    f"{type(model).__name__} built from its config has {name} of shape {tuple(like.shape)}, but the "
                    f"model has {key} of shape {tuple(old[key].shape) if key in old else None}; refine the model "
                    "before changing its modules by hand"
                )
        if weight == 0 or not old[low].is_floating_point() or not isinstance(old[low], nn.Parameter):
            return old[low].detach() if lacks_layers and low == name else old[low].detach().clone()
        return (1 - weight) * old[low] + weight * old[high]

    slots: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for module in new.modules():
        parameters = parameter_slots(module)
        for key, value in parameters.items():
            slots.setdefault(id(value), []).append((parameters, key))
    for name, parameter in list(new.named_parameters()):  # tied ones come once, and stay tied
        value = nn.Parameter(fetch(name, parameter), old[_locate(name, plan)[0]].requires_grad)
        for parameters, key in slots[id(parameter)]:
            parameters[key] = value
    for name, buffer in new.named_buffers():
        owner, _, leaf = name.rpartition(".")
        setattr(new.get_submodule(owner), leaf, fetch(name, buffer))
    kept = set(model.state_dict())  # a rotary table that no layer needs any more may go
    named = (name for name, _ in (*model.named_parameters(), *model.named_buffers()))
    ends = {name for name in named if name in kept and _place(name, plan) is None}
    if ends - used:
        raise UnsupportedModelError(
            f"{type(model).__name__} built from its config has no {sorted(ends - used)}, which the model has; refine "
            "the model before adding modules to it"
        )


def _locate(name: str, plan: Mapping[str, list[Source]]) -> tuple[str, str, float]:
    """(old name, old name of the layer above, its weight) for a parameter or buffer of the new model."""
    place = _place(name, plan)
    if place is None:
        return name, name, 0.0
    path, index, rest = place
    source = plan[path][index]
    return f"{path}.{source.low}.{rest}", f"{path}.{source.high}.{rest}", source.weight


def _place(name: str, plan: Mapping[str, list[Source]]) -> tuple[str, int, str] | None:
    for path in plan:
        if name.startswith(path + "."):
            index, _, rest = name[len(path) + 1 :].partition(".")
            return path, int(index), rest
    return None
