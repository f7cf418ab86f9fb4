"""The dp x lp x tp grid of processes: who shares a batch, who shares a layer. Pure torch.distributed.

Ranks are laid out tp fastest, then lp: world rank = (dp_rank * lp_size + lp_rank) * tp_size + tp_rank, so that those
which talk most are neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from hf_layerpar.errors import ConfigurationError
from hf_layerpar.run.transport import GroupTransport, group_of

AXES = ("dp", "lp", "tp")
"""Names of the axes in `Mesh.devices`."""


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """One process's place on the dp, lp and tp axes. The groups are None in a run of one process.

    dp_group: the processes that hold the same tensors and see other batches (gradients are averaged over it).
    lp_group: the processes that see the same batch and hold other layers.
    tp_group: the processes that see the same batch and hold other parts of the same layers.
    batch_group: all processes that see the same batch.
    devices: the axes as torch's own mesh, named "dp", "lp" and "tp".
    """

    dp_size: int = 1
    lp_size: int = 1
    tp_size: int = 1
    dp_rank: int = 0
    lp_rank: int = 0
    tp_rank: int = 0
    dp_group: dist.ProcessGroup | None = None
    lp_group: dist.ProcessGroup | None = None
    tp_group: dist.ProcessGroup | None = None
    batch_group: dist.ProcessGroup | None = None
    devices: DeviceMesh | None = None

    @property
    def world_size(self) -> int:
        return self.dp_size * self.lp_size * self.tp_size

    @property
    def batch_size(self) -> int:
        """The number of processes that see the same batch."""
        return self.lp_size * self.tp_size


def check_lp_size(world_size: int, lp_size: int, tp_size: int = 1) -> None:
    """Raises ConfigurationError where lp_size * tp_size does not divide the world; alike on all ranks, without talking
    to any."""
    for name, size in (("lp_size", lp_size), ("tp_size", tp_size)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigurationError(f"{name}={size!r} must be an integer of at least 1")
    together, beside = lp_size * tp_size, "" if tp_size == 1 else f" times tp_size={tp_size}"
    if world_size % together:
        fitting = [n for n in range(1, world_size // tp_size + 1) if world_size % (n * tp_size) == 0]
        below = world_size // together * together
        starts = f"{below} or {below + together}" if below else f"{together}"
        raise ConfigurationError(
            f"{world_size} processes can't be split into groups of lp_size={lp_size}{beside}; "
            f"use {f'lp_size in {fitting} or ' if fitting else ''}start {starts} processes"
        )


def build_mesh(lp_size: int, tp_size: int = 1, device_type: str = "cpu") -> Mesh:
    """The mesh over the default process group (or one process without one). Collective. Its groups have the default
    group's backends and timeout; one of all processes is that group itself.

    Raises ConfigurationError where lp_size * tp_size does not divide the number of processes, RankMismatchError on all
    of them where they were given several.
    """
    everyone = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    world = 1 if everyone is None else dist.get_world_size()
    if everyone is not None and world > 1:
        sizes = {"lp_size": lp_size, "tp_size": tp_size}
        GroupTransport(everyone, "processes").agree(sizes, remedy="give all processes the same lp_size and tp_size")
    check_lp_size(world, lp_size, tp_size)
    if everyone is None or world == 1:
        return Mesh()
    ranks = torch.arange(world).view(-1, lp_size, tp_size)
    dp_rank, lp_rank, tp_rank = ((ranks == dist.get_rank()).nonzero()[0]).tolist()
    lines = (ranks[:, lp_rank, tp_rank], ranks[dp_rank, :, tp_rank], ranks[dp_rank, lp_rank], ranks[dp_rank].flatten())
    # all processes make them in this order
    dp_group, lp_group, tp_group, batch_group = (
        everyone if len(line) == world else group_of(line.tolist(), "mesh") for line in lines
    )
    return Mesh(
        dp_size=len(ranks),
        lp_size=lp_size,
        tp_size=tp_size,
        dp_rank=dp_rank,
        lp_rank=lp_rank,
        tp_rank=tp_rank,
        dp_group=dp_group,
        lp_group=lp_group,
        tp_group=tp_group,
        batch_group=batch_group,
        devices=DeviceMesh.from_group([dp_group, lp_group, tp_group], device_type, ranks, mesh_dim_names=AXES),
    )
