"""Training checkpoints of a sharded model: whole or absent, and readable at any number of ranks.

Beside the weights, which are an ordinary HuggingFace checkpoint, a `checkpoint-N` directory holds

    optimizer/                        the optimizer's states by parameter name, its groups and the scheduler of these
                                      (`hf_layerpar.checkpoint.trainer_state`)
    scheduler.pt, trainer_state.json  as stock; with fp16 scaler.pt, the scale of the loss
    rng_state_<dp rank>.pth           random streams; the ranks of one dp rank share theirs
    exact_weights-*.safetensors       only where folding h into the stock weights (split form) rounds them
    contents.json                     the names of all files, so that a lost one is missed

It is written as `_checkpoint-N.partial` and renamed when every process has written its part. All of it is checked, and
what this rank needs of it beside the weights is read, before anything is loaded.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerState

from hf_layerpar.checkpoint import reading as weights
from hf_layerpar.checkpoint.saving import EXACT_WEIGHTS, check_shared
from hf_layerpar.checkpoint.trainer_state import SavedState, read_file
from hf_layerpar.compat.trainer import (
    SCALER_NAME,
    SCHEDULER_NAME,
    TRAINER_STATE_NAME,
    sort_checkpoints,
    unwrap_peft_model,
)
from hf_layerpar.compat.transformers import has_adapters
from hf_layerpar.errors import CheckpointError
from hf_layerpar.ode.files import check_whole, read_json, reading
from hf_layerpar.ode.saving import sync
from hf_layerpar.run.first_rank import together
from hf_layerpar.run.mesh import Mesh
from hf_layerpar.sharding import layer_parallel
from hf_layerpar.training.streams import kept_streams, main_streams, set_main_streams

CONTENTS = "contents.json"
OPTIMIZER = "optimizer"
_STATE_NAMES = (CONTENTS, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME)


def is_training_state(name: str) -> bool:
    """Whether a file of a checkpoint serves to go on with the training, and not to use the model."""
    return name in _STATE_NAMES or name.startswith((f"{OPTIMIZER}/", "optimizer-", "rng_state_", EXACT_WEIGHTS))


def everyone(mesh: Mesh) -> dist.ProcessGroup | None:
    return dist.group.WORLD if mesh.world_size > 1 else None


# ---- directories
class PartialCheckpoint:
    """A directory for all processes to write into, which becomes `final` when all are done. Collective.

    Killed at any moment, it leaves `final` as it was, and a `_*` directory that the next one removes. path: where to
    write. writer: this process makes and renames it. Raises CheckpointError on every process when one fails.
    """

    def __init__(self, final: Path, mesh: Mesh, *, writer: bool) -> None:
        self.final, self.path = final, final.with_name(f"_{final.name}.partial")
        self.failed = f"{final} was not written (earlier checkpoints are untouched)"
        self._group, self._writer = everyone(mesh), writer
        with self.writing():
            if writer:
                final.parent.mkdir(parents=True, exist_ok=True)
                restore_replaced(final.parent)
                for left_over in final.parent.glob("_checkpoint-*"):
                    shutil.rmtree(left_over)
                self.path.mkdir()
        with self.writing():
            check_shared(self.path)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Around a part of the work. Collective at its end: where it failed on a rank, all raise, and what was written
        is gone."""
        try:
            with together(self.failed, self._group):
                yield
        except CheckpointError:
            if self._writer:  # what fills the disk
                shutil.rmtree(self.path, ignore_errors=True)
            raise

    def finish(self) -> None:
        """To be called when every rank has written, and synced, its files; those of the writer are synced here."""
        with self.writing():
            if self._writer:
                for path in self.path.rglob("*"):
                    sync(path)
                names = sorted(p.relative_to(self.path).as_posix() for p in self.path.rglob("*") if p.is_file())
                (self.path / CONTENTS).write_text(json.dumps({"files": names}, indent=2) + "\n", "utf-8")
                sync(self.path / CONTENTS)
                sync(self.path)
                _put_in_place(self.path, self.final)


