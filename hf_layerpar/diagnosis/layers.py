"""Reads the layers of a stack one by one: size of the increment, Lipschitz estimate, growth, outlier tokens.

Shapes: B batch, T tokens, D hidden; a state is `[B, T, D]`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from hf_layerpar.compat.torch import tree_unflatten
from hf_layerpar.diagnosis.readings import LayerReading
from hf_layerpar.errors import UnsupportedModelError
from hf_layerpar.ode.stack import LayerStack, RecordedCall
from hf_layerpar.run.layers import Common, Entry, Layers, kept_streams


def lipschitz(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    iterations: int = 10,
    generator: torch.Generator | None = None,
) -> float:
    """Largest singular value of a function's Jacobian at x `[B, ...]`, over the rows of the batch, by power iteration.

    Rows must not depend on each other; each has an iteration of its own. The result approaches the true value from
    below. The function is evaluated once, so dropout inside it is one mask. J v is the derivative of J^T u by u along
    v, which works where forward-mode derivatives don't exist (fused attention runs as its plain formula for it).

    iterations: each costs about two vjps. generator: of the start vectors, on the device of x; the main stream without.

    Raises UnsupportedModelError when a part of the function can't be differentiated twice.
    """
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        x = x.detach().requires_grad_()
        y = function(x)
        if not y.requires_grad:  # a constant
            return 0.0
        u = torch.randn(y.shape, dtype=y.dtype, device=y.device, generator=generator).requires_grad_()
        (pulled,) = torch.autograd.grad(y, x, u, create_graph=True, materialize_grads=True)
    v = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    sigma = x.new_zeros(x.shape[0])
    for _ in range(iterations):
        v = v / _row_norms(v).clamp_min(torch.finfo(v.dtype).tiny).view(-1, *[1] * (v.ndim - 1))
        pushed = _derivative(pulled, u, v)
        sigma = torch.maximum(sigma, _row_norms(pushed))
        (v,) = torch.autograd.grad(y, x, pushed, retain_graph=True, materialize_grads=True)
    return float(sigma.max())


def _derivative(pulled: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """J v, from J^T u and its graph."""
    cause: RuntimeError | None = None
    if pulled.requires_grad:
        try:
            (pushed,) = torch.autograd.grad(pulled, u, v, retain_graph=True, allow_unused=True)
            if pushed is not None:
                return pushed
        except RuntimeError as error:  # "derivative for aten::... is not implemented"
            if "derivative" not in str(error):
                raise
            cause = error
    raise UnsupportedModelError(
        "the Lipschitz estimate needs second derivatives, which a part of the layer doesn't have; load the model with "
        "attn_implementation='sdpa' or 'eager'"
    ) from cause


def increment_of(call: RecordedCall) -> Callable[[Tensor], Tensor]:
    """x -> S(x) - x for one recorded layer call: what `lipschitz` is estimated of."""
    return lambda x: call.step(x, call.args, call.kwargs, compiled=False) - x


def with_sides(entry: Entry, sides: Sequence[Tensor]) -> list[RecordedCall]:
    """The recorded calls of an entry, with `sides` instead of what stands at their places."""
    given = {place: side for places, side in zip(entry.sides, sides, strict=True) for place in places}
    made = []
    for layer, call in enumerate(entry.calls):
        leaves, tree = entry.arguments(layer)
        args, kwargs = tree_unflatten([given.get((layer, j), leaf) for j, leaf in enumerate(leaves)], tree)
        recorded: Any = call
        made.append(dataclasses.replace(recorded, args=args, kwargs=kwargs))
    return made


class LayerReader:
    """A solver that runs a stack layer by layer, exactly, and reads every layer on the way.

    readings: of the last forward.
    """

    def __init__(self, stack: LayerStack, iterations: int = 10) -> None:
        self.stack, self.iterations = stack, iterations
        self.readings: list[LayerReading] = []

    def __call__(self, calls: Sequence[RecordedCall], x: Tensor) -> Tensor:
        training = any(call.layer.training for call in calls)
        seed = int(torch.randint(2**62, (), dtype=torch.int64)) if training else None
        layers = Layers(Entry(x, calls), Common(seed), 0, 0)
        generator = torch.Generator(x.device).manual_seed(0)
        self.readings = []
        with torch.no_grad(), kept_streams(x.device):
            for n, call in enumerate(calls):
                y = layers.forward((n,), x)
                constant = lipschitz(increment_of(call), x, iterations=self.iterations, generator=generator)
                self.readings.append(self._reading(n, x, y, constant))
                x = y
        return x

    def _reading(self, index: int, x: Tensor, y: Tensor, constant: float) -> LayerReading:
        tokens = y.float().norm(dim=-1).flatten()
        before = x.float().norm()
        return LayerReading(
            stack=self.stack.path,
            index=index,
            step_size=self.stack.step_sizes[index],
            increment=float((y - x).float().norm() / before),
            lipschitz=constant,
            growth=float(y.float().norm() / before),
            outlier=float(tokens.max() / tokens.median()),
            adjoint=math.nan,
        )


class AdjointReader:
    """A solver that runs a stack layer by layer in autograd's sight and keeps its states, whose gradients then are the
    adjoints. Each layer is evaluated again in the backward, so that no more is held than the states."""

    def __init__(self) -> None:
        self.states: list[Tensor] = []

    def __call__(self, calls: Sequence[RecordedCall], x: Tensor) -> Tensor:
        x = x if x.requires_grad else x.detach().requires_grad_()
        self.states = [x]
        for call in calls:
            x = checkpoint(call.step, x, call.args, call.kwargs, use_reentrant=False)
            self.states.append(x)
        return x


def adjoint_growths(readers: Sequence[AdjointReader], loss: Tensor) -> list[list[float]]:
    """Of each layer of each reader's stack, ||dloss/dx|| / ||dloss/dS(x)||; nan where the loss doesn't depend on it."""
    states = [state for reader in readers for state in reader.states]
    grads = torch.autograd.grad(loss, states, allow_unused=True)
    norms = iter([0.0 if g is None else float(g.float().norm()) for g in grads])
    found = []
    for reader in readers:
        own = [next(norms) for _ in reader.states]
        found.append([a / b if b else math.nan for a, b in pairwise(own)])
    return found


def _row_norms(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)
