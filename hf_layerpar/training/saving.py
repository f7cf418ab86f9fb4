"""The Trainer's saving, resuming and best-model loading, for a model sharded over lp ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, get_last_checkpoint
from transformers.utils import logging

from hf_layerpar.checkpoint.saving import Writing
from hf_layerpar.checkpoint.trainer_state import StateWriting, names_by_group
from hf_layerpar.compat.trainer import (
    SCALER_NAME,
    SCHEDULER_NAME,
    TRAINER_STATE_NAME,
    TRAINING_ARGS_NAME,
    ExportableState,
)
from hf_layerpar.errors import CheckpointError
from hf_layerpar.ode.saving import sync
from hf_layerpar.run.first_rank import tell_all, together
from hf_layerpar.run.mesh import Mesh
from hf_layerpar.sharding import LayerParallel, layer_parallel
from hf_layerpar.training import checkpoints
from hf_layerpar.training.arguments import LayerParallelTrainingArguments

logger = logging.get_logger(__name__)


class _Saving:
    """A checkpoint whose files this rank is yet to write: now, or in a thread beside the training.

    work: what is left to write. It talks to no other rank. states: those of the optimizer, to be finished afterwards.
    """

    def __init__(
        self, partial: checkpoints.PartialCheckpoint, work: list[Callable[[], Any]], states: StateWriting | None
    ) -> None:
        self.partial, self.states, self._work = partial, states, work
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._write, name=f"writes {self.partial.final.name}")
        self._thread.start()

    def _write(self) -> None:
        try:
            for part in self._work:
                part()
        except Exception as error:
            self._error = error

    @property
    def is_under_way(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Raises what went wrong."""
        self.abandon() if self._thread is not None else self._write()
        if self._error is not None:
            raise self._error

    def abandon(self) -> None:
        """Waits for the thread; the directory is left for the next checkpoint to remove."""
        if self._thread is not None:
            self._thread.join()


def _write_own(weights: Writing, directory: Path) -> None:
    for name in weights.own(directory):
        sync(directory / name)


