"""Parts of a checkpoint by transformers' own loader: renamings, conversions, dtypes, ties and new heads are its work.

The loader asks a model for the names of its tensors, reads those and makes new ones for what the checkpoint lacks. Here
it is given models some of whose parameters are None, which it therefore passes over: first one without its layers, and
then one that has a few layers and nothing else, again and again. A model that has a config and no checkpoint is read in
the same way, from a checkpoint that lacks everything.

What is new is drawn module by module, each from a stream of its own: so it doesn't depend on what else is read.
"""

from __future__ import annotations

import hashlib
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging as hf_logging

from hf_layerpar.compat.torch import tensor_slots
from hf_layerpar.compat.transformers import (
    IGNORED_MISSING,
    IGNORED_UNEXPECTED,
    INITIALISES,
    IS_INITIALISED,
    build_glob_alternation,
    dtype_plan,
)
from hf_layerpar.config import CONFIG_KEY, OdeSettings
from hf_layerpar.errors import ConfigurationError, UnsupportedModelError
from hf_layerpar.ode.families import find_stacks, shared_modules
from hf_layerpar.ode.files import is_of_a_checkpoint, reading

_Slot = tuple[dict[str, Any], str, Tensor]
"""A place of a module for a parameter or buffer, its name there, and the tensor on meta that says shape and dtype."""


