"""`from_pretrained`: a converted model from a checkpoint or a config, whole or spread over lp ranks as it is read.

Spread, a rank reads what is outside the layers, with the layers on the meta device; the model is converted and placed
as a whole one is; and then it reads its own layers, a few at a time, each with the step size and in the depth that the
converted model has. No tensor goes from rank to rank: what several of them have is compared by checksums.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

from hf_layerpar.comparing import model_facts
from hf_layerpar.compat.torch import tensor_slots
from hf_layerpar.compat.transformers import cached_file, find_adapter_config_file
from hf_layerpar.config import (
    CONFIG_KEY,
    Buffers,
    Form,
    Interpolation,
    LayerParallelConfig,
    OdeSettings,
    names,
    num_buffers,
    optional,
    shown,
)
from hf_layerpar.errors import ConfigurationError
from hf_layerpar.ode import fold
from hf_layerpar.ode.checkpoint import DOWNLOAD_ARGUMENTS, load_stock, stock_class_of, stock_form
from hf_layerpar.ode.convert import convert_to_ode, ode_view
from hf_layerpar.ode.families import find_stacks
from hf_layerpar.ode.files import reading
from hf_layerpar.ode.reading import PartReader, checksums, fingerprint
from hf_layerpar.ode.refine import Source, sources
from hf_layerpar.ode.stack import LayerStack
from hf_layerpar.plan.ownership import SplitName
from hf_layerpar.run.joining import transport_of
from hf_layerpar.run.layers import kept_streams
from hf_layerpar.run.transport import Attempt, fact
from hf_layerpar.sharding import parallelize

_AT_ONCE = 1 << 28
"""Bytes of layers that are read together: enough to make the opening of files cheap, and little beside a share."""
_WHOLE = (
    *("quantization_config", "gguf_file", "state_dict", "distributed_config", "tp_plan", "tp_size", "device_mesh"),
    *("max_memory", "offload_folder", "offload_buffers", "adapter_kwargs"),
)
"""Arguments of transformers' `from_pretrained` for models that are read as a whole, or spread otherwise."""
_OF_ONE_RANK = (
    *("device_map", "cache_dir", "token", "proxies", "local_files_only", "force_download", "output_loading_info"),
    "config",  # what the model's own has is compared
)
"""Arguments that may differ between ranks."""
_REMEDY = (
    "give all lp ranks the same checkpoint (or config) and arguments, and the same torch.manual_seed before where "
    "weights are new"
)


def from_pretrained(
    path: str | os.PathLike[str] | PreTrainedConfig,
    *,
    layer_parallel: LayerParallelConfig | None = None,
    group: dist.ProcessGroup | None = None,
    split: Sequence[int] | SplitName | None = None,
    step_size: float | None = None,
    num_steps: int | None = None,
    form: Form | Literal["auto"] = "auto",
    interpolation: Interpolation | None = None,
    buffers: Buffers | None = None,
    stacks: Sequence[str] | None = None,
    **kwargs: Any,
) -> Any:
    """Load a checkpoint written by a converted model's `save_pretrained`, or any plain one, as a converted model; and,
    with `layer_parallel`, as a parallelized one of which this rank reads its own layers only. Then it is collective
    over `group`, and no process needs room for more than its layers and what is outside of layers.

    Args:
        path: a directory or a Hub id. Its config.json names the model class (`architectures`), one of transformers.
            Or a config that does: then all weights are new, and the same at every lp size for one torch.manual_seed.
        layer_parallel, group, split: config, group and split of `parallelize`; it is called where the first is given.
        step_size, num_steps, form, interpolation, buffers, stacks: as of `convert_to_ode`. By default the model comes
            back with the settings it was saved with (a plain checkpoint: step size 1).
        kwargs: for that class's `from_pretrained`; with `output_loading_info=True` the result is (model, info), of
            what this rank has read. Spread, `device_map` may name one device, the rank's own.

    Weights that the checkpoint lacks (a new head) are drawn by the model's own code; spread, the same on all ranks and
    at every lp size, from torch's initial seed and the names of their modules. No code is run from the checkpoint.

    Raises:
        CheckpointError: there is no config.json, it names no class of transformers, or a file is damaged.
        ConfigurationError: a config of another class, or what can't be read in parts (adapters, quantised weights,
            GGUF, a device_map of several devices); and those of `convert_to_ode` and `parallelize`.
        RankMismatchError: the lp ranks were given different checkpoints, arguments or seeds; raised on all of them.
    """
    conversion: dict[str, Any] = {
        "step_size": step_size,
        "num_steps": num_steps,
        "form": form,
        "interpolation": interpolation,
        "buffers": buffers,
        "stacks": stacks,
    }
    if layer_parallel is None:
        if group is not None or split is not None:
            raise ConfigurationError(
                f"group={shown(group)} and split={shown(split)} say how layers are spread over ranks, which "
                "layer_parallel asks for; give layer_parallel=LayerParallelConfig(...), or leave them out"
            )
        if not isinstance(path, PreTrainedConfig):
            return _converted(load_stock(path, **kwargs), conversion)
        model, info = _opened(path, conversion, kwargs)
        view = ode_view(model)
        assert view.load is not None
        view.load()
        view.load = None
        return (model, info) if kwargs.get("output_loading_info") else model
    if not isinstance(layer_parallel, LayerParallelConfig):
        raise ConfigurationError(f"layer_parallel={shown(layer_parallel)} must be a LayerParallelConfig, or None")
    device = Attempt(lambda: _device_asked_for(kwargs))
    transport = transport_of(group, device.value or torch.device("cpu"))
    found = Attempt(lambda: _opened(path, conversion, kwargs))
    told = Attempt(lambda: _facts(path, kwargs, *found.given()) if found.error is None else {})
    facts = {"about to": "load a model in parts", "arguments": _told(conversion | kwargs)} | (told.value or {})
    transport.agree(facts, found.error or told.error, _REMEDY)
    model, info = found.given()
    parallelize(model, layer_parallel, group, split=split)
    return (model, info) if kwargs.get("output_loading_info") else model


