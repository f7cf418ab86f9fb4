"""What ranks compare of a model and of a batch, before they go on together."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor, nn

from hf_layerpar.compat.torch import keystr, tree_flatten_with_path
from hf_layerpar.compat.transformers import CHECKPOINT_PATH
from hf_layerpar.errors import UnsupportedModelError
from hf_layerpar.ode.convert import ode_view
from hf_layerpar.run.transport import ALIKE, Roughly, fact

SAME_ROWS = (
    f"{ALIKE}; a loader that deals rows out to processes (accelerator.prepare, DistributedSampler) must deal them out "
    "to dp ranks, with all lp ranks of one given the same"
)
"""What to do where batches differ."""


def model_facts(model: nn.Module) -> dict[str, Any]:
    """What ranks that are to share a model, or to have copies of it, compare."""
    try:
        conversion: Any = ode_view(model).settings
    except UnsupportedModelError:
        conversion = None
    config: Any = getattr(model, "config", None)
    config = fact(config.to_dict()) if hasattr(config, "to_dict") else {}
    return {
        "model": type(model).__name__,
        "conversion": conversion,
        "config": {k: v for k, v in config.items() if k not in (CHECKPOINT_PATH, "transformers_version")},
        "tensors": {
            name: f"{list(tensor.shape)} {tensor.dtype}{' trained' if tensor.requires_grad else ''}"
            for name, tensor in model.state_dict(keep_vars=True).items()
            if isinstance(tensor, Tensor)
        },
    }


def batch_facts(batch: Any, contents: bool) -> dict[str, Any]:
    """What ranks that are to be given the same batch compare. contents: not only its shapes."""
    leaves = {f"batch{keystr(path)}": leaf for path, leaf in tree_flatten_with_path(batch)[0]}
    facts = {name: _kind(leaf) for name, leaf in leaves.items()}
    if contents:
        facts |= {f"contents of {name}": _contents(leaf) for name, leaf in leaves.items()}
    return facts


def _kind(leaf: Any) -> Any:
    return f"{list(leaf.shape)} {leaf.dtype}" if isinstance(leaf, Tensor) else fact(leaf)


def _contents(leaf: Any) -> Any:
    """A checksum. Floats may have been computed, with other last bits on every device: of these a random projection."""
    if not isinstance(leaf, Tensor) or leaf.layout is not torch.strided or not leaf.numel():
        return None
    leaf = leaf.detach().flatten()
    if not leaf.is_floating_point():
        return zlib.crc32(leaf.cpu().contiguous().view(torch.uint8).numpy())
    values = leaf.float().nan_to_num().asinh()  # masks hold the largest numbers that there are
    seeded = torch.Generator(leaf.device).manual_seed(0)
    weights = torch.randn(len(values), generator=seeded, device=leaf.device)
    return Roughly(values @ weights / values.norm().clamp(min=1e-30))
