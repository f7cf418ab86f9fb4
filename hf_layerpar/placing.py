"""Which lp ranks hold which layers and which parameters outside them, and the dropping of what a rank doesn't hold.

Layers are split as the schedule wants it. What is outside of them is found by playing the model's forward through on a
small input: the front (what is needed before the first layers) belongs to the rank of the first layers, a middle
(encoder-decoders) to that of the next stack's first layers, the tail to that of the last layers. A parameter that
several phases use (tied embeddings) is on all their ranks, and so is one that no phase was seen to use.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_layerpar.compat.torch import parameter_slots, tensor_slots
from hf_layerpar.config import LayerParallelConfig, shown
from hf_layerpar.errors import ConfigurationError, UnsupportedModelError
from hf_layerpar.ode.ends import Ends
from hf_layerpar.ode.families import shared_modules
from hf_layerpar.ode.rehearsal import Rehearsed, rehearse
from hf_layerpar.ode.stack import LayerStack
from hf_layerpar.plan.ownership import (
    INTERLEAVED,
    V,
    balanced_split,
    contiguous_owner,
    interleaved_owner,
    two_blocks_owner,
)
from hf_layerpar.plan.schedules import SCHEDULES
from hf_layerpar.plan.step import inner_grid, interval_points
from hf_layerpar.run.layers import kept_streams
from hf_layerpar.run.transport import Transport


# ---- layers
def layer_owners(
    config: LayerParallelConfig,
    stacks: Sequence[LayerStack],
    num_ranks: int,
    split: Sequence[int] | str | None,
    found: Rehearsed | None,
) -> list[tuple[int, ...]]:
    """The lp rank of every layer, by stack. split: as `parallelize` takes it. found: what `played` found.

    Raises ConfigurationError where the layers of a stack can't be split so, or the grid doesn't fit it.
    """
    with_tail = len(stacks) - 1 if found is None else found.stacks[-1]
    tail = 0.0 if config.ends == "spread" else tail_in_layers(found, stacks)
    owners = [_owner(config, s, num_ranks, split, tail if i == with_tail else 0.0) for i, s in enumerate(stacks)]
    check_grids(config, stacks)
    return owners


def _owner(
    config: LayerParallelConfig, stack: LayerStack, num_ranks: int, split: Sequence[int] | str | None, tail: float
) -> tuple[int, ...]:
    """tail: what head and loss cost, in layers."""
    num_layers, buffers = len(stack.layers), stack.settings.buffers
    with _naming(stack):
        boundaries = interval_points(config, num_layers, buffers)
        if split is None and config.strategy == "pipeline" and num_ranks > 1:
            placement = getattr(SCHEDULES[config.schedule], "placement", "blocks")
            split = None if placement == "blocks" else placement
        if split is None and config.strategy == "pipeline" and num_ranks <= num_layers:
            split = balanced_split(num_layers, num_ranks, 1.0, 0.0, tail)
        if isinstance(split, str) and config.strategy == "pipeline" and split in (INTERLEAVED, V):
            return two_blocks_owner(num_layers, num_ranks, split)  # pyright: ignore[reportArgumentType]
        if isinstance(split, str):
            if split != INTERLEAVED:
                raise ConfigurationError(
                    f"split={shown(split)} with strategy={config.strategy!r}: the splits by name are "
                    "'interleaved', and 'v' for a pipeline; or give the number of layers of each rank"
                )
            return interleaved_owner(num_layers, num_ranks, boundaries)
        return contiguous_owner(num_layers, num_ranks, boundaries=boundaries, split=split)


def dealt_points(
    config: LayerParallelConfig, stack: LayerStack, split: Sequence[int] | str | None
) -> tuple[int, ...] | None:
    """The C-points of the intervals that `layer_owners` deals out to all ranks; None where it doesn't."""
    if split != INTERLEAVED or config.strategy != "mgrit":
        return None
    return tuple(interval_points(config, len(stack.layers), stack.settings.buffers))


def check_grids(config: LayerParallelConfig, stacks: Sequence[LayerStack]) -> None:
    """Refuses a grid that doesn't fit a stack now, and not in the first solve."""
    if config.strategy == "mgrit" and (config.forward_iterations or config.backward_iterations):
        for stack in stacks:
            with _naming(stack):
                inner_grid(config, len(stack.layers), stack.settings.buffers)


@contextmanager
def _naming(stack: LayerStack) -> Iterator[None]:
    """A model may have several stacks: settings that don't fit say which."""
    try:
        yield
    except ConfigurationError as error:
        raise ConfigurationError(f"stack {stack.path}: {error}") from error


