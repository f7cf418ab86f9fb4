"""What `save_pretrained` of a converted model writes, and how: whole or not at all.

What is written depends on what stock transformers can compute:

- every step size 1: an ordinary checkpoint; stock classes give bit-equal outputs.
- split form: an ordinary checkpoint whose weights contain the step size (`hf_layerpar.ode.fold`); stock classes compute
  the same function up to rounding. The settings say `folded`, so that converting it again unfolds it.
- otherwise (euler form; a fold that would be inexact): weights as they are, model type "ode-<type>" and custom code
  (`hf_layerpar.ode.remote`). Auto classes refuse it without trust_remote_code=True, and with it give a converted model
  of the stock class. A stock class's own from_pretrained (BertModel.from_pretrained) can't be made to refuse: it logs
  transformers' warning that a model of type "ode-bert" is used for one of type "bert", and steps with 1.

Adapters of a PEFT model are written as stock writes them; they belong to the converted model.

Nothing is half written. All files are made in a directory ".<name>.saving-<random>" and then moved into place. Where
more changes than one weight file, the old weights are taken away first and the new ones put in place last: in between
nothing loads. (Without config.json a stock class would still load the weights, with its default config.) A killed save
can leave that directory behind.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from hf_layerpar.compat.torch import tensor_slots
from hf_layerpar.compat.transformers import has_adapters
from hf_layerpar.config import CONFIG_KEY
from hf_layerpar.errors import CheckpointError, ConfigurationError
from hf_layerpar.hub.card import Kind
from hf_layerpar.ode import remote
from hf_layerpar.ode.convert import ode_view
from hf_layerpar.ode.files import is_of_a_checkpoint, makes_loadable
from hf_layerpar.ode.fold import folded_state_dict
from hf_layerpar.ode.pushing import ModelPush, PushToHub, kind_of


def attach_saving(model: PreTrainedModel) -> None:
    """Make `model.save_pretrained` write what this module's docstring says, and `model.push_to_hub` push that.

    Called by `convert_to_ode`.
    """
    model.save_pretrained = SavePretrained(model)
    model.push_to_hub = PushToHub(model)  # pyright: ignore[reportAttributeAccessIssue]


@dataclasses.dataclass(eq=False)
class SavePretrained:
    """The `save_pretrained` of a converted model. Plain data, so that deepcopy and pickle follow it to the copy."""

    model: PreTrainedModel

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        variant: str | None = None,
        token: str | bool | None = None,
        save_peft_format: bool = True,
        save_original_format: bool = True,
        distributed_checkpoint: bool = False,
        **kwargs: Any,
    ) -> None:
        """As `PreTrainedModel.save_pretrained`, with the same arguments.

        With `is_main_process=False` nothing is written, and neither is with an empty `state_dict` on a rank that lacks
        layers: `layer_parallel(model).state_dict()` gives the tensors on lp rank 0 only.

        Raises:
            CheckpointError: this rank lacks layers, and no `state_dict` was given or that lacks them too; or
                `save_directory` is a file.
            ConfigurationError: `distributed_checkpoint=True`.
        """
        sharded = any(stack.sharded for stack in ode_view(self.model).stacks)
        if sharded and (state_dict is None or state_dict):
            check_complete(self.model, state_dict or self.model.state_dict())
        if distributed_checkpoint:
            raise ConfigurationError(
                "distributed_checkpoint=True saves FSDP and TP shards, and a converted model has none; leave it out"
            )
        if not is_main_process or (sharded and not state_dict):
            return
        target = Path(os.path.realpath(save_directory))
        if target.is_file():
            raise CheckpointError(f"{save_directory} is a file; give save_pretrained a directory")
        push = None
        if push_to_hub:  # before the weights are written
            repo_id = kwargs.pop("repo_id", os.path.basename(os.path.abspath(save_directory)))
            push = ModelPush(repo_id, token=token, **kwargs)
        with aside(target) as temporary:
            self.write(
                temporary,
                state_dict,
                max_shard_size=max_shard_size,
                variant=variant,
                save_peft_format=save_peft_format,
                save_original_format=save_original_format,
            )
            names = os.listdir(temporary)
            for name in names:
                sync(temporary / name)
            publish(temporary, target, variant)
        if push is not None:
            push.upload(self.model, target, names, variant=variant)

    def write(self, directory: Path, given: dict[str, Tensor] | None, **kwargs: Any) -> None:
        """Writes into a directory that nobody reads yet. given: the whole state dict, where the model lacks layers."""
        model = self.model
        if has_adapters(model):  # writes the adapters only, and no config.json
            with filled(model, given or {}):
                type(model).save_pretrained(model, directory, state_dict=given, **kwargs)
            return
        state_dict = dict(model.state_dict() if given is None else given)
        # stock drops tied weights by their shared storage, which a gathered state dict doesn't have
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        for key, kept in tied.items():
            if key in state_dict and kept in state_dict:
                state_dict[key] = state_dict[kept]
        counted = state_dict.keys() - {name for name, _ in model.named_buffers()} - tied.keys()
        parameters = sum(state_dict[key].numel() for key in counted)
        kind = kind_of(model, state_dict)
        write_files(
            model, directory, kind, folded_state_dict(model, state_dict) if kind == "folded" else state_dict, **kwargs
        )
        for file in directory.glob("*.index*.json"):
            with _edited(file) as index:  # stock counts the parameters in memory, which may be a part of the model
                index["metadata"]["total_parameters"] = parameters


def write_files(
    model: PreTrainedModel, directory: Path, kind: Kind, state_dict: dict[str, Tensor], **kwargs: Any
) -> None:
    """Writes a checkpoint by stock's `save_pretrained`; with an empty `state_dict` all of it but the weights.

    kind: what the tensors are, which config.json says.
    """
    source = remote.modeling_source(model) if kind == "code" else None
    type(model).save_pretrained(model, directory, state_dict=state_dict, **kwargs)
    with _edited(directory / CONFIG_NAME) as config:
        config[CONFIG_KEY] = dataclasses.replace(ode_view(model).settings, folded=kind == "folded").to_dict()
        if source is not None:
            config["model_type"] = remote.MODEL_TYPE_PREFIX + config["model_type"]
            config["auto_map"] = remote.auto_map(model)
            (directory / f"{remote.MODULE_NAME}.py").write_text(source, "utf-8")


def check_complete(model: nn.Module, state_dict: dict[str, Tensor]) -> None:
    for stack in ode_view(model).stacks:
        for index in range(len(stack.layers)):
            if not any(f"{stack.path}.{index}." in key for key in state_dict):
                raise CheckpointError(
                    f"this rank holds only a part of the layers, and {stack.path}.{index} is not among the tensors to "
                    "save; call save_pretrained(path) of the parallelized model on all its lp ranks, or give it "
                    "state_dict=layer_parallel(model).state_dict()"
                )


@contextmanager
def filled(model: nn.Module, state_dict: dict[str, Tensor]) -> Iterator[None]:
    """The tensors that this rank lacks are those of `state_dict` inside. PEFT saves of a module what is in it."""
    lacking = [
        (slots, key, nn.Parameter(state_dict[name], requires_grad=False) if is_parameter else state_dict[name])
        for path, module in model.named_modules()
        for is_parameter, slots in zip((True, False), tensor_slots(module), strict=True)
        for key, value in slots.items()
        if value is None and (name := f"{path}.{key}" if path else key) in state_dict
    ]
    try:
        for slots, key, tensor in lacking:
            slots[key] = tensor
        yield
    finally:
        for slots, key, _ in lacking:
            slots[key] = None


@contextmanager
def _edited(file: Path) -> Iterator[dict[str, Any]]:
    """The content of a JSON file, written back in stock's layout."""
    content = json.loads(file.read_text("utf-8"))
    yield content
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")


