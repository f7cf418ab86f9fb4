"""How a process comes to the group that it works in: one that it is given, or all processes that a launcher started."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from hf_layerpar.config import shown
from hf_layerpar.errors import ConfigurationError
from hf_layerpar.run.transport import GroupTransport, LocalTransport, Transport


def transport_of(group: dist.ProcessGroup | None, device: torch.device) -> Transport:
    """How the lp ranks of a group speak, as `parallelize` takes it. device: of the model.

    Raises ConfigurationError for what is no group.
    """
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise ConfigurationError(
            f"group={shown(group)} must be a process group of torch.distributed that this process is in, or None"
        )
    if group is None:
        group = _all_processes(device)
    return LocalTransport() if group is None else GroupTransport(group)


def _all_processes(device: torch.device) -> dist.ProcessGroup | None:
    """The default process group; None where this is the only process."""
    world = os.environ.get("WORLD_SIZE", "1")
    if not dist.is_initialized() and world.isdigit() and int(world) > 1:
        if lacks := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
            raise ConfigurationError(
                f"WORLD_SIZE={world} says that this is one of {world} processes, but no process group is initialised, "
                f"and without {', '.join(lacks)} none can be: call torch.distributed.init_process_group() before "
                "parallelize, start with accelerate launch or torchrun, or unset WORLD_SIZE for one process"
            )
        dist.init_process_group("gloo" if device.type == "cpu" else None, **store_of_restart())
    return dist.group.WORLD if dist.is_initialized() else None


def store_of_restart(timeout: timedelta = dist.default_pg_timeout) -> dict[str, Any]:
    """Arguments for `init_process_group` of a process that torchrun has restarted; empty for others.

    All attempts find one another through the agent's store. Under the same keys a process would find addresses of ones
    that died in the attempt before.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    rank, size, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    store = TCPStore(os.environ["MASTER_ADDR"], port, size, is_master=False, timeout=timeout)
    return {"store": PrefixStore(f"restart {restarts}", store), "rank": rank, "world_size": size}
