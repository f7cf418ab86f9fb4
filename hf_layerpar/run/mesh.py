"""The dp x lp grid of processes: who shares a batch, who shares a layer. Pure torch.distributed.

Ranks are laid out lp fastest: world rank = dp_rank * lp_size + lp_rank, so that the lp ranks of one dp rank, which talk
most, are neighbours.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from hf_layerpar.errors import ConfigurationError
from hf_layerpar.run.transport import GroupTransport, group_of


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """One process's place on the dp and lp axes. The groups are None in a run of one process.

    dp_group: the processes that hold the same layers and see other batches (gradients are averaged over it).
    lp_group: the processes that see the same batch and hold other layers.
    """

    dp_size: int = 1
    lp_size: int = 1
    dp_rank: int = 0
    lp_rank: int = 0
    dp_group: dist.ProcessGroup | None = None
    lp_group: dist.ProcessGroup | None = None

    @property
    def world_size(self) -> int:
        return self.dp_size * self.lp_size


def store_of_restart(timeout: timedelta = dist.default_pg_timeout) -> dict[str, Any]:
    """Arguments for `init_process_group` of a process that torchrun has restarted; empty for others.

    All attempts find one another through the agent's store. Under the same keys a process would find addresses of ones
    that died in the attempt before.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    rank, size, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    store = dist.TCPStore(os.environ["MASTER_ADDR"], port, size, is_master=False, timeout=timeout)
    return {"store": dist.PrefixStore(f"restart {restarts}", store), "rank": rank, "world_size": size}


def check_lp_size(world_size: int, lp_size: int) -> None:
    """Raises ConfigurationError where lp_size does not divide the world; alike on all ranks, without talking to any."""
    if isinstance(lp_size, bool) or not isinstance(lp_size, int) or lp_size < 1:
        raise ConfigurationError(f"lp_size={lp_size!r} must be an integer of at least 1")
    if world_size % lp_size:
        fitting = [n for n in range(1, world_size + 1) if world_size % n == 0]
        below = world_size // lp_size * lp_size
        starts = f"{below} or {below + lp_size}" if below else f"{lp_size}"
        raise ConfigurationError(
            f"{world_size} processes can't be split into groups of lp_size={lp_size}; "
            f"use lp_size in {fitting} or start {starts} processes"
        )


def build_mesh(lp_size: int) -> Mesh:
    """The mesh over the default process group (or one process without one). Collective. Its groups have the default
    group's backends and timeout; one of all processes is that group itself.

    Raises ConfigurationError where lp_size does not divide the number of processes, RankMismatchError on all of them
    where they were given several.
    """
    everyone = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    world = 1 if everyone is None else dist.get_world_size()
    if everyone is not None and world > 1:
        GroupTransport(everyone, "processes").agree({"lp_size": lp_size}, remedy="give all processes the same lp_size")
    check_lp_size(world, lp_size)
    if everyone is None or world == 1:
        return Mesh()
    dp_rank, lp_rank = divmod(dist.get_rank(), lp_size)
    of_lp = range(dp_rank * lp_size, (dp_rank + 1) * lp_size)
    of_dp = range(lp_rank, world, lp_size)
    # all processes make them in this order
    lp_group, dp_group = (everyone if len(r) == world else group_of(r, "mesh") for r in (of_lp, of_dp))
    return Mesh(
        dp_size=world // lp_size,
        lp_size=lp_size,
        dp_rank=dp_rank,
        lp_rank=lp_rank,
        dp_group=dp_group,
        lp_group=lp_group,
    )
