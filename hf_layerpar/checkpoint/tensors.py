"""Tensors that many ranks have parts of, in one folder, by torch.distributed.checkpoint: read again at any number of
ranks, each of which reads its parts.

Its planners, files and metadata are used as they are. What the ranks say to each other about them goes by messages of
this package, so that a rank that fails or dies is known to all; and what is read is checked, and runs no code.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.futures import Future

from hf_layerpar.ode.files import reading
from hf_layerpar.run.first_rank import all_give

METADATA = ".metadata"


class TensorWriting:
    """Tensors about to be written into a folder: planned (collective), written by each rank (without a word to others),
    and finished (collective).

    tensors: by name; those of which several ranks have the same are written by one of them, and those that ranks have
    pieces of (DTensors) by all. failed: what is said where a rank fails.

    Raises CheckpointError on all ranks where something fails on one.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], folder: Path, group: dist.ProcessGroup | None, failed: str
    ) -> None:
        self._group, self._failed, self._results = group, failed, []
        self._rank = 0 if group is None else dist.get_rank(group)
        self._planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._writer = FileSystemWriter(folder)

        def local_plan() -> Any:
            self._planner.set_up_planner(dict(tensors), is_coordinator=self._rank == 0)
            self._writer.set_up_storage_writer(self._rank == 0)
            return self._writer.prepare_local_plan(self._planner.create_local_plan())

        plans = all_give(local_plan, failed, group)
        plans, self._metadata = self._planner.create_global_plan(plans)  # the same on all ranks
        self._plan = self._planner.finish_plan(self._writer.prepare_global_plan(plans)[self._rank])

    def write(self) -> None:
        self._results = self._writer.write_data(self._plan, self._planner).wait()

    def finish(self) -> None:
        results = all_give(lambda: self._results, self._failed, self._group)
        all_give(lambda: self._rank or self._writer.finish(self._metadata, results), self._failed, self._group)


class TensorFolder:
    """A folder that was written so. Raises CheckpointError for what is damaged or lost."""

    def __init__(self, folder: Path) -> None:
        self._reader = _Reader(folder)
        with reading(folder / METADATA):
            self._metadata = self._reader.read_metadata()
            found = self._metadata.state_dict_metadata.items()
            self.shapes = {
                name: (m.size, m.properties.dtype) for name, m in found if isinstance(m, TensorStorageMetadata)
            }

    def read(self, tensors: dict[str, Tensor]) -> None:
        """Fills tensors (or this rank's pieces of them) of these names."""
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        with reading(self._reader.path):
            planner.set_up_planner(tensors, self._metadata, is_coordinator=True)  # pyright: ignore[reportArgumentType]
            self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
            plan = planner.finish_plan(self._reader.prepare_local_plan(planner.create_local_plan()))
        self._reader.read_data(plan, planner)


class _Reader(FileSystemReader):
    """Sees a wrong byte, which torch.load does not look for."""

    path: Path

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (self.path / METADATA).open("rb") as file:
            found = _PlainUnpickler(file).load()
        if not isinstance(found, Metadata):
            raise TypeError(f"metadata are expected, and not a {type(found).__name__}")
        return found

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            entry = self.storage_data[item.storage_index]
            path = self.path / entry.relative_path
            with reading(path), path.open("rb") as file:
                if item.type != LoadItemType.TENSOR:
                    raise TypeError(f"{item.storage_index.fqn} is no tensor")
                file.seek(entry.offset)
                content = io.BytesIO(file.read(entry.length))
                with zipfile.ZipFile(content) as archive:
                    if archive.testzip() is not None:
                        raise ValueError("the checksum is wrong")
                content.seek(0)
                tensor: Tensor = torch.load(content, map_location="cpu", weights_only=True)
                for dim, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                    tensor = tensor.narrow(dim, offset, length)
                target = planner.resolve_tensor(item).detach()
                target.copy_(tensor)
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


class _PlainUnpickler(pickle.Unpickler):
    """Makes what the metadata of tensors consist of, and nothing else."""

    _PARTS = (
        *(("pathlib", name) for name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")),
        *(("torch.serialization", "_get_layout"), ("torch", "Size"), ("collections", "OrderedDict")),
    )
    _CLASSES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        is_class = module in self._CLASSES and isinstance(found, type) and found.__module__ == module
        if is_class or (module, name) in self._PARTS or isinstance(found, torch.dtype):
            return found
        raise pickle.UnpicklingError(f"{module}.{name} has no place in metadata")
