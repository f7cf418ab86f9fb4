"""Puts a converted model on the ranks of a layer axis: owned layers only, solved by the engine in every forward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import CommitInfo
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from hf_layerpar.calling import Calls
from hf_layerpar.checkpoint.collecting import collect, copy_own
from hf_layerpar.checkpoint.saving import SaveAdapters, SaveSpread, push
from hf_layerpar.comparing import model_facts
from hf_layerpar.compat.torch import norms_of, scale_
from hf_layerpar.config import LayerParallelConfig, shown
from hf_layerpar.errors import ConfigurationError, UnsupportedModelError
from hf_layerpar.generation import share_generation
from hf_layerpar.ode.compiled import Compiler
from hf_layerpar.ode.convert import OdeView, ode_view
from hf_layerpar.ode.ends import Ends
from hf_layerpar.ode.model_forward import intercept_root
from hf_layerpar.ode.rehearsal import plain
from hf_layerpar.ode.stack import LayerStack
from hf_layerpar.placing import (
    check_grids,
    dealt_points,
    device_of,
    drop_ends,
    drop_layers,
    layer_owners,
    place_ends,
    played,
)
from hf_layerpar.plan.ladder import StackShape, exact_settings
from hf_layerpar.plan.ownership import SplitName
from hf_layerpar.plan.step import check_config
from hf_layerpar.refusals import guard
from hf_layerpar.run.data_shards import DataShards, group_along, local
from hf_layerpar.run.joining import transport_of
from hf_layerpar.run.step_report import StepReport
from hf_layerpar.run.transport import Attempt, GroupTransport, Transport
from hf_layerpar.splitting import split_layers
from hf_layerpar.stepping import Stepper

_ATTRIBUTE = "_hf_layerpar_parallel"


def parallelize(
    model: nn.Module,
    config: LayerParallelConfig | None = None,
    group: dist.ProcessGroup | None = None,
    *,
    split: Sequence[int] | SplitName | None = None,
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
    guard(model, handle)
    return handle


def _new_view(model: nn.Module) -> OdeView:
    if getattr(model, _ATTRIBUTE, None) is not None:
        raise UnsupportedModelError(
            "the model is parallelized already; set layer_parallel(model).config to change its solver"
        )
    return ode_view(model)


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


class LayerParallel:
    """A model whose layers live on lp ranks.

    config: the settings of the next step; assign the same value on all lp ranks.
    owner_of: lp rank of every parameter and buffer, by its full name. Some parameters outside the layers have copies on
        other ranks too (tied ones on the first and the last).
    ends: the parameters outside the layers.
    split: as it was given to `parallelize`.
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
        self.split = split
        self.tp_size = 1
        self._instead: LayerParallelConfig | None = None
        self.stacks = tuple(stacks)
        check_config(config, transport.size)
        self.ends = Ends(model, stacks, transport.size)
        found = played(model, self.stacks, self.ends)
        owners = layer_owners(config, self.stacks, transport.size, split, found)
        self._dealt = [dealt_points(config, stack, split) for stack in self.stacks]
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
        self.owner_of = drop_layers(self.stacks, owners, self.ends, aliases, transport)
        if load is not None:
            loaded = Attempt(load)
            transport.agree({"about to": "use the layers that were loaded"}, loaded.error)
        drop_ends(model, self.ends, self._tied, self.owner_of, transport.rank)
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
        """Layers and buffers of every stack, and whether its layers are dealt out."""
        return tuple(
            StackShape(len(stack.layers), stack.settings.buffers, stack.settings.step_size, dealt)
            for stack, dealt in zip(self.stacks, self._dealt, strict=True)
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
        check_grids(config, self.stacks)

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
        return collect(self, self._layout)

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
        copy_own(self, full)


def _loss_of(output: Any) -> Any:
    return output["loss"] if isinstance(output, Mapping) else output[0]
