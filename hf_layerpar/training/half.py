"""Training in fp16: one scale of the loss for all processes, and a step that overflows on one is skipped by all."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from hf_layerpar.compat.accelerate import set_scaler
from hf_layerpar.compat.torch import SharedScaler
from hf_layerpar.errors import ConfigurationError


def use_fp16(accelerator: Any) -> None:
    """Makes an accelerator of mixed precision fp16 cast and scale as all processes do together.

    Accelerate's own scaler asks this process alone whether its gradients are finite, and on a CPU there is none, nor
    any fp16: stock then trains in fp32.
    """
    kind = accelerator.device.type
    many = dist.is_initialized() and dist.get_world_size() > 1
    set_scaler(accelerator, SharedScaler(kind) if many else torch.amp.GradScaler(kind))


def loss_scale(accelerator: Any) -> float:
    """What the loss is multiplied by before its backward; 1 without a scaler."""
    if accelerator.scaler is None:
        return 1.0
    return float(accelerator.scaler.scale(torch.ones((), device=accelerator.device)))


def check_parameters(parameters: Any) -> None:
    """Raises ConfigurationError for trained parameters in fp16, whose gradients can't be unscaled without loss."""
    if narrow := [tuple(p.shape) for p in parameters if p.requires_grad and p.dtype == torch.float16]:
        raise ConfigurationError(
            f"fp16=True with {len(narrow)} trained parameters in float16, such as one of shape {narrow[0]}: what is "
            "added to them is lost; load the model with dtype=torch.float32"
        )
