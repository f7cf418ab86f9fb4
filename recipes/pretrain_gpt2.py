"""A GPT-2 network pretrained from scratch on text: 2 open layers, 16 Euler steps of size 1/16, 2 close layers.

    accelerate launch --config_file recipes/configs/cpu_2.yaml recipes/pretrain_gpt2.py

trains a small one on the bytes of English text (from a Debian package, no hub is needed) with the exact layer pipeline
over two processes; `python recipes/pretrain_gpt2.py` does the same in one, and `--strategy mgrit` (with
`--coarse_operator`, `--coarsening`, ...) trains with MGRIT. A YAML file of settings may come first, options after it
override it. The network of the paper, GPT-2's sizes on OpenWebText from the hub, is

    accelerate launch --config_file recipes/configs/gpu_8.yaml recipes/pretrain_gpt2.py recipes/pretrain_gpt2_paper.yaml

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
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    default_data_collator,
    set_seed,
)

from hf_layerpar.training.arguments import LayerParallelTrainingArguments
from hf_layerpar.training.trainer import LayerParallelTrainer
from recipes.language import load_blocks
from recipes.offline import ENGLISH, OFFLINE, data_name
from recipes.running import run_recipe
from recipes.settings import NetworkArguments, common_settings, parse_settings


@dataclass
class RecipeArguments(NetworkArguments):
    """Which text and which network."""

    dataset_name: str = field(default=OFFLINE, metadata={"help": "'offline', or a hub data set with a text column."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the hub data set."})
    tokenizer_name: str = field(default="gpt2", metadata={"help": "Tokenizer of a hub data set; offline is bytes."})
    streaming: bool = field(default=False, metadata={"help": "Read a hub data set while training."})
    block_size: int = field(default=64, metadata={"help": "Tokens of a row."})
    max_eval_blocks: int = field(default=256, metadata={"help": "Rows of the validation slice, the same each time."})
    initializer_range: float | None = field(
        default=None, metadata={"help": "Standard deviation of new weights; default: 1 / sqrt(width)."}
    )


def default_settings() -> dict[str, Any]:
    """What this recipe sets differently from the training arguments' own defaults."""
    return common_settings() | {
        "output_dir": "runs/pretrain_gpt2",
        "max_steps": 2000,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 64,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "weight_decay": 0.1,
        "logging_steps": 20,
        "eval_strategy": "steps",
        "eval_steps": 100,
    }


def parse(argv: Sequence[str]) -> tuple[RecipeArguments, LayerParallelTrainingArguments]:
    """Settings from an optional YAML file (first) and options (after it)."""
    return parse_settings(RecipeArguments, default_settings(), argv, __doc__)


def build_model(recipe: RecipeArguments, tokenizer: PreTrainedTokenizerBase, seed: int) -> nn.Module:
    """The network with new weights, the same on every rank, in its ODE form."""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=recipe.block_size,
        n_embd=recipe.width,
        n_head=recipe.heads,
        # GPT-2's own 0.02 is for wide networks: it leaves the projections of narrow ones close to zero
        initializer_range=recipe.width**-0.5 if recipe.initializer_range is None else recipe.initializer_range,
        n_layer=recipe.num_layers,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), recipe.dropout),
    )
    set_seed(seed)
    model = GPT2LMHeadModel(config)
    model.generation_config.max_length = recipe.block_size  # there are no more positions
    # transformers can't tell it from the name of this class; without it the Trainer divides the loss by all T tokens of
    # a row, though only T - 1 are predicted
    model.loss_type = "ForCausalLM"
    return recipe.as_ode(model)


def main(argv: Sequence[str] | None = None, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """Train, evaluate, save; returns what result.json holds (on every rank)."""
    began = time.monotonic()
    recipe, args = parse(sys.argv[1:] if argv is None else argv)
    blocks = load_blocks(
        recipe.dataset_name,
        recipe.dataset_config,
        recipe.tokenizer_name,
        recipe.block_size,
        recipe.max_eval_blocks,
        recipe.streaming,
        args.seed,
    )
    trainer = LayerParallelTrainer(
        model=build_model(recipe, blocks.tokenizer, args.seed),
        args=args,
        train_dataset=blocks.train,
        eval_dataset=blocks.validation,
        data_collator=default_data_collator,
        processing_class=blocks.tokenizer,
        callbacks=list(callbacks),
    )
    data = data_name(recipe.dataset_name, ENGLISH)
    return run_recipe(trainer, recipe, began, {"validation": blocks.validation}, data)


if __name__ == "__main__":
    main()
