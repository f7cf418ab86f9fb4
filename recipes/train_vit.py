"""A vision transformer trained from scratch to classify images: 2 open layers, 28 Euler steps, 2 close layers.

    accelerate launch --config_file recipes/configs/cpu_2.yaml recipes/train_vit.py

trains a narrow one on Fashion-MNIST (from a Debian package, no hub is needed) with the exact layer pipeline over two
processes; `python recipes/train_vit.py` does the same in one, and `--strategy mgrit` (with `--coarse_operator`,
`--coarsening`, ...) trains with MGRIT. `--dataset_name uoft-cs/cifar10 --image_size 32 --patch_size 4 --augment true`
takes images from the hub. A YAML file of settings may come first, options after it override it. The network of the
paper, 32 layers on ImageNet from the hub, is

    accelerate launch --config_file recipes/configs/gpu_8.yaml --num_processes 2 \\
        recipes/train_vit.py recipes/train_vit_paper.yaml

Every run ends with a table, <output_dir>/result.json, <output_dir>/trainer_state.json (`hf-layerpar report
<output_dir>` draws it) and in <output_dir>/model the model and its image processor:
`transformers.pipeline("image-classification", model="<output_dir>/model")` takes any image.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a checkout runs without being installed

from torch import nn
from transformers import (
    TrainerCallback,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    default_data_collator,
    set_seed,
)

from hf_layerpar.errors import ConfigurationError
from hf_layerpar.training.arguments import LayerParallelTrainingArguments
from hf_layerpar.training.trainer import LayerParallelTrainer
from recipes.images import crop_and_mirror, load_images, pixel_rows
from recipes.offline import FASHION_MNIST, OFFLINE, data_name
from recipes.predictions import accuracy, likeliest
from recipes.running import run_recipe
from recipes.settings import NetworkArguments, common_settings, parse_settings


@dataclass
class RecipeArguments(NetworkArguments):
    """Which images and which network."""

    dataset_name: str = field(
        default=OFFLINE,
        metadata={"help": "'offline' (Fashion-MNIST), 'digits' (scikit-learn's), or a hub data set of images."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the hub data set."})
    image_column: str | None = field(default=None, metadata={"help": "Its images; default: the only such column."})
    label_column: str | None = field(default=None, metadata={"help": "Its classes; default: the only such column."})
    validation_rows: int = field(default=1000, metadata={"help": "Rows of the train split held out for validation."})
    augment: bool = field(default=False, metadata={"help": "Train on random crops, mirrored half of the time."})
    image_size: int = field(default=28, metadata={"help": "Pixels a side that images are resized to."})
    patch_size: int = field(default=7, metadata={"help": "Pixels a side of a patch, which becomes one token."})
    initializer_range: float | None = field(
        default=None, metadata={"help": "Standard deviation of new weights; default: 1 / sqrt(width)."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch_size < 1 or self.image_size < 1 or self.image_size % self.patch_size:
            raise ConfigurationError(f"image_size={self.image_size} must be a multiple of patch_size={self.patch_size}")


def default_settings() -> dict[str, Any]:
    """What this recipe sets differently from its arguments' own defaults."""
    return common_settings() | {
        "output_dir": "runs/train_vit",
        "width": 64,
        "inner_layers": 28,
        "max_steps": 800,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 250,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "weight_decay": 0.05,
        "logging_steps": 20,
        "eval_strategy": "steps",
        "eval_steps": 100,
        "remove_unused_columns": False,  # images become pixel values only as rows are read
    }


def parse(argv: Sequence[str]) -> tuple[RecipeArguments, LayerParallelTrainingArguments]:
    """Settings from an optional YAML file (first) and options (after it)."""
    return parse_settings(RecipeArguments, default_settings(), argv, __doc__)


def build_processor(recipe: RecipeArguments) -> ViTImageProcessorPil:
    """Makes three colours of grey images too: pipelines hand over every image in colour."""
    return ViTImageProcessorPil(size={"height": recipe.image_size, "width": recipe.image_size}, do_convert_rgb=True)


def build_model(recipe: RecipeArguments, labels: Sequence[str], seed: int) -> nn.Module:
    """The network with new weights, the same on every rank, in its ODE form."""
    config = ViTConfig(
        image_size=recipe.image_size,
        patch_size=recipe.patch_size,
        hidden_size=recipe.width,
        num_attention_heads=recipe.heads,
        intermediate_size=4 * recipe.width,
        num_hidden_layers=recipe.num_layers,
        # ViT's own 0.02 is for wide networks: it leaves the projections of narrow ones close to zero
        initializer_range=recipe.width**-0.5 if recipe.initializer_range is None else recipe.initializer_range,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        problem_type="single_label_classification",
        **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), recipe.dropout),
    )
    set_seed(seed)
    return recipe.as_ode(ViTForImageClassification(config))


def main(argv: Sequence[str] | None = None, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """Train, evaluate, save; returns what result.json holds (on every rank)."""
    began = time.monotonic()
    recipe, args = parse(sys.argv[1:] if argv is None else argv)
    pictures = load_images(
        recipe.dataset_name,
        recipe.dataset_config,
        recipe.image_column,
        recipe.label_column,
        recipe.validation_rows,
        args.seed,
    )
    processor = build_processor(recipe)
    held_out = {"validation": pictures.validation} | ({} if pictures.test is None else {"test": pictures.test})
    features = {name: pixel_rows(rows, processor) for name, rows in held_out.items()}
    trainer = LayerParallelTrainer(
        model=build_model(recipe, pictures.labels, args.seed),
        args=args,
        train_dataset=pixel_rows(pictures.train, processor, crop_and_mirror if recipe.augment else None),
        eval_dataset=features["validation"],
        data_collator=default_data_collator,
        processing_class=processor,
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=likeliest,
        callbacks=list(callbacks),
    )
    return run_recipe(trainer, recipe, began, features, data_name(recipe.dataset_name, FASHION_MNIST))


if __name__ == "__main__":
    main()
