"""Puts a converted model on the ranks of a layer axis: owned layers only, solved by the engine in every forward."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakSet

import torch
import torch.distributed as dist
from huggingface_hub import CommitInfo
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.optimizer import register_optimizer_step_pre_hook

from hf_layerpar.calling import Calls, refused_wrapper
from hf_layerpar.checkpoint.saving import SaveAdapters, SaveSpread, push
from hf_layerpar.compat.torch import DDP_READS_FIRST, norms_of, parameter_slots, scale_, tensor_slots
from hf_layerpar.compat.transformers import CHECKPOINT_PATH
from hf_layerpar.config import LayerParallelConfig, shown
from hf_layerpar.errors import CheckpointError, ConfigurationError, UnsupportedModelError
from hf_layerpar.generation import share_generation
from hf_layerpar.ode.compiled import Compiler
from hf_layerpar.ode.convert import OdeView, ode_view
from hf_layerpar.ode.ends import Ends
from hf_layerpar.ode.families import shared_modules
from hf_layerpar.ode.rehearsal import plain
from hf_layerpar.ode.stack import LayerStack, intercept_root
from hf_layerpar.placing import device_of, place_ends, played, tail_in_layers
from hf_layerpar.plan.ladder import StackShape, exact_settings
from hf_layerpar.plan.ownership import (
    INTERLEAVED,
    V,
    balanced_split,
    contiguous_owner,
    interleaved_owner,
    two_blocks_owner,
)
from hf_layerpar.plan.schedules import SCHEDULES
from hf_layerpar.plan.step import check_config, inner_grid, interval_points
from hf_layerpar.run.data_shards import DataShards, copy_full, full_tensor, group_along, local
from hf_layerpar.run.mesh import store_of_restart
from hf_layerpar.run.transport import Attempt, GroupTransport, LocalTransport, Transport, fact
from hf_layerpar.splitting import split_layers
from hf_layerpar.stepping import Stepper, StepReport

_ATTRIBUTE = "_hf_layerpar_parallel"


def parallelize(
    model: nn.Module,
    config: LayerParallelConfig | None = None,
    group: dist.ProcessGroup | None = None,
    *,
    split: Sequence[int] | Literal["interleaved"] | None = None,
) -> LayerParallel:
    """Spreads the layers of a converted model over the lp ranks, in place; collective over `group`.

    All parameters are first made equal to those of lp rank 0. Then each rank drops the layers it doesn't own (their
    parameters become None), so build the optimizer afterwards. From then on `model(**batch).loss.backward()` is all a
    training loop needs; every lp rank must be given the same batch and keep the same random seed. `model.generate(...)`
    and transformers' pipelines work too where all lp ranks call them together, with the same inputs.

    Args:
        model: a model from `convert_to_ode`, on its device.
        config: how the layers are solved; the exact pipeline by default. `LayerParallel.config` changes it later.
        group: the lp ranks. None: all processes that were started, or this one alone. Under a launcher that is the
            default process group, which is initialised here where the program hasn't done so.
        split: number of layers of each lp rank, the same for every stack. By default as the schedule wants it, or
            blocks as even as possible (fewer layers beside a head that costs as much as some). "interleaved": MGRIT
            intervals dealt out to all ranks, for the `aggregate` operator with `coarsening` = lp size; of a pipeline
            two blocks a rank. "v": two blocks a rank, there and back.

    Raises:
        UnsupportedModelError: the model isn't converted, or is parallelized already.
        ConfigurationError: the layers can't be split so, or the grid doesn't fit a stack.
        RankMismatchError: the lp ranks were given different models or settings; raised on all of them.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"parallelize needs a model from convert_to_ode; got {shown(model)}")
    config = LayerParallelConfig() if config is None else config
    transport = transport_of(group, device_of(model))
    found = Attempt(lambda: _new_view(model))
    transport.agree(model_facts(model) | {"settings": config, "split": split}, found.error)
    view = found.given()
    handle = LayerParallel(model, config, view.stacks, transport, split, view.load)
    view.load = None
    object.__setattr__(model, _ATTRIBUTE, handle)
    object.__setattr__(model, "push_to_hub", handle.push_to_hub)
    if hasattr(model, "save_pretrained"):
        object.__setattr__(model, "save_pretrained", handle.saver)
    object.__setattr__(model, DDP_READS_FIRST, _Unwrapped(handle))
    if handle.lp_size > 1:
        _spread.add(model)
        for module in model.modules():
            for name in _CHANGES:
                if hasattr(module, name):
                    object.__setattr__(module, name, _Refused(name))
    return handle


