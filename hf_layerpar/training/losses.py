"""Losses that stock can't be left alone with: what they are divided by, and label smoothing of parts of a batch.

Whether a model's loss is divided by `num_items_in_batch` is decided by computing it.

Stock concludes it from **kwargs in the signature of `forward`. Many heads (BERT, BART, T5 ...) take **kwargs for their
layers and ignore the count, and are then trained with gradients times the accumulation steps and the processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from hf_layerpar.compat.trainer import LabelSmoother
from hf_layerpar.training.streams import kept_streams


def depends_on_item_count(model: nn.Module, loss: Callable[[Tensor], Tensor], device: torch.device) -> bool | None:
    """Whether `loss(count)` changes with the count, in evaluation mode; None where the batch can't tell (no labels).

    All processes decide alike: a batch that shows the dependence on any of them settles it. Collective.
    """
    verdict = torch.tensor([None, False, True].index(_depends(model, loss, device)), device=device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(verdict, op=dist.ReduceOp.MAX)
    return [None, False, True][int(verdict)]


def _depends(model: nn.Module, loss: Callable[[Tensor], Tensor], device: torch.device) -> bool | None:
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


class SmoothedCrossEntropy(LabelSmoother):
    """Stock's label smoothing by torch's own loss function, so that the losses of parts of a batch can be put together
    (`hf_layerpar.ode.losses`)."""

    def __call__(
        self, model_output: Any, labels: Tensor, shift_labels: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        logits = model_output["logits"] if isinstance(model_output, dict) else model_output[0]
        if shift_labels:
            logits, labels = logits[..., :-1, :], labels[..., 1:]
        loss = functional.cross_entropy(
            logits.flatten(0, -2).float(),
            labels.flatten(),
            ignore_index=self.ignore_index,
            label_smoothing=self.epsilon,
            reduction="mean" if num_items_in_batch is None else "sum",
        )
        return loss if num_items_in_batch is None else loss / num_items_in_batch
