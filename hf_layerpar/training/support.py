"""What the trainer refuses, each with its reason and remedy, before any process waits for another."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_layerpar.compat.transformers import was_split_while_loading
from hf_layerpar.errors import ConfigurationError
from hf_layerpar.training.arguments import LayerParallelTrainingArguments

_WHOLE_MODEL_OPTIMIZERS = ("galore", "apollo", "lomo", "adalomo")


def refuse_trainer(kind: type) -> None:
    """Raises ConfigurationError for a trainer class whose other bases compute losses in a way that can't be spread."""
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] == "trl":
            raise ConfigurationError(
                f"{kind.__name__} derives from TRL's {base.__name__}, whose loss runs a head of its own around the "
                "backbone, which ranks without the head can't, and counts what it logs in every call; use "
                "LayerParallelTrainer by itself with tokenised data (labels of -100 where nothing is learned)"
            )


def refuse_unsupported(args: LayerParallelTrainingArguments, model: nn.Module | None) -> None:
    """Raises ConfigurationError for what can't be trained layer-parallel, without talking to other ranks."""
    many = args.world_size > 1
    refused = {
        "DeepSpeed": (
            args.deepspeed_plugin is not None,
            "layers are sharded by lp_size already; start without --deepspeed (in accelerate's config too)",
        ),
        "a model that from_pretrained has split over processes": (
            was_split_while_loading(model),
            "load it without distributed_config and tp_plan; lp_size, tp_size and fsdp of the arguments split it",
        ),
        f"DataParallel over {args.n_gpu} GPUs in one process": (
            args.n_gpu > 1,
            f"start one process a GPU: accelerate launch --num_processes {args.n_gpu}, or set CUDA_VISIBLE_DEVICES",
        ),
        f"a model in a {type(model).__name__}": (
            isinstance(model, DistributedDataParallel | nn.DataParallel),
            "gradients would be averaged twice; give the model inside",
        ),
        "a model spread by device_map": (
            len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1,
            "load it without device_map; lp_size spreads the layers",
        ),
        f"optim={args.optim}": (
            str(getattr(args.optim, "value", args.optim)).startswith(_WHOLE_MODEL_OPTIMIZERS),
            "it needs the whole model on every process; use adamw_torch, adafactor or another per-parameter optimizer",
        ),
        f"optim={args.optim} with fsdp or tp_size": (
            str(getattr(args.optim, "value", args.optim)).startswith("adafactor")
            and (args.shards_data or args.tp_size > 1),
            "it knows no tensors in pieces; use adamw_torch or another of torch's optimizers",
        ),
        "torch_compile with tp_size": (
            args.torch_compile and args.tp_size > 1,
            "layers that send messages are not compiled; use one of them",
        ),
        "stacked with tp_size": (
            args.stacked and args.tp_size > 1,
            "weights in parts are not stacked; use one of them",
        ),
        "cuda_graphs with tp_size": (
            args.cuda_graphs and args.tp_size > 1,
            "messages between ranks are not captured; use one of them",
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
            args.mixed_precision == "fp8",
            "it replaces the layers; use bf16=True or fp16=True",
        ),
        f"fp16 with controller={args.controller!r}": (
            args.mixed_precision == "fp16" and args.controller != "off",
            "the gradients that it looks at are not scaled, and what is small in them would be lost; use bf16=True",
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