def aside_of(target: Path) -> Path:
    """A path to write what becomes `target`: beside a new directory, but inside an existing one, which may be a mount
    point."""
    return (target if target.is_dir() else target.parent) / f".{target.name}.saving-{uuid.uuid4().hex[:8]}"


@contextmanager
def aside(target: Path) -> Iterator[Path]:
    """A new directory, which is gone afterwards unless it became the target."""
    temporary = aside_of(target)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish(temporary: Path, target: Path, variant: str | None) -> None:
    """Move the files of a complete checkpoint into place; at no time does `target` hold a mixture that loads."""
    if not target.exists():
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process has just made it
                raise
        else:
            sync(target.parent)
            return
    new = os.listdir(temporary)
    new.sort(key=makes_loadable)
    stale = []
    if CONFIG_NAME in new:  # not for adapters, which lie beside their base model
        stale = [name for name in os.listdir(target) if name not in new and is_of_a_checkpoint(name, variant)]
    changed = [name for name in new[:-1] if name.endswith(".safetensors") or not _same(temporary / name, target / name)]
    if changed or stale:
        for name in sorted([*stale, new[-1]], key=makes_loadable, reverse=True):
            (target / name).unlink(missing_ok=True)
    for name in [*changed, new[-1]]:
        os.replace(temporary / name, target / name)
    sync(target)


def _same(a: Path, b: Path) -> bool:
    return b.is_file() and a.read_bytes() == b.read_bytes()


def sync(path: Path) -> None:
    """Waits until a file's contents, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