@dataclass(eq=False)
class LayerLoader:
    """Gives a converted model the layers that it has on meta.

    plan: by stack, what layers of the checkpoint each layer is made of. folded: they contain the step size.
    """

    model: nn.Module
    reader: PartReader
    plan: Mapping[str, Sequence[Source]]
    folded: bool
    device: torch.device

    def __call__(self) -> None:
        with kept_streams(self.device):
            for stack in ode_view(self.model).stacks:
                tensors = {index: _tensors(layer) for index, layer in enumerate(stack.layers)}
                self._load(stack, [i for i, of_layer in tensors.items() if any(t.is_meta for _, _, _, t in of_layer)])

    def _load(self, stack: LayerStack, lacking: Sequence[int]) -> None:
        """In order, as sources ascend: those that no later layer needs are let go."""
        sources = [self.plan[stack.path][index] for index in lacking]
        needs = [sorted({s.low, s.high} if s.weight else {s.low}) for s in sources]
        held: dict[int, dict[str, Tensor]] = {}
        for place, (index, source) in enumerate(zip(lacking, sources, strict=True)):
            held = {number: tensors for number, tensors in held.items() if number >= needs[place][0]}
            if not held.keys() >= set(needs[place]):
                held |= self.reader.layers(stack.path, self._next(stack, index, needs[place:], held))
            last = place + 1 == len(lacking) or source.low not in needs[place + 1]
            self._put(stack.layers[index], held, source, last)
            if self.folded:
                fold.unfold_(stack.layers[index])

    def _next(
        self, stack: LayerStack, index: int, needs: Sequence[Sequence[int]], held: Mapping[int, Any]
    ) -> list[int]:
        """The layers to read now: what the first of `needs` lacks, and for those behind it as many as fit."""
        size = sum(t.numel() * t.element_size() for _, _, _, t in _tensors(stack.layers[index]))
        wanted = [number for number in needs[0] if number not in held]
        for needed in needs[1:]:
            more = [number for number in needed if number not in held and number not in wanted]
            if (len(wanted) + len(more)) * size > _AT_ONCE:
                break
            wanted += more
        return wanted

    @torch.no_grad()
    def _put(self, layer: nn.Module, held: Mapping[int, Mapping[str, Tensor]], source: Source, last: bool) -> None:
        made: dict[int, Tensor] = {}  # by what it replaces, of which modules may have one together
        for name, tensors, key, meta in list(_tensors(layer)):
            if not meta.is_meta:
                continue
            if id(meta) not in made:
                value = held[source.low][name].detach()
                trained = isinstance(meta, nn.Parameter)
                if source.weight and trained and value.is_floating_point():
                    value = (1 - source.weight) * value + source.weight * held[source.high][name].detach()
                elif not last:
                    value = value.clone()
                made[id(meta)] = nn.Parameter(value, meta.requires_grad) if trained else value
            tensors[key] = made[id(meta)]


def _tensors(layer: nn.Module) -> list[tuple[str, dict[str, Any], str, Tensor]]:
    """(name in the layer, where a module keeps it, its name there, itself) of every parameter and buffer."""
    return [
        (f"{path}.{key}" if path else key, tensors, key, tensor)
        for path, module in layer.named_modules()
        for tensors in tensor_slots(module)
        for key, tensor in tensors.items()
        if tensor is not None
    ]


