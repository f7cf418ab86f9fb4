"""Whether a model's loss is divided by `num_items_in_batch`, decided by computing it.

Stock concludes it from **kwargs in the signature of `forward`. Many heads (BERT, BART, T5 ...) take **kwargs for their
layers and ignore the count, and are then trained with gradients times the accumulation steps and the processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from hf_layerpar.training.streams import kept_streams


def depends_on_item_count(model: nn.Module, loss: Callable[[Tensor], Tensor], device: torch.device) -> bool | None:
    """Whether `loss(count)` changes with the count, in evaluation mode; None where the batch can't tell (no labels).

    Collective where the model's forward is.
    """
    was_training = model.training
    model.eval()
    try:
        values = []
        for count in (8.0, 16.0):
            with torch.no_grad(), kept_streams():
                values.append(float(loss(torch.tensor(count, device=device)).mean()))
    finally:
        model.train(was_training)
    if not all(map(math.isfinite, values)) or values[0] == 0:
        return None
    return not math.isclose(*values, rel_tol=1e-3)  # accelerators may repeat a forward with other last bits
