"""The Trainer's way to the Hub: pushes by the first process, failures told to all, and a card of the run."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, ModelCard
from huggingface_hub.utils import filter_repo_objects
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, SaveStrategy
from transformers.utils import CONFIG_NAME, logging

from hf_layerpar.compat.trainer import PushInProgress, hf_api
from hf_layerpar.hub.card import MARK, CardFacts, changes_of, make_card, merged, metrics_of, solver_facts
from hf_layerpar.hub.upload import CARD_NAME, Repository
from hf_layerpar.ode.files import is_of_a_checkpoint
from hf_layerpar.ode.pushing import VERSIONS, facts_for_card
from hf_layerpar.run.first_rank import on_first_rank
from hf_layerpar.training import checkpoints
from hf_layerpar.training.saving import ShardedSaving

logger = logging.get_logger(__name__)

HYPERPARAMETERS = (
    *("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "seed"),
    *("optim", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm"),
)
_LAST_CHECKPOINT = "last-checkpoint"
_STAGED = "_push-"
_NOT_PUSHED = ["_*", f"{PREFIX_CHECKPOINT_DIR}-*", ".*"]


class HubPushing(ShardedSaving):
    """The part of `LayerParallelTrainer` that pushes. Every push is one commit.

    Pushes of checkpoints have the model, its card and, by the hub_strategy, the checkpoint; push_to_hub() has all of
    output_dir but its checkpoints, as stock. They go on in the background; one that fails is logged as an error and
    leaves the Hub as it was, and training goes on.
    """

    callback_handler: Any
    push_in_progress: Any
    hub_model_id: str | None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As stock. Collective over all ranks: where the Hub refuses, all raise."""
        options = {} if private is None else {"private": private}  # older versions of stock don't take it
        self._on_first(lambda: super(HubPushing, self).init_hf_repo(token, **options))
        if not self.is_world_process_zero():  # all must know that the repository is there
            self.hub_model_id = self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name
            self.push_in_progress = None

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As stock: saves the model and uploads output_dir without its checkpoints. Collective over all ranks.

        Returns the commit (a future of it with blocking=False) on the first process, None on the others.

        Raises CheckpointError on all where the model can't be written. Else what failed on the first process, and
        HubError that quotes it on the others; with blocking=False a failure of the upload itself is in the future only.
        """
        args = self.args
        self.callback_handler.on_push_begin(args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        folder = Path(str(args.output_dir))

        def upload() -> CommitInfo | Future[CommitInfo]:
            self.create_model_card(**kwargs)
            self._await_pushes()
            paths = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
            files = [(name, folder / name) for name in filter_repo_objects(paths, ignore_patterns=_NOT_PUSHED)]
            commit = self._committing(files, commit_message or "Upload model", "", token, revision)
            return commit() if blocking else hf_api().run_as_future(commit)

        return self._on_first(upload)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Pushes a checkpoint's model, by the hub_strategy also the checkpoint itself, in the background."""
        args = self.args
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        running = self.push_in_progress
        busy = running is not None and not running.is_done()
        if busy and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        step = Path(checkpoint_folder).name.rpartition("-")[2]  # training may be further by now
        when = f"step {step}"
        if args.save_strategy != SaveStrategy.STEPS:
            when = f"epoch {int(self.state.epoch)}"
        output_dir = Path(str(args.output_dir))
        staged = output_dir / f"{_STAGED}{step}"

        def failed(error: Exception) -> None:
            logger.error(
                f"The push of {when} to {self.hub_model_id} failed: {type(error).__name__}: {error}. The Hub has "
                "what it had; the next push, or trainer.push_to_hub(), brings it up to date."
            )

        try:
            if not busy:
                for left_over in output_dir.glob(f"{_STAGED}*"):
                    shutil.rmtree(left_over)
            commit = self._stage(Path(checkpoint_folder), staged, f"Training in progress, {when}")
        except Exception as error:  # of this rank alone, which the others don't wait for
            failed(error)
            shutil.rmtree(staged, ignore_errors=True)
            return

        def push() -> None:
            try:
                commit()
            except Exception as error:
                failed(error)
            finally:
                shutil.rmtree(staged, ignore_errors=True)

        job = hf_api().run_as_future(push)  # one after the other, in this order
        if running is not None and busy:
            running.jobs.append(job)
        else:
            self.push_in_progress = PushInProgress([job])  # pyright: ignore[reportArgumentType]

    def _stage(self, folder: Path, staged: Path, message: str) -> Callable[[], CommitInfo]:
        """Links what is to be pushed of the checkpoint `folder`, since that may be deleted before the upload is
        through; returns what uploads it."""
        self.create_model_card()
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        files = {name: folder / name for name in names if not checkpoints.is_training_state(name)}
        files[CARD_NAME] = Path(str(self.args.output_dir)) / CARD_NAME
        replaced = ""
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            replaced = _LAST_CHECKPOINT if self.args.hub_strategy == HubStrategy.CHECKPOINT else folder.name
            files |= {f"{replaced}/{name}": folder / name for name in names}
        for name, path in files.items():
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            (shutil.copy2 if name == CARD_NAME else _link)(path, staged / name)
        return self._committing([(name, staged / name) for name in files], message, replaced)

    def _finish_current_push(self) -> None:
        """Collective over all ranks, so that no process goes ahead into a long wait for the first one."""
        if self.hub_model_id is not None:
            self._on_first(self._await_pushes)

    def _await_pushes(self) -> None:
        super()._finish_current_push()

    def _committing(
        self,
        files: list[tuple[str, Path]],
        message: str,
        folder: str,
        token: str | None = None,
        revision: str | None = None,
    ) -> Callable[[], CommitInfo]:
        """To be called for the commit of `files`, in which they also replace all of `folder` in the repository."""
        whole = CONFIG_NAME in dict(files)  # and not adapters, which may lie beside their base model

        def replaces(name: str) -> bool:
            return (whole and is_of_a_checkpoint(name)) or bool(folder and name.startswith(f"{folder}/"))

        token = self.args.hub_token if token is None else token
        revision = self.args.hub_revision if revision is None else revision
        repo_id = str(self.hub_model_id)

        def commit() -> CommitInfo:
            repository = Repository(repo_id, token=token, revision=revision)
            path = dict(files)[CARD_NAME]
            card = ModelCard.load(path, ignore_metadata_errors=True)
            if MARK in card.text:
                merged(card, repository.card()).save(path)
            return repository.commit(files, message, replaces=replaces)

        return commit

    def _on_first(self, action: Callable[[], Any]) -> Any:
        return on_first_rank(action, "the push to the Hub", self._world, self.args.device)

    # ---- the card
    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Writes output_dir/README.md from the run's state, on the first process. One that is there and was written by
        people is kept, and tagged; tags of another are kept.

        The arguments are stock's. dataset: what the data is called, the Hub's names (owner/name) among them become
        metadata; dataset_tags is another name of it.
        """
        if not self.is_world_process_zero():
            return
        args = self.args
        path = Path(str(args.output_dir)) / CARD_NAME
        there = ModelCard.load(path, ignore_metadata_errors=True) if path.is_file() else None
        base = getattr(self.model, "model_tags", None) or []
        facts = facts_for_card(self.model)
        log = self.state.log_history
        evaluations = evaluations_of(log)
        solver: dict[str, Any] = {"lp_size": self.mesh.lp_size, "dp_size": self.mesh.dp_size}
        if args.controller != "off":
            solver["controller"] = args.controller
        training = arguments_in_force(args, HYPERPARAMETERS)
        training["optimizer steps"] = self.state.global_step
        if seconds := [entry["train_runtime"] for entry in log if "train_runtime" in entry]:
            training["seconds"] = seconds[-1]
        facts |= {
            "name": model_name or self.hub_model_id or path.absolute().parent.name,
            "base_model": finetuned_from or facts["base_model"],
            "task": _first(tasks) or facts["task"],
            "datasets": tuple(_listed(dataset) or _listed(dataset_tags) or _dataset_names(self)),
            "tags": (*base, *_listed(tags), "generated_from_trainer"),
            "language": language,
            "license": license,
            "solver": solver_facts(args.layer_parallel_config.to_dict(), **solver),
            "changes": changes_of(log),
            "training": training,
            "metrics": {
                split: {k: v for k, v in rows[-1].items() if k != "step"} for split, rows in evaluations.items()
            },
            "evaluation": tuple(evaluations.get("eval", ())),
            "versions": {name: importlib.metadata.version(name) for name in (*VERSIONS, "accelerate")},
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        merged(make_card(CardFacts(**facts)), there).save(path)


def arguments_in_force(args: TrainingArguments, names: Iterable[str]) -> dict[str, Any]:
    """The named training arguments, and the precision, which accelerate's config may set instead of them."""
    values = args.to_sanitized_dict()
    chosen = {name: values[name] for name in names if name in values}
    return chosen | {"mixed_precision": args.mixed_precision}


def evaluations_of(log: Iterable[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Prefix of the evaluation ("eval" unless another was given) -> {"step", metric: value} in order."""
    found: dict[str, list[dict[str, Any]]] = {}
    for entry in log:
        for prefix in [key.removesuffix("_runtime") for key in entry if key.endswith("_runtime")]:
            if prefix == "train":
                continue
            values = {k: v for k, v in metrics_of(entry, prefix).items() if isinstance(v, int | float)}
            if values:
                found.setdefault(prefix, []).append({"step": entry["step"]} | values)
    return found


def _dataset_names(trainer: Any) -> list[str]:
    """What a data set of `datasets` says it is called."""
    data = trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset
    name = getattr(getattr(data, "info", None), "dataset_name", None)
    return [name] if name and name not in ("csv", "json", "pandas", "parquet", "text", "generator") else []


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else [v for v in value or [] if v]


def _first(value: str | list[str] | None) -> str | None:
    return next(iter(_listed(value)), None)


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
