"""What the trainer refuses, each with its reason and remedy, before any process waits for another."""

from __future__ import annotations

import os

from torch import nn
from transformers.utils.generic import strtobool

from hf_layerpar.errors import ConfigurationError
from hf_layerpar.training.arguments import LayerParallelTrainingArguments

_WHOLE_MODEL_OPTIMIZERS = ("galore", "apollo", "lomo", "adalomo")


def refuse_unsupported(args: LayerParallelTrainingArguments, model: nn.Module | None) -> None:
    """Raises ConfigurationError for what can't be trained layer-parallel, without talking to other ranks."""
    many = args.world_size > 1
    refused = {
        "DeepSpeed": (
            args.deepspeed_plugin is not None,
            "layers are sharded by lp_size already; start without --deepspeed (in accelerate's config too)",
        ),
        "FSDP": (
            bool(args.fsdp) or strtobool(os.environ.get("ACCELERATE_USE_FSDP", "false")) == 1,
            "layers are sharded by lp_size already; start without --fsdp (in accelerate's config too)",
        ),
        "a parallelism_config (tensor, context or sequence parallelism)": (
            args.parallelism_config is not None or (getattr(model, "tp_size", None) or 1) > 1,
            "leave it out and choose lp_size; the remaining processes are data parallel",
        ),
        f"DataParallel over {args.n_gpu} GPUs in one process": (
            args.n_gpu > 1,
            f"start one process a GPU: accelerate launch --num_processes {args.n_gpu}, or set CUDA_VISIBLE_DEVICES",
        ),
        "a model spread by device_map": (
            len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1,
            "load it without device_map; lp_size spreads the layers",
        ),
        f"optim={args.optim}": (
            str(getattr(args.optim, "value", args.optim)).startswith(_WHOLE_MODEL_OPTIMIZERS),
            "it needs the whole model on every process; use adamw_torch, adafactor or another per-parameter optimizer",
        ),
        "torch_compile": (
            args.torch_compile,
            "the layers are solved by an autograd node that can't be traced as one graph; leave it out",
        ),
        "auto_find_batch_size": (
            args.auto_find_batch_size,
            "processes could not agree on a size after one runs out of memory; set per_device_train_batch_size",
        ),
        "enable_jit_checkpoint": (
            args.enable_jit_checkpoint,
            "it saves on a signal that reaches the processes at different steps; use save_steps (writing is atomic)",
        ),
        f"{args.mixed_precision} (of the arguments, or of accelerate's config)": (
            args.mixed_precision in ("fp16", "fp8"),
            "fp16's loss scaler would skip steps on one lp rank and not on another, and fp8 replaces the layers; use "
            "bf16=True",
        ),
        f"predict_with_generate with a {type(model).__name__}": (
            args.predict_with_generate and model is not None and not hasattr(model, "generate"),
            "it has no generate; use a model with a language-modelling head, or predict_with_generate=False",
        ),
        "save_on_each_node": (
            args.save_on_each_node and args.lp_size > 1,
            "only lp rank 0 has the whole model to write; save to a directory that all nodes share",
        ),
        "train_sampling_strategy='batch_rebalance'": (
            args.train_sampling_strategy == "batch_rebalance" and args.lp_size > 1,
            "it counts every process as a data-parallel one; use 'group_by_length'",
        ),
        "dispatch_batches=True": (
            bool(getattr(args.accelerator_config, "dispatch_batches", None)) and many,
            "each dp rank must read its own batches; leave dispatch_batches out",
        ),
    }
    for name, (asked_for, remedy) in refused.items():
        if asked_for:
            raise ConfigurationError(f"{name} is not supported with layer-parallel training: {remedy}")
