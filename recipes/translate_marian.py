"""An encoder-decoder translation network trained from scratch, encoder and decoder both solved layer-parallel.

    accelerate launch --config_file recipes/configs/cpu_2.yaml recipes/translate_marian.py

trains a small one from Spanish to English on Bible verses (from two Debian packages, no hub is needed) with the exact
layer pipeline over two processes; `python recipes/translate_marian.py` does the same in one, and `--strategy mgrit`
(with `--coarse_operator`, `--coarsening`, ...) trains with MGRIT. A YAML file of settings may come first, options after
it override it. The network of the paper, 6 + 6 layers on OPUS from the hub, is

    accelerate launch --multi_gpu --num_processes 2 recipes/translate_marian.py recipes/translate_marian_paper.yaml

`--architecture` is one of
- pre_ln (the default): M2M100, which is Marian (sinusoidal positions, tied embeddings, no norm on them) with the norms
  before the branches, as in the paper. Every branch adds h f(x), so with small h one step of c h resembles c layers,
  which is what MGRIT lives on; and the trained network folds into a checkpoint of stock transformers at every h.
- marian: MarianMTModel itself, whose layers end in a norm. It has the euler form only, so its checkpoint is a stock one
  at `--step_size 1`, and otherwise has code of its own (`trust_remote_code=True`).

Every run ends with the BLEU of the validation slice, translated greedily (`--generation_num_beams` for beams), a table,
<output_dir>/result.json, <output_dir>/trainer_state.json (`hf-layerpar report <output_dir>` draws it) and the model
with its tokenizer in <output_dir>/model. result.json has, beside what every recipe's has, "bleu": {"score",
"signature"} and the first "translations". While training, the metrics are those of the reference's next token;
`--predict_with_generate` translates at every evaluation instead.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a checkout runs without being installed

from datasets import disable_progress_bars
from torch import nn
from transformers import (
    DataCollatorForSeq2Seq,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)

from hf_layerpar.errors import ConfigurationError
from hf_layerpar.training.arguments import LayerParallelTrainingArguments
from hf_layerpar.training.trainer import LayerParallelTrainer
from recipes.bitext import Bitext, load_bitext
from recipes.offline import ENGLISH, OFFLINE, SPANISH, data_name
from recipes.predictions import accuracy, likeliest
from recipes.running import run_recipe
from recipes.settings import NetworkArguments, common_settings, parse_settings
from recipes.translation_metrics import bleu_of_generated, corpus_bleu, decoded

ARCHITECTURES: dict[str, tuple[Any, Any]] = {
    "pre_ln": (M2M100Config, M2M100ForConditionalGeneration),
    "marian": (MarianConfig, MarianMTModel),
}

SHOWN = 10
"""So many translations are in result.json."""


@dataclass
class RecipeArguments(NetworkArguments):
    """Which pairs of sentences and which network; its layers are those of the encoder, and again of the decoder."""

    width: int = field(default=64, metadata={"help": "Hidden size; the MLPs are four times as wide."})
    inner_layers: int = field(default=6, metadata={"help": "Layers between the buffers, of encoder and decoder each."})
    buffers: list[int] = field(default_factory=lambda: [1, 1], metadata={"help": "Open and close layers kept exact."})
    step_size: float = field(default=1 / 4, metadata={"help": "h of the inner layers."})
    architecture: str = field(default="pre_ln", metadata={"help": "'pre_ln' (M2M100) or 'marian' (post-LN)."})
    dataset_name: str = field(default=OFFLINE, metadata={"help": "'offline', or a hub data set of translations."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the hub data set."})
    source_lang: str = field(default="es", metadata={"help": "Language to translate from."})
    target_lang: str = field(default="en", metadata={"help": "Language to translate to."})
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer of the hub or a folder; default: one is trained on the text."}
    )
    vocab_size: int = field(default=3000, metadata={"help": "Tokens of a tokenizer that is trained."})
    max_length: int = field(default=32, metadata={"help": "Pairs with more tokens on a side are left out."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use the first so many pairs only."})
    max_eval_samples: int = field(default=256, metadata={"help": "Pairs of the validation slice, the same each time."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.architecture not in ARCHITECTURES:
            raise ConfigurationError(f"architecture={self.architecture!r} must be one of {', '.join(ARCHITECTURES)}")


def default_settings() -> dict[str, Any]:
    """What this recipe sets differently from the training arguments' own defaults."""
    return common_settings() | {
        "output_dir": "runs/translate_marian",
        "max_steps": 1000,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 64,
        "learning_rate": 4e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "weight_decay": 0.01,
        "logging_steps": 20,
        "eval_strategy": "steps",
        "eval_steps": 200,
        "generation_num_beams": 1,
    }


