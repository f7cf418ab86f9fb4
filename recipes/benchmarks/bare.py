"""A stack without a model around it: its input given, its loss a function of its end. For measurements and tests.

Shapes: B batch, T tokens, D hidden; a state is `[B, T, D]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from hf_layerpar.compat.torch import autocast_of
from hf_layerpar.config import Buffers, LayerParallelConfig, buffer_places
from hf_layerpar.plan.costs import Costs
from hf_layerpar.plan.part import RankPart
from hf_layerpar.plan.step import Anatomy, build_step
from hf_layerpar.plan.tasks import Pieces, Plan
from hf_layerpar.run.increments import Increments
from hf_layerpar.run.layers import Common, Entry, LayerCall, Layers, sides_of
from hf_layerpar.run.step import LayersOf, Outcome, Step
from hf_layerpar.run.transport import Transport


class BareStack:
    """The layers of a stack as `Phases`, cut into micro-batches along the rows of `x` `[B, T, D]`.

    calls: of all layers, with their arguments for the whole batch; tensors among them with B rows are cut too, and
        those that require grad are sides. Their gradient, and that of x, go to `.grad`.
    loss: of an end state and the rows of the batch that it holds; losses of parts add up.
    """

    def __init__(self, calls: Sequence[LayerCall], x: Tensor, loss: Callable[[Tensor, slice], Tensor]) -> None:
        self.calls, self.x, self.loss = calls, x, loss
        self.micro_batches = 1
        self.sides = sides_of(calls)
        self._has_tensors = any(isinstance(t, Tensor) for c in calls for t in tree_leaves((c.args, c.kwargs)))

    def rows(self, micro_batch: int) -> slice:
        bounds = [len(self.x) * m // self.micro_batches for m in range(self.micro_batches + 1)]
        return slice(*list(pairwise(bounds))[micro_batch])

    def enter(self, place: int, micro_batch: int, given: Sequence[Tensor | None], *, real: bool) -> Entry:
        rows = self.rows(micro_batch)
        if self.micro_batches == 1:
            return Entry(self.x, self.calls, self.sides, autocast_of(self.x))
        cut: dict[int, Tensor] = {}  # what is one tensor for several layers stays one

        def part(leaf: object) -> object:
            if not isinstance(leaf, Tensor) or leaf.ndim == 0 or len(leaf) != len(self.x):
                return leaf
            return cut.setdefault(id(leaf), leaf[rows])

        with torch.set_grad_enabled(real):
            calls = self.calls
            if self._has_tensors:
                calls = [_Cut(call, *tree_map(part, (call.args, call.kwargs))) for call in calls]
            return Entry(self.x[rows], calls, self.sides, autocast_of(self.x))

    def finish(self, micro_batch: int, piece: Pieces, given: Sequence[Tensor | None]) -> Tensor:
        (end,) = given
        assert end is not None
        rows = self.rows(micro_batch)
        bounds = [rows.start + (rows.stop - rows.start) * i // piece[1] for i in range(piece[1] + 1)]
        with torch.enable_grad():
            return self.loss(end, slice(*list(pairwise(bounds))[piece[0]]))

    def plan(
        self,
        config: LayerParallelConfig,
        owner: Sequence[int],
        num_ranks: int,
        *,
        buffers: Buffers = (0, 0),
        costs: Costs | None = None,
    ) -> Plan:
        """The plan of a step with as many micro-batches as there are rows for. costs: of one micro-batch."""
        self.micro_batches = max(1, min(config.micro_batches, len(self.x)))
        anatomy = Anatomy.of_stack(owner, buffers)
        if self.sides:
            (run,) = anatomy.passes
            anatomy = Anatomy((type(run)(run.owner, run.buffers, True),), anatomy.ranks, anatomy.needs)
        return build_step(config, anatomy, num_ranks, self.micro_batches, costs=costs)

    def step(
        self,
        plan: Plan,
        transport: Transport,
        *,
        config: LayerParallelConfig | None = None,
        buffers: Buffers = (0, 0),
        seed: int | None = None,
        recompute: bool | Callable[[nn.Module], bool] = False,
        part: RankPart | None = None,
        make_layers: LayersOf = Layers,
    ) -> Outcome:
        """One step: losses in the outcome, gradients in `.grad`. Collective over the transport's ranks.

        config: for its increment penalty. seed: of dropout. part: this rank's of the plan, worked out before.
        make_layers: as `hf_layerpar.run.stackable.OneDevice` gives it with a plan in waves.
        """
        alpha = config.increment_penalty if config is not None else 0.0
        inner = frozenset(range(len(self.calls))) - buffer_places(buffers, len(self.calls))
        rows = [self.rows(m).stop - self.rows(m).start for m in range(self.micro_batches)]
        step = Step(
            part or RankPart.of(plan, transport.rank),
            self,
            transport,
            Common(seed, recompute),
            device=self.x.device,
            penalty=(lambda k: Increments(inner, rows, alpha, 1.0)) if alpha else None,
            make_layers=make_layers,
        )
        return step.run()


class _Cut:
    """A call with the arguments of some rows."""

    def __init__(self, call: LayerCall, args: tuple, kwargs: dict) -> None:
        self.layer, self.args, self.kwargs, self.step = call.layer, args, kwargs, call.step
