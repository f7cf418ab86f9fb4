"""Training runs on tiny models, executed on every rank of a pool; all results are plain data."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import torch
import torch.distributed as dist
import transformers as hf
from torch.utils.data import Dataset

from hf_layerpar.training.arguments import LayerParallelTrainingArguments
from hf_layerpar.training.trainer import LayerParallelTrainer
from tests import zoo

hf.logging.set_verbosity_error()
hf.utils.logging.disable_progress_bar()


class Samples(Dataset):
    """`length` samples of a family, each made from its own index."""

    def __init__(self, family: str, length: int, first: int = 0) -> None:
        self.family, self.length, self.first = family, length, first

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        i = index + self.first
        if not 0 <= index < self.length:
            raise IndexError(index)
        if self.family in ("vit", "deit"):
            return {"pixel_values": torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(i)), "labels": i % 2}
        ids = zoo.tokens(1, 12, seed=i)[0]
        if self.family == "bert_classifier":
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": i % 2}
        labels = ids.clone()
        if self.family == "llama":
            labels[: i % 5] = -100  # another number of labels in every sample
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def build(family: str, dropout: float | None = None, layers: int = 4) -> hf.PreTrainedModel:
    if family == "bert_classifier":
        torch.manual_seed(0)
        model: hf.PreTrainedModel = hf.BertForSequenceClassification(zoo.config("bert", layers))
    else:
        model = zoo.build(family, layers)[0]
    if dropout is not None:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout
            for name, value in vars(module).items():
                if "dropout" in name and isinstance(value, float):
                    setattr(module, name, dropout)
    return model


def arguments(output_dir: str, **settings: Any) -> LayerParallelTrainingArguments:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 3,
        "learning_rate": 1e-3,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_multiprocessing_context": "fork",  # a pool's ranks would start a server to fork from
        "seed": 3,
    }
    if not settings.get("dataloader_num_workers"):
        del defaults["dataloader_multiprocessing_context"]
    return LayerParallelTrainingArguments(output_dir=output_dir, **(defaults | settings))


def trainer(output_dir: str, family: str, settings: dict[str, Any], **more: Any) -> LayerParallelTrainer:
    """A trainer on a new tiny model; `settings` are training arguments, and `dropout`, `layers` and `dtype` of it."""
    settings = dict(settings)
    dtype = settings.pop("dtype", "float32")
    model = build(family, settings.pop("dropout", None), settings.pop("layers", 4)).to(getattr(torch, dtype))
    more = {"train_dataset": Samples(family, 64)} | more
    run = LayerParallelTrainer(model, arguments(output_dir, **settings), **more)
    run.remove_callback(hf.PrinterCallback)
    return run


def wait_for_all(run: LayerParallelTrainer) -> None:
    if run.mesh.world_size > 1:
        dist.barrier()


def digest(state_dict: dict[str, torch.Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(state_dict):
        total.update(name.encode() + state_dict[name].contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def outcome(run: LayerParallelTrainer) -> dict[str, Any]:
    """What a run left: logs, the hash of the full weights (lp rank 0) and of what several lp ranks hold, and counts."""
    handle = run.layer_parallel
    full = handle.state_dict()
    with handle.whole():
        copies = {
            p.names[0]: p.value.detach().clone() for p in handle.ends if p.value is not None and len(p.holders) > 1
        }
        copies = digest(copies) if copies else None
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    return {
        "losses": [entry["loss"] for entry in logs],
        "norms": [entry["grad_norm"] for entry in logs],
        "weights": digest(full) if full else None,
        "copies": copies,
        "largest": {name: t.double().abs().max().item() for name, t in full.items()},
        "tokens": run.state.num_input_tokens_seen,
        "flops": run.state.total_flos,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "logs": logs,
    }


def train_stock(output_dir: str, family: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The stock Trainer in one process, without dropout."""
    settings = dict(settings)
    dtype = settings.pop("dtype", "float32")
    ours = arguments(output_dir, **settings)
    own = {f.name for f in dataclasses.fields(LayerParallelTrainingArguments)}
    own -= {f.name for f in dataclasses.fields(hf.TrainingArguments)}
    values = {f.name: getattr(ours, f.name) for f in dataclasses.fields(ours) if f.init and f.name not in own}
    model = build(family, 0.0).to(getattr(torch, dtype))
    run = hf.Trainer(model, hf.TrainingArguments(**values), train_dataset=Samples(family, 64))
    run.remove_callback(hf.PrinterCallback)
    run.train()
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    return {"losses": [entry["loss"] for entry in logs], "norms": [entry["grad_norm"] for entry in logs]}


def train(output_dir: str, family: str, settings: dict[str, Any], resume: Any = None, **more: Any) -> dict[str, Any]:
    run = trainer(output_dir, family, settings, **more)
    run.train(resume_from_checkpoint=resume)
    return outcome(run)
