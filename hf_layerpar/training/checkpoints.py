"""Training checkpoints of a sharded model: whole or absent, and readable at any lp size.

Beside the weights, which are an ordinary HuggingFace checkpoint, a `checkpoint-N` directory holds

    optimizer-<lp rank>-of-<lp size>.pt   states by parameter name, of what that lp rank owns; its parameter groups, and
                                          the scheduler of these
    scheduler.pt, trainer_state.json      as stock
    rng_state_<dp rank>.pth               random streams; the lp ranks of one dp rank share theirs
    exact_weights.safetensors             only where folding h into the stock weights (split form) rounds them
    contents.json                         the names of all files, so that a lost one is missed

It is written as `_checkpoint-N.partial` and renamed when every process has written its part. All of it is read and
checked before anything of it is loaded.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerState
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import sort_checkpoints, unwrap_peft_model

from hf_layerpar.errors import CheckpointError
from hf_layerpar.ode.checkpoint import from_pretrained, sync
from hf_layerpar.ode.convert import convert_to_ode, ode_view
from hf_layerpar.ode.files import check_whole, read_json, reading
from hf_layerpar.ode.fold import can_fold, folded_state_dict
from hf_layerpar.run.first_rank import together
from hf_layerpar.run.mesh import Mesh
from hf_layerpar.sharding import layer_parallel
from hf_layerpar.training.streams import kept_streams, main_streams, set_main_streams

EXACT_WEIGHTS = "exact_weights.safetensors"
CONTENTS = "contents.json"
_OPTIMIZER = re.compile(r"optimizer-(\d{5})-of-(\d{5})\.pt")
_STATE_NAMES = (EXACT_WEIGHTS, CONTENTS, SCHEDULER_NAME, TRAINER_STATE_NAME)


def is_training_state(name: str) -> bool:
    """Whether a file of a checkpoint serves to go on with the training, and not to use the model."""
    return name in _STATE_NAMES or name.startswith(("optimizer-", "rng_state_"))


def everyone(mesh: Mesh) -> dist.ProcessGroup | None:
    return dist.group.WORLD if mesh.world_size > 1 else None


# ---- directories
@contextmanager
def whole_directory(final: Path, mesh: Mesh, *, writer: bool) -> Iterator[Path]:
    """A directory for all processes to write into, which becomes `final` when all are done. Collective.

    Killed at any moment, it leaves `final` as it was, and a `_*` directory that the next write removes. `writer`: this
    process makes and renames it. Raises CheckpointError on every process when one fails; `final` is left as it was.
    """
    group, failed = everyone(mesh), f"{final} was not written (earlier checkpoints are untouched)"
    partial = final.with_name(f"_{final.name}.partial")
    try:
        with together(failed, group):
            if writer:
                final.parent.mkdir(parents=True, exist_ok=True)
                restore_replaced(final.parent)
                for left_over in final.parent.glob("_checkpoint-*"):
                    shutil.rmtree(left_over)
                partial.mkdir()
        with together(failed, group):
            yield partial
            _sync_files(partial)
        with together(failed, group):
            if writer:
                names = sorted(path.relative_to(partial).as_posix() for path in partial.rglob("*") if path.is_file())
                (partial / CONTENTS).write_text(json.dumps({"files": names}, indent=2) + "\n", "utf-8")
                sync(partial / CONTENTS)
                sync(partial)
                _put_in_place(partial, final)
    except CheckpointError:
        if writer:  # what fills the disk
            shutil.rmtree(partial, ignore_errors=True)
        raise


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


def _sync_files(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        sync(path)


# ---- weights
def save_exact_weights(model: nn.Module, state_dict: Mapping[str, Tensor], directory: Path) -> None:
    """Writes the tensors that folding the step size into the stock weights would round, as they are."""
    settings = ode_view(model).settings
    if not isinstance(model, PreTrainedModel) or _adapters(model):
        return
    if settings.form != "split" or not can_fold(model, state_dict):
        return
    exact = {
        name: state_dict[name].contiguous()
        for name, folded in folded_state_dict(model, state_dict).items()
        if folded is not state_dict[name] and not torch.equal(folded / settings.step_size, state_dict[name])
    }
    if exact:
        save_file(exact, directory / EXACT_WEIGHTS, metadata={"format": "pt"})


def one_of_each(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the further names of tied tensors, which safetensors refuses to write."""
    first: dict[int, str] = {}
    for name, tensor in state_dict.items():
        first.setdefault(id(tensor), name)
    return {name: tensor.contiguous() for name, tensor in state_dict.items() if first[id(tensor)] == name}