def transport_of(group: dist.ProcessGroup | None, device: torch.device) -> Transport:
    """How the lp ranks of a group speak, as `parallelize` takes it. device: of the model.

    Raises ConfigurationError for what is no group.
    """
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise ConfigurationError(
            f"group={shown(group)} must be a process group of torch.distributed that this process is in, or None"
        )
    if group is None:
        group = _all_processes(device)
    return LocalTransport() if group is None else GroupTransport(group)


def _all_processes(device: torch.device) -> dist.ProcessGroup | None:
    """The default process group; None where this is the only process."""
    world = os.environ.get("WORLD_SIZE", "1")
    if not dist.is_initialized() and world.isdigit() and int(world) > 1:
        if lacks := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
            raise ConfigurationError(
                f"WORLD_SIZE={world} says that this is one of {world} processes, but no process group is initialised, "
                f"and without {', '.join(lacks)} none can be: call torch.distributed.init_process_group() before "
                "parallelize, start with accelerate launch or torchrun, or unset WORLD_SIZE for one process"
            )
        dist.init_process_group("gloo" if device.type == "cpu" else None, **store_of_restart())
    return dist.group.WORLD if dist.is_initialized() else None


def _new_view(model: nn.Module) -> OdeView:
    if getattr(model, _ATTRIBUTE, None) is not None:
        raise UnsupportedModelError(
            "the model is parallelized already; set layer_parallel(model).config to change its solver"
        )
    return ode_view(model)


def model_facts(model: nn.Module) -> dict[str, Any]:
    """What ranks that are to share a model, or to have copies of it, compare."""
    try:
        conversion: Any = ode_view(model).settings
    except UnsupportedModelError:
        conversion = None
    config: Any = getattr(model, "config", None)
    config = fact(config.to_dict()) if hasattr(config, "to_dict") else {}
    return {
        "model": type(model).__name__,
        "conversion": conversion,
        "config": {k: v for k, v in config.items() if k not in (CHECKPOINT_PATH, "transformers_version")},
        "tensors": {
            name: f"{list(tensor.shape)} {tensor.dtype}{' trained' if tensor.requires_grad else ''}"
            for name, tensor in model.state_dict(keep_vars=True).items()
            if isinstance(tensor, Tensor)
        },
    }


def layer_parallel(model: nn.Module) -> LayerParallel:
    """The handle of a parallelized model, also through wrappers (PEFT, DDP).

    Raises UnsupportedModelError when the model isn't parallelized.
    """
    for module in model.modules():
        handle = module.__dict__.get(_ATTRIBUTE)
        if handle is not None:
            return handle
    raise UnsupportedModelError(
        f"{type(model).__name__} is not parallelized; call parallelize(model, config, group) first"
    )


# ---- what would part the ranks
@dataclass(slots=True, eq=False)
class _Unwrapped:
    """What DistributedDataParallel looks at first of a model, of one that it must not wrap."""

    handle: LayerParallel

    def __iter__(self) -> Iterator[str]:
        if self.handle.lp_size > 1 or self.handle.config.strategy == "mgrit":
            raise refused_wrapper(self.handle.lp_size)
        return iter(())


_CHANGES = ("resize_token_embeddings", "add_adapter", "load_adapter", "add_weighted_adapter")
"""Methods of transformers' and PEFT's models that make parameters, which no rank would own."""


@dataclass(slots=True, eq=False)
class _Refused:
    """What stands in place of such a method, on ranks of which each has a part of the model."""

    name: str

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise UnsupportedModelError(
            f"{self.name} of a model that is spread over several lp ranks: no rank would own the parameters that it "
            f"makes. Call {self.name} before parallelize (of a model that LayerParallelTrainer spreads: before the "
            "trainer is made)"
        )


_spread: WeakSet[nn.Module] = WeakSet()
"""Models of which other ranks have parts."""


