"""What every recipe shares: settings from YAML and options, a progress line, and the parts of result.json."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import yaml
from torch import nn
from transformers import HfArgumentParser, Trainer, TrainerCallback

from hf_layerpar.agreement import gradient_agreement
from hf_layerpar.errors import ConfigurationError
from hf_layerpar.ode.convert import ode_view
from hf_layerpar.sharding import layer_parallel
from hf_layerpar.training.arguments import LayerParallelTrainingArguments

Recipe = TypeVar("Recipe")

TRAINING_SETTINGS = (
    *("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "seed", "bf16"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "gradient_checkpointing"),
)
"""The training arguments that result.json records."""


def common_settings() -> dict[str, Any]:
    """What every recipe sets differently from the training arguments' own defaults."""
    return {
        "lp_size": int(os.environ.get("WORLD_SIZE", "1")),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),  # without it, processes on the CPU would not find each other
    }


def parse_settings(
    recipe: type[Recipe], defaults: dict[str, Any], argv: Sequence[str]
) -> tuple[Recipe, LayerParallelTrainingArguments]:
    """Settings from an optional YAML file (first) and options (after it), for a recipe's dataclass and the training.

    defaults: of either, used where neither file nor options say anything.
    Raises ConfigurationError for a setting in the file that no option is called.
    """
    parser = HfArgumentParser((recipe, LayerParallelTrainingArguments))  # type: ignore[arg-type]
    known = {action.dest for action in parser._actions}
    argv = list(argv)
    if argv and argv[0].endswith((".yaml", ".yml")):
        path = argv.pop(0)
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        unknown = sorted(set(loaded) - known)
        if unknown:
            raise ConfigurationError(f"{path} sets {unknown}, which no option is called; see --help for the options")
        defaults = defaults | loaded
    parser.set_defaults(**defaults)
    return parser.parse_args_into_dataclasses(argv, look_for_args_file=False)  # type: ignore[return-value]


class ProgressLine(TrainerCallback):
    """One short line every `every` steps and for every evaluation, on the main process."""

    def __init__(self, every: int = 20) -> None:
        self.every = every
        self.start = time.monotonic()

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.start = time.monotonic()

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if not logs or not state.is_world_process_zero:
            return
        step = f"step {state.global_step}/{state.max_steps}"
        if "loss" in logs and state.global_step % self.every == 0:
            pace = (time.monotonic() - self.start) / state.global_step
            print(f"{step}  loss {logs['loss']:.4f}  {pace:.2f} s a step", flush=True)
        if "eval_loss" in logs:
            print(f"{step}  validation loss {logs['eval_loss']:.4f}", flush=True)


def agreement(trainer: Trainer, model: nn.Module, rows: Iterable[dict], batches: int) -> list[dict[str, float]]:
    """Cosine and norm ratio of the MGRIT gradient with the exact one, for each of the first training batches."""
    size = trainer.args.per_device_train_batch_size
    first = list(islice(rows, batches * size))
    found = []
    for start in range(0, len(first), size):
        inputs = trainer._prepare_inputs(trainer.data_collator(first[start : start + size]))
        found.append(gradient_agreement(model, inputs))
    return found


def settings_of(recipe: Any, args: LayerParallelTrainingArguments, model: nn.Module, stock: bool) -> dict[str, Any]:
    """The settings that result.json records: the recipe's, the ODE's, the solver's and the training's."""
    return {
        "recipe": dataclasses.asdict(recipe),
        "ode": None if stock else ode_view(model).settings.to_dict(),
        "layer_parallel": None if stock else args.layer_parallel_config.to_dict(),
        "training": {k: v for k, v in args.to_sanitized_dict().items() if k in TRAINING_SETTINGS},
    }


def rank_settings(args: LayerParallelTrainingArguments, model: nn.Module, stock: bool) -> list[dict[str, Any]]:
    """One entry a rank: its place, its device and threads, and the layers and parameters it holds."""
    entry = {
        "rank": args.process_index,
        "device": str(args.device),
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    if not stock:
        parallel = layer_parallel(model)
        held = {n for n, _ in model.named_parameters()}
        stacks = {
            stack.path: [i for i in range(len(stack.layers)) if any(n.startswith(f"{stack.path}.{i}.") for n in held)]
            for stack in ode_view(model).stacks
        }
        entry |= {"lp_rank": parallel.lp_rank, "lp_size": parallel.lp_size, "layers": stacks}
    if args.world_size == 1:
        return [entry]
    entries: list[Any] = [None] * args.world_size
    dist.all_gather_object(entries, entry)
    return entries
