"""Tiny random models of 22 families, with inputs and labels, for every generic test.

`build(name)` gives the same weights each time. Dropout is on wherever the family has one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

VOCAB = 99
PAD, BOS, EOS = 0, 1, 2

Inputs = dict[str, Tensor]


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(5, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def text(batch: int = 2, length: int = 12) -> Inputs:
    """A language-modelling batch; the last row is padded on the right."""
    ids = tokens(batch, length)
    mask = torch.ones_like(ids)
    mask[-1, -4:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def pairs(batch: int = 2) -> Inputs:
    return text(batch) | {"labels": tokens(batch, 9, seed=3)}


def pictures(batch: int = 2) -> Inputs:
    pixels = torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, "labels": torch.arange(batch) % 2}


def sounds(batch: int = 2) -> Inputs:
    features = torch.randn(batch, 8, 20, generator=torch.Generator().manual_seed(0))
    return {"input_features": features, "labels": tokens(batch, 9, seed=3)}


_SIZES: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
_TEXT = _SIZES | {"vocab_size": VOCAB, "max_position_embeddings": 64}
_SPECIAL = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_HIDDEN_DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
_LLAMA = _TEXT | _SPECIAL | {"num_key_value_heads": 2, "attention_dropout": 0.1}
_SLIDING = _LLAMA | {"head_dim": 8, "sliding_window": 4}
_PICTURE = _SIZES | _HIDDEN_DROPOUT | {"image_size": 16, "patch_size": 4}
_DEBERTA = _TEXT | _HIDDEN_DROPOUT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
_BUCKETS = {"position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True}
_SEQ2SEQ: dict[str, Any] = {
    "d_model": 32,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.1,
    "vocab_size": VOCAB,
} | _SPECIAL

_GPT2 = {"n_embd": 32, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
_DISTILBERT = {"dim": 32, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "dropout_rate": 0.1}
_OPT = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_attention_heads": 4}
_OPT |= {"max_position_embeddings": 64, "dropout": 0.1, "attention_dropout": 0.1}
_MODERNBERT = _TEXT | _SPECIAL | {"local_attention": 4, "cls_token_id": BOS, "sep_token_id": EOS}
_MODERNBERT |= {"attention_dropout": 0.1, "mlp_dropout": 0.1, "embedding_dropout": 0.1}
_WHISPER = _SEQ2SEQ | {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 32}
_WHISPER |= {"decoder_start_token_id": 3, "suppress_tokens": None, "begin_suppress_tokens": None}

# name: (model class, config class, config values, name of the depth(s) in the config, inputs)
_TABLE: dict[str, tuple[Any, Any, dict[str, Any], tuple[str, ...], Callable[[], Inputs]]] = {
    "bert": (hf.BertForMaskedLM, hf.BertConfig, _TEXT | _HIDDEN_DROPOUT, ("num_hidden_layers",), text),
    "roberta": (hf.RobertaForMaskedLM, hf.RobertaConfig, _TEXT | _HIDDEN_DROPOUT, ("num_hidden_layers",), text),
    "roberta_prelayernorm": (
        hf.RobertaPreLayerNormForMaskedLM,
        hf.RobertaPreLayerNormConfig,
        _TEXT | _HIDDEN_DROPOUT,
        ("num_hidden_layers",),
        text,
    ),
    "distilbert": (
        hf.DistilBertForMaskedLM,
        hf.DistilBertConfig,
        _DISTILBERT | {"vocab_size": VOCAB, "dropout": 0.1, "attention_dropout": 0.1},
        ("n_layers",),
        text,
    ),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config, _GPT2 | _SPECIAL | {"vocab_size": VOCAB}, ("n_layer",), text),
    "gpt_neox": (
        hf.GPTNeoXForCausalLM,
        hf.GPTNeoXConfig,
        _TEXT | _SPECIAL | {"hidden_dropout": 0.1, "attention_dropout": 0.1},
        ("num_hidden_layers",),
        text,
    ),
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, _LLAMA, ("num_hidden_layers",), text),
    "qwen2": (
        hf.Qwen2ForCausalLM,
        hf.Qwen2Config,
        _LLAMA | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
        ("num_hidden_layers",),
        text,
    ),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config, _LLAMA | {"head_dim": 8}, ("num_hidden_layers",), text),
    "mistral": (
        hf.MistralForCausalLM,
        hf.MistralConfig,
        _LLAMA | {"sliding_window": 4},
        ("num_hidden_layers",),
        text,
    ),
    "gemma2": (hf.Gemma2ForCausalLM, hf.Gemma2Config, _SLIDING, ("num_hidden_layers",), text),
    "gemma3": (
        hf.Gemma3ForCausalLM,
        hf.Gemma3TextConfig,
        _SLIDING | {"sliding_window_pattern": 2},
        ("num_hidden_layers",),
        text,
    ),
    "vit": (hf.ViTForImageClassification, hf.ViTConfig, _PICTURE, ("num_hidden_layers",), pictures),
    "deit": (hf.DeiTForImageClassification, hf.DeiTConfig, _PICTURE, ("num_hidden_layers",), pictures),
    "bart": (
        hf.BartForConditionalGeneration,
        hf.BartConfig,
        _SEQ2SEQ | {"max_position_embeddings": 64, "decoder_start_token_id": EOS, "forced_eos_token_id": EOS},
        ("encoder_layers", "decoder_layers"),
        pairs,
    ),
    "marian": (
        hf.MarianMTModel,
        hf.MarianConfig,
        _SEQ2SEQ | {"max_position_embeddings": 64, "decoder_start_token_id": PAD, "forced_eos_token_id": EOS},
        ("encoder_layers", "decoder_layers"),
        pairs,
    ),
    "m2m100": (
        hf.M2M100ForConditionalGeneration,
        hf.M2M100Config,
        _SEQ2SEQ
        | {"max_position_embeddings": 64, "decoder_start_token_id": EOS}
        | {"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0},
        ("encoder_layers", "decoder_layers"),
        pairs,
    ),
    "t5": (
        hf.T5ForConditionalGeneration,
        hf.T5Config,
        _T5 | {"vocab_size": VOCAB, "decoder_start_token_id": PAD, "pad_token_id": PAD, "eos_token_id": BOS},
        ("num_layers", "num_decoder_layers"),
        pairs,
    ),
    "opt": (hf.OPTForCausalLM, hf.OPTConfig, _OPT | _SPECIAL | {"vocab_size": VOCAB}, ("num_hidden_layers",), text),
    "modernbert": (hf.ModernBertForMaskedLM, hf.ModernBertConfig, _MODERNBERT, ("num_hidden_layers",), text),
    "deberta": (hf.DebertaForMaskedLM, hf.DebertaConfig, _DEBERTA, ("num_hidden_layers",), text),
    "deberta_v2": (
        hf.DebertaV2ForMaskedLM,
        hf.DebertaV2Config,
        _DEBERTA | _BUCKETS,
        ("num_hidden_layers",),
        text,
    ),
    "whisper": (
        hf.WhisperForConditionalGeneration,
        hf.WhisperConfig,
        _WHISPER,
        ("encoder_layers", "decoder_layers"),
        sounds,
    ),
}

_GPTJ = {"n_embd": 32, "n_head": 4, "n_positions": 64, "rotary_dim": 4, "resid_pdrop": 0.1, "attn_pdrop": 0.1}
_BAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 4, "attn_layer_indices": [1]}
_DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}

# layers that return their state in a tuple
_TUPLES: dict[str, tuple[Any, Any, dict[str, Any], tuple[str, ...], Callable[[], Inputs]]] = {
    "bloom": (
        hf.BloomForCausalLM,
        hf.BloomConfig,
        _SPECIAL | _DROPOUT | {"vocab_size": VOCAB, "hidden_size": 32, "n_head": 4},
        ("n_layer",),
        text,
    ),
    "falcon": (hf.FalconForCausalLM, hf.FalconConfig, _TEXT | _SPECIAL | _DROPOUT, ("num_hidden_layers",), text),
    "gptj": (hf.GPTJForCausalLM, hf.GPTJConfig, _GPTJ | _SPECIAL | {"vocab_size": VOCAB}, ("n_layer",), text),
    "mpt": (
        hf.MptForCausalLM,
        hf.MptConfig,
        {"d_model": 32, "n_heads": 4, "max_seq_len": 64, "vocab_size": VOCAB, "resid_pdrop": 0.1},
        ("n_layers",),
        text,
    ),
    "longformer": (
        hf.LongformerForMaskedLM,
        hf.LongformerConfig,
        _TEXT | _SPECIAL | _HIDDEN_DROPOUT | {"attention_window": 4, "sep_token_id": EOS},
        ("num_hidden_layers",),
        text,
    ),
    "nystromformer": (
        hf.NystromformerForMaskedLM,
        hf.NystromformerConfig,
        _TEXT | _SPECIAL | _HIDDEN_DROPOUT | {"num_landmarks": 4, "segment_means_seq_len": 4, "conv_kernel_size": 3},
        ("num_hidden_layers",),
        text,
    ),
    "xlnet": (
        hf.XLNetLMHeadModel,
        hf.XLNetConfig,
        _SPECIAL | {"vocab_size": VOCAB, "d_model": 32, "n_head": 4, "d_inner": 64, "use_mems_eval": False},
        ("n_layer",),
        text,
    ),
    "squeezebert": (
        hf.SqueezeBertForMaskedLM,
        hf.SqueezeBertConfig,
        _TEXT | _SPECIAL | _HIDDEN_DROPOUT | {"embedding_size": 32},
        ("num_hidden_layers",),
        text,
    ),
    "bamba": (hf.BambaForCausalLM, hf.BambaConfig, _LLAMA | _BAMBA, ("num_hidden_layers",), text),
}

NAMES = tuple(_TABLE)
TUPLES = tuple(_TUPLES)
DECODERS = ("gpt2", "gpt_neox", "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "opt")
ENCODER_DECODERS = ("bart", "marian", "m2m100", "t5", "whisper")
EAGER_ONLY = ("gemma2", "deberta", "deberta_v2")
"""Families whose stock models refuse sdpa."""
SPLIT = ("gpt2", "gpt_neox", "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "vit", "deit", "t5", "opt")
SPLIT += ("modernbert", "whisper", "roberta_prelayernorm", "m2m100")
"""Pre-LN families."""


def config(name: str, layers: int = 4, **changes: Any) -> Any:
    _, config_class, values, depths, _ = (_TABLE | _TUPLES)[name]
    return config_class(**(values | dict.fromkeys(depths, layers) | changes))


def build(
    name: str, layers: int = 4, seed: int = 0, attention: str | None = None, **changes: Any
) -> tuple[Any, Inputs]:
    """(model, inputs with labels) of a family with `layers` layers per stack; `changes` go to its config.

    attention: "eager" or "sdpa"; default: what stock chooses. Stock raises ValueError for one that it refuses.
    """
    torch.manual_seed(seed)
    model_class, *_, inputs = (_TABLE | _TUPLES)[name]
    return model_class._from_config(config(name, layers, **changes), attn_implementation=attention), inputs()


def without_labels(inputs: Inputs) -> Inputs:
    return {name: value for name, value in inputs.items() if name != "labels"}


def in_every_version(names: Iterable[str], *chosen: str) -> list[Any]:
    """Of names, test parameters; the chosen ones are checked with other versions of the libraries too (`compat`)."""
    assert set(chosen) <= set(names)
    return [pytest.param(name, marks=pytest.mark.compat) if name in chosen else name for name in names]