class PartReader:
    """Reads a model in parts. The random streams are the caller's to keep.

    stock_class: its class, of transformers. path: a directory, a Hub id, or None for a model that has only a config.
    options: for `from_pretrained` of that class. chosen: names of the layer lists, as in `find_stacks`, where the
    model's config doesn't say.
    seed: what new values are drawn from, with the name of their module. device: where the options put the model.
    info: names of what was missing, unexpected or of another shape in what has been read, as transformers tells it.
    """

    def __init__(
        self,
        stock_class: type[PreTrainedModel],
        path: str | None,
        options: Mapping[str, Any],
        chosen: Sequence[str] | None,
        seed: int,
        device: torch.device,
    ) -> None:
        self.path, self.chosen, self.seed, self.device = path, chosen, seed, device
        self.info: dict[str, Any] = {}
        self._class, self._options = stock_class, dict(options)
        if path is None:
            self._options["state_dict"] = {}
        self._make: Callable[..., PreTrainedModel] = stock_class
        self._store: PreTrainedModel | None = None
        self._layers: dict[tuple[str, int], nn.Module] = {}  # of the store
        self._slots: dict[tuple[str, int], dict[str, _Slot]] = {}
        make = lambda cls, *args, **kwargs: self._make(*args, **kwargs)  # noqa: E731
        # calling it gives what __new__ gives, as that is of the stock class: `from_pretrained` fills a model of ours
        self._loader: Any = type(stock_class.__name__, (stock_class,), {"__new__": make, "__module__": __name__})

    def open(self) -> PreTrainedModel:
        """A model of the stock class with all that is outside the layers; their parameters and buffers are on meta."""
        slots: list[_Slot] = []
        unexpected: set[str] = set()

        def make(*args: Any, **kwargs: Any) -> PreTrainedModel:
            model = self._class(*args, **kwargs)
            if getattr(model.config, "quantization_config", None) is not None:
                raise ConfigurationError(
                    f"{self.path} is quantised, and its weights can't be read in parts; load it without "
                    "layer_parallel, and call parallelize"
                )
            stored = getattr(model.config, CONFIG_KEY, None)
            if stored is not None:
                self.chosen = OdeSettings.from_dict(stored).stacks
            stacks = find_stacks(model, self.chosen)
            for path, layers in stacks.items():
                for layer, of_layer in zip(layers, _slots_of(model, path, layers), strict=True):
                    shared = {id(layer.get_submodule(name)) for name in shared_modules(layer)}
                    slots.extend(slot for module, slot in of_layer.values() if id(module) not in shared)
                    if not shared:  # else it is read as a whole, as its other parts may give the shared ones values
                        _hide([slot for _, slot in of_layer.values()])
                        _mark_done(layer)
            # with or without the name of the model inside, which a checkpoint of that alone leaves out
            paths = (re.escape(path.removeprefix(f"{model.base_model_prefix}.")) for path in stacks)
            unexpected.update(getattr(model, IGNORED_UNEXPECTED) or ())
            patterns = unexpected | {rf"(^|\.){path}\.\d+\." for path in paths}
            setattr(model, IGNORED_UNEXPECTED, patterns)
            return model

        model = self._load(make)
        for tensors, key, tensor in slots:
            tensors[key] = tensor
        _keep_dtypes(model, slots)
        setattr(model, IGNORED_UNEXPECTED, unexpected)
        if self.path is not None and not Path(self.path).is_dir():
            self._options["local_files_only"] = True  # all of it is here by now
        return model

    def layers(self, path: str, indices: Sequence[int]) -> dict[int, dict[str, Tensor]]:
        """Parameters and buffers of some layers of a stack, by their names inside the layer."""

        def make(*args: Any, **kwargs: Any) -> PreTrainedModel:
            model = self._store
            if model is None:
                model = self._store = self._class(*args, **kwargs)
                for stack, layers in find_stacks(model, self.chosen).items():
                    self._layers |= {(stack, index): layer for index, layer in enumerate(layers)}
                    for index, slots in enumerate(_slots_of(model, stack, layers)):
                        self._slots[stack, index] = {name: slot for name, (_, slot) in slots.items()}
                _mark_done(model)
                _hide([slot for module in model.modules() for slot in _slots(module).values()])
                model.all_tied_weights_keys = {}  # what is tied was read before
            inside = re.escape(path.removeprefix(f"{model.base_model_prefix}."))
            wanted = "|".join(rf"(^|\.){inside}\.{index}\." for index in indices)
            setattr(model, IGNORED_UNEXPECTED, {rf"^(?!.*({wanted}))"})
            for index in indices:
                for tensors, key, tensor in self._slots[path, index].values():
                    tensors[key] = tensor
                for module in self._layers[path, index].modules():
                    vars(module).pop(IS_INITIALISED, None)
            return model

        self._load(make)
        read: dict[int, dict[str, Tensor]] = {}
        for index in indices:
            slots = self._slots[path, index]
            read[index] = {name: tensors[key] for name, (tensors, key, _) in slots.items()}
            for tensors, key, _ in slots.values():
                tensors[key] = None
        return read

    def _load(self, make: Callable[..., PreTrainedModel]) -> PreTrainedModel:
        def seeded(*args: Any, **kwargs: Any) -> PreTrainedModel:
            model = make(*args, **kwargs)
            missing.update(getattr(model, IGNORED_MISSING) or ())
            if self.path is None:
                setattr(model, IGNORED_MISSING, {""})  # no report: everything is new
            self._seed_modules(model)
            return model

        missing: set[str] = set()
        self._make = seeded
        where = "the model's config" if self.path is None else self.path
        with reading(Path(where)), _quietly(self.path is None), _empty_is_nan():
            model, info = self._loader.from_pretrained(self.path, output_loading_info=True, **self._options)
        setattr(model, IGNORED_MISSING, missing)
        for module in model.modules():
            vars(module).pop(INITIALISES, None)
        read = model.state_dict()
        left = [name for name in (read if self.path is None else info["missing_keys"]) if _is_left(read.get(name))]
        if left:
            raise UnsupportedModelError(
                f"{sorted(left)[:4]} of {type(model).__name__} get values from its constructor alone, which doesn't "
                "run when a model is read in parts; build or load it as a whole, and call convert_to_ode and "
                "parallelize"
            )
        for kind, names in info.items():
            self.info[kind] = type(names)([*self.info.get(kind, ()), *names])
        return model

    def _seed_modules(self, model: PreTrainedModel) -> None:
        """Its modules are initialised by their own code, each from its own stream."""
        names = {id(module): name for name, module in model.named_modules()}

        def initialise(original: Callable[[nn.Module], None], module: nn.Module) -> None:
            text = f"{self.seed} {names.get(id(module), '')}".encode()
            seed = int.from_bytes(hashlib.sha256(text).digest()[:7], "little")
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed other devices too, for good
            if self.device.type != "cpu":
                torch.get_device_module(self.device).manual_seed(seed)
            original(module)

        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                original = getattr(module, INITIALISES)
                vars(module)[INITIALISES] = lambda part, original=original: initialise(original, part)


