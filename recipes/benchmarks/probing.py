"""A callback that compares the gradients of many settings with the exact one while a network trains exactly."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
from transformers import TrainerCallback, default_data_collator

from hf_layerpar.agreement import GradientProbe
from hf_layerpar.plan.ladder import describe
from hf_layerpar.plan.operators import OPERATORS
from hf_layerpar.sharding import layer_parallel

COARSENINGS = (4, 8)
ITERATIONS = ((1, 1), (2, 1))


class GradientTable(TrainerCallback):
    """Every `every` steps, and at the end: `rows` of step, settings, cosine, norm ratio and bias to noise."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.rows: list[dict[str, Any]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.every:
            return
        rows, size = kwargs["train_dataloader"].dataset, args.per_device_train_batch_size
        places = torch.randperm(len(rows), generator=torch.Generator().manual_seed(state.global_step))[:size]
        handle = layer_parallel(model)
        probe = GradientProbe(model, default_data_collator([rows[i] for i in places.tolist()]))
        for c, operator in itertools.product(COARSENINGS, OPERATORS):
            start = dataclasses.replace(handle.config, strategy="mgrit", coarsening=c, coarse_operator=operator)
            for forward, backward in ITERATIONS:
                settings = dataclasses.replace(start, forward_iterations=forward, backward_iterations=backward)
                found = probe.compare(settings)
                row = {"step": state.global_step, "settings": describe(settings)}
                row |= {key: found[key] for key in ("cosine", "norm_ratio")}
                self.rows.append(row | {"bias_to_noise": found["bias"] / probe.noise})
