"""A batch whose rows are dealt out to the lp ranks outside the stacks, and put together again for every solve.

In such a forward what reaches a rank's ends in the backward is its share of the gradient, and the shares of all ranks
add up to the whole. So a state's gradient is cut where the state was gathered, the gradient of a table that every rank
holds alike is kept by one rank alone, and the parameters of the ends sum theirs over the ranks at last.

Shapes: B batch, T tokens, D hidden; a state is `[B, T, D]`. A rank's slice holds some rows of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from hf_layerpar.errors import UnsupportedModelError
from hf_layerpar.parallel.communicator import Communicator
from hf_layerpar.parallel.program import LayerCall, mix

Solve = Callable[[Sequence[LayerCall], Tensor], Tensor]


class CannotSlice(Exception):
    """The slices of this batch can't be put together; raised on all lp ranks alike. The whole batch can be computed."""


class Slices:
    """The division of one forward's batch.

    own: this rank's rows; at least one.
    seed: the forward's draw from the main stream, the same on all lp ranks.
    """

    def __init__(self, communicator: Communicator, batch_size: int, seed: int) -> None:
        size = communicator.size
        bounds = [batch_size * rank // size for rank in range(size + 1)]
        self.communicator, self.seed = communicator, seed
        self.counts = [stop - start for start, stop in pairwise(bounds)]
        self.own = slice(bounds[communicator.rank], bounds[communicator.rank + 1])
        self._even = len(set(self.counts)) == 1
        self._solves = 0

    def cut(self, whole: Tensor) -> Tensor:
        """The own rows of a tensor of all rows; the gradient is gathered (collective)."""
        return _Cut.apply(self, whole) if _has_graph(whole) else whole[self.own]  # type: ignore[return-value]

    def gather(self, own: Tensor) -> Tensor:
        """All rows from every rank's own (collective); the gradient is cut."""
        return _Gather.apply(self, own) if _has_graph(own) else self.rows_of_all(own)  # type: ignore[return-value]

    def rows_of_all(self, own: Tensor) -> Tensor:
        """`gather` without a graph. Collective."""
        largest = max(self.counts)
        padded = own.new_zeros(largest - len(own), *own.shape[1:])
        whole = self.communicator.all_gather(torch.cat([own, padded]) if len(padded) else own.contiguous())
        if self._even:
            return whole
        return torch.cat([rows[:count] for rows, count in zip(whole.split(largest), self.counts, strict=True)])

    def solve(self, solver: Solve, calls: Sequence[LayerCall], x: Tensor) -> Tensor:
        """The own rows `[b, T, D]` of x_N from those of x_0 and calls with the own rows. Collective.

        Raises CannotSlice on all ranks where their arguments don't fit together.
        """
        calls = self._whole_arguments(calls, x.device)
        self._solves += 1
        # the solver's draw must be the same on all ranks, whatever their slices have drawn
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(mix(self.seed, self._solves, self.communicator.size))
            y = solver(calls, self.gather(x))
        return self.cut(y)

    @contextmanager
    def random_stream(self, device: torch.device) -> Iterator[None]:
        """A stream of this rank's own; the caller's is put back afterwards."""
        accelerator = device.type != "cpu"
        with torch.random.fork_rng([device] if accelerator else [], device_type=device.type if accelerator else "cuda"):
            seed = mix(self.seed, 0, self.communicator.rank)
            torch.default_generator.manual_seed(seed)
            if accelerator:
                torch.get_device_module(device).manual_seed(seed)
            yield

    # ---- inside
    def _whole_arguments(self, calls: Sequence[LayerCall], device: torch.device) -> list[LayerCall]:
        """The calls with all rows in every argument that has rows."""
        flat = [tree_flatten((call.args, call.kwargs)) for call in calls]
        tensors = {id(leaf): leaf for leaves, _ in flat for leaf in leaves if isinstance(leaf, Tensor)}
        place = {key: i for i, key in enumerate(tensors)}
        facts = {
            "layer arguments": list(dict.fromkeys(tuple(_kind(leaf, place) for leaf in leaves) for leaves, _ in flat)),
            "tensors": [
                (str(t.dtype), tuple(t.shape if self._even else t.shape[1:]), t.requires_grad) for t in tensors.values()
            ],
        }
        if not self.communicator.same(facts, device):
            raise CannotSlice
        whole: dict[int, Tensor] = {}
        for (key, tensor), dims in zip(tensors.items(), self._first_dims(tensors.values(), device), strict=True):
            if self._has_rows(tensor, dims):
                whole[key] = self.gather(tensor)
            else:
                whole[key] = _Share.apply(self, tensor) if _has_graph(tensor) else tensor  # type: ignore[assignment]
        found = []
        for call, (leaves, tree) in zip(calls, flat, strict=True):
            call = copy.copy(call)
            call.args, call.kwargs = tree_unflatten([whole.get(id(leaf), leaf) for leaf in leaves], tree)
            found.append(call)
        return found

    def _first_dims(self, tensors: Iterable[Tensor], device: torch.device) -> list[list[int]]:
        """Dim 0 of each tensor on every rank (0 where it has none)."""
        own = [len(tensor) if tensor.ndim else 0 for tensor in tensors]
        if self._even:  # shapes were compared
            return [[dim] * self.communicator.size for dim in own]
        every = self.communicator.all_gather(torch.tensor(own, device=device))
        return every.view(self.communicator.size, -1).t().tolist()

    def _has_rows(self, tensor: Tensor, first_dims: list[int]) -> bool:
        """Whether an argument's first dim is the slice, by that dim on every rank."""
        if first_dims != self.counts:
            if len(set(first_dims)) > 1:
                raise CannotSlice
            return False
        if not self._even:
            return True
        # slices are alike, so a table may have as many rows by chance: DeBERTa's relative embeddings `[2k, D]`, or,
        # where slices have one row, its relative positions `[1, T, T]`. Others `[1, ...]` may be repeated for all rows
        integer_table = tensor.dtype == torch.int64 and tensor.ndim == 3
        if tensor.ndim < 2 or (tensor.ndim == 2 and tensor.is_floating_point()) or integer_table:
            raise CannotSlice
        return True


@contextmanager
def summed_gradients(modules: Iterable[nn.Module], communicator: Communicator) -> Iterator[None]:
    """Inside, the trainable parameters held by `modules` themselves are stand-ins whose gradients are summed over the
    lp ranks on their way to the parameters. Their backward is collective."""
    places = [
        (module, name, parameter)
        for module in modules
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.requires_grad
    ]
    parameters = list(dict.fromkeys(parameter for _, _, parameter in places))
    stand_ins: dict[Any, Any] = {}
    if parameters:
        stand_ins = dict(zip(parameters, _SummedOverRanks.apply(communicator, *parameters), strict=True))  # type: ignore[arg-type]
    for module, name, parameter in places:
        module._parameters[name] = stand_ins[parameter]
    try:
        yield
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, slices: Slices, own: Tensor) -> Tensor:
        ctx.slices = slices
        return slices.rows_of_all(own)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        return None, grad[ctx.slices.own]


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, slices: Slices, whole: Tensor) -> Tensor:
        ctx.slices = slices
        return whole[slices.own].clone()  # autograd forbids in-place operations on views that such a function returns

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        return None, ctx.slices.rows_of_all(grad)


