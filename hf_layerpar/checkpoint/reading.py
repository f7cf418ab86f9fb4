"""Weights of a checkpoint by name: a rank reads what it owns, a tensor (or what is converted together) at a time.

Which tensors there are, under which names and in which shapes, is found out first, from the files' headers; alike on
all ranks, so that what is lost or doesn't fit is an error on all of them before anything is loaded.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from hf_layerpar.checkpoint.pieces import Layout, Whole
from hf_layerpar.checkpoint.saving import EXACT_WEIGHTS
from hf_layerpar.compat.transformers import (
    IGNORED_MISSING,
    IGNORED_SAVING,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    get_model_conversion_mapping,
    rename_source_key,
)
from hf_layerpar.config import CONFIG_KEY, OdeSettings
from hf_layerpar.errors import CheckpointError
from hf_layerpar.ode.checkpoint import stored_config
from hf_layerpar.ode.convert import ode_view
from hf_layerpar.ode.files import read_json, reading
from hf_layerpar.ode.fold import scaled_parameters, unfold
from hf_layerpar.run.data_shards import copy_full
from hf_layerpar.sharding import LayerParallel

_REMEDY = "load a checkpoint of this model (same architecture, depth and head)"


class StoredTensors:
    """The tensors in some weight files, by the names that they have there; read when asked for.

    Raises CheckpointError for a damaged file.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._path_of: dict[str, Path] = {}
        self._pickled: dict[Path, dict[str, Tensor]] = {}  # mapped: their bytes are read when they are used
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in paths:
            with reading(path):
                if path.suffix == ".bin":
                    self._pickled[path] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
                    found = {name: tuple(tensor.shape) for name, tensor in self._pickled[path].items()}
                else:
                    with safe_open(path, "pt") as file:
                        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            self.shapes |= found
            self._path_of |= dict.fromkeys(found, path)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        by_path: dict[Path, list[str]] = {}
        for name in names:
            by_path.setdefault(self._path_of[name], []).append(name)
        found: dict[str, Tensor] = {}
        for path, inside in by_path.items():
            with reading(path):
                if path in self._pickled:
                    found |= {name: self._pickled[path][name] for name in inside}
                else:  # opened again and again: what was read of a mapped file counts as memory as long as it is open
                    with safe_open(path, "pt") as file:
                        found |= {name: file.get_tensor(name) for name in inside}
        return found


def weight_files(directory: Path) -> list[Path]:
    """The files that hold a checkpoint's weights, those that transformers would take.

    Raises CheckpointError where there are none, or an index is damaged.
    """
    for index, single in ((SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME), (WEIGHTS_INDEX_NAME, WEIGHTS_NAME)):
        if (directory / single).is_file():
            return [directory / single]
        if (directory / index).is_file():
            values: Any = read_json(directory / index)
            with reading(directory / index):
                return sorted({directory / name for name in values["weight_map"].values()})
    raise CheckpointError(f"{directory} holds no model weights; give a checkpoint-N directory written whole")


