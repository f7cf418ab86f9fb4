"""What transformers' Trainer has that is private, or that is replaced here: its methods, with what they take."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import Seq2SeqTrainer

from hf_layerpar.compat import looking_into, unsupported

with looking_into("transformers"):
    from transformers.trainer import SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
    from transformers.trainer_callback import ExportableState
    from transformers.trainer_pt_utils import LabelSmoother, find_batch_size, safe_globals
    from transformers.trainer_utils import sort_checkpoints, unwrap_peft_model
    from transformers.utils.generic import strtobool
    from transformers.utils.hub import PushInProgress, hf_api

__all__ = [
    "SCALER_NAME",
    "SCHEDULER_NAME",
    "TRAINER_STATE_NAME",
    "TRAINING_ARGS_NAME",
    "ExportableState",
    "LabelSmoother",
    "PushInProgress",
    "find_batch_size",
    "hf_api",
    "safe_globals",
    "sort_checkpoints",
    "strtobool",
    "unwrap_peft_model",
]

OVERRIDDEN: dict[str, str] = {
    "_build_accelerator_args": "**kwargs",
    "_clip_grad_norm": "model",
    "_finalize_training": "trial num_train_samples start_time",
    "_finish_current_push": "",
    "_get_dataloader": "dataset description batch_size sampler_fn is_training dataloader_key",
    "_get_grad_norm": "model grad_norm",
    "_get_num_items_in_batch": "batch_samples device",
    "_load_best_model": "",
    "_load_from_checkpoint": "resume_from_checkpoint model",
    "_load_optimizer_and_scheduler": "checkpoint",
    "_load_rng_state": "checkpoint",
    "_load_scaler": "checkpoint",
    "_maybe_log_save_evaluate": ("tr_loss grad_norm model trial epoch ignore_keys_for_eval start_time learning_rate"),
    "_prepare_for_training": "max_steps train_dataloader resume_from_checkpoint",
    "_push_from_checkpoint": "checkpoint_folder",
    "_run_epoch": (
        "model epoch train_dataloader steps_in_epoch num_update_steps_per_epoch trial ignore_keys_for_eval start_time "
        "resume_from_checkpoint epochs_trained steps_trained_in_current_epoch"
    ),
    "_save_checkpoint": "model trial",
    "_save_rng_state": "output_dir",
    "_track_num_input_tokens": "inputs",
    "call_model_init": "trial",
    "create_accelerator_and_postprocess": "",
    "create_model_card": ("language license tags model_name finetuned_from tasks dataset_tags dataset dataset_args"),
    "evaluation_loop": "dataloader description prediction_loss_only ignore_keys metric_key_prefix",
    "floating_point_ops": "inputs",
    "get_batch_samples": "epoch_iterator num_batches device",
    "get_tp_size": "",
    "init_hf_repo": "token",
    "log": "logs start_time",
    "prediction_step": "model inputs prediction_loss_only ignore_keys **gen_kwargs",
    "push_to_hub": "commit_message blocking token revision **kwargs",
    "save_model": "output_dir _internal_call",
    "train": "resume_from_checkpoint trial ignore_keys_for_eval",
    "training_step": "model inputs num_items_in_batch",
}
"""The methods of the Trainer in whose place `LayerParallelTrainer` has its own, and their parameters.

Stock may add some that have defaults.
"""
CALLED: dict[str, str] = {
    "_get_output_dir": "trial",
    "_prepare_inputs": "inputs",
    "_save_scaler": "output_dir",
    "compute_loss": "model inputs return_outputs num_items_in_batch",
    "compute_loss_context_manager": "",
    "create_optimizer": "model",
    "store_flos": "",
}
"""Further ones that are called."""
ATTRIBUTES = (
    *("model_accepts_loss_kwargs", "gather_function", "compute_loss_func", "label_smoother", "hp_search_backend"),
    *("callback_handler", "control", "accelerator"),
)
"""What a trainer holds when it is made."""
WHILE_TRAINING = ("_globalstep_last_logged", "current_gradient_accumulation_steps")
"""What it holds once it trains."""


def check_trainer(stock: type) -> None:
    """Raises UnsupportedVersionError for a Trainer whose methods are not those that are relied on."""
    for name, wanted in {**OVERRIDDEN, **CALLED}.items():
        method = getattr(stock, name, None)
        if method is None:
            raise unsupported("transformers", f"its Trainer has no {name}")
        found = list(inspect.signature(method).parameters.values())[1:]
        named = [p for p in found if p.kind is not p.VAR_KEYWORD]
        expected = [word for word in wanted.split() if not word.startswith("**")]
        alike = [p.name for p in named[: len(expected)]] == expected
        alike = alike and all(p.default is not p.empty for p in named[len(expected) :])
        if not alike or ("**" in wanted and named == found):
            raise unsupported("transformers", f"Trainer.{name} takes ({', '.join(map(str, found))}), not ({wanted})")


def check_attributes(trainer: Any) -> None:
    """Raises UnsupportedVersionError for a trainer that lacks what is relied on."""
    for name in ATTRIBUTES:
        if not hasattr(trainer, name):
            raise unsupported("transformers", f"its Trainer has no {name}")


def loss_is_scaled(trainer: Any, num_items_in_batch: Any) -> bool:
    """Whether its losses are divided by something that counts all batches of a step."""
    said = getattr(trainer, "loss_is_scaled_for_ga", None)  # since 5.19
    if said is not None:
        return said
    counted = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
    return counted or trainer.compute_loss_func is not None


check_trainer(Seq2SeqTrainer)