def drop_layers(
    stacks: Sequence[LayerStack],
    owners: Sequence[tuple[int, ...]],
    ends: Ends,
    names: Mapping[int, Sequence[str]],
    transport: Transport,
) -> dict[str, int]:
    """Drops the layers of other ranks, and returns the lp rank of what was in layers, by full name. names: of every
    tensor, by its id.

    Tensors that layers share (or a layer and what is outside) stay on all ranks where they are frozen. Raises
    UnsupportedModelError for one that is trained on several ranks.
    """
    end_of = {id(p.value): p for p in ends}
    made_for_all = {
        id(layer.get_submodule(name)) for stack in stacks for layer in stack.layers for name in shared_modules(layer)
    }
    kept: set[int] = set()
    rank_of: dict[int, int] = {}

    def slots() -> Iterator[tuple[LayerStack, int, int, dict[str, Any], str, Tensor]]:
        for stack, owner in zip(stacks, owners, strict=True):
            for index, layer in enumerate(stack.layers):
                for module in layer.modules():
                    for tensors in tensor_slots(module):
                        for key, tensor in tensors.items():
                            if tensor is not None and id(module) not in made_for_all:
                                yield stack, index, owner[index], tensors, key, tensor

    for stack, index, rank, _, _, tensor in slots():
        end, other = end_of.get(id(tensor)), rank_of.setdefault(id(tensor), rank)
        if (other if end is None else end.holders) in (rank, (rank,)):
            continue
        if tensor.requires_grad:
            whom = f"a layer of lp rank {other}" if end is None else f"what lp ranks {end.holders} have outside"
            raise UnsupportedModelError(
                f"layer {index} of {stack.path} (lp rank {rank}) shares the trained tensor "
                f"{next(iter(names.get(id(tensor), ())), '?')} with {whom}; freeze it, give each layer its own, or "
                "use lp_size=1"
            )
        kept.add(id(tensor))
        if end is not None:
            end.holders = tuple(range(transport.size))
    owner_of: dict[str, int] = {}
    for _, _, rank, tensors, key, tensor in list(slots()):
        if id(tensor) not in end_of:
            owner_of |= dict.fromkeys(names.get(id(tensor), ()), rank_of[id(tensor)])
        if rank != transport.rank and id(tensor) not in kept:
            tensors[key] = None
    for stack, owner in zip(stacks, owners, strict=True):
        stack.foreign = frozenset(index for index, rank in enumerate(owner) if rank != transport.rank)
    return owner_of


# ---- what is outside of them
def place_ends(
    found: Rehearsed | None,
    stacks: Sequence[LayerStack],
    owners: Sequence[tuple[int, ...]],
    ends: Ends,
    *,
    spread: bool,
    num_ranks: int,
) -> None:
    """Sets `holders` and `is_shared` of the end parameters. found: what `played` found; without it the ranks of all
    phases hold all of the ends. spread: every rank holds what the tail uses."""
    stack_order = range(len(stacks)) if found is None else found.stacks
    ranks = [*(owners[s][0] for s in stack_order), owners[stack_order[-1]][-1]]
    everyone = tuple(range(num_ranks))
    for p in ends:
        phases = [] if found is None else [k for k, uses in enumerate(found.uses) if p in uses]
        homes = sorted({ranks[k] for k in phases} if phases else set(ranks))
        in_tail = not phases or len(ranks) - 1 in phases
        p.holders = everyone if spread and in_tail else tuple(homes)
        p.is_shared = len(phases) != 1 or len(p.holders) > 1


def tail_in_layers(found: Rehearsed | None, stacks: Sequence[LayerStack]) -> float:
    """What head and loss cost in layers, by numbers of parameters: each is used about once a token."""
    if found is None:
        return 0.0
    layer = sum(p.numel() for p in stacks[found.stacks[-1]].layers[0].parameters())
    return sum(p.shape.numel() for p in found.uses[-1]) / layer if layer else 0.0


def drop_ends(
    model: nn.Module, ends: Ends, tied: Mapping[str, Sequence[str]], owner_of: dict[str, int], rank: int
) -> None:
    """Drops the end parameters that this rank doesn't hold, and adds to `owner_of` what is outside the layers. tied: of
    every name in the full state dict, the others of the same tensor."""
    owner_of |= {name: 0 for name, _ in model.named_buffers() if name in tied and name not in owner_of}
    for p in ends:
        names = [name for own in p.names for name in (own, *tied.get(own, ())) if name in tied]
        owner_of |= dict.fromkeys(names, p.holders[0])
        if rank not in p.holders:
            for module, key in p.slots:
                parameter_slots(module)[key] = None
            p.value = None


def played(model: nn.Module, stacks: Sequence[LayerStack], ends: Ends) -> Rehearsed | None:
    """The rehearsal of a forward on a small input; None, with a warning, where the model takes another one."""
    was_training = model.training
    try:
        with kept_streams(device_of(model)):
            inputs = dummy_inputs(model)
            return rehearse(lambda batch: model(**batch), inputs, stacks, ends, loss=False)
    except Exception as error:  # whatever a model raises for inputs that are none of its own
        warnings.warn(
            f"the forward of {type(model).__name__} could not be played through on a small input ({error}), so the "
            "ranks of its first and last layers hold all parameters outside the layers",
            stacklevel=4,  # played, LayerParallel, parallelize
        )
        return None
    finally:
        model.train(was_training)


def device_of(model: nn.Module) -> torch.device:
    """Of a model whose layers may still be on the meta device."""
    devices = [p.device for p in model.parameters()]
    return next((device for device in devices if device.type != "meta"), devices[0])


def dummy_inputs(model: nn.Module) -> dict[str, Any]:
    """A small batch of one row, by the name of the model's main input."""
    inner = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), model)
    name = getattr(inner, "main_input_name", "input_ids")
    config: Any = getattr(inner, "config", None)
    device = device_of(model)
    tokens = torch.ones(1, 4, dtype=torch.int64, device=device)
    inputs: dict[str, Any] = {name: tokens}
    if name == "pixel_values":
        size = getattr(config, "image_size", 32)
        height, width = (size, size) if isinstance(size, int) else size
        inputs[name] = torch.zeros(1, getattr(config, "num_channels", 3), height, width, device=device)
    elif name == "input_features":
        frames = 2 * getattr(config, "max_source_positions", 1500)
        inputs[name] = torch.zeros(1, getattr(config, "num_mel_bins", 80), frames, device=device)
    elif name == "input_values":
        inputs[name] = torch.zeros(1, 4000, device=device)
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = tokens
    dtype = next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), torch.float32)
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
