"""A step played through without its layers: which stacks it passes, what depends on what, how its loss is made.

The model's own forward (or whatever computes the loss around it) runs on stand-ins of the parameters outside the layers
(`hf_layerpar.ode.ends`), and each stack hands back a zero state. Every rank finds the same, without talking; so a
step that can't be done is refused on all of them before any waits for another.

Shapes: B batch, T tokens, D hidden; a state is `[B, T, D]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from hf_layerpar.compat.torch import (
    tree_flatten,
    tree_is_leaf,
    tree_leaves,
    tree_leaves_with_path,
    tree_map,
    tree_map_with_path,
)
from hf_layerpar.errors import ConfigurationError, LayerParallelError, UnsupportedModelError
from hf_layerpar.ode.ends import EndParameter, Ends
from hf_layerpar.ode.losses import LOSSES, Counting, Term, factors
from hf_layerpar.ode.stack import LayerStack, NeedsSerialError, RecordedCall, remedy_for

Closure = Callable[[Any], Any]
"""Runs the model on a batch (any nest of tensors): its loss in training, its output otherwise."""


@dataclass(frozen=True)
class Rehearsed:
    """What a rehearsal found.

    stacks: of each pass, the index of its stack. sides: of each pass, the places (layer, leaf of its arguments) of
    every tensor that depends on parameters or earlier passes.
    needs: of each phase, the passes that its result depends on, by gradients or by values alone. uses: of each phase,
    the end parameters. foreign: shapes of trained parameters outside the model that it depends on.
    terms, factors: of the loss, where it is a sum of multiples of known loss functions; else None.
    metrics: names of what is returned beside the loss.
    """

    stacks: tuple[int, ...]
    sides: tuple[tuple[tuple[tuple[int, int], ...], ...], ...]
    needs: tuple[tuple[int, ...], ...]
    uses: tuple[frozenset[EndParameter], ...]
    foreign: tuple[tuple[int, ...], ...]
    terms: tuple[Term, ...] | None
    factors: tuple[float, ...]
    output: Any
    metrics: tuple[str, ...]

    @property
    def facts(self) -> dict[str, Any]:
        """What ranks compare."""
        return {
            "passes": self.stacks,
            "sides": [len(s) for s in self.sides],
            "needs": self.needs,
            "metrics": self.metrics,
        }


class Player:
    """The solver of all stacks while a forward is played through: `reached` is asked at every stack's entry.

    It gets (number of the pass, index of the stack, calls, x) and returns the end state.
    """

    def __init__(
        self, stacks: Sequence[LayerStack], reached: Callable[[int, int, Sequence[RecordedCall], Tensor], Tensor]
    ) -> None:
        self.stacks, self.reached = tuple(stacks), reached
        self.passes = 0

    @contextmanager
    def playing(self, trains: bool | None = None) -> Iterator[Player]:
        before = [(stack.solver, stack.runner) for stack in self.stacks]
        for index, stack in enumerate(self.stacks):
            stack.solver, stack.runner, stack.trains = self._solver(index), None, trains
            stack.in_line_because = None
        try:
            yield self
        finally:
            for stack, (solver, runner) in zip(self.stacks, before, strict=True):
                stack.solver, stack.runner, stack.trains = solver, runner, None
                stack.forget()

    def _solver(self, index: int) -> Callable[[Sequence[RecordedCall], Tensor], Tensor]:
        def solve(calls: Sequence[RecordedCall], x: Tensor) -> Tensor:
            self.passes += 1
            return self.reached(self.passes - 1, index, calls, x)

        return solve


def rehearse(
    closure: Closure, batch: Any, stacks: Sequence[LayerStack], ends: Ends, *, loss: bool, trains: bool = True
) -> Rehearsed:
    """loss: the closure computes one; otherwise any output, with or without a loss in it. trains: the forward will go
    backward. The random streams are the caller's to keep."""
    found: list[tuple[int, list[list[tuple[int, int]]], set[int], set[EndParameter]]] = []
    ends_of_passes: list[Tensor] = []  # kept alive, as they are known by id
    foreign: dict[int, tuple[int, ...]] = {}
    counting = Counting()

    with torch.enable_grad(), ends.stood_in() as stand_ins:
        known: dict[int, int | EndParameter] = {id(t): p for p, t in stand_ins.items()}
        for p, stand_in in stand_ins.items():
            counting.mark(stand_in, p)

        def look(tensors: Iterable[Tensor]) -> tuple[set[int], set[EndParameter]]:
            tensors = list(tensors)
            origins = set(counting.origins(tensors))
            for leaf in _leaves_of(tensors):
                if id(leaf) in known:
                    origins.add(known[id(leaf)])
                else:
                    foreign[id(leaf)] = tuple(leaf.shape)
            passes = {o for o in origins if isinstance(o, int)}
            return passes, {o for o in origins if isinstance(o, EndParameter)}

        def reached(number: int, index: int, calls: Sequence[RecordedCall], x: Tensor) -> Tensor:
            if trains and not torch.is_grad_enabled():
                raise UnsupportedModelError(
                    "a training step's loss calls the model without gradients (torch.no_grad), but its layers are "
                    "evaluated later, when what was switched off for that call (adapters, dropout) may be on again. "
                    "Call the model before the step, and put what comes of it into the batch"
                )
            sides: dict[int, list[tuple[int, int]]] = {}
            tensors: dict[int, Tensor] = {}
            for layer, call in enumerate(calls):
                for j, leaf in enumerate(tree_flatten((call.args, call.kwargs))[0]):
                    if isinstance(leaf, Tensor) and leaf.requires_grad:
                        sides.setdefault(id(leaf), []).append((layer, j))
                        tensors[id(leaf)] = leaf
            found.append((index, list(sides.values()), *look([x, *tensors.values()])))
            end = _end_like(x)
            ends_of_passes.append(end)
            known[id(end)] = number
            counting.mark(end, number)
            return end

        with Player(stacks, reached).playing(trains), counting:
            output = closure(batch)
        value, metrics = loss_and_metrics(output) if loss else (loss_in(output), {})
        of_passes, of_ends = look(t for t in tree_leaves(output) if isinstance(t, Tensor))
        made_of = None if value is None or not value.requires_grad else factors(value, counting)
    because = next((stack.in_line_because for stack in stacks if stack.in_line_because), None)
    if not found and because is not None:
        raise NeedsSerialError(
            f"{because} needs every layer's value while the model's forward runs, but a solver evaluates the layers "
            f"behind it. {remedy_for(because)} Or run the model without parallelize"
        )
    if not found:
        raise UnsupportedModelError(
            "the model's forward came by none of its stacks, so there is nothing to solve; is another model called?"
        )
    return Rehearsed(
        stacks=tuple(f[0] for f in found),
        sides=tuple(tuple(tuple(places) for places in f[1]) for f in found),
        needs=(*(tuple(sorted(f[2])) for f in found), tuple(sorted(of_passes))),
        uses=(*(frozenset(f[3]) for f in found), frozenset(of_ends)),
        foreign=tuple(foreign.values()),
        terms=None if made_of is None else tuple(counting.terms),
        factors=tuple(made_of or ()),
        output=tree_map(_detached, output),
        metrics=tuple(sorted(metrics)),
    )


