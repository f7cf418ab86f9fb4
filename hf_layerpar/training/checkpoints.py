"""Training checkpoints of a sharded model: whole or absent, and readable at any lp size.

Beside the weights, which are an ordinary HuggingFace checkpoint, a `checkpoint-N` directory holds

    optimizer-<lp rank>-of-<lp size>.pt   states by parameter name, of what that lp rank owns
    scheduler.pt, trainer_state.json      as stock
    rng_state_<dp rank>.pth               random streams; the lp ranks of one dp rank share theirs
    exact_weights.safetensors             only where folding h into the stock weights (split form) rounds them

It is written as `_checkpoint-N.partial` and renamed when every process has written its part.
"""

from __future__ import annotations

import copy
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import sort_checkpoints, unwrap_peft_model

from hf_layerpar.errors import CheckpointError
from hf_layerpar.ode.checkpoint import from_pretrained, sync
from hf_layerpar.ode.convert import convert_to_ode, ode_view
from hf_layerpar.ode.fold import can_fold, folded_state_dict
from hf_layerpar.run.mesh import Mesh
from hf_layerpar.sharding import layer_parallel
from hf_layerpar.training.streams import kept_streams, main_streams, set_main_streams

EXACT_WEIGHTS = "exact_weights.safetensors"
_OPTIMIZER = re.compile(r"optimizer-(\d{5})-of-(\d{5})\.pt")


def is_training_state(name: str) -> bool:
    """Whether a file of a checkpoint serves to go on with the training, and not to use the model."""
    return name in (EXACT_WEIGHTS, SCHEDULER_NAME, TRAINER_STATE_NAME) or name.startswith(("optimizer-", "rng_state_"))


# ---- directories
@contextmanager
def whole_directory(final: Path, mesh: Mesh, *, writer: bool) -> Iterator[Path]:
    """A directory for all processes to write into, which becomes `final` when all are done. Collective.

    Killed at any moment, it leaves `final` as it was, and a `_*` directory that the next write removes. `writer`: this
    process makes and renames it. Raises CheckpointError on every process when one fails; `final` is left as it was.
    """
    partial = final.with_name(f"_{final.name}.partial")
    if writer:
        final.parent.mkdir(parents=True, exist_ok=True)
        restore_replaced(final.parent)
        for left_over in final.parent.glob("_checkpoint-*"):
            shutil.rmtree(left_over)
        partial.mkdir()
    mesh.barrier()
    failure: Exception | None = None
    try:
        yield partial
        _sync_files(partial)
    except Exception as error:
        failure = error
    mine = None if failure is None else f"{type(failure).__name__}: {failure}"
    failures: list[str | None] = [mine] * mesh.world_size
    if mesh.world_size > 1:
        dist.all_gather_object(failures, mine)
    said = {rank: text for rank, text in enumerate(failures) if text is not None}
    if said:
        raise CheckpointError(
            f"{final} was not written, by world rank: {said}; earlier checkpoints are untouched"
        ) from failure
    if writer:
        replaced = final.with_name(f"_{final.name}.replaced")
        if final.exists():
            final.rename(replaced)
        partial.rename(final)
        sync(final.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    mesh.barrier()


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


def _sync_files(directory: Path) -> None:
    for path in directory.iterdir():
        if path.is_file():
            sync(path)


# ---- weights
def save_exact_weights(model: nn.Module, state_dict: Mapping[str, Tensor], directory: Path) -> None:
    """Writes the tensors that folding the step size into the stock weights would round, as they are."""
    base = _hf_model(model)
    settings = ode_view(base).settings
    if base is not model or settings.form != "split" or not can_fold(base, state_dict):
        return
    exact = {
        name: state_dict[name].contiguous()
        for name, folded in folded_state_dict(base, state_dict).items()
        if folded is not state_dict[name] and not torch.equal(folded / settings.step_size, state_dict[name])
    }
    if exact:
        save_file(exact, directory / EXACT_WEIGHTS, metadata={"format": "pt"})


def load_weights(model: nn.Module, directory: Path) -> None:
    """Copies what this rank holds from a checkpoint, through `from_pretrained` and its key conversion.

    Raises CheckpointError when any tensor of the model is not in the checkpoint, or has another shape.
    """
    base = _hf_model(model)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is no directory; give a checkpoint-N directory")
    if base is not model:
        _load_adapters(model, directory)
        return
    if not any(directory.glob("*.safetensors")) and not any(directory.glob("pytorch_model*.bin")):
        raise CheckpointError(f"{directory} holds no model weights; give a checkpoint-N directory written whole")
    with kept_streams():
        if getattr(transformers, type(base).__name__, None) is type(base):
            full, info = from_pretrained(directory, output_loading_info=True)
        else:  # a class of the user's own, which the checkpoint's config can't name
            full, info = type(base).from_pretrained(directory, output_loading_info=True)  # pyright: ignore
            full = convert_to_ode(full)
    lost = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "mismatched_keys") if info[kind]}
    if lost:
        raise CheckpointError(
            f"{directory} does not hold all weights of {type(base).__name__}: "
            + "; ".join(f"{len(names)} {kind} {names[:4]}" for kind, names in lost.items())
            + "; load a checkpoint of this model (same architecture, depth and head)"
        )
    state_dict = full.state_dict()
    if (directory / EXACT_WEIGHTS).is_file():
        state_dict |= load_file(directory / EXACT_WEIGHTS)
    layer_parallel(model).load_state_dict(state_dict)