@dataclasses.dataclass
class _Group:
    """Stored tensors of which the model's are made: one that may have another name, or several that are converted.

    sources: their names, each with the pattern by which its converter knows it. name: of the (first) tensor made.
    """

    name: str
    converter: WeightConverter | None
    sources: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def made(self, tensors: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
        if self.converter is None:
            return {self.name: tensors[self.sources[0][0]]}
        converter = deepcopy(self.converter)  # it collects tensors
        for source, pattern in self.sources:
            converter.add_tensor(self.name, source, pattern, tensors[source])  # pyright: ignore[reportArgumentType]
        found: dict[str, Any] = converter.convert(self.name, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in found.items()}


def _groups(model: Any, stored: Iterable[str], layout: Layout) -> tuple[list[_Group], list[str]]:
    """What the stored tensors become, and those of which nothing does: transformers' way of loading a state dict, of
    which it has no function that goes without a whole model."""
    renamings: list[WeightRenaming] = []
    converters: list[WeightConverter] = []
    if isinstance(model, PreTrainedModel):
        for entry in get_model_conversion_mapping(model):
            if isinstance(entry, WeightConverter):
                converters.append(entry)
            elif isinstance(entry, WeightRenaming):
                renamings.append(entry)
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = getattr(model, "base_model_prefix", None)
    known: dict[str, Any] = dict(layout)
    groups: dict[str, _Group] = {}
    unknown = []
    for source in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(source, renamings, converters, prefix, known)
        if name not in layout and source in layout:
            name, pattern = rename_source_key(source, [], [], prefix, known)
        if name not in layout:
            unknown.append(source)
            continue
        group = groups.setdefault(name, _Group(name, by_pattern[pattern] if pattern else None))
        group.sources.append((source, pattern or source))
    return list(groups.values()), unknown


def read_weights(handle: LayerParallel, directory: Path) -> Callable[[], None]:
    """Finds out what a checkpoint of a model (not of adapters) has. The function that it returns puts what this rank
    holds into the model, reading it; it is collective where dp ranks have pieces of the model.

    Raises CheckpointError when a file is damaged, or when any tensor of the model is not in the checkpoint, or has
    another shape.
    """
    model, layout = handle._model, handle._layout
    folded: dict[str, tuple[nn.Module, float]] = {}
    if isinstance(model, PreTrainedModel):
        if getattr(model, "hf_quantizer", None) is not None:
            raise CheckpointError(
                f"the weights of a quantized {type(model).__name__} can't be read back; train adapters on it"
            )
        folded = _folded(model, directory)
    stored = StoredTensors(weight_files(directory))
    exact = StoredTensors(sorted(directory.glob(f"{EXACT_WEIGHTS}*.safetensors")))
    groups, unknown = _groups(model, stored.shapes, layout)
    whole = Whole(model, layout)
    shapes: dict[str, tuple[int, ...]] = {}
    targets: list[tuple[_Group, list[str]]] = []
    for group in groups:
        with reading(directory):
            made = group.made({s: torch.empty(stored.shapes[s], device="meta") for s, _ in group.sources}, whole)
        targets.append((group, list(made)))
        shapes |= {name: tuple(tensor.shape) for name, tensor in made.items()}
    shapes |= exact.shapes
    _check(handle, directory, shapes, [] if isinstance(model, PreTrainedModel) else unknown)

    def put() -> None:
        with torch.no_grad(), handle.whole(writes=True):
            here = {n: t for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
            for group, names in targets:
                if here.keys() & names:
                    made = group.made(stored.read(source for source, _ in group.sources), whole)
                    for name in here.keys() & names - exact.shapes.keys():
                        value = made[name]
                        copy_full(here[name].data, unfold(value, *folded[name]) if name in folded else value)
            for name in here.keys() & exact.shapes.keys():
                copy_full(here[name].data, exact.read([name])[name])

    return put


def _folded(model: PreTrainedModel, directory: Path) -> dict[str, tuple[nn.Module, float]]:
    """The tensors into which a checkpoint's step size is multiplied, with what undoes it."""
    values = stored_config(directory).get(CONFIG_KEY)
    settings = None if values is None else OdeSettings.from_dict(values)
    if settings is None or not settings.folded:
        return {}
    stored, here = dataclasses.replace(settings, folded=False), ode_view(model).settings
    if stored != here:
        raise CheckpointError(
            f"the weights in {directory} have the step size of other settings in them: {stored} there, {here} of the "
            "model; convert the model with the same settings"
        )
    return {name: (module, h) for name, module, h in scaled_parameters(model)}


def _check(handle: LayerParallel, directory: Path, shapes: Mapping[str, tuple[int, ...]], unknown: list[str]) -> None:
    model, layout = handle._model, handle._layout
    missing = [n for n in layout if n not in shapes and not any(other in shapes for other in handle._tied.get(n, ()))]
    ignored = set(getattr(model, IGNORED_SAVING, None) or ())
    patterns = getattr(model, IGNORED_MISSING, None) or ()
    missing = [n for n in missing if n not in ignored and not any(re.search(p, n) for p in patterns)]
    wrong = [n for n, shape in shapes.items() if n in layout and layout[n][0] != shape]
    if missing or unknown or wrong:
        raise CheckpointError(
            f"{directory} does not hold all weights of {type(model).__name__}: {len(missing)} missing {missing[:4]}, "
            f"{len(unknown)} unknown {unknown[:4]}, {len(wrong)} of another shape {wrong[:4]}; {_REMEDY}"
        )
