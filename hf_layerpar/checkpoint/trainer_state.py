"""The state of an optimizer and its scheduler in a folder, by names of parameters, so that it fits any number of ranks.

groups.pt            of every lp rank its parameter groups, the scheduler of these, and states that are no tensors
*.distcp, .metadata  states that are tensors, as "<parameter>.<state>" (`hf_layerpar.checkpoint.tensors`)
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_layerpar.checkpoint.tensors import TensorFolder, TensorWriting
from hf_layerpar.compat.trainer import safe_globals
from hf_layerpar.errors import CheckpointError
from hf_layerpar.ode.files import reading
from hf_layerpar.run.first_rank import all_give
from hf_layerpar.run.mesh import Mesh
from hf_layerpar.run.transport import fact

GROUPS = "groups.pt"


def read_file(path: Path) -> dict[str, Any]:
    """A file of `torch.save`. Raises CheckpointError for a damaged one."""
    with reading(path), safe_globals():
        found = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(found, dict):
            raise TypeError(f"a dict is expected, and not a {type(found).__name__}")
    return found


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


class StateWriting(TensorWriting):
    """The state of an optimizer and its scheduler about to be written; see `TensorWriting`. For all ranks.

    staged: copies on the host are written, so that training may go on.
    """

    def __init__(
        self,
        optimizer: Any,
        scheduler: Any,
        model: nn.Module,
        mesh: Mesh,
        folder: Path,
        group: dist.ProcessGroup | None,
        failed: str,
        *,
        staged: bool = False,
    ) -> None:
        tensors: dict[str, Tensor] = {}

        def part() -> dict[str, Any] | None:
            names = names_by_group(optimizer, model)
            packed = optimizer.state_dict()
            flat = [name for group in names for name in group]
            parameters = dict(model.named_parameters())
            others: dict[str, dict[str, Any]] = {}
            for index, state in packed["state"].items():
                name = flat[index]
                for key, value in state.items():
                    if not isinstance(value, Tensor) or "." in key:
                        others.setdefault(name, {})[key] = value
                        continue
                    _check_cut(name, key, value, parameters[name])
                    tensors[f"{name}.{key}"] = on_host(value) if staged else value
            options = [
                {k: v for k, v in g.items() if k not in ("params", "param_names")} for g in packed["param_groups"]
            ]
            groups = [{"options": o, "names": n} for o, n in zip(options, names, strict=True)]
            if mesh.dp_rank or mesh.tp_rank:  # which have the same
                return None
            return {"groups": groups, "schedule": scheduler.state_dict(), "others": others}

        parts = all_give(part, failed, group)
        super().__init__(tensors, folder, group, failed)

        def write_groups() -> None:
            if self._rank == 0:
                torch.save({"parts": [part for part in parts if part is not None]}, folder / GROUPS)

        all_give(write_groups, failed, group)


def on_host(tensor: Tensor) -> Tensor:
    """A copy on the host; of what this rank has of a tensor in pieces."""
    if isinstance(tensor, DTensor):
        local = tensor.to_local().to("cpu", copy=True)
        return DTensor.from_local(
            local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )
    return tensor.detach().to("cpu", copy=True)


def _check_cut(name: str, key: str, value: Tensor, parameter: Tensor) -> None:
    if isinstance(parameter, DTensor) and not isinstance(value, DTensor) and value.numel() > 1:
        raise CheckpointError(
            f"the optimizer keeps {key} {list(value.shape)} of a piece of {name}, which can't be put together with "
            "those of others; use an optimizer whose states have the shape of the parameter (AdamW, SGD), or save with "
            "save_only_model=True"
        )


class SavedState:
    """What `StateWriting` wrote, read by this rank as far as it has the parameters.

    Raises CheckpointError for a damaged or lost file.
    """

    def __init__(self, folder: Path, model: nn.Module) -> None:
        self._folder = folder
        saved = read_file(folder / GROUPS)
        with reading(folder / GROUPS):
            self._parts: list[dict[str, Any]] = list(saved["parts"])
            self._states: dict[str, dict[str, Any]] = {}
            for part in self._parts:
                self._states |= {name: dict(state) for name, state in part["others"].items()}
            self._groups = [
                _Group(part, index, frozenset(group["names"]))
                for part in self._parts
                for index, group in enumerate(part["groups"])
            ]
        tensors = TensorFolder(folder)
        parameters = dict(model.named_parameters())
        wanted: dict[str, Tensor] = {}
        for name, (shape, dtype) in tensors.shapes.items():
            parameter, key = name.rpartition(".")[::2]
            if parameter in parameters:
                like = parameters[parameter]
                is_alike = isinstance(like, DTensor) and like.shape == shape  # in pieces, as that is
                made = torch.empty_like(like, dtype=dtype) if is_alike else torch.empty(shape, dtype=dtype)
                wanted[name] = self._states.setdefault(parameter, {})[key] = made.detach()
        tensors.read(wanted)

    def of(
        self, optimizer: Any, scheduler: Any, model: nn.Module, mesh: Mesh, schedule: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """(state dict of the optimizer, of the scheduler) of what this rank holds. schedule: what the scheduler was
        saved with beside.

        Groups are those that hold the same parameters, wherever they stand in the order; a group of several saved ones,
        of several lp ranks, takes the settings that these have in common.

        Raises CheckpointError when the parameter groups differ.
        """
        saved = self._groups
        # this rank's first: others may have other settings for the same parameters
        if len(self._parts) == mesh.lp_size:
            saved = sorted(saved, key=lambda group: group.part is not self._parts[mesh.lp_rank])
        names = names_by_group(optimizer, model)
        packed = optimizer.state_dict()
        settings = [
            {k: fact(v) for k, v in group.items() if k not in ("params", "param_names")}
            for group in packed["param_groups"]
        ]
        picks = _matched([frozenset(group) for group in names], settings, saved, self._folder)
        flat = [name for group in names for name in group]
        # a parameter without a state had none when saved: the groups name it
        packed["state"] = {index: self._states[name] for index, name in enumerate(flat) if name in self._states}
        for group, pick in zip(packed["param_groups"], picks, strict=True):
            group |= {} if pick is None else copy.deepcopy(pick.options)
        if any(picks):
            fresh = scheduler.state_dict()
            entries = [pick and (pick.part["schedule"], pick.index, len(pick.part["groups"])) for pick in picks]
            schedule = _regrouped(entries, fresh)
        return packed, schedule


@dataclass(frozen=True)
class _Group:
    """A parameter group of one lp rank."""

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


def _matched(
    wanted: Sequence[frozenset[str]], settings: Sequence[Any], saved: Sequence[_Group], directory: Path
) -> list[_Group | None]:
    """For each group here the saved one whose settings it takes; None for one without parameters. settings: of each
    group here. Groups of equal ones are one: the stock Trainer keeps parameters in pieces apart from others."""
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
        mine = [said for names, said in zip(wanted, settings, strict=True) if group.names & names]
        if any(said != mine[0] for said in mine):
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
