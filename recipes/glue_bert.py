"""Sentence classification with a BERT-family model, its layers split over all processes.

    accelerate launch --config_file recipes/configs/cpu_2.yaml recipes/glue_bert.py

trains a pretrained MiniLM to tell good from bad movie snippets (both come from PyPI packages, no hub is needed) with
the exact layer pipeline over two processes. `--task sst2` (or any other GLUE task) and `--model_name
bert-base-uncased` take the real ones from the hub; give them `--max_steps -1 --num_train_epochs 3`. Sentences of your
own come from files with a column of text (or two) and one called label:

    accelerate launch --config_file recipes/configs/cpu_2.yaml recipes/glue_bert.py --train_file my.csv

A YAML file of settings may come first, options after it override it; the refined network, 24 steps of size 1/4 trained
with MGRIT, is

    accelerate launch --config_file recipes/configs/cpu_2.yaml recipes/glue_bert.py recipes/glue_bert_refined.yaml

A network that recipes/pretrain_bert.py has trained keeps its step sizes, which its checkpoint records:

    python recipes/glue_bert.py --model_name runs/pretrain_bert/model --source products

`python recipes/glue_bert.py --stock` trains the same thing with the Trainer of transformers alone, in one process.
Every run ends with a table, <output_dir>/result.json and the model in <output_dir>/model.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a checkout runs without being installed

from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    set_seed,
)

from hf_layerpar.errors import ConfigurationError
from hf_layerpar.ode.convert import convert_to_ode
from hf_layerpar.training.arguments import LayerParallelTrainingArguments
from hf_layerpar.training.trainer import LayerParallelTrainer
from recipes.glue_tasks import (
    GLUE,
    Splits,
    Task,
    encode,
    get_task,
    load_files,
    load_splits,
    majority_share,
    metrics_for,
)
from recipes.offline import OFFLINE, SENTENCES, minilm
from recipes.running import run_recipe
from recipes.settings import common_settings, parse_settings

MINILM_NAME = "minilm"


@dataclass
class RecipeArguments:
    """Which model, which data, and how the model is read as an ODE."""

    task: str = field(default=OFFLINE, metadata={"help": "'offline', or a GLUE task by name (needs the hub)."})
    train_file: str | None = field(
        default=None, metadata={"help": "Rows of your own instead of a task's: csv, tsv, json lines or parquet."}
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "Rows to evaluate on; default: a tenth of train_file."}
    )
    test_file: str | None = field(default=None, metadata={"help": "Rows to evaluate on in the end."})
    source: str = field(default="movies", metadata={"help": "Offline sentences: movies, products, tweets or news."})
    model_name: str = field(default=MINILM_NAME, metadata={"help": "'minilm' (from PyPI), a hub name, or a folder."})
    max_length: int = field(default=64, metadata={"help": "Tokens a sentence (pair) is cut to."})
    dropout: float | None = field(default=None, metadata={"help": "Every dropout rate of the model; default: its own."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use that many training rows only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use that many rows of each other split."})
    stock: bool = field(default=False, metadata={"help": "Train with transformers' own Trainer, in one process."})
    step_size: float | None = field(
        default=None, metadata={"help": "h; 0.25 refines every layer into 4 steps. Default: the checkpoint's, or 1."}
    )
    num_steps: int | None = field(default=None, metadata={"help": "Inner steps; default: layers / step_size."})
    form: str = field(default="auto", metadata={"help": "'euler', 'split' or 'auto'."})
    interpolation: str | None = field(
        default=None, metadata={"help": "Weights of refined steps: constant (the default) or linear."}
    )
    buffers: list[int] | None = field(
        default=None, metadata={"help": "Open and close layers kept exact. Default: the checkpoint's, or none."}
    )
    agreement_batches: int = field(
        default=2, metadata={"help": "Batches on which an MGRIT gradient is compared with the exact one."}
    )


def default_settings() -> dict[str, Any]:
    """What this recipe sets differently from the training arguments' own defaults."""
    return common_settings() | {
        "output_dir": "runs/glue_bert",
        "micro_batches": 4,
        "max_steps": 150,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 64,
        "learning_rate": 1e-4,
        "warmup_steps": 0.1,
        "logging_steps": 1,  # result.json has the loss of every step
    }


