"""What all processes of a run must have alike, compared on all of them before any waits for another."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import nn

from hf_layerpar.compat.torch import set_timeout
from hf_layerpar.run.transport import GroupTransport, LocalTransport, Transport, fact
from hf_layerpar.training.arguments import LayerParallelTrainingArguments

REMEDY = "give all processes the same arguments, data and model, and let no code between depend on the rank"
_SEEN_BY_ONE_PROCESS = (
    *("disable_tqdm", "log_level", "log_level_replica", "log_on_each_node", "report_to", "run_name", "project"),
    *("hub_token", "skip_memory_metrics", "debug", "logging_nan_inf_filter", "local_rank", "dataloader_num_workers"),
    *("dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_in_order"),
    "dataloader_multiprocessing_context",
)
"""Training arguments that may differ between processes."""


class Processes:
    """All processes of a run. Every method is collective, and raises RankMismatchError on all of them where they
    differ."""

    def __init__(self, args: LayerParallelTrainingArguments) -> None:
        self._transport = _transport_of(args)

    def agree(self, facts: dict[str, Any], error: Exception | None = None) -> None:
        """As `Transport.agree`."""
        self._transport.agree(facts, error, REMEDY)

    def agree_on_settings(self, args: LayerParallelTrainingArguments, **facts: Any) -> None:
        """The arguments that all must have been given alike, and further facts."""
        names = [f.name for f in dataclasses.fields(LayerParallelTrainingArguments) if f.init]
        self.agree({n: fact(getattr(args, n)) for n in names if n not in _SEEN_BY_ONE_PROCESS} | facts)

    def agree_on_optimizer(self, model: nn.Module, optimizer: Any, scheduler: Any) -> None:
        """What is set for each parameter, whichever processes have it: lp ranks may have groups of their own layers."""
        names = {id(p): name for name, p in model.named_parameters()}
        members: dict[str, Any] = {"scheduler": type(scheduler).__name__}
        for group in optimizer.param_groups:
            options = fact({k: v for k, v in group.items() if k not in ("params", "param_names")})
            members |= {f"optimizer group of {names.get(id(p), '?')}": options for p in group["params"]}
        self._transport.agree_in_common(members, REMEDY)

    def any_of(self, doing: str, flags: Sequence[bool]) -> list[bool]:
        """As `Transport.any_of`."""
        return self._transport.any_of(doing, flags)


def _transport_of(args: LayerParallelTrainingArguments) -> Transport:
    """With the timeout of the arguments, also where the process group was started before them."""
    group = dist.group.WORLD if dist.is_initialized() else None
    if group is None or dist.get_world_size() == 1:
        return LocalTransport()
    default = next(f.default for f in dataclasses.fields(args) if f.name == "ddp_timeout")
    if args.ddp_timeout != default:
        set_timeout(group, timedelta(seconds=args.ddp_timeout))
    return GroupTransport(group, "processes")