def _load_adapters(model: nn.Module, directory: Path) -> None:
    from peft import PeftModel, load_peft_weights, set_peft_model_state_dict

    assert isinstance(model, PeftModel)
    weights = load_peft_weights(str(directory), device="cpu")
    result = set_peft_model_state_dict(model, weights, adapter_name=str(model.active_adapter))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    lost = sorted(trainable & set(result.missing_keys))
    if lost:
        raise CheckpointError(
            f"{directory} does not hold all adapter weights: {len(lost)} missing {lost[:4]}; load a checkpoint of this "
            "adapter configuration"
        )


def _hf_model(model: nn.Module) -> PreTrainedModel:
    return unwrap_peft_model(model)  # type: ignore[return-value]


# ---- optimizer
def save_optimizer(optimizer: Any, model: nn.Module, mesh: Mesh, directory: Path) -> None:
    """Writes the optimizer states of this lp rank by parameter name. For one dp rank to call."""
    names = _names_by_group(optimizer, model)
    packed = optimizer.state_dict()
    owner_of = layer_parallel(model).owner_of
    flat = [name for group in names for name in group]
    mine = {flat[index]: state for index, state in packed["state"].items() if owner_of[flat[index]] == mesh.lp_rank}
    options = [{k: v for k, v in group.items() if k != "params"} for group in packed["param_groups"]]
    groups = [{"options": o, "names": n} for o, n in zip(options, names, strict=True)]
    path = directory / f"optimizer-{mesh.lp_rank:05d}-of-{mesh.lp_size:05d}.pt"
    torch.save({"state": mine, "groups": groups}, path)


def load_optimizer(optimizer: Any, model: nn.Module, directory: Path) -> bool:
    """Restores what this rank holds from the files of any number of lp ranks; False where there are none.

    Raises CheckpointError when one of the files is missing, or the parameter groups differ.
    """
    parts = _parts(directory, _OPTIMIZER)
    if not parts:
        return False
    states: dict[str, Any] = {}
    saved_groups: list[tuple[dict[str, Any], set[str]]] = []
    for path in parts:
        part = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        states |= part["state"]
        saved_groups = saved_groups or [(group["options"], set()) for group in part["groups"]]
        for (_, members), group in zip(saved_groups, part["groups"], strict=True):
            members |= set(group["names"])
    names = _names_by_group(optimizer, model)
    if len(names) != len(saved_groups) or any(
        not set(here) <= members for here, (_, members) in zip(names, saved_groups, strict=True)
    ):
        raise CheckpointError(
            f"{directory} was written with {len(saved_groups)} parameter groups of other parameters than the "
            f"{len(names)} here; resume with the same optimizer settings and the same trainable parameters"
        )
    packed = optimizer.state_dict()
    flat = [name for group in names for name in group]
    # a parameter without a state had none when saved: all files are there, and the groups name it
    # (deepcopy: the files are only mapped, and may be rotated away)
    packed["state"] = {index: copy.deepcopy(states[name]) for index, name in enumerate(flat) if name in states}
    for group, (options, _) in zip(packed["param_groups"], saved_groups, strict=True):
        group |= options
    optimizer.load_state_dict(packed)
    return True


def _parts(directory: Path, pattern: re.Pattern[str]) -> list[Path]:
    """The files of all lp ranks in their order, or none at all. Raises CheckpointError when some are lost."""
    found = {int(m[1]): (int(m[2]), p) for p in directory.iterdir() if (m := pattern.fullmatch(p.name))}
    size = next(iter(found.values()))[0] if found else 0
    if sorted(found) != list(range(size)):
        names = pattern.pattern.split("-")[0]
        raise CheckpointError(f"{directory} has {names} files of lp ranks {sorted(found)} of {size}; all are needed")
    return [found[rank][1] for rank in range(size)]


def _names_by_group(optimizer: Any, model: nn.Module) -> list[list[str]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


# ---- random streams
def save_streams(mesh: Mesh, device: torch.device, directory: Path) -> None:
    """Writes the random streams of this dp rank. For one lp rank to call."""
    states = main_streams()
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state(device)
    torch.save(states, directory / f"rng_state_{mesh.dp_rank}.pth")


def load_streams(mesh: Mesh, device: torch.device, directory: Path) -> bool:
    """Restores them on every lp rank; False where the checkpoint has none for this dp rank."""
    path = directory / f"rng_state_{mesh.dp_rank}.pth"
    if not path.is_file():
        return False
    with safe_globals():
        states = torch.load(path, map_location="cpu", weights_only=True)
    set_main_streams(states)
    if device.type != "cpu" and "device" in states:
        torch.get_device_module(device).set_rng_state(states["device"], device)
    return True
