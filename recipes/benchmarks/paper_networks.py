"""The paper's deep networks, narrow enough for two cores: what `paper_speed.py` times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MBartConfig,
    MBartForConditionalGeneration,
    PreTrainedModel,
    RobertaPreLayerNormConfig,
    RobertaPreLayerNormForMaskedLM,
    RobertaPreLayerNormForTokenClassification,
)

WIDTH, HEADS, FEED_FORWARD = 64, 4, 256
ROWS, TOKENS, VOCABULARY = 8, 64, 1000
SIZES = {"width": WIDTH, "heads": HEADS, "feed_forward": FEED_FORWARD, "rows": ROWS, "tokens": TOKENS}
TAGS = 17

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Network:
    """A network of the paper's speed figures.

    figure: what the paper shows and read off its axes.
    build: from the depth of each stack, the model and a batch of random tokens.
    stacks: how many it has.
    measured: the depth that is timed on two ranks. depths: those that are predicted.
    coarsening, forward, backward: the paper's settings.
    """

    figure: str
    build: Callable[[int], tuple[PreTrainedModel, Batch]]
    stacks: int
    measured: int
    depths: tuple[int, ...]
    coarsening: int
    forward: int
    backward: int


def encoder_settings(depth: int) -> dict[str, Any]:
    sizes = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "intermediate_size": FEED_FORWARD}
    dropout = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    positions = TOKENS + 2  # this family counts them from the padding token's number on
    return (
        sizes | dropout | {"num_hidden_layers": depth, "vocab_size": VOCABULARY, "max_position_embeddings": positions}
    )


def tokens_and_labels(num_labels: int) -> Batch:
    shape = (ROWS, TOKENS)
    return {"input_ids": torch.randint(3, VOCABULARY, shape), "labels": torch.randint(3, num_labels, shape)}


def bert(depth: int) -> tuple[PreTrainedModel, Batch]:
    """Masked language model, pre-LN."""
    return RobertaPreLayerNormForMaskedLM(RobertaPreLayerNormConfig(**encoder_settings(depth))), tokens_and_labels(
        VOCABULARY
    )


def morphology(depth: int) -> tuple[PreTrainedModel, Batch]:
    """A tag for every token, pre-LN."""
    config = RobertaPreLayerNormConfig(**encoder_settings(depth), num_labels=TAGS)
    return RobertaPreLayerNormForTokenClassification(config), tokens_and_labels(TAGS)


def translation(depth: int) -> tuple[PreTrainedModel, Batch]:
    """Encoder and decoder of `depth` layers each, pre-LN."""
    sizes: dict[str, Any] = {f"{side}_layers": depth for side in ("encoder", "decoder")}
    sizes |= {f"{side}_attention_heads": HEADS for side in ("encoder", "decoder")}
    sizes |= {f"{side}_ffn_dim": FEED_FORWARD for side in ("encoder", "decoder")}
    config = MBartConfig(
        **sizes,
        d_model=WIDTH,
        vocab_size=VOCABULARY,
        max_position_embeddings=TOKENS,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
    )
    return MBartForConditionalGeneration(config), tokens_and_labels(VOCABULARY)


NETWORKS = {
    "bert": Network("BERT, 128 layers: up to about 3 times on 8 GPUs", bert, 1, 128, (64, 128, 256), 4, 1, 1),
    "morphology": Network("MC, 256 to 1024 layers: up to about 4 times", morphology, 1, 256, (256, 512, 1024), 2, 2, 1),
    "translation": Network(
        "MT, 160 + 160 layers: up to about 4 times on 8 GPUs", translation, 2, 80, (80, 160), 3, 2, 1
    ),
}
