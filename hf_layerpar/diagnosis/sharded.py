"""Lipschitz estimates of the layers of a parallelized model, each on the rank that holds it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import accumulate

import torch
from torch import Tensor

from hf_layerpar.diagnosis.layers import increment_of, lipschitz, with_sides
from hf_layerpar.ode.phases import Reached
from hf_layerpar.ode.rehearsal import Player, rehearse
from hf_layerpar.ode.stack import RecordedCall
from hf_layerpar.run.layers import Common, Entry, Layers, kept_streams
from hf_layerpar.sharding import LayerParallel


def lipschitz_of_layers(handle: LayerParallel, forward: Callable[[], object], iterations: int = 3) -> list[float]:
    """The estimate (`lipschitz` of x -> S(x) - x) of every layer of every stack, in order, at the exact states of one
    forward; alike on all lp ranks. Collective over them.

    forward: runs the model once; it is called twice, the second time up to the last layers. What it returns is dropped.
    The caller's random stream doesn't move.
    """
    stepper, stacks, device = handle.stepper, handle.stacks, handle.device
    rank, broadcast = stepper.transport.rank, stepper.transport.broadcast
    offsets = list(accumulate((len(stack.layers) for stack in stacks), initial=0))
    found = torch.zeros(offsets[-1], device=device)
    with kept_streams(device), torch.no_grad():
        rehearsed = rehearse(lambda _: forward(), None, stacks, handle.ends, loss=False, trains=False)
        anatomy = stepper.anatomy(rehearsed)

        def reached(number: int, index: int, calls: Sequence[RecordedCall], x: Tensor) -> Tensor:
            """Runs a stack layer by layer over its owners. The rank of the phase before says where from: on the others
            what depends on parameters is made of stand-ins."""
            entry = Entry(x, calls, rehearsed.sides[number])
            real = [t.detach().contiguous() for t in (x, *entry.sources)]
            for tensor in real:
                broadcast(tensor, anatomy.ranks[number])
            x, *sides = real
            calls = with_sides(entry, sides)
            layers = Layers(Entry(x, calls), Common(0 if any(call.layer.training for call in calls) else None), 0, 0)
            generator = torch.Generator(device)
            for n, owner in enumerate(anatomy.passes[number].owner):
                y = torch.empty_like(x, memory_format=torch.contiguous_format)
                if owner == rank:
                    y = layers.forward((n,), x).contiguous()
                    generator.manual_seed(n)  # the same start vectors whichever rank holds the layer
                    found[offsets[index] + n] = lipschitz(
                        increment_of(calls[n]), x, iterations=iterations, generator=generator
                    )
                broadcast(y, owner)
                x = y
            if number + 1 == len(anatomy.passes):
                raise Reached(calls, x, None)
            return x

        with suppress(Reached), handle.ends.of_phase(len(anatomy.passes)), Player(stacks, reached).playing():
            forward()
    handle.all_reduce(found)
    return found.tolist()
