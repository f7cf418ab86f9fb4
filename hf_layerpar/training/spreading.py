"""Puts the trainer's model on its mesh: layers on lp ranks, parts of matrices on tp ranks, pieces on dp ranks."""

from __future__ import annotations

import os
from typing import Any

from torch import nn
from transformers.trainer_utils import set_seed

from hf_layerpar.comparing import model_facts
from hf_layerpar.config import shown
from hf_layerpar.errors import ConfigurationError, UnsupportedModelError
from hf_layerpar.loading import from_pretrained
from hf_layerpar.ode.convert import convert_to_ode, ode_view
from hf_layerpar.ode.reading import checksums
from hf_layerpar.run.mesh import Mesh
from hf_layerpar.run.transport import Attempt, GroupTransport
from hf_layerpar.sharding import layer_parallel, parallelize
from hf_layerpar.training.arguments import LayerParallelTrainingArguments
from hf_layerpar.training.collectives import broadcast_model
from hf_layerpar.training.processes import REMEDY, Processes


def spread(
    given: nn.Module | str | os.PathLike[str], args: LayerParallelTrainingArguments, mesh: Mesh, everyone: Processes
) -> nn.Module:
    """The model `given`, or of the checkpoint of that name, as this process has it. Collective over all processes.

    One that isn't converted is converted at step size 1; one that is spread already stays as it is.

    Raises ConfigurationError for one that is spread in another way, RankMismatchError on all processes where they were
    given different ones, and those of `convert_to_ode`, `parallelize` and `from_pretrained`.
    """
    if isinstance(given, str | os.PathLike):
        model = _read(given, args, mesh, everyone)
    elif is_parallel(given):  # a second trainer for the same model
        _check_placement(given, args, mesh)
        layer_parallel(given).config = args.layer_parallel_config
        return given
    else:
        model = _placed(given, args, mesh, everyone)
    _cut(model, args, mesh, everyone)
    return model


def is_parallel(model: Any) -> bool:
    """Whether `parallelize` was called on the model."""
    try:
        layer_parallel(model)
    except UnsupportedModelError:
        return False
    return True


def _check_placement(model: nn.Module, args: LayerParallelTrainingArguments, mesh: Mesh) -> None:
    handle = layer_parallel(model)
    if args.split not in (None, handle.split):
        raise ConfigurationError(
            f"the model is spread with split={shown(handle.split)} already, but split={args.split!r}; give a model "
            "that isn't parallelized, or leave split out"
        )
    if handle.lp_size != mesh.lp_size:
        raise ConfigurationError(
            f"the model is spread over {handle.lp_size} lp ranks already, but lp_size={mesh.lp_size}; give a "
            "model that isn't parallelized"
        )
    if (handle.tp_size, handle.is_sharded_over_dp) != (mesh.tp_size, args.shards_data):
        raise ConfigurationError(
            f"the model was cut before by tp_size={handle.tp_size} and fsdp={handle.is_sharded_over_dp}, but "
            f"now tp_size={mesh.tp_size} and fsdp={args.shards_data}; give a model that isn't parallelized"
        )


def _placed(model: nn.Module, args: LayerParallelTrainingArguments, mesh: Mesh, everyone: Processes) -> nn.Module:
    """A model that every process has whole."""
    found = Attempt(lambda: _converted(model))
    everyone.agree(model_facts(found.value or model), found.error)
    model = found.given()
    if args.place_model_on_device is not False:
        model.to(args.device)
    parallelize(model, args.layer_parallel_config, mesh.lp_group, split=args.split)
    for group in (mesh.dp_group, mesh.tp_group):
        if group is not None:
            broadcast_model(model, group)
    return model


def _converted(model: nn.Module) -> nn.Module:
    try:
        ode_view(model)
    except UnsupportedModelError:
        return convert_to_ode(model)
    return model


def _read(
    path: str | os.PathLike[str], args: LayerParallelTrainingArguments, mesh: Mesh, everyone: Processes
) -> nn.Module:
    """A model of which each process has read its own layers."""
    set_seed(args.seed)  # new heads are drawn, as stock's with model_init
    place = None if args.place_model_on_device is False else args.device
    placement: dict[str, Any] = {"group": mesh.lp_group, "split": args.split, "device_map": place}
    found = Attempt(lambda: from_pretrained(path, layer_parallel=args.layer_parallel_config, **placement))
    everyone.agree({"about to": "train a model that was read in parts"}, found.error)
    model = found.given()
    for group, names in ((mesh.dp_group, "dp ranks"), (mesh.tp_group, "tp ranks")):
        if group is not None:
            held = checksums(dict(model.named_parameters()) | dict(model.named_buffers()))
            GroupTransport(group, names).agree({"checksums": held}, remedy=REMEDY)
    return model


def _cut(model: nn.Module, args: LayerParallelTrainingArguments, mesh: Mesh, everyone: Processes) -> None:
    """Leaves tp ranks parts of the layers' matrices, and then dp ranks pieces of all that they have."""
    handle, devices = layer_parallel(model), mesh.devices
    splits, shards = mesh.tp_size > 1, args.shards_data
    if devices is None or not (splits or shards):
        return

    def cut() -> None:
        if splits:
            handle.split_over_tp(devices)
        if shards:
            handle.shard_over_dp(devices)

    everyone.agree({"about to": "cut parameters"}, Attempt(cut).error)