def _converted(loaded: Any, conversion: Mapping[str, Any]) -> Any:
    if isinstance(loaded, tuple):
        model, info = loaded
        return convert_to_ode(model, **conversion), info
    return convert_to_ode(loaded, **conversion)


def _opened(
    path: str | os.PathLike[str] | PreTrainedConfig, conversion: Mapping[str, Any], kwargs: Mapping[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A converted model with its layers on meta, whose view has what loads them; and what was found to be read."""
    device = _device_asked_for(kwargs)
    if isinstance(path, PreTrainedConfig):
        stock_class, options, name = stock_class_of(path.to_dict(), f"the {type(path).__name__}"), dict(kwargs), None
        dtype = options.pop("torch_dtype", None) or options.pop("dtype", None) or path.dtype
        options |= {"config": path, "dtype": dtype or torch.get_default_dtype()}
    else:
        name = os.fspath(path)
        with reading(Path(name)):
            if find_adapter_config_file(name, **_of_download(kwargs)) is not None:
                raise ConfigurationError(
                    f"{name} has the adapters of a PEFT model, which are not read in parts; load it without "
                    "layer_parallel and call parallelize, or load the model that they belong to"
                )
            stock_class, options = stock_form(name, **kwargs)
    for key in _WHOLE:
        if options.get(key) is not None:
            raise ConfigurationError(
                f"{key}={shown(options[key])} can't be used for a model that is read in parts; leave it out, or load "
                "the model without layer_parallel and call parallelize"
            )
    config = options.get("config")
    wanted = stock_class.config_class
    if isinstance(config, PreTrainedConfig) and wanted is not None and not isinstance(config, wanted):
        raise ConfigurationError(
            f"config is a {type(config).__name__}, and a {stock_class.__name__} is built from a {wanted.__name__}; "
            "give one of that class, or leave it out"
        )
    options.pop("output_loading_info", None)
    chosen = optional(names)("stacks", conversion["stacks"])
    reader = PartReader(stock_class, name, options, chosen, torch.initial_seed(), device)
    with kept_streams(device):
        opened = reader.open()
    depths = {name: len(layers) for name, layers in find_stacks(opened, reader.chosen).items()}
    stored = getattr(opened.config, CONFIG_KEY, None)
    model = convert_to_ode(opened, **conversion)
    view = ode_view(model)
    settings = view.settings
    if conversion["buffers"] is not None:  # as they lay before the model got another depth
        settings = dataclasses.replace(settings, buffers=conversion["buffers"])
    plan = {
        stack.path: sources(depths[stack.path], len(stack.layers) - num_buffers(settings.buffers), settings)
        for stack in view.stacks
    }
    folded = stored is not None and OdeSettings.from_dict(stored).folded
    view.load = LayerLoader(model, reader, plan, folded, device)
    return model, reader.info


def _facts(
    path: str | os.PathLike[str] | PreTrainedConfig,
    kwargs: Mapping[str, Any],
    model: PreTrainedModel,
    info: Mapping[str, Any],
) -> dict[str, Any]:
    """What ranks compare of what they have read: the model, the files, and what all of them have."""
    facts: dict[str, Any] = {}
    if not isinstance(path, PreTrainedConfig):
        facts["checkpoint"] = fingerprint(_folder(path, kwargs), kwargs.get("variant"))
    if info["missing_keys"] or isinstance(path, PreTrainedConfig):
        facts["torch.initial_seed()"] = torch.initial_seed()
    outside = {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor) and not t.is_meta}
    return facts | model_facts(model) | {"checksums outside the layers": checksums(outside)}


def _device_asked_for(kwargs: Mapping[str, Any]) -> torch.device:
    """Where `from_pretrained` with these arguments puts the model.

    Raises ConfigurationError for a device_map of several devices, or of ones to be found out.
    """
    asked = kwargs.get("device_map")
    places = set(asked.values()) if isinstance(asked, Mapping) else {asked}
    try:
        (place,) = places
        return torch.get_default_device() if place is None else torch.device(place)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigurationError(
            f"device_map={shown(asked)} must name one device, as the layers are spread over ranks; use "
            "device_map=torch.device(...), or leave it out for the CPU"
        ) from error


def _of_download(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: kwargs[key] for key in DOWNLOAD_ARGUMENTS if key in kwargs}


def _folder(path: str | os.PathLike[str], kwargs: Mapping[str, Any]) -> Path:
    """Where the files of a checkpoint are that was read."""
    if Path(path).is_dir():
        return Path(path, kwargs.get("subfolder") or "")
    here = cached_file(
        path, CONFIG_NAME, **(_of_download(kwargs) | {"local_files_only": True, "force_download": False})
    )
    return Path(str(here)).parent


def _told(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What all ranks must have been told alike."""
    return {key: fact(value) for key, value in arguments.items() if key not in _OF_ONE_RANK}
