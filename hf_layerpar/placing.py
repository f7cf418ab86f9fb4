"""Which lp ranks hold the parameters outside the layers: found by playing the model's forward through on a small input.

The front (what is needed before the first layers) belongs to the rank of the first layers, a middle (encoder-decoders)
to that of the next stack's first layers, the tail to that of the last layers. A parameter that several phases use (tied
embeddings) is on all their ranks, and so is one that no phase was seen to use.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_layerpar.ode.ends import Ends
from hf_layerpar.ode.rehearsal import Rehearsed, rehearse
from hf_layerpar.ode.stack import LayerStack
from hf_layerpar.run.layers import kept_streams


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
            stacklevel=5,
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