class ShardedSaving(Trainer):
    """The part of `LayerParallelTrainer` that writes and reads; see `checkpoints` for what is in a directory."""

    args: LayerParallelTrainingArguments
    mesh: Mesh
    model: Any  # stock says: of many types, or None
    optimizer: Any
    lr_scheduler: Any
    accelerator: Any
    state: Any
    _resumed: checkpoints.TrainingState | None = None
    _saving: _Saving | None = None

    @property
    def layer_parallel(self) -> LayerParallel:
        """The handle of the current model."""
        return layer_parallel(self.model)

    @property
    def _world(self) -> dist.ProcessGroup | None:
        return checkpoints.everyone(self.mesh)

    # ---- writing
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes what stock `from_pretrained` loads. Collective over all ranks, of which the lp ranks of one dp rank
        write their layers.

        Raises CheckpointError on all ranks where one can't write.
        """
        saver = self.layer_parallel.saver
        # as stock, a model that is whole on every rank can be saved by one of them alone
        alike = _internal_call or saver.is_spread
        if alike:  # before any waits for what the others say of their writing
            self.layer_parallel.agree({"about to": "save the model"})
        folder = Path(str(self.args.output_dir if output_dir is None else output_dir))
        with together(f"the model was not written to {folder}", self._world if alike else None):
            if saver.is_spread or self.args.should_save:
                saver.write(folder, writes=self._writes)
            if self.args.should_save:
                self._save_beside(folder)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    @property
    def _writes(self) -> bool:
        """Whether this rank's part of the model is written by it; others have the same part."""
        return self.mesh.dp_rank == self.mesh.tp_rank == 0

    def _save_beside(self, folder: Path) -> None:
        """What stock's `_save` writes beside a model."""
        folder.mkdir(parents=True, exist_ok=True)
        processing = self.processing_class
        if processing is None:
            processing = getattr(self.data_collator, "tokenizer", None)
        if processing is not None:
            processing.save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._finish_saving()
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        run_dir = Path(self._get_output_dir(trial=trial))
        final = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.save_strategy != SaveStrategy.NO and self.state.best_global_step:
            best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            if best == final or best.exists():
                self.state.best_model_checkpoint = str(best)
        partial = checkpoints.PartialCheckpoint(final, self.mesh, writer=self.args.should_save)
        saver, later = self.layer_parallel.saver, self.args.async_save
        work: list[Callable[[], Any]] = []
        with self.layer_parallel.whole():
            with partial.writing():
                weights = saver.part(self._writes, exact=True, staged=later)
            with partial.writing():
                weights.first(partial.path)
                if self.args.should_save:
                    self._save_beside(partial.path)
                    self._collect_callback_states()
                    self.state.save_to_json(str(partial.path / TRAINER_STATE_NAME))
            if later:
                work.append(lambda: _write_own(weights, partial.path))
            else:
                with partial.writing():
                    _write_own(weights, partial.path)
        states: StateWriting | None = None
        if not self.args.save_only_model:
            with partial.writing():
                states = self._state_writing(partial.path, staged=later)
                work.append(states.write)
                if self.args.should_save:
                    torch.save(self.lr_scheduler.state_dict(), partial.path / SCHEDULER_NAME)
                self._save_scaler(str(partial.path))
                self._save_rng_state(str(partial.path))
        self._saving = _Saving(partial, work, states)
        if later:
            self._saving.start()
        else:
            self._finish_saving()

    def _finish_saving(self) -> None:
        """Waits for the checkpoint that is being written, if any, and puts it in its place. Collective."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        with saving.partial.writing():
            saving.wait()
        if saving.states is not None:
            with saving.partial.writing():
                saving.states.finish()
        saving.partial.finish()
        final = saving.partial.final
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        with together(f"{final} is written, but older checkpoints were not removed", self._world):
            if self.args.should_save:
                checkpoints.rotate(final.parent, self.args.save_total_limit, self.state.best_model_checkpoint)

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint is being written by this process, beside the training."""
        return self._saving is not None and self._saving.is_under_way

    def _collect_callback_states(self) -> None:
        for callback in [c for c in [*self.callback_handler.callbacks, self.control] if isinstance(c, ExportableState)]:
            name, stored = type(callback).__name__, self.state.stateful_callbacks
            if isinstance(stored[name], list):
                stored[name].append(callback.state())
            else:
                stored[name] = callback.state()

    def _state_writing(self, folder: Path, staged: bool) -> StateWriting:
        """Collective over all ranks."""
        state = (self.optimizer, self.lr_scheduler, self.model, self.mesh, folder / checkpoints.OPTIMIZER)
        return StateWriting(*state, self._world, "the optimizer's state was not written", staged=staged)

    def _save_rng_state(self, output_dir: str) -> None:
        if self.mesh.lp_rank == self.mesh.tp_rank == 0:
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
        try:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        finally:
            if self._saving is not None:  # an error came between, and other ranks may be anywhere
                self._saving.abandon()
                self._saving = None

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._finish_saving()
        return super()._finalize_training(*args, **kwargs)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Also refuses, before the first step, what a checkpoint would not give back."""
        prepared = super()._prepare_for_training(*args, **kwargs)
        with together("training was not begun", self._world):
            if self.args.save_strategy != SaveStrategy.NO:
                checkpoints.check_comes_back(self.model)
                if not self.args.save_only_model:
                    names_by_group(self.optimizer, self.model)
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        directory, failed = Path(resume_from_checkpoint), f"training can't be resumed from {resume_from_checkpoint}"
        with together(failed, self._world):
            self._resumed = checkpoints.TrainingState(self.model, self.mesh, self.args.device, directory)
            put = checkpoints.read_weights(self.model, directory)
        with together(failed, self._world):
            put()

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        logger.info(f"Loading best model from {best} (score: {self.state.best_metric}).")
        with together(f"the best model can't be loaded from {best}", self._world):
            put = checkpoints.read_weights(self.model, Path(str(best)))
        with together(f"the best model can't be loaded from {best}", self._world):
            put()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        resumed, self._resumed = self._resumed, None  # read before the weights were put in
        assert resumed is not None
        with together(f"training can't be resumed from {checkpoint}", self._world):
            found = resumed.of(self.optimizer, self.lr_scheduler, self.model)
        if found is None:
            logger.warning(f"{checkpoint} has no optimizer or scheduler state (save_only_model?); they start anew.")
            return
        self.optimizer.load_state_dict(found[0])
        self.lr_scheduler.load_state_dict(found[1])

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.accelerator.scaler is None:  # a run in fp16 may go on in another precision
            return
        if not (Path(checkpoint) / SCALER_NAME).is_file():
            logger.warning(f"{checkpoint} has no scale of the loss (it was not trained in fp16); it starts anew.")
        super()._load_scaler(checkpoint)

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
