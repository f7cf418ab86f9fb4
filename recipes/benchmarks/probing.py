"""A callback that compares the gradients of many settings with the exact one while a network trains exactly."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from transformers import TrainerCallback, default_data_collator

from hf_layerpar.agreement import GradientProbe
from hf_layerpar.config import describe
from hf_layerpar.plan.operators import OPERATORS
from hf_layerpar.sharding import layer_parallel

Settings = dict[str, Any]


def setting(operator: str, coarsening: int, forward: int, backward: int) -> Settings:
    """Of MGRIT on two levels; 0 iterations are an exact sweep."""
    sweeps = {"forward_iterations": forward, "backward_iterations": backward}
    return {"strategy": "mgrit", "coarse_operator": operator, "coarsening": coarsening} | sweeps


EVERY_OPERATOR = [
    setting(operator, c, forward, backward)
    for c, operator in itertools.product((4, 8), OPERATORS)
    for forward, backward in ((1, 1), (2, 1))
]


class GradientTable(TrainerCallback):
    """Every `every` steps, and at the end: `rows` of step, settings, cosine, norm ratio and bias to noise. Where the
    network trains with an increment penalty, twice: of the loss with it, and of the loss's own gradient."""

    def __init__(self, every: int, settings: Sequence[Settings] = EVERY_OPERATOR) -> None:
        self.every, self.settings = every, settings
        self.rows: list[dict[str, Any]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.every:
            return
        rows, size = kwargs["train_dataloader"].dataset, args.per_device_train_batch_size
        places = torch.randperm(len(rows), generator=torch.Generator().manual_seed(state.global_step))[:size]
        batch = default_data_collator([rows[i] for i in places.tolist()])
        handle = layer_parallel(model)
        batch = {name: tensor.to(handle.device) for name, tensor in batch.items()}
        trained = handle.config
        try:
            for penalty in sorted({0.0, trained.increment_penalty}):
                handle.config = dataclasses.replace(trained, increment_penalty=penalty)
                probe = GradientProbe(model, batch)
                for values in self.settings:
                    settings = dataclasses.replace(handle.config, **values)
                    found = probe.compare(settings)
                    row = {"step": state.global_step, "settings": describe(settings), "penalty": penalty}
                    row |= {key: found[key] for key in ("cosine", "norm_ratio")}
                    self.rows.append(row | {"bias_to_noise": found["bias"] / probe.noise})
        finally:
            handle.config = trained
