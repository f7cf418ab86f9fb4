"""A transformers forward in phases: stopped at a stack's entry, or gone on with behind given end states.

No model code is rewritten: the same forward is run again for every phase. In front of the stack that it is to stop at,
stacks hand back the end states that are given; there an exception ends it. Behind the last one it runs to its end.

Shapes: a state is `[B, T, D]`, B the rows of a micro-batch or of a piece of one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from hf_layerpar.compat.torch import autocast_of
from hf_layerpar.errors import UnsupportedModelError
from hf_layerpar.ode.ends import Ends
from hf_layerpar.ode.losses import Term, Whole
from hf_layerpar.ode.rehearsal import Closure, Player, Rehearsed, cut_rows, loss_and_metrics
from hf_layerpar.ode.stack import LayerStack, RecordedCall


class Reached(BaseException):
    """Ends a forward at the entry of a pass. No `Exception`, so that no code of a model or a loss takes it for one."""

    def __init__(self, calls: Sequence[RecordedCall], x: Tensor, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.calls, self.x, self.autocast = calls, x, autocast


class ModelPhases:
    """The phases of a model's forward on a batch that is cut into micro-batches.

    closure: the loss (or output) of a batch. rehearsed: what its rehearsal found. terms: of the whole batch's loss,
    where it is cut. outputs: what the tails returned, by (micro-batch, piece); in training metrics, beside their loss.
    entry: makes what the solver takes from (x, calls, sides, autocast).
    """

    def __init__(
        self,
        closure: Closure,
        micro_batches: Sequence[Any],
        rows: Sequence[int],
        stacks: Sequence[LayerStack],
        ends: Ends,
        rehearsed: Rehearsed,
        entry: Callable[..., Any],
        *,
        terms: Sequence[Term] | None,
        trains: bool,
    ) -> None:
        self.closure, self.micro_batches, self.rows = closure, micro_batches, rows
        self.stacks, self.ends, self.rehearsed, self.terms = stacks, ends, rehearsed, terms
        self.trains, self.make_entry = trains, entry
        self.outputs: dict[tuple[int, int], Any] = {}
        self.metrics: dict[tuple[int, int], Mapping[str, Any]] = {}

    def enter(self, place: int, micro_batch: int, given: Sequence[Tensor | None], *, real: bool) -> Any:
        with torch.set_grad_enabled(real and self.trains), self.ends.of_phase(place):
            try:
                self._play(self.micro_batches[micro_batch], given, stop=place)
            except Reached as reached:
                # of one layout on all ranks, or their sums over rows would round differently
                x = reached.x.contiguous() if real else reached.x
                return self.make_entry(x, reached.calls, self.rehearsed.sides[place], reached.autocast)
        raise self._strayed(f"ended before pass {place}")

    def finish(self, micro_batch: int, piece: tuple[int, int], given: Sequence[Tensor | None]) -> Tensor | None:
        i, n = piece
        batch = cut_rows(self.micro_batches[micro_batch], self.rows[micro_batch], n)[i]
        place = len(self.rehearsed.stacks)
        watched = nullcontext() if self.terms is None else Whole(self.terms)
        with torch.set_grad_enabled(self.trains), self.ends.of_phase(place), watched:
            output = self._play(batch, given, stop=place)
        if not self.trains:
            self.outputs[micro_batch, i] = output
            return None
        loss, self.metrics[micro_batch, i] = loss_and_metrics(output)
        return loss

    def _play(self, batch: Any, given: Sequence[Tensor | None], stop: int) -> Any:
        def reached(number: int, index: int, calls: Sequence[RecordedCall], x: Tensor) -> Tensor:
            if number >= len(self.rehearsed.stacks) or index != self.rehearsed.stacks[number]:
                raise self._strayed(f"came to stack {self.stacks[index].path} as pass {number}")
            if number == stop:
                raise Reached(calls, x, autocast_of(x))
            state = given[number]
            # what the phase doesn't depend on only needs a shape
            return torch.zeros((), dtype=x.dtype, device=x.device).expand(x.shape) if state is None else state

        with Player(self.stacks, reached).playing():
            return self.closure(batch)

    def _strayed(self, how: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"a forward {how}, unlike its rehearsal, which came by stacks {self.rehearsed.stacks}: which stacks a "
            "batch passes must not depend on the values in it"
        )