def _put_in_place(partial: Path, final: Path) -> None:
    replaced = final.with_name(f"_{final.name}.replaced")
    if final.exists():
        final.rename(replaced)
    try:
        partial.rename(final)
    except OSError:
        restore_replaced(final.parent)
        raise
    sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def restore_replaced(run_dir: Path) -> None:
    """Undoes a replacement of a checkpoint by one of the same step that was killed between its two renames."""
    for replaced in run_dir.glob("_checkpoint-*.replaced"):
        final = replaced.with_name(replaced.name.removeprefix("_").removesuffix(".replaced"))
        if not final.exists():
            replaced.rename(final)


def rotate(run_dir: Path, limit: int | None, best: str | None) -> None:
    """Keeps the `limit` newest checkpoints, the newest and the best among them always.

    A checkpoint is renamed before it is deleted, so that no half-deleted one is ever found by its name.
    """
    if limit is None or limit <= 0:
        return
    checkpoints = sort_checkpoints(str(run_dir), use_mtime=True)
    protected = {Path(checkpoints[-1])} | ({Path(best)} if best else set())
    surplus = len(checkpoints) - max(limit, len(protected))
    for path in [Path(c) for c in checkpoints if Path(c) not in protected][: max(surplus, 0)]:
        doomed = path.with_name(f"_{path.name}.deleted-{uuid.uuid4().hex[:8]}")
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


