"""The Trainer's saving, resuming and best-model loading, for a model sharded over lp ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, get_last_checkpoint, unwrap_peft_model
from transformers.utils import logging

from hf_layerpar.errors import CheckpointError
from hf_layerpar.run.first_rank import tell_all, together
from hf_layerpar.run.mesh import Mesh
from hf_layerpar.sharding import LayerParallel, layer_parallel
from hf_layerpar.training import checkpoints
from hf_layerpar.training.arguments import LayerParallelTrainingArguments

logger = logging.get_logger(__name__)


class ShardedSaving(Trainer):
    """The part of `LayerParallelTrainer` that writes and reads; see `checkpoints` for what is in a directory."""

    args: LayerParallelTrainingArguments
    mesh: Mesh
    model: Any  # stock says: of many types, or None
    optimizer: Any
    lr_scheduler: Any
    accelerator: Any
    state: Any

    @property
    def layer_parallel(self) -> LayerParallel:
        """The handle of the current model."""
        return layer_parallel(self.model)

    @property
    def _world(self) -> dist.ProcessGroup | None:
        return checkpoints.everyone(self.mesh)

    # ---- writing
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes what stock `from_pretrained` loads. Collective over all ranks.

        Raises CheckpointError on all ranks where the first one can't write.
        """
        state_dict = self.layer_parallel.state_dict() if self.mesh.dp_rank == 0 else {}
        if not isinstance(unwrap_peft_model(self.model), PreTrainedModel):
            state_dict = checkpoints.one_of_each(state_dict)
        # as stock, a model that is whole on every rank can be saved by one of them alone
        alike = _internal_call or self.mesh.lp_size > 1
        folder = self.args.output_dir if output_dir is None else output_dir
        with together(f"the model was not written to {folder}", self._world if alike else None):
            if self.args.should_save:
                self._save(output_dir, state_dict=state_dict)
                if _internal_call and output_dir is not None:  # a checkpoint to resume from
                    checkpoints.save_exact_weights(self.model, state_dict, Path(output_dir))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        run_dir = Path(self._get_output_dir(trial=trial))
        final = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.save_strategy != SaveStrategy.NO and self.state.best_global_step:
            best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            if best == final or best.exists():
                self.state.best_model_checkpoint = str(best)
        writer = self.args.should_save
        with checkpoints.whole_directory(final, self.mesh, writer=writer) as partial:
            self.save_model(str(partial), _internal_call=True)
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler(str(partial))
                self._save_rng_state(str(partial))
            if writer:
                self._collect_callback_states()
                self.state.save_to_json(str(partial / TRAINER_STATE_NAME))
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        with together(f"{final} is written, but older checkpoints were not removed", self._world):
            if writer:
                checkpoints.rotate(run_dir, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _collect_callback_states(self) -> None:
        for callback in [c for c in [*self.callback_handler.callbacks, self.control] if isinstance(c, ExportableState)]:
            name, stored = type(callback).__name__, self.state.stateful_callbacks
            if isinstance(stored[name], list):
                stored[name].append(callback.state())
            else:
                stored[name] = callback.state()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.mesh.dp_rank == 0:
            checkpoints.save_optimizer(self.optimizer, self.lr_scheduler, self.model, self.mesh, Path(output_dir))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _save_rng_state(self, output_dir: str) -> None:
        if self.mesh.lp_rank == 0:
            checkpoints.save_streams(self.mesh, self.args.device, Path(output_dir))

    # ---- reading
    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> Any:
        if resume_from_checkpoint is True:
            run_dir = Path(str(self.args.output_dir))
            with together(f"an earlier checkpoint in {run_dir} was not put back", self._world):
                if self.args.should_save:
                    checkpoints.restore_replaced(run_dir)
            with together(f"no checkpoint was found in {run_dir}", self._world):
                last = get_last_checkpoint(run_dir)
            found = tell_all(last, self._world, "the search for a checkpoint")
            if len(set(found.values())) > 1:
                raise CheckpointError(
                    f"the last checkpoint in {run_dir} is, by world rank, {found}; all ranks must see one folder"
                )
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Also refuses, before the first step, what a checkpoint would not give back."""
        prepared = super()._prepare_for_training(*args, **kwargs)
        with together("training was not begun", self._world):
            if self.args.save_strategy != SaveStrategy.NO:
                checkpoints.check_comes_back(self.model)
                if not self.args.save_only_model:
                    checkpoints.names_by_group(self.optimizer, self.model)
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        directory = Path(resume_from_checkpoint)
        with together(f"training can't be resumed from {directory}", self._world):
            checkpoints.check_training_state(self.mesh, self.args.device, directory)
            put = checkpoints.read_weights(self.model, directory)
        put()

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        logger.info(f"Loading best model from {best} (score: {self.state.best_metric}).")
        with together(f"the best model can't be loaded from {best}", self._world):
            put = checkpoints.read_weights(self.model, Path(str(best)))
        put()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        with together(f"training can't be resumed from {checkpoint}", self._world):
            found = checkpoints.read_optimizer(
                self.optimizer, self.lr_scheduler, self.model, self.mesh, Path(checkpoint)
            )
        if found is None:
            logger.warning(f"{checkpoint} has no optimizer or scheduler state (save_only_model?); they start anew.")
            return
        self.optimizer.load_state_dict(found[0])
        self.lr_scheduler.load_state_dict(found[1])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        with together(f"training can't be resumed from {checkpoint}", self._world):
            put = checkpoints.read_streams(self.mesh, self.args.device, Path(checkpoint))
        if put is not None:
            put()
        else:
            logger.warning(
                f"{checkpoint} has no random streams of dp rank {self.mesh.dp_rank}; the resumed run draws other masks."
            )
