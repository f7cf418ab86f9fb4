"""Saving a model that is spread over lp ranks: each writes the tensors that it owns, into files of one checkpoint.

A model of at most `COLLECTED` bytes that fits one file is gathered on lp rank 0 instead, which then writes what stock
would. Adapters are gathered too, without the model that they are put on.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import CommitInfo
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME

from hf_layerpar.checkpoint.collecting import collect
from hf_layerpar.checkpoint.pieces import Pieces, kept_names, write_tensors
from hf_layerpar.compat.transformers import has_adapters
from hf_layerpar.errors import CheckpointError, ConfigurationError
from hf_layerpar.hub.card import solver_facts
from hf_layerpar.ode.fold import fold, scaled_parameters, unfold
from hf_layerpar.ode.pushing import ModelPush, check_pushable, kind_of
from hf_layerpar.ode.saving import SavePretrained, aside_of, check_complete, filled, publish, sync, write_files
from hf_layerpar.run.data_shards import full_tensor
from hf_layerpar.run.first_rank import all_give, on_first_rank, tell_all, together

if TYPE_CHECKING:
    from hf_layerpar.sharding import LayerParallel

COLLECTED = 256 << 20
"""Bytes of a model that is small enough to be gathered."""

EXACT_WEIGHTS = "exact_weights"
"""Files that begin so have, as they are, the tensors that folding the step size into stock's weights rounds."""


@dataclasses.dataclass
class Writing:
    """What this rank is to write into a directory; nothing of it talks to other ranks. Both return names of files.

    first: before other ranks write there, since transformers takes files away that look like those of an earlier save.
    own: beside the others.
    """

    first: Callable[[Path], list[str]] = lambda directory: []
    own: Callable[[Path], list[str]] = lambda directory: []


@dataclasses.dataclass(eq=False)
class _Saver(ABC):
    """The `save_pretrained` of a parallelized model. Plain data, so that deepcopy follows it to the copy."""

    model: Any
    handle: LayerParallel

    @property
    def is_spread(self) -> bool:
        """Whether other ranks have parts of the model that this one lacks."""
        handle = self.handle
        return handle.lp_size > 1 or handle.is_sharded_over_dp or self._is_cut

    @property
    def _is_cut(self) -> bool:
        return any(isinstance(tensor, DTensor) for tensor in self.model.state_dict(keep_vars=True).values())

    @abstractmethod
    def prepared(self, **options: Any) -> Writing:
        """What is to be written, found out before. Collective over the lp ranks."""

    def part(self, writes: bool, **options: Any) -> Writing:
        """`prepared` where the lp ranks of this rank write, and nothing elsewhere. Collective over the lp ranks, and
        over those that have pieces of their tensors."""
        if writes:
            return self.prepared(**options)
        if self._is_cut:  # those that write need this rank's pieces
            self.prepared(**options)
        return Writing()

    def write(self, directory: Path, *, writes: bool = True, **options: Any) -> list[str]:
        """Writes the model aside, then into `directory`, and returns the names of all files on lp rank 0. Collective as
        `part`.

        Raises CheckpointError on all lp ranks where one can't write.
        """
        handle, group = self.handle, self.handle.group
        failed = f"{directory} was not written"
        target = Path(os.path.realpath(directory))
        with handle.whole():
            writing = self.part(writes, **options)
            if not writes:
                return []
            made: list[Path] = []

            def first() -> Path | None:
                if handle.lp_rank:
                    return None
                if target.is_file():
                    raise CheckpointError(f"{directory} is a file; give save_pretrained a directory")
                made.append(aside_of(target))
                made[0].mkdir(parents=True)
                for name in writing.first(made[0]):
                    sync(made[0] / name)
                return made[0]

            try:
                temporary = next(path for path in all_give(first, failed, group) if path is not None)
                with together(failed, group):
                    for name in writing.own(temporary):
                        sync(temporary / name)
                names: list[str] = []
                with together(failed, group):
                    if made:
                        names = _files_in(temporary)
                        publish(temporary, target, options.get("variant"))
            finally:
                for path in made:
                    shutil.rmtree(path, ignore_errors=True)  # it is gone already where it became the target
        return names