class _Share(torch.autograd.Function):
    """A tensor that all ranks hold alike, whose gradient is the whole one on each of them: the first rank keeps it."""

    @staticmethod
    def forward(ctx: Any, slices: Slices, tensor: Tensor) -> Tensor:
        ctx.keep = slices.communicator.rank == 0
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        return None, grad if ctx.keep else torch.zeros_like(grad)


class _SummedOverRanks(torch.autograd.Function):
    """Parameters as they are. It is the first node of a forward's graph, so its backward runs last."""

    @staticmethod
    def forward(ctx: Any, communicator: Communicator, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.communicator = communicator
        ctx.device = parameters[0].device
        ctx.set_materialize_grads(False)  # what was not used keeps no gradient, and optimizers leave it alone
        return tuple(parameter.detach() for parameter in parameters)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ctx.communicator.agree({"ends with a gradient": [grad is not None for grad in grads]}, ctx.device)
        summed = list(grads)
        for dtype in dict.fromkeys(grad.dtype for grad in grads if grad is not None):
            places = [i for i, grad in enumerate(grads) if grad is not None and grad.dtype == dtype]
            flat = torch.cat([grads[i].flatten() for i in places])  # type: ignore[union-attr]
            ctx.communicator.all_reduce(flat)
            for i, part in zip(places, flat.split([grads[i].numel() for i in places]), strict=True):  # type: ignore[union-attr]
                summed[i] = part.view(grads[i].shape)  # type: ignore[union-attr]
        return (None, *summed)


def _has_graph(tensor: Tensor) -> bool:
    return tensor.requires_grad and torch.is_grad_enabled()


def _kind(leaf: Any, place: dict[int, int]) -> int | str:
    if isinstance(leaf, Tensor):
        return place[id(leaf)]
    if leaf is None or isinstance(leaf, bool | int | float | str | torch.dtype):
        return type(leaf).__name__
    raise UnsupportedModelError(
        f"a layer is given a {type(leaf).__name__}, whose rows can't be gathered from the lp ranks; use "
        "sliced_ends=False, or an attention implementation whose masks are tensors (sdpa, eager)"
    )