def parse(argv: Sequence[str]) -> tuple[RecipeArguments, LayerParallelTrainingArguments]:
    """Settings from an optional YAML file (first) and options (after it)."""
    recipe, args = parse_settings(RecipeArguments, default_settings(), argv, __doc__)
    if args.generation_max_length is None:
        args.generation_max_length = recipe.max_length + 1  # the token that starts a decoder counts
    return recipe, args


def build_model(recipe: RecipeArguments, tokenizer: PreTrainedTokenizerBase, seed: int) -> nn.Module:
    """The network with new weights, the same on every rank, in its ODE form."""
    config_class, model_class = ARCHITECTURES[recipe.architecture]
    sizes = {
        "layers": recipe.num_layers,
        "attention_heads": recipe.heads,
        "ffn_dim": 4 * recipe.width,
        "layerdrop": 0.0,
    }
    config = config_class(
        vocab_size=len(tokenizer),
        d_model=recipe.width,
        max_position_embeddings=recipe.max_length + 1,
        activation_function="relu",
        init_std=recipe.width**-0.5,  # with the scale of the embeddings, states and logits start at size 1
        scale_embedding=True,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
        forced_eos_token_id=None,
        **{f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sizes.items()},
        **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), recipe.dropout),
    )
    set_seed(seed)
    model = recipe.as_ode(model_class(config))
    # it takes num_items_in_batch through **kwargs and ignores it: the loss is the mean over the batch's target tokens
    model.accepts_loss_kwargs = False
    return model


def translate(trainer: LayerParallelTrainer, bitext: Bitext) -> list[str]:
    """The validation slice translated, on every rank. Collective. The trainer is left generating, without metrics."""
    trainer.args.predict_with_generate = True
    trainer.compute_metrics = trainer.preprocess_logits_for_metrics = None
    return decoded(trainer.predict(bitext.validation).predictions, bitext.tokenizer)  # type: ignore[arg-type]


def main(argv: Sequence[str] | None = None, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """Train, evaluate, translate, save; returns what result.json holds (on every rank)."""
    began = time.monotonic()
    recipe, args = parse(sys.argv[1:] if argv is None else argv)
    if args.disable_tqdm:
        disable_progress_bars()
    bitext = load_bitext(
        recipe.dataset_name,
        recipe.dataset_config,
        (recipe.source_lang, recipe.target_lang),
        recipe.tokenizer_name,
        recipe.vocab_size,
        recipe.max_length,
        recipe.max_train_samples,
        recipe.max_eval_samples,
    )
    model = build_model(recipe, bitext.tokenizer, args.seed)
    generating = args.predict_with_generate
    trainer = LayerParallelTrainer(
        model=model,
        args=args,
        train_dataset=bitext.train,  # type: ignore[arg-type]
        eval_dataset=bitext.validation,  # type: ignore[arg-type]
        data_collator=DataCollatorForSeq2Seq(bitext.tokenizer),
        processing_class=bitext.tokenizer,
        compute_metrics=bleu_of_generated(bitext.tokenizer, bitext.references) if generating else accuracy,
        preprocess_logits_for_metrics=None if generating else likeliest,
        callbacks=list(callbacks),
    )

    def also(result: dict[str, Any]) -> dict[str, Any]:
        translations = translate(trainer, bitext)
        bleu = corpus_bleu(translations, bitext.references)
        result["metrics"]["validation"]["bleu"] = bleu["score"]
        names = ("source", "reference", "translation")
        rows = zip(bitext.sources, bitext.references, translations, strict=True)
        return {"bleu": bleu, "translations": [dict(zip(names, row, strict=True)) for row in rows][:SHOWN]}

    data = data_name(recipe.dataset_name, ENGLISH, SPANISH)
    return run_recipe(trainer, recipe, began, {"validation": bitext.validation}, data, also)


if __name__ == "__main__":
    main()