def recount(
    closure: Closure,
    batch: Any,
    stacks: Sequence[LayerStack],
    ends: Ends,
    known: Sequence[Term],
    *,
    trains: bool = True,
) -> tuple[Term, ...]:
    """`known`, the terms of a loss that was rehearsed, with the counts of another batch.

    Raises ConfigurationError where it computes another loss.
    """
    counting = Counting(follows=False)
    player = Player(stacks, lambda number, index, calls, x: _end_like(x))
    with torch.enable_grad(), ends.stood_in(), player.playing(trains), counting:
        closure(batch)
    if [t.kind for t in counting.terms] != [t.kind for t in known]:
        raise ConfigurationError(
            f"the loss is computed by {[t.function for t in counting.terms]} for this batch and by "
            f"{[t.function for t in known]} for an earlier one, so that it can't be put together from parts; use "
            "micro_batches=1 and ends='first_last'"
        )
    return tuple(counting.terms)


def _end_like(x: Tensor) -> Tensor:
    """What stands for the end state of a pass that was entered with x."""
    return torch.zeros((), dtype=x.dtype, device=x.device).expand(x.shape).requires_grad_()


def loss_in(output: Any) -> Tensor | None:
    """The loss in a model's output, if there is one."""
    value = output.get("loss") if isinstance(output, Mapping) else None
    return value if isinstance(value, Tensor) and value.ndim == 0 else None