def _mark_done(model: nn.Module) -> None:
    for module in model.modules():
        setattr(module, IS_INITIALISED, True)


def _slots(module: nn.Module) -> dict[str, _Slot]:
    return {
        key: (tensors, key, tensor)
        for tensors in tensor_slots(module)
        for key, tensor in tensors.items()
        if tensor is not None
    }


def _slots_of(
    model: PreTrainedModel, path: str, layers: Sequence[nn.Module]
) -> list[dict[str, tuple[nn.Module, _Slot]]]:
    """What isn't tied to anything in each layer, by names inside it, and the module that has it."""
    ties = model.all_tied_weights_keys
    tied = {*ties, *ties.values()}
    found = []
    for index, layer in enumerate(layers):
        slots = {
            f"{name}.{key}" if name else key: (module, slot)
            for name, module in layer.named_modules()
            for key, slot in _slots(module).items()
        }
        found.append({name: slot for name, slot in slots.items() if f"{path}.{index}.{name}" not in tied})
    return found


def _hide(slots: Sequence[_Slot]) -> None:
    for tensors, key, _ in slots:
        tensors[key] = None


def _keep_dtypes(model: PreTrainedModel, slots: Sequence[_Slot]) -> None:
    """The loader reads some modules in a dtype of their own (T5's output projections in half precision)."""
    dtype = model.config.dtype
    plan = dtype_plan(model, dtype) if isinstance(dtype, torch.dtype) else {}
    if not plan:
        return
    pattern, groups, _ = build_glob_alternation(list(plan))
    names = {
        (id(module._parameters), key): f"{path}.{key}"
        for path, module in model.named_modules()
        for key in module._parameters
    }
    for tensors, key, tensor in slots:
        found = pattern.search(names.get((id(tensors), key), ""))
        if found is not None and found.lastgroup is not None:
            tensors[key] = nn.Parameter(tensor.to(plan[groups[found.lastgroup]]), tensor.requires_grad)


@contextmanager
def _quietly(all_is_new: bool) -> Iterator[None]:
    """A model is read in many parts, and no bar of one says how far it is. all_is_new: no warning that tensors are."""
    shown, level = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    if all_is_new:
        hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if shown:
            hf_logging.enable_progress_bar()


@contextmanager
def _empty_is_nan() -> Iterator[None]:
    """Tensors of floats are made with NaN in them, and not with what their memory had."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filling: Any = torch.utils.deterministic
    fills = filling.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    filling.fill_uninitialized_memory = True
    try:
        yield
    finally:
        filling.fill_uninitialized_memory = fills
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _is_left(tensor: Any) -> bool:
    """Whether nothing was written to a tensor that was made then."""
    if not isinstance(tensor, Tensor) or tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
        return False
    return bool(tensor.detach().flatten()[0].isnan())


# ---- what ranks compare
_BLOCKS, _BLOCK = 64, 4096


def fingerprint(folder: Path, variant: str | None = None) -> dict[str, str]:
    """Of each weight file of a checkpoint its size and a checksum of some of its blocks, so that ranks that were given
    different ones find it out without reading all."""
    found = {}
    for path in sorted(folder.iterdir()):
        if not is_of_a_checkpoint(path.name, variant):
            continue
        with reading(path), path.open("rb") as file:
            size, checksum = os.fstat(file.fileno()).st_size, 0
            for i in range(_BLOCKS):
                file.seek(i * max(0, size - _BLOCK) // (_BLOCKS - 1))
                checksum = zlib.crc32(file.read(_BLOCK), checksum)
        found[path.name] = f"{size} bytes {checksum:08x}"
    return found


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Of the values of each tensor, by name."""
    return {
        name: f"{zlib.crc32(t.detach().reshape(-1).cpu().contiguous().view(torch.uint8).numpy().data):08x}"
        for name, t in tensors.items()
    }