def read_weights(model: nn.Module, directory: Path) -> Callable[[], None]:
    """Reads the weights of a checkpoint, by `from_pretrained` with its key conversion. The function that it returns
    puts what this rank holds into the model.

    Raises CheckpointError when a file is damaged, or when any tensor of the model is not in the checkpoint, or has
    another shape.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is no directory; give a checkpoint-N directory")
    _check_contents(directory, lambda name: name == EXACT_WEIGHTS or not is_training_state(name))
    check_whole(directory)
    if _adapters(model):
        found = [(name, _read_adapters(model, name, directory)) for name in _adapters(model)]

        def put() -> None:
            from peft import set_peft_model_state_dict

            for name, weights in found:
                set_peft_model_state_dict(model, weights, adapter_name=name)

        return put
    if not any(directory.glob("*.safetensors")) and not any(directory.glob("pytorch_model*.bin")):
        raise CheckpointError(f"{directory} holds no model weights; give a checkpoint-N directory written whole")
    handle = layer_parallel(model)
    state_dict: dict[str, Tensor] = {}
    if not isinstance(model, PreTrainedModel):  # a module around one, of which there is the state dict only
        for path in sorted(directory.glob("model*.safetensors")):
            with reading(path):
                state_dict |= load_file(path)
        return lambda: handle.load_state_dict(state_dict)
    with kept_streams(), reading(directory):
        if getattr(transformers, type(model).__name__, None) is type(model):
            full, info = from_pretrained(directory, output_loading_info=True)
        else:  # a class of the user's own, which the checkpoint's config can't name
            full, info = type(model).from_pretrained(directory, output_loading_info=True)  # pyright: ignore
            full = convert_to_ode(full)
    lost = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "mismatched_keys") if info[kind]}
    if lost:
        raise CheckpointError(
            f"{directory} does not hold all weights of {type(model).__name__}: "
            + "; ".join(f"{len(names)} {kind} {names[:4]}" for kind, names in lost.items())
            + "; load a checkpoint of this model (same architecture, depth and head)"
        )
    state_dict = full.state_dict()
    exact = directory / EXACT_WEIGHTS
    if exact.is_file():
        with reading(exact):
            state_dict |= load_file(exact)
    return lambda: handle.load_state_dict(state_dict)


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
    elif isinstance(model, PreTrainedModel) and getattr(model, "hf_quantizer", None) is None:
        _check_config(model, known)


def _check_config(model: PreTrainedModel, known: Mapping[str, tuple[int, ...]]) -> None:
    """What `from_pretrained` does first: a model made from the config alone, which must have the same tensors."""
    kind = type(model).__name__
    remedy = (
        "a checkpoint of it could not be loaded. Set what differs in the config and build the model from that, put it "
        "into a module of your own, or train with save_strategy='no'"
    )
    try:
        with kept_streams(), ExitStack() as stack:
            for context in type(model).get_init_context(model.dtype, False, False, None):
                stack.enter_context(context)
            made = type(model)(copy.deepcopy(model.config))
    except Exception as error:
        raise CheckpointError(
            f"{kind} can't be made from its config alone ({type(error).__name__}: {error}), so {remedy}"
        ) from error
    shapes = {name: tuple(t.shape) for name, t in made.state_dict().items() if isinstance(t, Tensor)}
    odd = sorted(name for name in known.keys() | shapes.keys() if known.get(name) != shapes.get(name))
    if odd:
        first = odd[0]
        raise CheckpointError(
            f"{len(odd)} tensors of the {kind} are not those of its config, such as {first}: {known.get(first)} here, "
            f"{shapes.get(first)} by the config, so {remedy}"
        )


def _adapters(model: Any) -> list[str]:
    """The adapters that a checkpoint has: all of a PEFT model, the active one of a model that some were added to."""
    if unwrap_peft_model(model) is not model:
        return list(model.peft_config)
    return model.active_adapters()[:1] if getattr(model, "_hf_peft_config_loaded", False) else []


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
def check_training_state(mesh: Mesh, device: torch.device, directory: Path) -> None:
    """Reads everything beside the weights, and changes nothing. Raises CheckpointError for what is lost or damaged."""
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
    parts = _part_files(directory)
    for index, part in enumerate(parts):
        read_state(part)
        if index % mesh.world_size == mesh.dp_rank * mesh.lp_size + mesh.lp_rank:  # a map of it doesn't see all bytes
            with reading(part), zipfile.ZipFile(part) as archive:
                if archive.testzip() is not None:
                    raise ValueError("the checksum is wrong")
    schedule = directory / SCHEDULER_NAME
    if parts or schedule.is_file():
        read_state(schedule)
    read_streams(mesh, device, directory)


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


def read_state(path: Path) -> dict[str, Any]:
    """A file of `torch.save`, only mapped where it is big. Raises CheckpointError for a damaged one."""
    with reading(path), safe_globals():
        found = torch.load(
            path, map_location="cpu", weights_only=True, mmap=_OPTIMIZER.fullmatch(path.name) is not None
        )
        if not isinstance(found, dict):
            raise TypeError(f"a dict is expected, and not a {type(found).__name__}")
    return found


# ---- optimizer and scheduler
def save_optimizer(optimizer: Any, scheduler: Any, model: nn.Module, mesh: Mesh, directory: Path) -> None:
    """Writes the optimizer states of this lp rank by parameter name, and its groups. For one dp rank to call."""
    names = names_by_group(optimizer, model)
    packed = optimizer.state_dict()
    owner_of = layer_parallel(model).owner_of
    flat = [name for group in names for name in group]
    mine = {flat[index]: state for index, state in packed["state"].items() if owner_of[flat[index]] == mesh.lp_rank}
    options = [
        {k: v for k, v in group.items() if k not in ("params", "param_names")} for group in packed["param_groups"]
    ]
    groups = [{"options": o, "names": n} for o, n in zip(options, names, strict=True)]
    path = directory / f"optimizer-{mesh.lp_rank:05d}-of-{mesh.lp_size:05d}.pt"
    torch.save({"state": mine, "groups": groups, "schedule": scheduler.state_dict()}, path)


def read_optimizer(
    optimizer: Any, scheduler: Any, model: nn.Module, mesh: Mesh, directory: Path
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """(state dict of the optimizer, of the scheduler) of what this rank holds, from the files of any number of lp
    ranks; None where there are none.

    Groups are those that hold the same parameters, wherever they stand in the order; a group of several saved ones, of
    several lp ranks, takes the settings that these have in common.

    Raises CheckpointError when a file is missing or damaged, or the parameter groups differ.
    """
    files = _part_files(directory)
    schedule = directory / SCHEDULER_NAME
    if not files or not schedule.is_file():
        return None
    parts = [read_state(path) for path in files]
    states: dict[str, Any] = {}
    with reading(files[0].with_name("optimizer-*.pt")):
        for part in parts:
            states |= part["state"]
        if len(parts) == mesh.lp_size:  # this rank's first: others may have other settings for the same parameters
            parts = [parts[mesh.lp_rank], *parts[: mesh.lp_rank], *parts[mesh.lp_rank + 1 :]]
        saved = [
            _Group(part, index, frozenset(group["names"]))
            for part in parts
            for index, group in enumerate(part["groups"])
        ]
    names = names_by_group(optimizer, model)
    picks = _matched([frozenset(group) for group in names], saved, directory)
    packed = optimizer.state_dict()
    flat = [name for group in names for name in group]
    # a parameter without a state had none when saved: all files are there, and the groups name it
    # (deepcopy: the files are only mapped, and may be rotated away)
    packed["state"] = {index: copy.deepcopy(states[name]) for index, name in enumerate(flat) if name in states}
    for group, pick in zip(packed["param_groups"], picks, strict=True):
        group |= {} if pick is None else copy.deepcopy(pick.options)
    found = read_state(schedule)
    if all("schedule" in part for part in parts) and any(picks):
        fresh = scheduler.state_dict()
        entries = [pick and (pick.part["schedule"], pick.index, len(pick.part["groups"])) for pick in picks]
        found = _regrouped(entries, fresh)
    return packed, found


@dataclass(frozen=True)
class _Group:
    """A parameter group in one lp rank's file."""

    part: dict[str, Any]
    index: int
    names: frozenset[str]

    @property
    def options(self) -> dict[str, Any]:
        return self.part["groups"][self.index]["options"]

    def says(self) -> Any:
        """What a group that is put together of several must have in common."""
        plain = {name: v.tolist() if isinstance(v, Tensor) else v for name, v in self.options.items()}
        return plain, _regrouped([(self.part.get("schedule", {}), self.index, len(self.part["groups"]))], {})


