"""An encoder that tags words with their parts of speech, trained from scratch: 64 Euler steps of size 1/8.

    accelerate launch --config_file recipes/configs/cpu_2.yaml recipes/tag_morphology.py

trains a narrow one on the Hebrew treebank of Universal Dependencies (from a PyPI package, no hub is needed; not for
commercial use) with the exact layer pipeline over two processes; `python recipes/tag_morphology.py` does the same in
one, and `--strategy mgrit` (with `--coarse_operator`, `--coarsening`, ...) trains with MGRIT. `--target feats` tags
words with all their morphological features. AdamW learns more in these few steps than the paper's SGD, which is
`--optim sgd --optim_args momentum=0.9 --learning_rate 0.1`. A YAML file of settings may come first, options after it
override it. The network of the paper, with SGD on the English treebank GUM from the hub (or on `--dataset_name FOLDER`
of CoNLL-U files), is

    accelerate launch --config_file recipes/configs/gpu_8.yaml recipes/tag_morphology.py \\
        recipes/tag_morphology_paper.yaml

Every run ends with a table, <output_dir>/result.json, <output_dir>/trainer_state.json (`hf-layerpar report
<output_dir>` draws it) and the model in <output_dir>/model.
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
    DataCollatorForTokenClassification,
    PreTrainedTokenizerBase,
    RobertaPreLayerNormConfig,
    RobertaPreLayerNormForTokenClassification,
    TrainerCallback,
    set_seed,
)

from hf_layerpar.errors import ConfigurationError
from hf_layerpar.training.arguments import LayerParallelTrainingArguments
from hf_layerpar.training.trainer import LayerParallelTrainer
from recipes.offline import HEBREW, OFFLINE, data_name
from recipes.predictions import likeliest
from recipes.running import run_recipe
from recipes.settings import NetworkArguments, common_settings, parse_settings
from recipes.tagging import baselines, encode, label_names, tag_metrics, train_tokenizer
from recipes.treebank import load_treebank


@dataclass
class RecipeArguments(NetworkArguments):
    """Which treebank and which network."""

    width: int = field(default=48, metadata={"help": "Hidden size."})
    mlp_width: int = field(default=128, metadata={"help": "Hidden size of the MLPs."})
    inner_layers: int = field(default=64, metadata={"help": "Layers between the buffers, one Euler step each."})
    buffers: list[int] = field(default_factory=lambda: [0, 0], metadata={"help": "Open and close layers kept exact."})
    step_size: float = field(default=1 / 8, metadata={"help": "h of the inner layers."})
    dataset_name: str = field(
        default=OFFLINE,
        metadata={"help": "'offline', a folder of *train, *dev and *test.conllu, or a hub data set like UD's."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the hub data set."})
    target: str = field(default="upos", metadata={"help": "'upos', or 'feats': all morphological features."})
    vocabulary: int = field(default=8000, metadata={"help": "Pieces of words in the tokenizer."})
    max_length: int = field(default=48, metadata={"help": "Pieces of a row; longer sentences are cut."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use that many training sentences only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use that many of each other split."})
    initializer_range: float = field(default=0.02, metadata={"help": "Standard deviation of new weights."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length < 1:
            raise ConfigurationError(f"max_length={self.max_length} must be at least 1")


def default_settings() -> dict[str, Any]:
    """What this recipe sets differently from the training arguments' own defaults."""
    return common_settings() | {
        "output_dir": "runs/tag_morphology",
        "max_steps": 1000,
        "per_device_train_batch_size": 8,
        "train_sampling_strategy": "group_by_length",  # less padding
        "per_device_eval_batch_size": 64,
        "learning_rate": 4e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "logging_steps": 20,
        "eval_strategy": "steps",
        "eval_steps": 200,
    }


def parse(argv: Sequence[str]) -> tuple[RecipeArguments, LayerParallelTrainingArguments]:
    """Settings from an optional YAML file (first) and options (after it)."""
    return parse_settings(RecipeArguments, default_settings(), argv, __doc__)


def build_model(
    recipe: RecipeArguments, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], seed: int
) -> nn.Module:
    """The network with new weights, the same on every rank, in its ODE form."""
    pad = tokenizer.pad_token_id
    config = RobertaPreLayerNormConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=recipe.max_length + pad + 1,  # RoBERTa counts positions from pad + 1
        hidden_size=recipe.width,
        num_attention_heads=recipe.heads,
        intermediate_size=recipe.mlp_width,
        num_hidden_layers=recipe.num_layers,
        initializer_range=recipe.initializer_range,
        hidden_dropout_prob=recipe.dropout,
        attention_probs_dropout_prob=recipe.dropout,
        type_vocab_size=1,
        pad_token_id=pad,
        bos_token_id=None,
        eos_token_id=None,
        id2label=dict(enumerate(labels)),
        label2id={name: i for i, name in enumerate(labels)},
    )
    set_seed(seed)
    model = recipe.as_ode(RobertaPreLayerNormForTokenClassification(config))
    # the head takes num_items_in_batch through **kwargs and ignores it: with it the Trainer would not divide the loss
    # by the accumulation steps
    model.accepts_loss_kwargs = False
    return model


def main(argv: Sequence[str] | None = None, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """Train, evaluate, save; returns what result.json holds (on every rank)."""
    began = time.monotonic()
    recipe, args = parse(sys.argv[1:] if argv is None else argv)
    treebank = load_treebank(recipe.dataset_name, recipe.dataset_config, recipe.target)
    train = treebank.train[: recipe.max_train_samples]
    held_out = {name: getattr(treebank, name)[: recipe.max_eval_samples] for name in ("validation", "test")}
    tokenizer = train_tokenizer(train, recipe.vocabulary)
    tokenizer.model_max_length = recipe.max_length  # saved with the model: more positions were not trained
    labels = label_names(train)
    rows = {name: encode(split, tokenizer, labels, recipe.max_length) for name, split in held_out.items()}
    trainer = LayerParallelTrainer(
        model=build_model(recipe, tokenizer, labels, args.seed),
        args=args,
        train_dataset=encode(train, tokenizer, labels, recipe.max_length),  # type: ignore[arg-type]
        eval_dataset=rows["validation"],  # type: ignore[arg-type]
        data_collator=DataCollatorForTokenClassification(tokenizer),
        processing_class=tokenizer,
        compute_metrics=tag_metrics,
        preprocess_logits_for_metrics=likeliest,
        callbacks=list(callbacks),
    )

    def also(result: dict[str, Any]) -> dict[str, Any]:
        for name, split in held_out.items():
            result["metrics"][name] |= baselines(train, split, labels)
        return {}

    return run_recipe(trainer, recipe, began, rows, data_name(recipe.dataset_name, HEBREW), also)


if __name__ == "__main__":
    main()
