"""Parameters of which each dp rank keeps a piece: torch's FSDP2 over the dp axis, driven once a step.

Between steps a parameter is a DTensor, and so are its gradient and its optimizer state: a dp rank has a piece of each.
During a step all of this rank's parameters are whole and plain, for the front, every sweep, level and micro-batch, as
pipelines with FSDP2 do. They are gathered at its begin in one fixed order; at its end, when what several lp ranks have
a part in is summed, each group of gradients is averaged over the dp ranks, cut up, and freed. No collective hangs on
the plan: dp ranks may run other ones (a last batch with fewer rows) and generate texts of other lengths.

FSDP2's own hooks would gather whenever a module is called, also where a forward is only rehearsed or recorded. So its
groups are formed on modules that nobody calls, and their parameters put where the model looks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from hf_layerpar.compat.torch import find_fsdp_memory, parameter_slots, reduce_fsdp, start_fsdp
from hf_layerpar.errors import ConfigurationError
from hf_layerpar.run.transport import peer_loss


class _Unit(nn.Module):
    """Parameters that are gathered and reduced together."""


class DataShards:
    """The parameters of `model` on this rank, cut over `mesh`. Collective; all its ranks hold equal parameters before.

    layers: modules with a group each; what is in none of them is one group more. moved: called when modules have been
    given other parameters (their pieces, or whole ones).

    Raises ConfigurationError for what can't be cut.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[nn.Module], mesh: DeviceMesh, moved: Callable[[], None]
    ) -> None:
        self.mesh, self.is_whole, self._moved = mesh, False, moved
        slots: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for key, parameter in parameter_slots(module).items():
                if parameter is not None:
                    slots.setdefault(parameter, []).append((module, key))
        left = {parameter for parameter in slots if parameter.ndim}
        self._uncut = [parameter for parameter in slots if not parameter.ndim]
        groups: list[list[nn.Parameter]] = []
        for layer in layers:
            groups.append([p for p in layer.parameters() if p in left])
            left -= set(groups[-1])
        groups = [[p for p in slots if p in left], *filter(None, groups)]
        self._check(groups)
        self._root = _Unit()
        self._slots: list[tuple[_Unit, str, list[tuple[nn.Module, str]]]] = []
        self._units: list[Any] = []
        for number, group in enumerate(groups):
            unit = self._root if number == 0 else _Unit()
            for i, parameter in enumerate(group):
                unit.register_parameter(f"parameter{i}", parameter)
                self._slots.append((unit, f"parameter{i}", slots[parameter]))
            if number:
                self._root.add_module(f"group{number}", unit)
        for unit in [*self._root.children(), self._root]:
            self._units.append(fully_shard(unit, mesh=mesh))
        start_fsdp(self._root)
        self._pieces = [self._held(unit, name) for unit, name, _ in self._slots]
        self._place()

    @property
    def uncut(self) -> list[nn.Parameter]:
        """Trained parameters that every rank has whole at all times: single numbers."""
        return [p for p in self._uncut if p.requires_grad]

    # ---- whole or in pieces
    @contextmanager
    def whole(self, *, writes: bool = False) -> Iterator[None]:
        """Parameters are whole inside. writes: what is written to them there is kept. Collective at its begin, where
        they were in pieces."""
        before = self.is_whole
        self.gather()
        try:
            yield
            if writes:
                self._keep()
        finally:
            if not before:
                self.cut()

    @peer_loss("the gathering of parameters")
    def gather(self) -> None:
        """Makes parameters whole; nothing where they are. Collective."""
        if not self.is_whole:
            find_fsdp_memory(self._root)
            for handle in [unit.unshard(async_op=True) for unit in self._units]:
                handle.wait()
            self.is_whole = True
            self._place()

    def cut(self) -> None:
        """Leaves pieces. Gradients of whole parameters wait for `reduce`."""
        for unit in self._units:
            unit.reshard()
        self.is_whole = False
        self._place()

    @peer_loss("the averaging of gradients")
    def reduce(self) -> None:
        """Averages the gradients of whole parameters over the ranks, into pieces of gradients, and leaves pieces of
        parameters. Collective.

        A parameter without a gradient on some ranks counts as zero there; without one on all it stays without.
        """
        wholes = [self._held(unit, name) for unit, name, _ in self._slots]
        used = torch.tensor([p.grad is not None for p in wholes], dtype=torch.int32, device=self.mesh.device_type)
        dist.all_reduce(used, op=dist.ReduceOp.MAX, group=self.mesh.get_group())
        for parameter, is_used in zip(wholes, used.tolist(), strict=True):
            if is_used and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        reduce_fsdp(self._root)
        self.is_whole = False
        self._place()

    # ---- inside
    @staticmethod
    def _held(unit: nn.Module, name: str) -> nn.Parameter:
        parameter = parameter_slots(unit)[name]
        assert parameter is not None
        return parameter

    def _place(self) -> None:
        for unit, name, slots in self._slots:
            for module, key in slots:
                parameter_slots(module)[key] = parameter_slots(unit)[name]
        self._moved()

    def _keep(self) -> None:
        with torch.no_grad():
            for (unit, name, _), piece in zip(self._slots, self._pieces, strict=True):
                mine = local(self._held(unit, name).detach())  # of tp ranks: cut once more
                cut = distribute_tensor(mine, self.mesh, [Shard(0)], src_data_rank=None)
                local(piece.detach()).copy_(cut.to_local())

    @staticmethod
    def _check(groups: Iterable[Iterable[nn.Parameter]]) -> None:
        for group in groups:
            dtypes = {p.dtype for p in group if p.requires_grad}
            if len(dtypes) > 1:
                raise ConfigurationError(
                    f"FSDP of trained parameters of dtypes {sorted(map(str, dtypes))} in one layer (or outside the "
                    "layers): their gradients are averaged together; cast the model to one dtype, or train without fsdp"
                )


# ---- tensors that may be in pieces
def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor. Collective over the ranks that have pieces of it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copy_full(target: Tensor, source: Tensor) -> None:
    """Copies of the whole tensor `source` what `target` is a piece of. No rank talks."""
    if isinstance(target, DTensor):
        source = source.detach().to(target.device, target.dtype)
        source = distribute_tensor(source, target.device_mesh, target.placements, src_data_rank=None).to_local()
    local(target.detach()).copy_(source)


def group_along(tensor: Tensor, axis: str) -> dist.ProcessGroup | None:
    """The ranks along an axis of the mesh that have other parts of a tensor; None where it isn't cut over that."""
    if not isinstance(tensor, DTensor):
        return None
    names = tensor.device_mesh.mesh_dim_names or ()
    is_cut = axis in names and not tensor.placements[names.index(axis)].is_replicate()
    return tensor.device_mesh.get_group(axis) if is_cut else None
