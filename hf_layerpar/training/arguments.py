"""The Trainer's arguments with the layer-parallel settings beside them."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Annotated

import torch
import torch.distributed as dist
from accelerate import PartialState
from transformers import Seq2SeqTrainingArguments

from hf_layerpar.config import (
    Count,
    Flag,
    LayerParallelConfig,
    SolverSettings,
    checked,
    help_of,
    one_of,
    optional,
    real,
    setting,
    shown,
    whole,
)
from hf_layerpar.errors import ConfigurationError
from hf_layerpar.plan.ownership import SplitName, V
from hf_layerpar.plan.step import check_config
from hf_layerpar.run.joining import store_of_restart
from hf_layerpar.run.mesh import check_lp_size
from hf_layerpar.training.controller import Policy
from hf_layerpar.training.launched import axis_sizes, check_axes, check_fsdp, fsdp_of_launcher

Bound = Annotated[float, real(lambda bound: 0 < bound < math.inf, "positive and finite; controller='off' has no bound")]

_UPLOADS = {
    "wandb": ("WANDB_LOG_MODEL", ("end", "checkpoint")),
    "dvclive": ("HF_DVCLIVE_LOG_MODEL", ("1", "on", "yes", "true")),
}
"""Trackers that save the model by a stock Trainer on the main process, and the variable and values that ask for it."""


@dataclass
class LayerParallelTrainingArguments(Seq2SeqTrainingArguments, SolverSettings):
    """`transformers.TrainingArguments` plus `lp_size`, `split` and the fields of `LayerParallelConfig`, by the same
    names; and `predict_with_generate`, `generation_max_length`, `generation_num_beams`, `generation_config` as in
    `Seq2SeqTrainingArguments`.

    They are ordinary fields, so `HfArgumentParser` reads them from the command line, from YAML and from JSON.
    `per_device_train_batch_size` counts per dp rank: the lp and tp ranks of one dp rank share its batch.

    `fsdp=True` (or `accelerate launch --use_fsdp --fsdp_version 2`) is understood as in stock: between steps every dp
    rank keeps a piece of the parameters, gradients and optimizer states of the layers that its lp rank owns, by FSDP2.
    So is accelerate's `ParallelismConfig` where it says the same as these arguments.

    Raises ConfigurationError where lp_size and tp_size do not divide the number of processes, or a setting is out of
    range or says something else than what can be done here.
    """

    coarsening: list[int] = field(  # HfArgumentParser reads lists, not one number or several
        default_factory=lambda: [SolverSettings.coarsening],  # type: ignore[list-item]
        metadata={"help": help_of(SolverSettings, "coarsening")},
        kw_only=True,  # as the settings are: the first argument is stock's, the output folder
    )
    lp_size: Count = setting(1, "Processes that share one model's layers; divides the world.")
    split: Annotated[SplitName | None, optional(one_of(SplitName))] = setting(
        None,
        "Which lp rank has which layers: interleaved (MGRIT intervals dealt out to all ranks, for aggregate; of a "
        "pipeline two blocks a rank) or v (a pipeline's two blocks, there and back); default: as the schedule wants "
        "it, else a block a rank.",
    )
    tp_size: Count = setting(1, "Processes that share each layer's matrices (transformers' tp_plan).")
    controller: Annotated[Policy, one_of(Policy)] = setting(
        "off", "Watches MGRIT during training and moves to other settings: off, paper, raise or adaptive."
    )
    check_every: Count = setting(500, "Controller: optimizer steps between checks.")
    check_gradient: Flag = setting(
        False, "Controller: checks compare with the exact gradient too (adaptive always does)."
    )
    check_layers: Flag = setting(False, "Controller: checks estimate each layer's Lipschitz constant too.")
    controller_bound: Bound = setting(0.3, "Controller: largest bias of the gradient, as a share of a step's gradient.")
    controller_ranks: Annotated[int | None, optional(whole(1, remedy=", or None for lp_size"))] = setting(
        None, "Controller: lp ranks to predict step times for; default: lp_size."
    )
    async_save: Flag = setting(False, "Writes checkpoints from copies on the host while training goes on.")

    def __post_init__(self) -> None:
        checked(self, LayerParallelTrainingArguments)
        # YAML and Python callers give one number
        self.coarsening = list(self.coarsening) if isinstance(self.coarsening, list | tuple) else [self.coarsening]
        check_config(self.layer_parallel_config, self.lp_size)  # before the process group is started
        self._check_split()
        self._check_rows()
        # a launcher's CPU setting doesn't reach stock, which then finds one process
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        timeout = timedelta(seconds=self.ddp_timeout)
        restarted = {} if dist.is_initialized() else store_of_restart(timeout)
        if self.use_cpu or restarted:  # stock gives the process group its timeout on accelerators only
            PartialState(cpu=self.use_cpu, backend=self.ddp_backend, timeout=timeout, **restarted)
        launched = fsdp_of_launcher()
        if launched is not None:
            self.fsdp, self.fsdp_config = True, launched  # type: ignore[assignment]
        super().__post_init__()
        self._find_axes()
        self._check_trackers()

    def _find_axes(self) -> None:
        asked = axis_sizes(self.parallelism_config)
        if asked["tp"] > 1:
            if self.tp_size not in (1, asked["tp"]):
                raise ConfigurationError(
                    f"tp_size={self.tp_size}, but tp_size={asked['tp']} in the parallelism_config; give one of them"
                )
            self.tp_size = asked["tp"]
        check_lp_size(self.world_size, self.lp_size, self.tp_size)
        dp_size = self.world_size // (self.lp_size * self.tp_size)
        check_axes(asked, dp_size)
        self.shards_data = bool(self.fsdp) or asked["dp_shard"] > 1
        if self.fsdp:
            check_fsdp(self.fsdp_config)  # type: ignore[arg-type]
        self.fsdp_plugin_args = None  # by which accelerate would wrap the model
        if self.shards_data and dp_size == 1:
            raise ConfigurationError(
                f"fsdp on {self.world_size} processes with lp_size={self.lp_size} and tp_size={self.tp_size}: one dp "
                "rank has nobody to share parameters with; start more processes, or leave fsdp out"
            )
        if self.shards_data and self.stacked:
            raise ConfigurationError(
                "fsdp with stacked=True: stacked weights are copies, whole on every dp rank; use one of them"
            )
        if self.shards_data and self.cuda_graphs:
            raise ConfigurationError(
                "fsdp with cuda_graphs=True: a graph reads parameters where they were, and fsdp makes them anew in "
                "every step; use one of them"
            )

    def _check_split(self) -> None:
        if self.split == V and self.strategy != "pipeline":
            raise ConfigurationError(
                f"split={self.split!r} with strategy={self.strategy!r}: it is two blocks a rank, there and back, of a "
                "pipeline; use split='interleaved', leave split out, or use strategy='pipeline'"
            )
        if self.split is not None and self.controller == "adaptive" and self.strategy != "mgrit":
            raise ConfigurationError(
                f"split={self.split!r} with controller='adaptive' and strategy={self.strategy!r}: layers would be "
                "placed for a pipeline, and the controller moves between MGRIT settings; use strategy='mgrit', whose "
                "intervals split='interleaved' deals out, or leave split out"
            )

    def _check_rows(self) -> None:
        compares = self.controller == "adaptive" or (self.controller != "off" and self.check_gradient)
        rows = self.per_device_train_batch_size
        if compares and (not isinstance(rows, int) or rows < 2):
            raise ConfigurationError(
                f"controller={self.controller!r} compares the gradient's bias with its noise, which it reads off the "
                f"batch's halves; use per_device_train_batch_size of at least 2, not {shown(rows)}"
            )

    def _check_trackers(self) -> None:
        """Refuses those that save the model on one process alone when training ends."""
        for tracker, (variable, values) in _UPLOADS.items():
            value = os.environ.get(variable, "")
            if self.lp_size * self.tp_size > 1 and tracker in (self.report_to or ()) and value.lower() in values:
                raise ConfigurationError(
                    f"{variable}={value} with lp_size={self.lp_size} and tp_size={self.tp_size}: {tracker} saves the "
                    "model on one process when training ends, which holds a part of it; unset the variable, and upload "
                    "the folder that trainer.save_model writes"
                )

    @property
    def layer_parallel_config(self) -> LayerParallelConfig:
        """The settings as `parallelize` takes them."""
        return LayerParallelConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(LayerParallelConfig)})