def _matched(wanted: Sequence[frozenset[str]], saved: Sequence[_Group], directory: Path) -> list[_Group | None]:
    """For each group here the saved one whose settings it takes; None for one without parameters."""
    remedy = "resume with the same optimizer settings and the same trainable parameters"
    picks: list[_Group | None] = []
    for names in wanted:
        touching = [group for group in saved if group.names & names]
        unknown = sorted(names.difference(*(group.names for group in touching)))
        if unknown:
            raise CheckpointError(
                f"{directory} has no optimizer state for {len(unknown)} parameters {unknown[:4]}; {remedy}"
            )
        exact = next((group for group in touching if group.names == names), None)
        if exact is None and any(group.says() != touching[0].says() for group in touching):
            raise CheckpointError(
                f"{directory} has several parameter groups of other settings for {len(names)} parameters "
                f"{sorted(names)[:4]}, which are one group here; {remedy}"
            )
        picks.append(exact or next(iter(touching), None))
    for group in saved:
        if sum(bool(group.names & names) for names in wanted) > 1:
            raise CheckpointError(
                f"{directory} has one parameter group for {len(group.names)} parameters {sorted(group.names)[:4]}, "
                f"which are several here; {remedy}"
            )
    return picks


def _regrouped(entries: Sequence[tuple[Any, int, int] | None], fresh: Any) -> Any:
    """A scheduler's state whose lists with an entry for each group are put together anew.

    entries: for each group here the state that it comes from, its index there, and the number of groups there; None for
        a group without parameters, which keeps what `fresh` has.
    """
    here = [entry for entry in entries if entry is not None]
    first = here[0][0]

    def inside(key: Any) -> list[tuple[Any, int, int] | None]:
        return [entry and (entry[0][key], *entry[1:]) for entry in entries]

    if isinstance(first, list) and all(isinstance(item, dict) for item in first):  # schedulers of a scheduler
        kept = fresh if isinstance(fresh, list) and len(fresh) == len(first) else [{}] * len(first)
        return [_regrouped(inside(i), kept[i]) for i in range(len(first))]
    if not isinstance(first, dict):
        return first
    made = {}
    for key, value in first.items():
        kept = fresh.get(key) if isinstance(fresh, dict) else None
        if "lr" in str(key) and isinstance(value, list) and all(len(s[key]) == count for s, _, count in here):
            kept = kept if isinstance(kept, list) and len(kept) == len(entries) else value[:1] * len(entries)
            made[key] = [kept[i] if entry is None else entry[0][key][entry[1]] for i, entry in enumerate(entries)]
        else:
            made[key] = _regrouped(inside(key), kept)
    return made


