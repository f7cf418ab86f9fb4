"""Gradients of parameters outside the layers that several phases or ranks have a part in, summed in one order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_layerpar.ode.ends import EndParameter, Ends
from hf_layerpar.run.transport import Transport

Parts = dict[tuple[int, int], Tensor]
"""(place of a parameter among the shared ones, part) -> gradient, of this rank."""


def sum_over_ranks(ends: Ends, transport: Transport, device: torch.device) -> None:
    """After the backward of a call (`hf_layerpar.calling`): gradients that several ranks have a part in. What came
    on one rank is in one sum already, whichever phases it came in. Collective."""
    shared, rank, size = ends.shared, transport.rank, transport.size
    parts: Parts = {}
    for i, p in enumerate(shared):
        for place in list(p.aliases):
            grad = ends.take_gradient(p, place)
            if grad is not None:
                parts[i, rank] = grad
    present = torch.zeros(len(shared), size, dtype=torch.float64)
    for i, _ in parts:
        present[i, rank] = 1.0
    present = present.to(device)
    transport.all_reduce(present)
    sum_parts(shared, parts, present.cpu() > 0, range(size), transport, device)


def sum_parts(
    shared: Sequence[EndParameter],
    parts: Parts,
    present: Tensor,
    homes: Sequence[int],
    transport: Transport,
    device: torch.device,
    *,
    spread: bool = False,
) -> None:
    """Gradients that come in several parts (phases, or ranks): summed on the first holder, the last part first, as
    in a serial backward, so that no sum depends on which ranks run the phases; then sent to the other holders.

    parts: handed over, and let go as they are summed. present: `[shared, parts]`, which there are. homes: the rank of
    each part. spread: the last part is on all ranks; these sum by an all-reduce.
    """
    rank, size = transport.rank, transport.size
    last_first = range(len(homes))[::-1]
    by_all_reduce = [spread and len(p.holders) == size for p in shared]
    arriving: list[Any] = []
    outgoing: list[tuple[Any, Tensor]] = []
    for i, p in enumerate(shared):
        first = p.holders[0]
        for k in last_first:
            if not present[i, k] or homes[k] == first or by_all_reduce[i]:
                continue
            if rank == homes[k]:
                sent = parts.pop((i, k)).contiguous()
                outgoing.append((transport.send(sent, first), sent))
            elif rank == first:
                parts[i, k] = torch.empty(p.shape, dtype=p.dtype, device=device)
                arriving.append(transport.receive(parts[i, k], homes[k]))
    while arriving:
        transport.wait(arriving.pop(0))  # a handle holds on to its tensor
    for i, p in enumerate(shared):
        if not present[i].any() or rank not in p.holders:
            continue
        assert p.value is not None
        own = (parts.pop((i, k)) for k in last_first if (i, k) in parts)
        if by_all_reduce[i]:
            total = torch.zeros(p.shape, dtype=p.dtype, device=device)
            for grad in own:
                total += grad
            transport.all_reduce(total)
        elif rank == p.holders[0]:
            total = next(own)
            for grad in own:
                total += grad
            sent = total.contiguous()
            outgoing += [(transport.send(sent, other), sent) for other in p.holders[1:]]
        else:
            total = torch.empty(p.shape, dtype=p.dtype, device=device)
            transport.wait(transport.receive(total, p.holders[0]))
        if p.value.grad is None:
            p.value.grad = total
        else:
            p.value.grad += total
    for handle, _ in outgoing:
        transport.wait(handle)