def loss_and_metrics(output: Any) -> tuple[Tensor, Mapping[str, Any]]:
    """What a loss function may return: the loss, or (loss, metrics by name).

    Raises ConfigurationError for anything else.
    """
    metrics: Mapping[str, Any] = {}
    if isinstance(output, tuple) and len(output) == 2 and isinstance(output[1], Mapping):
        output, metrics = output
    if not isinstance(output, Tensor) or output.ndim:
        raise ConfigurationError(
            f"the loss of a training step must be a scalar, but a {type(output).__name__} "
            f"{tuple(getattr(output, 'shape', ()))} was returned; give the batch the labels that the model's loss "
            "needs, or return a scalar (or a scalar and a dict of metrics)"
        )
    return output, metrics


def rehearse_parts(
    closure: Closure,
    parts: Sequence[Any],
    stacks: Sequence[LayerStack],
    ends: Ends,
    why: str,
    *,
    loss: bool = True,
    trains: bool = True,
) -> list[Rehearsed]:
    """Of parts of a batch. why: the settings that cut it.

    Raises ConfigurationError also for what the model or the loss raises for a part and not for the whole.
    """
    try:
        return [rehearse(closure, part, stacks, ends, loss=loss, trains=trains) for part in parts]
    except LayerParallelError:
        raise
    except Exception as error:
        raise ConfigurationError(
            f"{why} cuts the batch, and with it what the model returns, but a part of it can't be computed "
            f"({type(error).__name__}: {error}). Put what belongs to its rows into the batch, also what a loss "
            "function reads beside the logits, or use micro_batches=1 and ends='first_last'"
        ) from error


def check_parts(whole: Rehearsed, parts: Sequence[Rehearsed], why: str) -> None:
    """Raises ConfigurationError unless the losses of parts of the batch add up to that of the whole.

    parts: the rehearsals of all. why: the settings that cut the batch.
    """
    if whole.terms is None:
        raise ConfigurationError(
            f"{why} cuts the batch, but its loss can't be put together from those of parts: it must be a sum of "
            f"multiples of means or sums by {', '.join(LOSSES)} of torch.nn.functional. Use micro_batches=1 and "
            "ends='first_last'"
        )
    kinds = [t.kind for t in whole.terms]
    for part in parts:
        if part.terms is None or [t.kind for t in part.terms] != kinds:
            raise ConfigurationError(
                f"{why} cuts the batch, but the loss of a part is computed by other functions than that of the whole; "
                "use micro_batches=1 and ends='first_last'"
            )
        if not all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(whole.factors, part.factors, strict=True)):
            raise ConfigurationError(
                f"{why} cuts the batch, but the losses of its parts don't add up: the loss is a sum that is divided by "
                "a number of each part's own (labels, rows). Divide by num_items_in_batch, use a mean of "
                "torch.nn.functional, or use micro_batches=1 and ends='first_last'"
            )
    sizes = [sum(column) for column in zip(*([t.size for t in part.terms or ()] for part in parts), strict=True)]
    classes = [[t.classes for t in part.terms or ()] for part in parts]
    if sizes != [t.size for t in whole.terms] or any(c != [t.classes for t in whole.terms] for c in classes):
        raise ConfigurationError(
            f"{why} cuts the batch, but its loss compares rows of the batch with each other (the input of a loss "
            "function grows with more than the rows), which the parts don't see; use micro_batches=1 and "
            "ends='first_last'"
        )
    targets = [sum(column) for column in zip(*([t.targets for t in part.terms or ()] for part in parts), strict=True)]
    if any(t.targets not in (0, found) for t, found in zip(whole.terms, targets, strict=True)):
        raise ConfigurationError(
            f"{why} cuts the batch, but its loss compares the logits of a part with targets of the whole batch, which "
            "a loss function has from elsewhere. Put them into the batch, or use micro_batches=1 and ends='first_last'"
        )


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


# ---- rows
def plain(batch: Any) -> Any:
    """Mappings that pytrees don't look into (such as a collator's `BatchEncoding`) as dicts."""
    if isinstance(batch, dict):
        return {key: plain(value) for key, value in batch.items()} if type(batch) is dict else batch
    return plain(dict(batch)) if isinstance(batch, Mapping) and tree_is_leaf(batch) else batch