def _part_files(directory: Path) -> list[Path]:
    """The optimizer's files of all lp ranks in order, or none at all. Raises CheckpointError when some are lost."""
    found = [(int(m[1]), int(m[2]), path) for path in directory.iterdir() if (m := _OPTIMIZER.fullmatch(path.name))]
    size = found[0][1] if found else 0
    if sorted((rank, of) for rank, of, _ in found) != [(rank, size) for rank in range(size)]:
        raise CheckpointError(
            f"{directory} has optimizer files {sorted(path.name for *_, path in found)}; those of all lp ranks of one "
            "number are needed: copy the lost ones anew, or use another checkpoint"
        )
    return [path for *_, path in sorted(found)]


def names_by_group(optimizer: Any, model: nn.Module) -> list[list[str]]:
    """The names of the parameters in each group. Raises CheckpointError for a parameter that the model doesn't have."""
    names = {id(p): name for name, p in model.named_parameters()}
    strange = [tuple(p.shape) for group in optimizer.param_groups for p in group["params"] if id(p) not in names]
    if strange:
        raise CheckpointError(
            f"the optimizer has {len(strange)} parameters that are not the model's, of shapes {strange[:4]}, and a "
            "checkpoint would not hold them; make them parameters of the model before the trainer is made"
        )
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


# ---- random streams
def save_streams(mesh: Mesh, device: torch.device, directory: Path) -> None:
    """Writes the random streams of this dp rank. For one lp rank to call."""
    states = main_streams()
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state(device)
    torch.save(states, directory / f"rng_state_{mesh.dp_rank}.pth")


def read_streams(mesh: Mesh, device: torch.device, directory: Path) -> Callable[[], None] | None:
    """Reads and tries them; the function that it returns sets them. None where there are none for this dp rank."""
    path = directory / f"rng_state_{mesh.dp_rank}.pth"
    if not path.is_file():
        return None
    states = read_state(path)
    with reading(path), kept_streams():
        set_main_streams(states)

    def put() -> None:
        set_main_streams(states)
        if device.type != "cpu" and "device" in states:
            torch.get_device_module(device).set_rng_state(states["device"], device)

    return put
