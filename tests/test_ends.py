"""Sliced ends on lp ranks against the same model with replicated ends, loss and every gradient."""

import copy
import math

import pytest
import torch
import torch.distributed as dist

from hf_layerpar import LayerParallelConfig, convert_to_ode, parallelize
from tests.multiproc import run_ranks
from tests.zoo import NAMES, build


def double(name, batch, **changes):
    """(model, inputs) in float64 with `batch` rows, the labels of the first rows mostly ignored."""
    model, inputs = build(name, **changes)
    inputs = {k: torch.cat([v] * batch)[:batch].clone() for k, v in inputs.items()}
    for key, value in inputs.items():
        if value.is_floating_point():
            value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
        elif key != "attention_mask" and value.ndim == 2:
            value.copy_(torch.randint(5, 99, value.shape, generator=torch.Generator().manual_seed(2)))
    if inputs["labels"].ndim == 2:
        inputs["labels"][0, 2:] = -100
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    return model.double(), inputs


def gradients(model, inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def error(grads, expected):
    assert set(grads) == set(expected)
    norm = math.sqrt(sum(float(g.pow(2).sum()) for g in expected.values()))
    return max(float((grads[n] - g).norm()) / norm for n, g in expected.items())


def against_replicated(name, batch, config, changes):
    model, inputs = double(name, batch, **changes)
    model = convert_to_ode(model).eval()
    handle = parallelize(model, LayerParallelConfig(**config))
    expected_loss, expected = gradients(model, inputs)
    handle.config = LayerParallelConfig(sliced_ends=True, **config)
    rows = len(model(**inputs).logits)
    loss, found = gradients(model, inputs)
    return rows, loss, abs(loss - expected_loss), error(found, expected)
