"""A checkpoint in pieces: which rank writes which tensors into which file, known alike on all ranks before anything is
written; and the writing of a file tensor by tensor, so that no rank holds more of the model than it owns.

What transformers does to a state dict before it writes it (tied tensors, renamed and converted ones) is done here to
one layer at a time, and to tensors without data first, which says what comes out.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_layerpar.compat.torch import buffer_slots
from hf_layerpar.compat.transformers import (
    IGNORED_SAVING,
    remove_tied_weights_from_state_dict,
    revert_weight_conversion,
)
from hf_layerpar.errors import CheckpointError
from hf_layerpar.ode.convert import ode_view
from hf_layerpar.ode.fold import fold, scaled_parameters

Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Name -> shape and dtype of every tensor of a state dict."""


@dataclass(frozen=True)
class PieceFile:
    """A file, the rank that writes it, and its tensors in their order by the names that they have in it."""

    name: str
    rank: int
    tensors: Layout


class Whole:
    """A model that lacks tensors, for transformers' conversions, some of which look at a parameter's shape."""

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self._model, self._layout = model, layout

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get_parameter(self, name: str) -> Tensor:
        return _without_data(self._layout, [name])[name]


class Pieces:
    """The files that hold a model's weights.

    Args:
        model: may lack tensors.
        layout: of the whole model's state dict. tied: for a name those that are the same tensor.
        owner_of: the rank that has a tensor; 0 where it isn't named. num_ranks: how many there are.
        max_shard_size, variant, original_format: as `max_shard_size`, `variant` and `save_original_format` of
            `PreTrainedModel.save_pretrained`.
        folded: whether step sizes are multiplied into the weights (`hf_layerpar.ode.fold`).

    Raises CheckpointError where the original format needs tensors of several layers or ranks at once.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        owner_of: Mapping[str, int],
        tied: Mapping[str, Iterable[str]],
        num_ranks: int,
        *,
        max_shard_size: int | str,
        variant: str | None = None,
        original_format: bool = True,
        folded: bool = False,
    ) -> None:
        self._model, self._converts = Whole(model, layout), original_format and isinstance(model, PreTrainedModel)
        self._scaled = {name: (module, h) for name, module, h in scaled_parameters(model)} if folded else {}
        kept = kept_names(model, layout, tied)
        self._units: dict[Any, list[str]] = {}
        unit = _units_of(model)
        for name in kept:
            self._units.setdefault((owner_of.get(name, 0), unit(name)), []).append(name)
        self._unit_of: dict[str, Any] = {}
        made: dict[str, Tensor] = {}
        for key, names in self._units.items():
            found = self._stored(_without_data(layout, names))
            self._unit_of |= dict.fromkeys(found, key)
            made |= found
        whole = self._stored(_without_data(layout, kept))
        if {n: t.shape for n, t in whole.items()} != {n: t.shape for n, t in made.items()}:
            odd = sorted(whole.keys() ^ made.keys() or (n for n in whole if whole[n].shape != made[n].shape))
            raise CheckpointError(
                f"the original format of a {type(model).__name__} puts tensors of several layers or ranks together, "
                f"such as {odd[:4]}, so it can't be written in pieces; save with save_original_format=False"
            )
        stored = {n: (tuple(t.shape), t.dtype) for n, t in whole.items()}
        self.files = _files(stored, lambda n: self._unit_of[n][0], num_ranks, max_shard_size, variant)
        self.fits_one = len(_split(stored, max_shard_size)) <= 1
        self._index_name = f"model.safetensors.index{_dotted(variant)}.json"
        self.total_size = sum(map(_bytes, stored.values()))
        buffers = {
            f"{path}.{key}" if path else key for path, module in model.named_modules() for key in buffer_slots(module)
        }
        counted = set(kept) - buffers
        self.total_parameters = sum(torch.Size(layout[name][0]).numel() for name in counted)

    def write(self, directory: Path, rank: int, of: Callable[[str], Tensor]) -> list[str]:
        """Writes a rank's files, and on rank 0 the index of several; returns their names. of: its tensors by name."""
        names = []
        for file in self.files:
            if file.rank == rank:
                write_tensors(directory / file.name, file.tensors, self._tensors(file, of))
                names.append(file.name)
        if rank == 0 and len(self.files) > 1:
            index = {
                "metadata": {"total_parameters": self.total_parameters, "total_size": self.total_size},
                "weight_map": {name: file.name for file in self.files for name in file.tensors},
            }
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (directory / self._index_name).write_text(text, "utf-8")
            names.append(self._index_name)
        return names

    def _tensors(self, file: PieceFile, of: Callable[[str], Tensor]) -> Iterator[Tensor]:
        """The tensors of a file in their order, made a layer at a time."""
        unit, held = None, {}
        for name in file.tensors:
            if self._unit_of[name] != unit:
                held.clear()
                unit = self._unit_of[name]
                held = self._stored({n: self._folded(n, of(n)) for n in self._units[unit]})
            yield held.pop(name)

    def _folded(self, name: str, tensor: Tensor) -> Tensor:
        return fold(tensor, *self._scaled[name]) if name in self._scaled else tensor

    def _stored(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return revert_weight_conversion(self._model, tensors) if self._converts else tensors  # pyright: ignore


def kept_names(model: nn.Module, layout: Layout, tied: Mapping[str, Iterable[str]]) -> list[str]:
    """The names under which tensors are saved: of tied ones one, as transformers chooses it."""
    here: dict[str, Tensor] = {}
    ignored = getattr(model, IGNORED_SAVING, None) or ()
    for name, (shape, dtype) in layout.items():
        if name not in ignored:
            same = next((here[other] for other in tied.get(name, ()) if other in here), None)
            # of one number, but with a place in memory of its own, by which transformers knows tied ones
            here[name] = torch.zeros((), dtype=dtype).expand(shape) if same is None else same
    if isinstance(model, PreTrainedModel):
        return list(remove_tied_weights_from_state_dict(here, model))
    first: dict[int, str] = {}
    return [name for name, tensor in here.items() if first.setdefault(id(tensor), name) == name]


def write_tensors(path: Path, tensors: Layout, values: Iterable[Tensor]) -> None:
    """Writes a safetensors file from tensors that come one after the other. safetensors itself wants all of them at
    once, on the host."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, entry in tensors.items():
        end = begin + _bytes(entry)
        header[name] = {"dtype": _dtype_name(entry[1]), "shape": list(entry[0]), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, (shape, dtype)), value in zip(tensors.items(), values, strict=True):
            assert (tuple(value.shape), value.dtype) == (shape, dtype), f"{name}: {value.shape} {value.dtype}"
            # a copy: memory that NumPy has seen can't be freed again, as FSDP does with whole parameters
            flat = value.detach().to("cpu", copy=True).contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)


@functools.cache
def _dtype_name(dtype: torch.dtype) -> str:
    """What safetensors calls it."""
    content = safetensors.torch.save({"x": torch.empty(0, dtype=dtype)})
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["x"]["dtype"]


def _bytes(entry: tuple[tuple[int, ...], torch.dtype]) -> int:
    return torch.Size(entry[0]).numel() * entry[1].itemsize


def _without_data(layout: Layout, names: Iterable[str]) -> dict[str, Tensor]:
    return {name: torch.empty(layout[name][0], dtype=layout[name][1], device="meta") for name in names}


def _files(
    stored: Layout, rank_of: Callable[[str], int], num_ranks: int, max_shard_size: int | str, variant: str | None
) -> list[PieceFile]:
    shards = []
    for rank in range(num_ranks):
        own = {name: entry for name, entry in stored.items() if rank_of(name) == rank}
        shards += [(rank, names) for names in _split(own, max_shard_size)]
    files = []
    for number, (rank, names) in enumerate(shards, 1):
        suffix = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        names.sort(key=lambda name: -stored[name][1].itemsize)  # so that each is aligned to its own size
        files.append(
            PieceFile(f"model{_dotted(variant)}{suffix}.safetensors", rank, {name: stored[name] for name in names})
        )
    return files


def _split(stored: Layout, max_shard_size: int | str) -> list[list[str]]:
    """Names that go into a file together."""
    sizes = {name: _bytes(entry) for name, entry in stored.items()}
    found = split_state_dict_into_shards_factory(
        sizes, get_storage_size=lambda size: size, filename_pattern="{suffix}", max_shard_size=max_shard_size
    )
    return [names for names in found.filename_to_tensors.values() if names]


def _dotted(variant: str | None) -> str:
    return f".{variant}" if variant else ""


def _units_of(model: nn.Module) -> Callable[[str], Any]:
    """Of a tensor's name what it belongs to that is converted at once: a layer, or all that is in none."""
    paths = "|".join(re.escape(stack.path) for stack in ode_view(model).stacks)
    pattern = re.compile(rf"(?:.*\.)?(?:{paths})\.\d+\.")

    def unit(name: str) -> str | None:
        found = pattern.match(name)
        return found and found[0]

    return unit
