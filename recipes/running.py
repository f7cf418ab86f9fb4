"""The course that every recipe takes: compare gradients, train, evaluate, save, and write result.json.

result.json of every recipe holds
- data: what the model card calls it
- settings: {"recipe", "ode", "layer_parallel", "training"}
- rows: {split: number of rows}
- metrics: {split: {"loss", and the task's metrics}} after training
- evaluation: [{"step", "loss", and the task's metrics}] on the validation split, while training and after it
- gradient_agreement: {"before" and "after": [{"cosine", "norm_ratio", ...} a batch]} for MGRIT
- steps: the logs of training steps, checks: those of the controller
- seconds: {"training", "all"}, ranks: a record each, versions
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback

from hf_layerpar.agreement import gradient_agreement
from hf_layerpar.hub.card import metrics_of
from hf_layerpar.ode.convert import ode_view
from hf_layerpar.sharding import layer_parallel
from hf_layerpar.training.arguments import LayerParallelTrainingArguments
from hf_layerpar.training.pushing import arguments_in_force
from hf_layerpar.training.trainer import LayerParallelTrainer
from recipes.results import print_table, versions, write_json

TRAINING_SETTINGS = (
    *("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "seed"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "gradient_checkpointing"),
)
"""The training arguments that result.json records, beside the precision."""


class ProgressLine(TrainerCallback):
    """Short lines on the main process: where training starts, every `logging_steps` steps (20 where every step is
    logged), every evaluation, every setting that a controller goes to, and how it ended."""

    def __init__(self) -> None:
        self.start, self.first, self.read = time.monotonic(), 0, 0

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.start, self.first = time.monotonic(), state.global_step
        if state.is_world_process_zero:
            on = f"{args.world_size} process{'es' if args.world_size > 1 else ''}"
            print(f"training from step {state.global_step} to {state.max_steps} on {on}", flush=True)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if not state.is_world_process_zero:
            return
        for entry in state.log_history[self.read :]:  # a check's texts come beside its numbers once these are logged
            if "lp_check_reason" in entry:
                print(f"step {entry['step']}  now {entry['lp_check_name']}: {entry['lp_check_reason']}", flush=True)
        self.read = len(state.log_history)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if not logs or not state.is_world_process_zero:
            return
        step = f"step {state.global_step}/{state.max_steps}"
        every = 20 if args.logging_steps <= 1 else 1  # of the logs, which come every logging_steps
        if "loss" in logs and state.global_step % every == 0:
            pace = (time.monotonic() - self.start) / max(1, state.global_step - self.first)
            print(f"{step}  loss {logs['loss']:.4f}  {pace:.2f} s a step", flush=True)
        if "eval_loss" in logs:
            print(f"{step}  validation loss {logs['eval_loss']:.4f}", flush=True)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            checks = [entry for entry in state.log_history if "lp_check_name" in entry]
            last = f"; the controller's last setting is {checks[-1]['lp_check_name']}" if checks else ""
            seconds = time.monotonic() - self.start
            print(f"trained to step {state.global_step} in {seconds:.1f} s{last}", flush=True)


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
        "training": arguments_in_force(args, TRAINING_SETTINGS),
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


def evaluate(trainer: Trainer, name: str, rows: Any) -> dict[str, float]:
    """The metrics of a split. Those of "validation" are called "eval_..." in the logs, as those while training, and are
    taken from there where training ended with them."""
    if name != "validation":
        return metrics_of(trainer.evaluate(rows, metric_key_prefix=name), name)
    state = trainer.state
    last = next((entry for entry in reversed(state.log_history) if "eval_loss" in entry), {})
    if last.get("step") != state.global_step or trainer.args.load_best_model_at_end:
        last = trainer.evaluate(rows)
    return metrics_of(last, "eval")


def log_metrics(trainer: Trainer, metrics: Mapping[str, Mapping[str, float]]) -> None:
    """Puts what the logs lack of a split's metrics beside its last evaluation there: a pushed card has its figures from
    the logs."""
    for split, values in metrics.items():
        prefix = "eval" if split == "validation" else split
        entry = next(e for e in reversed(trainer.state.log_history) if f"{prefix}_loss" in e)
        entry |= {f"{prefix}_{name}": value for name, value in values.items()}


def push(trainer: Trainer, folder: Path, data: str) -> None:
    """The model, from `folder`, and its card to the Hub."""
    before, trainer.args.output_dir = trainer.args.output_dir, str(folder)
    try:
        trainer.push_to_hub(dataset=data)
    finally:
        trainer.args.output_dir = before


def run_recipe(
    trainer: Trainer,
    recipe: Any,
    began: float,
    held_out: Mapping[str, Any],
    data: str,
    also: Callable[[dict[str, Any]], Mapping[str, Any]] = lambda result: {},
) -> dict[str, Any]:
    """Train, evaluate, save; returns what <output_dir>/result.json holds, on every rank.

    Args:
        trainer: with the training rows; transformers' own Trainer trains the stock model.
        recipe: the recipe's dataclass, with `agreement_batches`.
        began: `time.monotonic()` of the recipe's start.
        held_out: split -> its rows, evaluated after training.
        data: what the model card calls them (`recipes.offline.data_name`).
        also: given the result, more entries for it; called on every rank.

    The model is saved to <output_dir>/model and the logs to <output_dir>/trainer_state.json, which `hf-layerpar report`
    reads. With `--push_to_hub true --hub_model_id NAME` the model goes to the Hub too, last: a push that fails costs
    nothing else. The process group is destroyed at the end.
    """
    args, model, rows = trainer.args, trainer.model, trainer.train_dataset
    assert model is not None
    stock = not isinstance(trainer, LayerParallelTrainer)
    trainer.remove_callback(PrinterCallback)  # ProgressLine says enough
    trainer.add_callback(ProgressLine())
    measure = not stock and args.strategy == "mgrit" and recipe.agreement_batches > 0  # type: ignore[attr-defined]
    cosines = {}
    if measure:
        cosines["before"] = agreement(trainer, model, rows, recipe.agreement_batches)  # type: ignore[arg-type]
    train_begin = time.monotonic()
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    train_end = time.monotonic()
    if measure:
        cosines["after"] = agreement(trainer, model, rows, recipe.agreement_batches)  # type: ignore[arg-type]
    metrics = {name: evaluate(trainer, name, split) for name, split in held_out.items()}
    folder = Path(str(args.output_dir))
    trainer.save_model(str(folder / "model"), _internal_call=True)  # with push_to_hub it would be pushed here already

    log = trainer.state.log_history
    result = {
        "data": data,
        "settings": settings_of(recipe, args, model, stock),  # type: ignore[arg-type]
        "rows": {name: size(split) for name, split in {"train": rows, **held_out}.items()},
        "metrics": metrics,
        "evaluation": [{"step": e["step"]} | metrics_of(e, "eval") for e in log if "eval_loss" in e],
        "gradient_agreement": cosines,
        "steps": [entry for entry in log if "loss" in entry],
        "checks": [entry for entry in log if "lp_check_setting" in entry],
        "seconds": {"training": train_end - train_begin, "all": time.monotonic() - began},
        "ranks": rank_settings(args, model, stock),  # type: ignore[arg-type]
        "versions": versions(),
    }
    result |= also(result)
    log_metrics(trainer, metrics)
    trainer.save_state()
    if trainer.is_world_process_zero():
        write_json(folder / "result.json", result)
        report(result)
    if args.push_to_hub:
        push(trainer, folder / "model", data)
    if dist.is_initialized():
        dist.destroy_process_group()
    return result


def size(rows: Any) -> int | None:
    """How many there are; None for a stream."""
    return len(rows) if hasattr(rows, "__len__") else None


def report(result: dict[str, Any]) -> None:
    """The result as a table on the terminal."""
    settings = result["settings"]
    rows: list[tuple[str, Any]] = [("data", result["data"]), ("processes", len(result["ranks"]))]
    rows += [("strategy", (settings["layer_parallel"] or {"strategy": "stock"})["strategy"])]
    if settings["ode"]:
        rows += [("step size", settings["ode"]["step_size"])]
    rows += [("training seconds", f"{result['seconds']['training']:.1f}")]
    for split, values in result["metrics"].items():
        rows += [(f"{split} {name}", f"{value:.4f}") for name, value in values.items()]
    for when, found in result["gradient_agreement"].items():
        rows += [(f"gradient cosine {when}", ", ".join(f"{v['cosine']:.4f}" for v in found))]
    print_table(rows)