def _refuse_whole_model_optimizers(optimizer: Any, args: Any, kwargs: Any) -> None:
    if isinstance(optimizer, torch.optim.LBFGS):
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if any(id(p) in held for model in _spread for p in model.parameters()):
            raise ConfigurationError(
                "LBFGS of a model on several lp ranks: it measures all parameters together, of which each rank has "
                "some; use an optimizer that treats every parameter by itself (AdamW, SGD), or lp_size=1"
            )


register_optimizer_step_pre_hook(_refuse_whole_model_optimizers)


class LayerParallel:
    """A model whose layers live on lp ranks.

    config: the settings of the next step; assign the same value on all lp ranks.
    owner_of: lp rank of every parameter and buffer, by its full name. Some parameters outside the layers have copies on
        other ranks too (tied ones on the first and the last).
    ends: the parameters outside the layers.
    """

    def __init__(
        self,
        model: nn.Module,
        config: LayerParallelConfig,
        stacks: Sequence[LayerStack],
        transport: Transport,
        split: Sequence[int] | str | None,
        load: Callable[[], None] | None = None,
    ) -> None:
        """load: gives the layers that this rank owns their weights, where all are on the meta device, and what is
        outside of them is the same on all ranks already."""
        self._model, self._config, self._transport = model, config, transport
        self.tp_size = 1
        self._instead: LayerParallelConfig | None = None
        self.stacks = tuple(stacks)
        check_config(config, transport.size)
        self.ends = Ends(model, stacks, transport.size)
        found = played(model, self.stacks, self.ends)
        last = found.stacks[-1] if found is not None else len(self.stacks) - 1
        tail = tail_in_layers(found, self.stacks)
        owners = [
            self._owner(config, stack, transport.size, split, tail if i == last and config.ends != "spread" else 0.0)
            for i, stack in enumerate(stacks)
        ]
        for stack in stacks:
            self._check_grid(config, stack)
        state = {
            name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)
        }
        self._layout = {name: (tuple(t.shape), t.dtype) for name, t in state.items()}
        aliases: dict[int, list[str]] = {}
        for name, tensor in state.items():
            aliases.setdefault(id(tensor), []).append(name)
        self._tied = {name: [n for n in names if n != name] for names in aliases.values() for name in names}
        if transport.size > 1 and load is None:
            with torch.no_grad():
                for tensor in {id(t): t for t in (*state.values(), *model.buffers())}.values():
                    dense = tensor.data.contiguous()
                    transport.broadcast(dense, 0)
                    tensor.data.copy_(dense)
        place_ends(found, self.stacks, owners, self.ends, spread=config.ends == "spread", num_ranks=transport.size)
        self.owner_of: dict[str, int] = {}
        self._place_layers(owners, aliases)
        if load is not None:
            loaded = Attempt(load)
            transport.agree({"about to": "use the layers that were loaded"}, loaded.error)
        self._drop_ends()
        self.stepper = Stepper(model, self.stacks, owners, self.ends, transport)
        calls = Calls(self.stepper, lambda: self.next_config)
        for stack in stacks:
            stack.runner = calls
        intercept_root(model, self.stacks)
        if transport.size > 1:
            share_generation(model, transport)

    def train_step(
        self,
        batch: Mapping[str, Any],
        loss: Callable[[Mapping[str, Any]], Any] | None = None,
        *,
        scale: float = 1.0,
        penalty_scale: float | None = None,
    ) -> Any:
        """One forward and backward of a batch, as `config` says. Collective over the lp ranks.

        It leaves `scale` times the gradient of the whole batch's loss in `.grad` (added to what is there) of the
        parameters that this rank holds, and returns the loss `[]`, alike on all ranks.

        Args:
            batch: what the model's forward takes, the same on all lp ranks. It is cut into micro-batches along dim 0.
            loss: computes the loss of a batch (or of a part of one) from it by calling the model; by default
                `model(**batch).loss`. It may return (loss, metrics), a dict of scalars that are added up over the
                parts and returned beside the loss.
            scale: what the loss is multiplied by before its backward, such as 1 over the accumulation steps.
            penalty_scale: the same for the increment penalty; `scale` by default. It is a mean over the batch, so it is
                1 over the accumulation steps also where the loss is divided by a count of all of them.

        Raises (on all ranks, before any waits for another):
            ConfigurationError: the batch is cut (micro_batches, ends="spread"), and its loss can't be put together
                from those of parts; the message says what can.
            UnsupportedModelError: the model can't be solved for this batch.
            RankMismatchError: the lp ranks were given different batches or settings.
        """
        closure = loss or (lambda batch: _loss_of(self._model(**batch)))
        penalty_scale = scale if penalty_scale is None else penalty_scale
        return self.stepper.train(plain(batch), closure, self.next_config, scale, penalty_scale)

    @property
    def lp_size(self) -> int:
        return self._transport.size

    @property
    def lp_rank(self) -> int:
        return self._transport.rank

    @property
    def device(self) -> torch.device:
        return next(self._model.parameters()).device

    @property
    def shapes(self) -> tuple[StackShape, ...]:
        """Layers and buffers of every stack."""
        return tuple(
            StackShape(len(stack.layers), stack.settings.buffers, stack.settings.step_size) for stack in self.stacks
        )

    @property
    def group(self) -> dist.ProcessGroup | None:
        return self._transport.group if isinstance(self._transport, GroupTransport) else None

    @property
    def config(self) -> LayerParallelConfig:
        return self._config

    @config.setter
    def config(self, config: LayerParallelConfig) -> None:
        self._check(config)
        self._config = config

    def _check(self, config: LayerParallelConfig) -> None:
        check_config(config, self.lp_size)
        for stack in self.stacks:
            self._check_grid(config, stack)

    @property
    def next_config(self) -> LayerParallelConfig:
        """The settings of the next forward: `config`, or what `using` says."""
        return self._instead or self._config

    @contextmanager
    def using(self, config: LayerParallelConfig) -> Iterator[None]:
        """Forwards inside (and their backwards) run with `config`; the same on all lp ranks.

        Raises ConfigurationError as setting `config` does.
        """
        self._check(config)
        before, self._instead = self._instead, config
        try:
            yield
        finally:
            self._instead = before

    def exact(self) -> AbstractContextManager[None]:
        """Forwards inside (and their backwards) run the exact pipeline."""
        return self.using(exact_settings(self._config))

    def compile_layers(self, backend: str = "inductor", mode: str = "default") -> None:
        """From now on the layers run as code of torch.compile: those of a class share it, and it is made when the
        first of them is evaluated. Collective over the lp ranks.

        Forwards with a KV cache run as they are, and in one process those with gradient checkpointing too where no
        solver runs them. Code makes all gradients of a layer at once, so input-only vjps cost as much as final ones,
        and weight gradients aren't taken apart. Sets `torch._functorch.config.donated_buffer` to False, as graphs are
        gone through several times.

        Raises ConfigurationError for what torch.compile doesn't know and for modes with CUDA graphs, and
        UnsupportedModelError for layers with a forward of their own; on all ranks.
        """

        def made() -> Compiler:
            for stack in self.stacks:
                stack.check_compilable()
            return Compiler(backend, mode)

        found = Attempt(made)
        self.agree({"about to": "compile layers", "backend and mode": (backend, mode)}, found.error)
        for stack in self.stacks:
            stack.compiler = found.given()

    def split_over_tp(self, devices: DeviceMesh) -> None:
        """From now on the tp ranks of the mesh (its axis "tp") hold a part each of the own layers' matrices, by
        transformers' tp_plan; see `hf_layerpar.splitting`. They must hold equal parameters, and be given the same
        batches. To be called before `shard_over_dp`, and before the optimizer is made.

        Raises ConfigurationError for models that can't be split.
        """
        split_layers(self._model, self.stacks, devices["tp"])
        self.tp_size = devices["tp"].size()

    def shard_over_dp(self, devices: DeviceMesh) -> None:
        """From now on the dp ranks of the mesh (its axis "dp") keep a piece each of this rank's parameters, gradients
        and optimizer states, by FSDP2; see `hf_layerpar.run.data_shards`. They must hold equal parameters. To be called
        before the optimizer is made. Collective over the dp ranks.

        Raises ConfigurationError for parameters that can't be cut.
        """
        layers = [layer for stack in self.stacks for i, layer in enumerate(stack.layers) if i not in stack.foreign]
        self.stepper.shards = DataShards(self._model, layers, devices["dp"], self.ends.refresh)
        share_generation(self._model, self._transport, self.whole)

    @property
    def is_sharded_over_dp(self) -> bool:
        """Whether dp ranks keep pieces of this rank's parameters, so that reading them is collective over these."""
        return self.stepper.shards is not None

    def whole(self, *, writes: bool = False) -> AbstractContextManager[None]:
        """Parameters that dp ranks keep pieces of are whole and plain inside. writes: what is written to them is kept.
        Collective over the dp ranks at its begin; nothing where each rank's are whole."""
        return self.stepper.whole(writes=writes)

    def agree(self, facts: dict[str, Any], error: Exception | None = None) -> None:
        """Raises RankMismatchError on all lp ranks where they have other `facts`, and `error` where all have one.
        Collective."""
        self._transport.agree(facts, error)

    def any_of(self, doing: str, flag: bool) -> bool:
        """Whether `flag` is set on any lp rank. Collective; raises RankMismatchError on all where some are not `doing`
        this."""
        return self._transport.any_of(doing, [flag])[0]

    def all_reduce(self, tensor: Tensor) -> None:
        """Sums `tensor` over the lp ranks, in place. Collective."""
        self._transport.all_reduce(tensor)

    def grad_norm(self) -> Tensor:
        """The 2-norm `[]` of all gradients: layers of all lp ranks, and the ends once. The same bits on all lp ranks
        and at every lp size. Collective over the lp ranks."""
        grads = {name: p.grad for name, p in self._model.named_parameters() if p.grad is not None}
        tensors = [local(grad) for grad in grads.values()]
        wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32  # than bf16
        norms = dict(zip(grads, norms_of(tensors, wide), strict=True))
        place = {name: i for i, name in enumerate(self.owner_of)}
        squares = torch.zeros(len(place), dtype=torch.float64, device=self.device)
        # what several ranks hold counts once
        mine = {place[n]: norm for n, norm in norms.items() if self.owner_of[n] == self.lp_rank}
        if mine:
            squares[list(mine)] = torch.stack([norm.double() for norm in mine.values()]).square()
        for axis in ("dp", "tp"):  # other ranks have other pieces
            groups = {place[name]: group_along(grad, axis) for name, grad in grads.items()}
            cut = [i for i, group in groups.items() if group is not None]
            if cut:
                pieces = squares[cut]
                dist.all_reduce(pieces, group=groups[cut[0]])
                squares[cut] = pieces
        self.all_reduce(squares)  # exact: each entry comes from one rank
        return torch.tensor(math.sqrt(math.fsum(squares.tolist())), device=self.device)  # fsum knows no order

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """`torch.nn.utils.clip_grad_norm_` for gradients that live on several ranks: that one sees other layers on
        each, and would scale the copies of the ends differently. Returns `grad_norm()` of before. Collective over the
        lp ranks.

        Raises ConfigurationError for a limit that isn't positive.
        """
        if not max_norm > 0:
            raise ConfigurationError(f"max_norm={max_norm} must be positive; leave the call out to clip nothing")
        norm = self.grad_norm()
        scale = max_norm / (float(norm) + 1e-6)
        if not scale >= 1:  # also where the norm is not a number, as torch
            grads = [local(p.grad) for p in self._model.parameters() if p.grad is not None]
            scale_(grads, scale)
        return norm

    def report(self) -> StepReport | None:
        """What the last step measured; None before the first.

        Collective over the lp ranks when a sweep was inexact or increments are penalised (residuals and penalties are
        summed here, not in every step).
        """
        return self.stepper.report()

    def state_dict(self) -> dict[str, Tensor]:
        """The full model's state dict on the CPU, on lp rank 0; empty on the others. Collective over the lp ranks.

        Tensors of lp rank 0 that already are on the CPU are the model's own, not copies.
        """
        return self.collected(self._layout)

    def collected(self, names: Iterable[str]) -> dict[str, Tensor]:
        """`state_dict` of the tensors of these names, the same on all lp ranks. Collective over the lp ranks."""
        self._transport.agree({"about to": "collect the state dict"})
        with self.whole():
            return self._collected(names)

    def _collected(self, names: Iterable[str]) -> dict[str, Tensor]:
        here = {name: t for name, t in self._model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
        on_host: dict[int, Tensor] = {}  # by identity, so that tied tensors stay tied
        full: dict[str, Tensor] = {}
        for name in names:  # one tensor at a time: no second copy of the model
            shape, dtype = self._layout[name]
            owner = self.owner_of.get(name, 0)
            if owner == 0:
                if self.lp_rank == 0:
                    tensor = here[name]
                    if id(tensor) not in on_host:
                        on_host[id(tensor)] = full_tensor(tensor.detach()).cpu()
                        if self.stepper.shards is not None:  # whole for a while only
                            on_host[id(tensor)] = on_host[id(tensor)].clone()
                    full[name] = on_host[id(tensor)]
            elif self.lp_rank == owner:
                self._transport.wait(self._transport.send(full_tensor(here[name].detach()).contiguous(), 0))
            elif self.lp_rank == 0:
                buffer = torch.empty(shape, dtype=dtype, device=self.device)
                self._transport.wait(self._transport.receive(buffer, owner))
                full[name] = buffer.cpu()
        return full

    def push_to_hub(self, repo_id: str, **options: Any) -> CommitInfo | None:
        """Pushes the whole model; `model.push_to_hub` is this too. Collective over the lp ranks (of one dp rank).

        lp rank 0 uploads what `save_pretrained` writes, in one commit, which it returns. The others wait for it.
        options: those of `PreTrainedModel.push_to_hub`. Where the model is written in pieces, TMPDIR must be a folder
        that all lp ranks share.

        Raises what failed on lp rank 0, and HubError that quotes it on the others; the Hub then has what it had.
        """
        return push(self.saver, repo_id, **options)

    @property
    def saver(self) -> SaveAdapters | SaveSpread:
        """What writes the model; `model.save_pretrained` is this too."""
        is_peft = hasattr(self._model, "get_base_model")
        return SaveAdapters(self._model, self) if is_peft else SaveSpread(self._model, self)

    def load_state_dict(self, full: Mapping[str, Tensor]) -> None:
        """Copies what this rank holds out of a full state dict.

        Raises CheckpointError when names are missing or unknown or shapes differ, before anything is copied.
        """
        tied = self._tied
        missing = [n for n in self._layout if n not in full and not any(alias in full for alias in tied.get(n, ()))]
        unknown = [n for n in full if n not in self._layout]
        wrong = [n for n, (shape, _) in self._layout.items() if n in full and tuple(full[n].shape) != shape]
        if missing or unknown or wrong:
            raise CheckpointError(
                f"the state dict doesn't fit {type(self._model).__name__}: {len(missing)} missing {missing[:4]}, "
                f"{len(unknown)} unknown {unknown[:4]}, {len(wrong)} of another shape {wrong[:4]}; load a "
                f"checkpoint of this model (same architecture, depth and head)"
            )
        with torch.no_grad(), self.whole(writes=True):
            for name, tensor in self._model.state_dict(keep_vars=True).items():
                if isinstance(tensor, Tensor) and name in full:
                    copy_full(tensor.data, full[name])

    # ---- inside
    @staticmethod
    def _owner(
        config: LayerParallelConfig,
        stack: LayerStack,
        num_ranks: int,
        split: Sequence[int] | str | None,
        tail: float,
    ) -> tuple[int, ...]:
        """The lp rank of every layer. tail: what head and loss cost, in layers."""
        num_layers, buffers = len(stack.layers), stack.settings.buffers
        with _naming(stack):
            boundaries = interval_points(config, num_layers, buffers)
            if split is None and config.strategy == "pipeline" and num_ranks > 1:
                placement = getattr(SCHEDULES[config.schedule], "placement", "blocks")
                split = None if placement == "blocks" else placement
            if split is None and config.strategy == "pipeline" and num_ranks <= num_layers:
                split = balanced_split(num_layers, num_ranks, 1.0, 0.0, tail)
            if isinstance(split, str) and config.strategy == "pipeline" and split in (INTERLEAVED, V):
                return two_blocks_owner(num_layers, num_ranks, split)  # pyright: ignore[reportArgumentType]
            if isinstance(split, str):
                if split != INTERLEAVED:
                    raise ConfigurationError(
                        f"split={shown(split)} with strategy={config.strategy!r}: the splits by name are "
                        "'interleaved', and 'v' for a pipeline; or give the number of layers of each rank"
                    )
                return interleaved_owner(num_layers, num_ranks, boundaries)
            return contiguous_owner(num_layers, num_ranks, boundaries=boundaries, split=split)

    @staticmethod
    def _check_grid(config: LayerParallelConfig, stack: LayerStack) -> None:
        """Refuses a grid that doesn't fit the stack now, and not in the first solve."""
        if config.strategy == "mgrit" and (config.forward_iterations or config.backward_iterations):
            with _naming(stack):
                inner_grid(config, len(stack.layers), stack.settings.buffers)

    def _place_layers(self, owners: Sequence[tuple[int, ...]], names: Mapping[int, Sequence[str]]) -> None:
        """Notes who owns what, and drops the layers of other ranks. names: of every tensor, by its id.

        Tensors that layers share (or a layer and what is outside) stay on all ranks where they are frozen. Raises
        UnsupportedModelError for one that is trained on several ranks.
        """
        ends = {id(p.value): p for p in self.ends}
        made_for_all = {
            id(layer.get_submodule(name))
            for stack in self.stacks
            for layer in stack.layers
            for name in shared_modules(layer)
        }
        kept: set[int] = set()
        rank_of: dict[int, int] = {}

        def slots() -> Iterator[tuple[LayerStack, int, int, dict[str, Any], str, Tensor]]:
            for stack, owner in zip(self.stacks, owners, strict=True):
                for index, layer in enumerate(stack.layers):
                    for module in layer.modules():
                        for tensors in tensor_slots(module):
                            for key, tensor in tensors.items():
                                if tensor is not None and id(module) not in made_for_all:
                                    yield stack, index, owner[index], tensors, key, tensor

        for stack, index, rank, _, _, tensor in slots():
            end, other = ends.get(id(tensor)), rank_of.setdefault(id(tensor), rank)
            if (other if end is None else end.holders) in (rank, (rank,)):
                continue
            if tensor.requires_grad:
                whom = f"a layer of lp rank {other}" if end is None else f"what lp ranks {end.holders} have outside"
                raise UnsupportedModelError(
                    f"layer {index} of {stack.path} (lp rank {rank}) shares the trained tensor "
                    f"{next(iter(names.get(id(tensor), ())), '?')} with {whom}; freeze it, give each layer its own, or "
                    "use lp_size=1"
                )
            kept.add(id(tensor))
            if end is not None:
                end.holders = tuple(range(self.lp_size))
        for _, _, rank, tensors, key, tensor in list(slots()):
            if id(tensor) not in ends:
                self.owner_of |= dict.fromkeys(names.get(id(tensor), ()), rank_of[id(tensor)])
            if rank != self.lp_rank and id(tensor) not in kept:
                tensors[key] = None
        for stack, owner in zip(self.stacks, owners, strict=True):
            stack.foreign = frozenset(index for index, rank in enumerate(owner) if rank != self.lp_rank)

    def _drop_ends(self) -> None:
        """The end parameters that this rank doesn't hold."""
        named = dict(self._model.named_buffers())
        self.owner_of |= {name: 0 for name in self._layout if name in named and name not in self.owner_of}
        for p in self.ends:
            names = [name for own in p.names for name in (own, *self._tied.get(own, ())) if name in self._layout]
            self.owner_of |= dict.fromkeys(names, p.holders[0])
            if self.lp_rank not in p.holders:
                for module, key in p.slots:
                    parameter_slots(module)[key] = None
                p.value = None


@contextmanager
def _naming(stack: LayerStack) -> Iterator[None]:
    """A model may have several stacks: settings that don't fit say which."""
    try:
        yield
    except ConfigurationError as error:
        raise ConfigurationError(f"stack {stack.path}: {error}") from error


def _loss_of(output: Any) -> Any:
    return output["loss"] if isinstance(output, Mapping) else output[0]