# ---- weights
def read_weights(model: nn.Module, directory: Path) -> Callable[[], None]:
    """Finds out what the weights of a checkpoint are. The function that it returns puts what this rank holds into the
    model.

    Raises CheckpointError when a file is damaged, or when any tensor of the model is not in the checkpoint, or has
    another shape.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is no directory; give a checkpoint-N directory")
    _check_contents(directory, lambda name: name.startswith(EXACT_WEIGHTS) or not is_training_state(name))
    check_whole(directory)
    if not _adapters(model):
        return weights.read_weights(layer_parallel(model), directory)
    found = [(name, _read_adapters(model, name, directory)) for name in _adapters(model)]

    def put() -> None:
        from peft import set_peft_model_state_dict

        for name, read in found:
            set_peft_model_state_dict(model, read, adapter_name=name)

    return put


def check_comes_back(model: nn.Module) -> None:
    """Raises CheckpointError for a model that training would change, but that its checkpoints would not give back."""
    handle, kind = layer_parallel(model), type(model).__name__
    here = {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    known = {name: shape for name, (shape, _) in handle._layout.items()}
    changed = {name for name, t in here.items() if known.get(name) != tuple(t.shape)}
    changed |= {name for name in known if name not in here and handle.owner_of.get(name, 0) == handle.lp_rank}
    changed |= {p.names[0] for p in handle.ends for at, key in p.slots if at._parameters.get(key) is not p.value}
    if changed:
        raise CheckpointError(
            f"{len(changed)} tensors of the {kind} were added, resized or replaced after it was parallelized, such as "
            f"{sorted(changed)[:4]}; resize embeddings, add adapters and change heads before the trainer is made"
        )
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    if _adapters(model):
        unsaved = set(trained) - {
            id(t) for name in _adapters(model) for t in _adapter_state(model, name, here).values()
        }
        prompts = any(model.peft_config[name].is_prompt_learning for name in _adapters(model))  # pyright: ignore
        if unsaved and not prompts:
            raise CheckpointError(
                f"{len(unsaved)} trained parameters of the {kind} are in none of the adapters that a checkpoint has: "
                f"{sorted(trained[i] for i in unsaved)[:4]}; name their modules in the adapter config's "
                "modules_to_save, or freeze them"
            )


def _adapters(model: Any) -> list[str]:
    """The adapters that a checkpoint has: all of a PEFT model, the active one of a model that some were added to."""
    if unwrap_peft_model(model) is not model:
        return list(model.peft_config)
    return model.active_adapters()[:1] if has_adapters(model) else []


def _adapter_state(model: Any, name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, dict(state_dict), name, save_embedding_layers=False)


def _read_adapters(model: Any, name: str, directory: Path) -> dict[str, Tensor]:
    from peft import load_peft_weights

    if unwrap_peft_model(model) is not model and name != "default":
        directory = directory / name
        if not directory.is_dir():
            raise CheckpointError(
                f"{directory}, the adapter {name!r}, is missing; give a checkpoint-N directory written whole"
            )
        check_whole(directory)
    if not any(directory.glob("adapter_model.*")):
        raise CheckpointError(f"{directory} holds no adapter weights; give a checkpoint-N directory written whole")
    with reading(directory):
        weights = load_peft_weights(str(directory), device="cpu")
    if unwrap_peft_model(model) is model:
        weights = {key.removeprefix("base_model.model."): tensor for key, tensor in weights.items()}
    here = model.state_dict()
    wanted = _adapter_state(model, name, here)
    lost = sorted(key for key, tensor in wanted.items() if key not in weights or weights[key].shape != tensor.shape)
    lost += sorted(
        key for key, t in weights.items() if key in here and here[key].shape != t.shape and key not in wanted
    )
    if lost:
        raise CheckpointError(
            f"{directory} does not hold all adapter weights: {len(lost)} missing or of another shape {lost[:4]}; load "
            "a checkpoint of this adapter configuration"
        )
    return weights


# ---- training state
class TrainingState:
    """All of a checkpoint beside its weights, read by this rank as far as it needs it; nothing is changed.

    Raises CheckpointError for what is lost or damaged, or of an earlier format.
    """

    def __init__(self, model: nn.Module, mesh: Mesh, device: torch.device, directory: Path) -> None:
        self.directory, self._mesh = directory, mesh
        if not directory.is_dir():
            raise CheckpointError(f"{directory} is no directory; give a checkpoint-N directory")
        path = directory / TRAINER_STATE_NAME
        if not path.is_file():
            raise CheckpointError(
                f"{directory} has no {TRAINER_STATE_NAME}, so it is no whole checkpoint to resume from; give a "
                "checkpoint-N directory, or resume_from_checkpoint=True for the last whole one of output_dir"
            )
        _check_contents(directory)
        values = read_json(path)
        with reading(path):
            if odd := [name for name in ("global_step", "train_batch_size") if not isinstance(values.get(name), int)]:
                raise ValueError(f"no number for {odd}")
            TrainerState(**values)
        if old := sorted(directory.glob("optimizer-*-of-*.pt")):
            raise CheckpointError(
                f"{directory} has its optimizer states in {old[0].name}, a format that is no longer read: resume with "
                f"the version that wrote it, or remove {CONTENTS} and optimizer-*.pt to go on from the weights alone"
            )
        schedule, folder = directory / SCHEDULER_NAME, directory / OPTIMIZER
        self._schedule = read_file(schedule) if folder.is_dir() or schedule.is_file() else None
        self._saved = SavedState(folder, model) if folder.is_dir() else None
        if (directory / SCALER_NAME).is_file():
            read_file(directory / SCALER_NAME)
        read_streams(mesh, device, directory)

    def of(self, optimizer: Any, scheduler: Any, model: nn.Module) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """(state dict of the optimizer, of the scheduler) of what this rank holds; None where there are none.

        Raises CheckpointError when the parameter groups differ.
        """
        if self._saved is None or self._schedule is None:
            return None
        return self._saved.of(optimizer, scheduler, model, self._mesh, self._schedule)


def _check_contents(directory: Path, needed: Callable[[str], bool] = lambda name: True) -> None:
    """That no file is lost that was written and is needed; of checkpoints that say what they have."""
    if (directory / CONTENTS).is_file():
        names: Any = read_json(directory / CONTENTS).get("files")
        with reading(directory / CONTENTS):
            lost = [name for name in names if needed(name) and not (directory / name).is_file()]
        if lost:
            raise CheckpointError(
                f"{directory} was written with {lost}, but that is missing; copy it anew, use another checkpoint, or "
                f"remove {CONTENTS} to go on without"
            )


# ---- random streams
def save_streams(mesh: Mesh, device: torch.device, directory: Path) -> None:
    """Writes the random streams of this dp rank. For one lp rank to call."""
    states = main_streams()
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state(device)
    path = directory / f"rng_state_{mesh.dp_rank}.pth"
    torch.save(states, path)
    sync(path)


def read_streams(mesh: Mesh, device: torch.device, directory: Path) -> Callable[[], None] | None:
    """Reads and tries them; the function that it returns sets them. None where there are none for this dp rank."""
    path = directory / f"rng_state_{mesh.dp_rank}.pth"
    if not path.is_file():
        return None
    states = read_file(path)
    with reading(path), kept_streams():
        set_main_streams(states)

    def put() -> None:
        set_main_streams(states)
        if device.type != "cpu" and "device" in states:
            torch.get_device_module(device).set_rng_state(states["device"], device)

    return put