class SaveSpread(_Saver):
    """That of a model, whatever its class."""

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
        """As `PreTrainedModel.save_pretrained`, with the same arguments. Collective over the lp ranks, which write the
        tensors that they own; they must see one directory.

        The model is written where any of its lp ranks is the main process. With a `state_dict` it is not collective,
        and only a rank that is given one writes: `layer_parallel(model).state_dict()` is that of all on lp rank 0.

        Raises (on all lp ranks):
            CheckpointError: `save_directory` is a file, a rank doesn't see it, or can't write.
            ConfigurationError: `distributed_checkpoint=True`.
            RankMismatchError: the lp ranks were given different arguments.
        """
        handle = self.handle
        options = {"max_shard_size": max_shard_size, "variant": variant, "save_original_format": save_original_format}
        more = {"push_to_hub": push_to_hub, "token": token, "distributed_checkpoint": distributed_checkpoint}
        if state_dict is not None or not self.is_spread:
            if not isinstance(self.model, PreTrainedModel):
                if state_dict is None or state_dict:
                    own = {"is_main_process": is_main_process, "max_shard_size": max_shard_size, "variant": variant}
                    self._write_own(Path(save_directory), state_dict or {}, **own, push_to_hub=push_to_hub, **kwargs)
                return None
            given = {"is_main_process": is_main_process, "state_dict": state_dict, "save_peft_format": save_peft_format}
            return SavePretrained(self.model)(save_directory, **given, **options, **more, **kwargs)
        handle.agree({"save_pretrained": os.fspath(save_directory), **options, "push_to_hub": push_to_hub})
        if distributed_checkpoint:
            raise ConfigurationError(
                "distributed_checkpoint=True saves FSDP and TP shards in a format of their own; leave it out, and each "
                "lp rank writes its layers"
            )
        if not handle.any_of("save a model", is_main_process):
            self.write(Path(save_directory), writes=False, **options)
            return None
        push = None
        if push_to_hub:  # before anything is written
            check_pushable(self.model)
            repo_id = kwargs.pop("repo_id", os.path.basename(os.path.abspath(save_directory)))
            push = on_first_rank(
                lambda: ModelPush(repo_id, token=token, **kwargs), "a push", handle.group, handle.device
            )
        names = self.write(Path(save_directory), save_peft_format=save_peft_format, **options)
        if push_to_hub:

            def upload() -> None:
                assert push is not None
                push.upload(self.model, Path(save_directory), names, variant=variant)

            on_first_rank(upload, "a push", handle.group, handle.device)
        return None

    def prepared(
        self,
        *,
        max_shard_size: int | str = "50GB",
        variant: str | None = None,
        save_peft_format: bool = True,
        save_original_format: bool = True,
        exact: bool = False,
        staged: bool = False,
    ) -> Writing:
        """What is to be written, found out before. Collective over the lp ranks.

        exact: also the tensors that folding rounds. staged: of copies on the host, so that the model may change.
        """
        model, handle = self.model, self.handle
        if has_adapters(model):
            given = collect(handle, adapter_names(model, handle))
            if staged:
                given = {name: tensor.clone() for name, tensor in given.items()}
            return _of_first(handle, lambda d: SavePretrained(model).write(d, given, save_peft_format=save_peft_format))
        is_stock = isinstance(model, PreTrainedModel)
        if is_stock and getattr(model, "hf_quantizer", None) is not None:
            if not self.is_spread:
                return _of_first(handle, lambda directory: SavePretrained(model).write(directory, None))
            raise CheckpointError(
                f"the weights of a quantized {type(model).__name__} can't be written in pieces; train adapters on it, "
                "whose checkpoints leave it out"
            )
        layout = handle._layout
        here = {name: t for name, t in model.state_dict(keep_vars=True).items() if name in layout}
        self._check_layout(here)
        stand_ins = {name: torch.zeros((), dtype=dtype).expand(shape) for name, (shape, dtype) in layout.items()}
        kind = kind_of(model, stand_ins) if is_stock else "plain"
        pieces = Pieces(
            model,
            layout,
            handle.owner_of,
            handle._tied,
            handle.lp_size,
            max_shard_size=max_shard_size,
            variant=variant,
            original_format=save_original_format,
            folded=kind == "folded",
        )
        has_own_format = not is_stock and hasattr(type(model), "save_pretrained")
        small = has_own_format or (pieces.fits_one and pieces.total_size <= COLLECTED)
        whole = handle.state_dict() if small else {}
        held: dict[int, Tensor] = {}  # by identity, so that tied tensors stay tied

        def of(tensor: Tensor) -> Tensor:
            if id(tensor) not in held:
                full = full_tensor(tensor.detach())
                held[id(tensor)] = full.to("cpu", copy=True) if staged else full
            return held[id(tensor)]

        own = {name: of(t) for name, t in here.items() if handle.owner_of.get(name, 0) == handle.lp_rank}
        if staged:
            whole = {name: own.get(name, tensor) for name, tensor in whole.items()}

        def first(directory: Path) -> list[str]:
            if handle.lp_rank:
                return []
            if small and is_stock:
                more = {"max_shard_size": max_shard_size, "variant": variant}
                SavePretrained(model).write(directory, whole, save_original_format=save_original_format, **more)
            elif has_own_format:
                self._write_own(directory, whole, max_shard_size=max_shard_size, variant=variant)
            elif small:
                kept = {name: whole[name].contiguous() for name in kept_names(model, layout, handle._tied)}
                save_file(kept, directory / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
            elif is_stock:
                write_files(model, directory, kind, {}, variant=variant)
            return _files_in(directory)

        def of_rank(directory: Path) -> list[str]:
            names = []
            if not small:
                check_shared(directory)
                names += pieces.write(directory, handle.lp_rank, own.__getitem__)
            if exact and kind == "folded":
                names += _write_exact(model, directory, own, handle)
            return names

        return Writing(first, of_rank)

    def _write_own(self, directory: Path, given: dict[str, Tensor], **options: Any) -> None:
        """By the `save_pretrained` of a class that isn't transformers'. given: what this rank lacks."""
        with filled(self.model, given):
            type(self.model).save_pretrained(self.model, directory, **options)

    def _check_layout(self, here: dict[str, Tensor]) -> None:
        layout = self.handle._layout
        odd = sorted(n for n, t in here.items() if (tuple(t.shape), t.dtype) != layout[n])
        error = None
        if odd:
            t = here[odd[0]]
            error = CheckpointError(
                f"{len(odd)} tensors changed their shape or dtype after parallelize, such as {odd[0]}: "
                f"{layout[odd[0]]} then, {tuple(t.shape), t.dtype} now; cast and resize a model before parallelize"
            )
        self.handle.agree({"about to": "write a model"}, error)


class SaveAdapters(_Saver):
    """That of a PEFT model."""

    def __call__(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As `PeftModel.save_pretrained`, with the same arguments. Collective over the lp ranks; lp rank 0 writes. With
        a `state_dict` as in `SaveSpread`.

        Raises CheckpointError on all lp ranks where lp rank 0 can't write.
        """
        model, handle = self.model, self.handle
        given = kwargs.pop("state_dict", None)
        if given is not None:
            if given:
                check_complete(model, given)
                self._write(save_directory, given, *args, **kwargs)
        elif not self.is_spread:
            type(model).save_pretrained(model, save_directory, *args, **kwargs)
        else:
            given = collect(handle, adapter_names(model, handle, kwargs.get("save_embedding_layers", "auto")))
            with together(f"{save_directory} was not written", handle.group):
                if given:
                    self._write(save_directory, given, *args, **kwargs)

    def _write(self, save_directory: Any, given: dict[str, Tensor], *args: Any, **kwargs: Any) -> None:
        with filled(self.model, given):
            type(self.model).save_pretrained(self.model, save_directory, *args, state_dict=given, **kwargs)

    def write(self, directory: Path, *, writes: bool = True, **options: Any) -> list[str]:
        """As that of a model, but right into `directory`, as PEFT does."""
        with self.handle.whole():
            writing, names = self.part(writes, **options), []
            if writes:
                with together(f"{directory} was not written", self.handle.group):
                    directory.mkdir(parents=True, exist_ok=True)
                    names = writing.first(directory)
        return names

    def prepared(self, *, staged: bool = False, **_: Any) -> Writing:
        """As `SaveSpread.prepared`."""
        given = collect(self.handle, adapter_names(self.model, self.handle, "auto"))
        if staged:
            given = {name: tensor.clone() for name, tensor in given.items()}
        return _of_first(self.handle, lambda directory: self._write(directory, given))


def adapter_names(model: Any, handle: LayerParallel, embeddings: bool | str = False) -> list[str]:
    """The names of the tensors that adapters are made of, on all lp ranks alike. Collective.

    embeddings: as `save_embedding_layers` of PEFT; unless it is False, those are among them.
    """
    from peft import get_peft_model_state_dict

    layout = handle._layout
    stand_ins = {name: torch.zeros((), dtype=dtype).expand(shape) for name, (shape, dtype) in layout.items()}
    chosen: set[int] = set()
    for adapter in model.peft_config:
        found = get_peft_model_state_dict(model, dict(stand_ins), adapter, save_embedding_layers=False)
        chosen |= {id(tensor) for tensor in found.values()}
    kept = {
        id(p)
        for get in (model.get_input_embeddings, model.get_output_embeddings)
        if (m := get())
        for p in m.parameters()
    }
    mine = {name for name, tensor in stand_ins.items() if id(tensor) in chosen}
    if embeddings:
        mine |= {n for n, t in model.state_dict(keep_vars=True).items() if id(t) in kept}
    told = tell_all(mine, handle.group, "the choice of adapter weights")
    return [name for name in layout if any(name in names for names in told.values())]


def check_shared(directory: Path) -> None:
    """Raises CheckpointError where this process doesn't see a directory that another one has just made."""
    if not directory.is_dir():
        raise CheckpointError(
            f"this rank does not see {directory}, which another one made: give a directory on a file system that all "
            "ranks share, since each writes its layers"
        )


def _of_first(handle: LayerParallel, write: Callable[[Path], Any]) -> Writing:
    def first(directory: Path) -> list[str]:
        if handle.lp_rank:
            return []
        before = set(_files_in(directory))
        write(directory)
        return sorted(set(_files_in(directory)) - before)

    return Writing(first)


def _write_exact(model: nn.Module, directory: Path, own: dict[str, Tensor], handle: LayerParallel) -> list[str]:
    rounded = {
        name: own[name]
        for name, module, h in scaled_parameters(model)
        if name in own and not torch.equal(unfold(fold(own[name], module, h), module, h), own[name])
    }
    if not rounded:
        return []
    check_shared(directory)
    file = f"{EXACT_WEIGHTS}-{handle.lp_rank + 1:05d}-of-{handle.lp_size:05d}.safetensors"
    write_tensors(directory / file, {name: (tuple(t.shape), t.dtype) for name, t in rounded.items()}, rounded.values())
    return [file]


def _files_in(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def push(saver: _Saver, repo_id: str, **options: Any) -> CommitInfo | None:
    """Pushes a parallelized model in one commit, which lp rank 0 returns. Collective over the lp ranks.

    Raises what failed on lp rank 0, HubError that quotes it on the others; CheckpointError on all where a rank can't
    write its part.
    """
    handle, doing = saver.handle, f"the push to {repo_id!r}"
    group, device = handle.group, handle.device
    check_pushable(saver.model)
    handle.agree({"push_to_hub": repo_id})
    model_push = on_first_rank(lambda: ModelPush(repo_id, **options), doing, group, device)
    with ExitStack() as stack:
        with together(f"{repo_id!r} was not pushed", group):
            temporary = stack.enter_context(tempfile.TemporaryDirectory()) if handle.lp_rank == 0 else None
        told = tell_all(temporary, group, doing)
        folder = Path(next(path for path in told.values() if path is not None), "model")
        saver.write(folder, max_shard_size=options.get("max_shard_size", "50GB"))

        def upload() -> CommitInfo:
            assert model_push is not None
            solver = solver_facts(handle.config.to_dict(), lp_size=handle.lp_size)
            return model_push.upload(saver.model, folder, os.listdir(folder), solver)

        return on_first_rank(upload, doing, group, device)
