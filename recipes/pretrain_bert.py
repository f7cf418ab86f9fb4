"""A pre-LN BERT pretrained from scratch on masked text: 2 open layers, 16 Euler steps of size 1/4, 2 close layers.

    accelerate launch --config_file recipes/configs/cpu_2.yaml recipes/pretrain_bert.py

trains a small one on English text (from a Debian package, no hub is needed) with the exact layer pipeline over two
processes; `python recipes/pretrain_bert.py` does the same in one, and `--strategy mgrit` (with `--coarse_operator`,
`--coarsening`, ...) trains with MGRIT. A YAML file of settings may come first, options after it override it. The
network of the paper, 128 layers on C4 from the hub, is

    accelerate launch --config_file recipes/configs/gpu_8.yaml recipes/pretrain_bert.py recipes/pretrain_bert_paper.yaml

The model class is transformers' RobertaPreLayerNormForMaskedLM: BERT with the norms inside the residual branches, and
without its next-sentence task. As in the paper, the value, output and MLP projections of its L layers are multiplied by
sqrt(log 2L) when they are new; that factor is Magneto's (arXiv 2210.06423, after DeepNet's, arXiv 2203.00555), which
derives it for layers with one norm more in each branch (sub-LN).

Every run ends with a table, <output_dir>/result.json, <output_dir>/trainer_state.json (`hf-layerpar report
<output_dir>` draws it) and the model in <output_dir>/model, which `recipes/glue_bert.py --model_name` fine-tunes.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a checkout runs without being installed

import torch
from torch import nn
from transformers import (
    PreTrainedTokenizerBase,
    RobertaPreLayerNormConfig,
    RobertaPreLayerNormForMaskedLM,
    TrainerCallback,
    set_seed,
)

from hf_layerpar.training.arguments import LayerParallelTrainingArguments
from hf_layerpar.training.trainer import LayerParallelTrainer
from recipes.masking import Masks, load_masked, masked_accuracy
from recipes.offline import ENGLISH, OFFLINE, data_name
from recipes.predictions import likeliest
from recipes.running import run_recipe
from recipes.settings import NetworkArguments, common_settings, parse_settings

SCALED = ("attention.self.value", "attention.output.dense", "intermediate.dense", "output.dense")
"""The projections of a layer that are scaled at initialisation."""


@dataclass
class RecipeArguments(NetworkArguments):
    """Which text and which network."""

    width: int = field(default=64, metadata={"help": "Hidden size; the MLPs are four times as wide."})
    heads: int = field(default=2, metadata={"help": "Attention heads."})
    step_size: float = field(default=1 / 4, metadata={"help": "h of the inner layers."})
    dataset_name: str = field(default=OFFLINE, metadata={"help": "'offline', or a hub data set with a text column."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the hub data set."})
    tokenizer_name: str = field(
        default="google-bert/bert-base-uncased", metadata={"help": "Tokenizer of a hub data set; offline has its own."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read a hub data set while training."})
    block_size: int = field(default=64, metadata={"help": "Tokens of a row, with the two that frame it."})
    mask_share: float = field(default=0.2, metadata={"help": "Share of the tokens that is masked."})
    max_eval_blocks: int = field(default=256, metadata={"help": "Rows of the validation slice, masked once for all."})


def default_settings() -> dict[str, Any]:
    """What this recipe sets differently from the training arguments' own defaults."""
    return common_settings() | {
        "output_dir": "runs/pretrain_bert",
        "max_steps": 2000,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 64,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "weight_decay": 0.01,
        "logging_steps": 20,
        "eval_strategy": "steps",
        "eval_steps": 100,
    }


def parse(argv: Sequence[str]) -> tuple[RecipeArguments, LayerParallelTrainingArguments]:
    """Settings from an optional YAML file (first) and options (after it)."""
    return parse_settings(RecipeArguments, default_settings(), argv, __doc__)


@torch.no_grad()
def scale_projections_(model: RobertaPreLayerNormForMaskedLM) -> None:
    """Multiply the value, output and MLP projections of the L new layers by sqrt(log 2L)."""
    layers = model.roberta_prelayernorm.encoder.layer
    for layer in layers:
        for name in SCALED:
            layer.get_submodule(name).weight.mul_(math.sqrt(math.log(2 * len(layers))))


def build_model(recipe: RecipeArguments, tokenizer: PreTrainedTokenizerBase, seed: int) -> nn.Module:
    """The network with new weights, the same on every rank, in its ODE form."""
    config = RobertaPreLayerNormConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        num_attention_heads=recipe.heads,
        intermediate_size=4 * recipe.width,
        num_hidden_layers=recipe.num_layers,
        # this class counts positions from the padding token's number
        max_position_embeddings=recipe.block_size + tokenizer.pad_token_id + 1,
        initializer_range=0.02 * math.sqrt(768 / recipe.width),  # BERT's 0.02, with the same gain at other widths
        hidden_dropout_prob=recipe.dropout,
        attention_probs_dropout_prob=recipe.dropout,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
    )
    set_seed(seed)
    model = RobertaPreLayerNormForMaskedLM(config)
    scale_projections_(model)
    # its loss is the mean over the masked tokens of a batch, whatever num_items_in_batch says
    model.accepts_loss_kwargs = False  # type: ignore[assignment]
    return recipe.as_ode(model)


def main(argv: Sequence[str] | None = None, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """Train, evaluate, save; returns what result.json holds (on every rank)."""
    began = time.monotonic()
    recipe, args = parse(sys.argv[1:] if argv is None else argv)
    text = load_masked(
        recipe.dataset_name,
        recipe.dataset_config,
        recipe.tokenizer_name,
        recipe.block_size,
        recipe.max_eval_blocks,
        recipe.mask_share,
        recipe.streaming,
        args.seed,
    )
    trainer = LayerParallelTrainer(
        model=build_model(recipe, text.tokenizer, args.seed),
        args=args,
        train_dataset=text.train,
        eval_dataset=text.validation,
        data_collator=Masks(text.tokenizer, recipe.mask_share),
        processing_class=text.tokenizer,
        compute_metrics=masked_accuracy,
        preprocess_logits_for_metrics=likeliest,
        callbacks=list(callbacks),
    )
    data = data_name(recipe.dataset_name, ENGLISH)
    return run_recipe(trainer, recipe, began, {"validation": text.validation}, data)


if __name__ == "__main__":
    main()
