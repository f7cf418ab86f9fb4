"""Lipschitz estimates of the layers of a parallelized model, each on the rank that holds it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_layerpar.diagnosis.layers import increment_of, lipschitz
from hf_layerpar.ode.stack import RecordedCall
from hf_layerpar.run.engine import StackEngine
from hf_layerpar.run.program import Program
from hf_layerpar.sharding import LayerParallel


def lipschitz_of_layers(handle: LayerParallel, forward: Callable[[], object], iterations: int = 3) -> list[float]:
    """The estimate (`lipschitz` of x -> S(x) - x) of every layer of every stack, in order, at the exact states of one
    forward; alike on all lp ranks. Collective over them.

    forward: runs the model once; what it returns is dropped. The caller's random stream doesn't move.
    """
    device = handle.device
    readers = [(stack, stack.solver, _Reader(handle.engine(stack), iterations)) for stack in handle.stacks]
    with torch.random.fork_rng([] if device.type == "cpu" else [device]), torch.no_grad():
        for stack, _, reader in readers:
            stack.solver = reader
        try:
            forward()
        finally:
            for stack, engine, _ in readers:
                stack.solver = engine
    found = torch.tensor([value for _, _, reader in readers for value in reader.constants], device=device)
    handle.all_reduce(found)
    return found.tolist()


class _Reader:
    """A solver that runs a stack layer by layer over its owners, exactly. constants: 0 for layers of other ranks."""

    def __init__(self, engine: StackEngine, iterations: int) -> None:
        self.engine, self.iterations = engine, iterations
        self.constants: list[float] = []

    def __call__(self, calls: Sequence[RecordedCall], x: Tensor) -> Tensor:
        communicator, generator = self.engine.communicator, torch.Generator(x.device)
        seed = 0 if any(call.layer.training for call in calls) else None
        program = Program(calls, x, micro_batches=1, seed=seed, recompute=False)
        with program.running(keep_graphs=False):
            for n, (call, owner) in enumerate(zip(calls, self.engine.owner, strict=True)):
                constant, y = 0.0, torch.empty_like(x, memory_format=torch.contiguous_format)
                if owner == communicator.rank:
                    y = program.forward_step((n,), 0, x, False).contiguous()
                    generator.manual_seed(n)  # the same start vectors whichever rank holds the layer
                    constant = lipschitz(increment_of(call), x, iterations=self.iterations, generator=generator)
                communicator.broadcast(y, owner)
                self.constants.append(constant)
                x = y
        return x