def parse(argv: Sequence[str]) -> tuple[RecipeArguments, LayerParallelTrainingArguments]:
    """Settings from an optional YAML file (first) and options (after it)."""
    recipe, args = parse_settings(RecipeArguments, default_settings(), argv, __doc__)
    if recipe.train_file is None and (recipe.validation_file or recipe.test_file):
        raise ConfigurationError("validation_file and test_file come with a train_file; give that one too")
    if recipe.stock:
        asked_for = {
            "processes": args.world_size,
            "step_size": recipe.step_size,
            "num_steps": recipe.num_steps,
            "strategy": args.strategy,
        }
        if tuple(asked_for.values()) not in ((1, size, None, "pipeline") for size in (None, 1.0)):
            given = ", ".join(f"{name}={value}" for name, value in asked_for.items())
            raise ConfigurationError(
                f"--stock with {given}: it trains the model as it is in one process; start it with `python` and leave "
                "out the options of the ODE and of its solver"
            )
    return recipe, args


def load_data(recipe: RecipeArguments, seed: int) -> tuple[Task, Splits, str]:
    """The task, its rows, and what a model card calls them."""
    train, held_out = recipe.max_train_samples, recipe.max_eval_samples
    if recipe.train_file is None:
        splits = load_splits(recipe.task, seed, recipe.source, train, held_out)
        return get_task(recipe.task), splits, f"{SENTENCES.about}: {recipe.source}" if recipe.task == OFFLINE else GLUE
    given = {"train": recipe.train_file, "validation": recipe.validation_file, "test": recipe.test_file}
    files = {split: path for split, path in given.items() if path}
    limits = {"train": train, "validation": held_out, "test": held_out}
    return *load_files(files, seed, limits), Path(recipe.train_file).name


def build_model(recipe: RecipeArguments, seed: int, task: Task) -> tuple[nn.Module, Any]:
    """(model, tokenizer), the same on every rank; converted to its ODE form unless it is to be trained stock."""
    name = str(minilm()) if recipe.model_name == MINILM_NAME else recipe.model_name
    config = AutoConfig.from_pretrained(name, num_labels=task.num_labels)
    if task.labels:
        config.id2label = dict(enumerate(task.labels))
        config.label2id = {label: i for i, label in enumerate(task.labels)}
    else:
        config.problem_type = "regression"
    if recipe.dropout is not None:
        for key in list(config.to_dict()):
            if re.search(r"(dropout(_prob)?|_pdrop)$", key):
                setattr(config, key, recipe.dropout)
    set_seed(seed)  # the classifier's new weights
    model = AutoModelForSequenceClassification.from_pretrained(name, config=config)
    # BERT heads take num_items_in_batch through **kwargs and ignore it: with it the Trainer would not divide the loss
    # by the accumulation steps.
    model.accepts_loss_kwargs = False
    if not recipe.stock:
        model = convert_to_ode(
            model,
            step_size=recipe.step_size,
            num_steps=recipe.num_steps,
            form=recipe.form,  # type: ignore[arg-type]
            interpolation=recipe.interpolation,  # type: ignore[arg-type]
            buffers=None if recipe.buffers is None else tuple(recipe.buffers),  # type: ignore[arg-type]
        )
        model.accepts_loss_kwargs = False  # a refined model is a new object
    tokenizer = AutoTokenizer.from_pretrained(name)
    if recipe.max_length > tokenizer.model_max_length:
        raise ConfigurationError(
            f"max_length={recipe.max_length}: the model of {recipe.model_name} has positions for "
            f"{tokenizer.model_max_length} tokens"
        )
    return model, tokenizer


def main(argv: Sequence[str] | None = None, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """Train, evaluate, save; returns what result.json holds (on every rank)."""
    began = time.monotonic()
    recipe, args = parse(sys.argv[1:] if argv is None else argv)
    task, splits, data = load_data(recipe, args.seed)
    model, tokenizer = build_model(recipe, args.seed, task)
    regression = task.num_labels == 1
    features = {
        name: encode(rows, tokenizer, recipe.max_length, regression)
        for name, rows in {"train": splits.train, **splits.held_out}.items()
    }
    compute_metrics, metric_origin = metrics_for(task)
    trainer = (Trainer if recipe.stock else LayerParallelTrainer)(
        model=model,
        args=args,
        train_dataset=features["train"],  # type: ignore[arg-type]
        eval_dataset=features["validation"],  # type: ignore[arg-type]
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
        callbacks=list(callbacks),
    )

    def also(result: dict[str, Any]) -> dict[str, Any]:
        for split, rows in splits.held_out.items():
            if isinstance(rows[0]["label"], int):
                result["metrics"][split]["majority"] = majority_share(rows)
        return {"metric_origin": metric_origin}

    return run_recipe(trainer, recipe, began, {name: features[name] for name in splits.held_out}, data, also)


if __name__ == "__main__":
    main()