def batch_rows(batch: Any, main: str | None = None) -> int:
    """B of a batch: the first dimension of its main input, or else of its first tensor."""
    value = batch[main] if isinstance(batch, Mapping) and main in batch else None
    if isinstance(value, list) or (isinstance(value, Tensor) and value.ndim):
        return len(value)
    return next((len(t) for t in tree_leaves(batch) if isinstance(t, Tensor) and t.ndim), 0)


def cut_rows(batch: Any, rows: int, parts: int) -> list[Any]:
    """The batch in so many parts: every tensor with `rows` rows and every list of as many items is cut, the rest is
    given to all. Positions of several kinds (`position_ids` of shape [3, rows, T]) are cut along their rows too.

    Raises ConfigurationError for a tensor that has neither as many rows nor one, for what hides tensors, and for
    tables of things of which a row has any number (images, packed sequences).
    """
    if parts == 1:
        return [batch]

    def is_whole(node: Any) -> bool:
        return is_column(node) or type(node).__name__ == "BlockMask"

    def row_dim(key: Any, leaf: Any) -> int | None:
        """The dimension of a tensor or list that is cut."""
        name = getattr(key[-1], "key", None) if key else None
        if is_column(leaf):
            return 0
        if not isinstance(leaf, Tensor) or not leaf.ndim or name == "cache_position":
            return None
        dim = int(name == "position_ids" and leaf.ndim == 3 and leaf.shape[1] == rows)
        return dim if leaf.shape[dim] == rows else None

    def is_column(node: Any) -> bool:
        return isinstance(node, list) and len(node) == rows

    named = [
        (getattr(key[-1], "key", None) if key else None, key, leaf)
        for key, leaf in tree_leaves_with_path(batch, is_leaf=is_whole)
    ]
    for name, key, leaf in sorted(named, key=lambda entry: entry[0] not in _TABLES):  # they say more than shapes
        fault = None
        if leaf is not None and name in _TABLES:
            fault = f"{name}, a table of things of which a row may have any number"
        elif type(leaf).__name__ == "BlockMask":
            fault = "a BlockMask, whose function counts the rows of the whole batch (a tensor mask is cut)"
        elif isinstance(leaf, Tensor) and leaf.ndim:
            if name != "cache_position" and len(leaf) != 1 and row_dim(key, leaf) is None:
                fault = f"a tensor of shape {tuple(leaf.shape)}, whose first dimension is neither 1 nor {rows}"
        elif isinstance(leaf, Mapping) or is_dataclass(leaf):
            fault = f"a {type(leaf).__name__}, which isn't looked into (a dict is)"
        if fault is not None:
            raise ConfigurationError(
                f"a batch of {rows} rows can't be cut into {parts} parts: it holds {fault}; use micro_batches=1 and "
                "ends='first_last'"
            )

    def part(start: int, stop: int) -> Any:
        def cut(key: Any, leaf: Any) -> Any:
            dim = row_dim(key, leaf)
            return leaf if dim is None else leaf[start:stop] if dim == 0 else leaf[:, start:stop]

        return tree_map_with_path(cut, batch, is_leaf=is_column)

    bounds = [rows * i // parts for i in range(parts + 1)]
    return [part(a, b) for a, b in pairwise(bounds)]


_TABLES = ("image_grid_thw", "video_grid_thw", "cu_seq_lens_q", "cu_seq_lens_k")


def signature_of(batch: Any, rows: int) -> tuple:
    """What of a batch a rehearsal may depend on, sizes left out: the step's anatomy is the same for all lengths."""
    leaves, tree = tree_flatten(batch)

    def fact(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return (str(leaf.dtype), leaf.ndim, leaf.ndim > 0 and len(leaf) == rows, leaf.requires_grad)
        return leaf if leaf is None or isinstance(leaf, bool | int | float | str) else type(leaf).__name__

    return str(tree), tuple(map(fact, leaves))


def _leaves_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The leaves of the autograd graphs of `tensors`."""
    found: dict[int, Tensor] = {}
    ahead: list[Any] = []
    for tensor in tensors:
        if tensor.grad_fn is not None:
            ahead.append(tensor.grad_fn)
        elif tensor.requires_grad:
            found[id(tensor)] = tensor
    seen: set[Any] = set()
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        ahead += [below for below, _ in node.next_functions]
    return list(found.values())
