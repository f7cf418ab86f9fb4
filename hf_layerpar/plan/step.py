"""The plan of a training step: from settings, the anatomy of the model and the number of micro-batches to tasks.

    front -> layers -> (middle -> layers ->) tail -> layers backward -> (middle backward -> ...) -> front backward

for every micro-batch, the layers either exactly (block by block) or by MGRIT sweeps; then a schedule puts the tasks of
all micro-batches in order, and steps that follow each other on a rank are made one.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

from hf_layerpar.config import Buffers, LayerParallelConfig, gathered, shown
from hf_layerpar.errors import ConfigurationError
from hf_layerpar.plan import schedules
from hf_layerpar.plan.builder import PlanBuilder, Split
from hf_layerpar.plan.costs import APART, Costs
from hf_layerpar.plan.cycle import Cycle
from hf_layerpar.plan.grid import Grid
from hf_layerpar.plan.operators import OPERATORS, CoarseOperator
from hf_layerpar.plan.schedules import SCHEDULES, Shape
from hf_layerpar.plan.simulate import simulate
from hf_layerpar.plan.tasks import Direction, Plan, Task, Value
from hf_layerpar.plan.waves import in_waves


@dataclass(frozen=True)
class Pass:
    """One run of a state through a stack. owner: the rank of every layer. buffers: those that are always solved exactly
    (see `OdeSettings`). sides: layers are given something beside the state that depends on parameters or earlier
    passes (encoder states, position biases). stack: a number for the stack, None for one that no other pass goes
    through."""

    owner: tuple[int, ...]
    buffers: Buffers = (0, 0)
    sides: bool = False
    stack: int | None = None


@dataclass(frozen=True)
class Anatomy:
    """How a forward runs: its passes, and the phases before, between and behind them.

    ranks: of each phase. needs: of each phase, the passes whose end states its result depends on.
    tail_pieces: parts that the tail's rows are cut into, each computed by another rank (1: all by ranks[-1]).
    """

    passes: tuple[Pass, ...]
    ranks: tuple[int, ...]
    needs: tuple[tuple[int, ...], ...]
    tail_pieces: int = 1

    @classmethod
    def of_stack(cls, owner: Sequence[int], buffers: Buffers = (0, 0)) -> Anatomy:
        """One stack with its ends on the ranks of its first and last layer."""
        return cls((Pass(tuple(owner), buffers),), (owner[0], owner[-1]), ((), (0,)))


def check_config(config: LayerParallelConfig, num_ranks: int) -> None:
    """Raises ConfigurationError for unregistered names, and for stacked or captured layers on several lp ranks."""
    if not isinstance(config, LayerParallelConfig):
        raise ConfigurationError(f"config={shown(config)} must be a LayerParallelConfig")
    if config.coarse_operator not in OPERATORS:
        raise ConfigurationError(
            f"coarse_operator={config.coarse_operator!r} is unknown; use one of {', '.join(OPERATORS)}, or add it to "
            "hf_layerpar.plan.operators.OPERATORS"
        )
    if config.schedule not in SCHEDULES:
        raise ConfigurationError(
            f"schedule={config.schedule!r} is unknown; use one of {', '.join(SCHEDULES)}, or add it to "
            "hf_layerpar.plan.schedules.SCHEDULES"
        )
    if config.cuda_graphs and num_ranks > 1:
        raise ConfigurationError(
            f"cuda_graphs=True with lp_size={num_ranks}: messages between ranks are not captured; use "
            "cuda_graphs=False or lp_size=1"
        )
    if config.stacked and num_ranks > 1:
        raise ConfigurationError(
            f"stacked=True with lp_size={num_ranks}: layers are evaluated together on one device, and here they are "
            f"spread over several; use stacked=False or lp_size=1"
        )


def inner_grid(config: LayerParallelConfig, num_layers: int, buffers: Buffers) -> Grid:
    """The grid over the layers between the first and last buffers, in layer order."""
    opening, *between, closing = gathered(buffers, num_layers)
    return Grid.coarsened(num_layers - opening - closing, config.factors, [place - opening for place in between])


def interval_points(config: LayerParallelConfig, num_layers: int, buffers: Buffers) -> list[int]:
    """The places in the stack where intervals of the finest grid begin or end; none without MGRIT."""
    if config.strategy != "mgrit":
        return []
    opening = gathered(buffers, num_layers)[0]
    return [opening + p for p in inner_grid(config, num_layers, buffers).levels[1]]


def build_step(
    config: LayerParallelConfig,
    anatomy: Anatomy,
    num_ranks: int,
    micro_batches: int = 1,
    *,
    trains: bool = True,
    costs: Costs | None = None,
    kinds: tuple[tuple[int, ...], ...] | None = None,
) -> Plan:
    """The validated plan of one step.

    trains: False for a forward alone, which is always exact.
    costs: of one micro-batch, to schedule by. kinds: of stacked steps, by pass a number for each layer, equal for
    those that can share a wave; by default all can.
    Raises ConfigurationError when the grid doesn't fit the stack, or for unknown names.
    """
    check_config(config, num_ranks)
    schedule, operator = SCHEDULES[config.schedule], OPERATORS[config.coarse_operator]
    return _built(config, anatomy, num_ranks, micro_batches, trains, costs, kinds, schedule, operator)


@lru_cache(maxsize=256)
def _built(
    config: LayerParallelConfig,
    anatomy: Anatomy,
    num_ranks: int,
    micro_batches: int,
    trains: bool,
    costs: Costs | None,
    kinds: tuple[tuple[int, ...], ...] | None,
    schedule: Callable[..., Plan],
    operator: CoarseOperator,
) -> Plan:
    writer = _Writer(config, operator, anatomy, num_ranks, micro_batches, trains)
    writer.write()
    if config.stacked and trains:
        plan = in_waves(writer.plan(None), kinds)
    elif writer.inexact:
        splits = [schedules.always, None] if num_ranks > 1 else [None]
        plan = schedules.shortest(writer.plan, costs or APART, splits)
    else:
        blocks = max(Counter(r for p in anatomy.passes for r, _ in groupby(p.owner)).values())
        shape = Shape(num_ranks, micro_batches, blocks)
        plan = schedule(writer.plan, shape, costs or APART)
    if num_ranks > 1:
        plan = by_ending(plan, costs or APART)
    plan = plan if config.increment_penalty or config.stacked else fused(plan)
    plan.validate()
    return plan


def by_ending(plan: Plan, costs: Costs) -> Plan:
    """The plan with its tasks sorted by when they should end: each rank's own order stays, and what goes from rank to
    rank is posted in the order in which it comes to be (`Plan.traffic`)."""
    ends = [end for _, end in simulate(plan, costs).spans]
    order = sorted(range(len(ends)), key=lambda i: (ends[i], i))
    return dataclasses.replace(plan, tasks=tuple(plan.tasks[i] for i in order))


class _Writer:
    """Writes the tasks of all micro-batches, one after the other."""

    def __init__(
        self,
        config: LayerParallelConfig,
        operator: CoarseOperator,
        anatomy: Anatomy,
        num_ranks: int,
        micro_batches: int,
        trains: bool,
    ) -> None:
        self.operator = operator
        self.config, self.anatomy, self.micro_batches, self.trains = config, anatomy, micro_batches, trains
        self.build = PlanBuilder(num_ranks, stacked=config.stacked and trains)
        self.inexact = trains and any(self._iterations(d) for d in ("forward", "backward"))
        self.sides: dict[tuple[int, int], int] = {}

    def plan(self, split: Split | None) -> Plan:
        passes = [len(p.owner) for p in self.anatomy.passes]
        stacks = [-1 - k if p.stack is None else p.stack for k, p in enumerate(self.anatomy.passes)]
        return self.build.build(
            passes, self.micro_batches, trains=self.trains, stacks=stacks, sides=self.sides, split=split
        )

    def write(self) -> None:
        for m in range(self.micro_batches):
            ends = self._forward(m)
            adjoints = self._tail(m, ends)
            if self.trains:
                self._backward(m, ends, adjoints)

    def _forward(self, m: int) -> list[int]:
        """The end states of all passes."""
        ends: list[int] = []
        for k, run in enumerate(self.anatomy.passes):
            made = [Value("state", k, m), *([Value("sides", k, m)] if run.sides else [])]
            given = [ends[j] for j in self.anatomy.needs[k]]
            x, *sides = self.build.phase(k, "forward", m, self.anatomy.ranks[k], given, made)
            if sides:
                self.sides[k, m] = sides[0]
            ends.append(self._sweep(k, "forward", m, x))
        return ends

    def _tail(self, m: int, ends: list[int]) -> dict[int, list[int]]:
        """The adjoints that the tail gives, by pass."""
        build, k, needs = self.build, len(ends), self.anatomy.needs[-1]
        pieces, home = self.anatomy.tail_pieces, self.anatomy.ranks[-1]
        outputs = [Value("state", j, m) for j in needs] if self.trains else []
        given = [ends[j] for j in needs]
        if pieces == 1:
            made = build.phase(k, "forward", m, home, given, outputs)
            return {j: [value] for j, value in zip(needs, made, strict=False)}
        cut = [build.cut(value, j, pieces) for j, value in zip(needs, given, strict=True)]
        parts = []
        for i in range(pieces):
            like = [dataclasses.replace(v, piece=(i, pieces)) for v in outputs]
            parts.append(build.phase(k, "forward", m, i, [c[i] for c in cut], like, piece=(i, pieces)))
        owners = {j: self.anatomy.passes[j].owner[-1] for j in needs}
        return {j: [build.join([p[i] for p in parts], j, owners[j])] for i, j in enumerate(needs) if self.trains}

    def _backward(self, m: int, ends: list[int], adjoints: dict[int, list[int]]) -> None:
        build = self.build
        for k, run in reversed(list(enumerate(self.anatomy.passes))):
            # what later phases say of this pass's end, the last phase first
            terms = [(1.0, value) for value in adjoints.get(k, ())]
            build.sweep(k, "backward", m, run.owner)
            lam = build.combine(terms, run.owner[-1])
            given = [self._sweep(k, "backward", m, lam)]
            if run.sides:
                given.append(build.collect(k, m, run.owner, self._last_finals(k, m)))
            needs = self.anatomy.needs[k]
            outputs = [Value("state", j, m) for j in needs]
            made = build.phase(k, "backward", m, self.anatomy.ranks[k], given, outputs)
            for j, value in zip(needs, made, strict=True):
                adjoints.setdefault(j, []).append(value)

    def _last_finals(self, k: int, m: int) -> dict[int, int]:
        """What the final vjp of each layer made."""
        return {
            n: t.output
            for t in self.build.tasks
            if t.final and t.direction == "backward" and (t.place, t.micro_batch) == (k, m)
            for n in t.layers
        }

    def _iterations(self, direction: Direction) -> int:
        if self.config.strategy != "mgrit" or not self.trains:
            return 0
        return self.config.forward_iterations if direction == "forward" else self.config.backward_iterations

    def _sweep(self, k: int, direction: Direction, m: int, x: int) -> int:
        """The value at the other end of pass k."""
        build, run, forward = self.build, self.anatomy.passes[k], direction == "forward"
        build.sweep(k, direction, m, run.owner)
        layers = range(len(run.owner))
        iterations = self._iterations(direction)
        if not iterations:
            return self._chain(layers if forward else layers[::-1], x)
        opening, *_, closing = gathered(run.buffers, len(layers))
        grid = inner_grid(self.config, len(layers), run.buffers)
        head, body, tail = layers[:opening], layers[opening : len(layers) - closing], layers[len(layers) - closing :]
        if not forward:
            head, body, tail, grid = tail[::-1], body[::-1], head[::-1], grid.reversed()
        x = self._chain(head, x)
        build.iterations[k, direction] = iterations
        krylov = not forward and self.config.acceleration == "krylov"
        x = Cycle(build, body, grid, self.operator, self.config.relaxation, x, krylov=krylov).solve(iterations)
        return self._chain(tail, x)

    def _chain(self, layers: Sequence[int], x: int) -> int:
        build = self.build
        if not self.inexact and not build.stacked:  # nothing looks inside a rank's block
            for _, block in groupby(layers, key=lambda n: build.owner[n]):
                x = build.block(list(block), x)
            return x
        for layer in layers:
            build.wave = build.open_waves()
            x = build.step(layer, x, final=True)
        return x


# ---- runs: final steps that a rank works one right after the other are evaluated as one
Joint = tuple[int, int, int]
"""(pass, micro-batch, layer): between this layer and the next one in layer order."""


def fused(plan: Plan) -> Plan:
    """The plan with runs as single tasks: one autograd graph instead of one for every layer, and one backward, as in
    the plain model, with no Python between the layers. Nothing else may need a state inside a run, in the forward or
    in the backward; runs with weight gradients apart stay as they are (the smaller the better)."""
    tasks = plan.tasks
    # a "collect" only waits for the steps, and can wait for the run
    uses: Counter[int] = Counter(v for t in tasks if t.kind != "collect" for v in t.inputs)
    joints: dict[Direction, set[Joint]] = {"forward": set(), "backward": set()}
    apart: set[Joint] = set()
    before: dict[int, Task] = {}  # the last task of each rank
    for t in tasks:
        a, before[t.rank] = before.get(t.rank), t
        if a is not None and _follow(a, t) and uses[a.output] == 1:
            joints[t.direction].add(_joint(a, t))
        if t.kind == "step" and t.direction == "backward" and (not t.final or plan.is_split(t)):
            apart |= {(t.place, t.micro_batch, n - above) for n in t.layers for above in (0, 1)}
    shared = joints["forward"] & joints["backward"] if plan.trains else joints["forward"]
    shared -= apart
    if not shared:
        return plan
    runs: list[list[Task]] = []
    latest: dict[int, list[Task]] = {}  # the last run of each rank
    for t in tasks:
        run = latest.get(t.rank)
        if run and _follow(run[-1], t) and _joint(run[-1], t) in shared:
            run.append(t)
        else:
            latest[t.rank] = run = [t]
            runs.append(run)
    # state and graph of a part of a run -> those of the run
    names = {old: new for r in runs for t in r for old, new in zip(t.outputs, r[-1].outputs, strict=True)}
    joined: dict[int, Task] = {}  # by the last task of the run
    for run in runs:
        last = run[-1]
        inputs = tuple(names.get(v, v) for t in run for v in (t.inputs if t is run[0] else t.inputs[1:]))
        if last.kind in ("step", "collect"):  # for others their places count
            inputs = tuple(dict.fromkeys(inputs))
        if inputs != last.inputs:
            last = dataclasses.replace(last, inputs=inputs, layers=tuple(n for t in run for n in t.layers))
        joined[id(run[-1])] = last
    return dataclasses.replace(plan, tasks=tuple(joined[id(t)] for t in tasks if id(t) in joined))


def _follow(a: Task, b: Task) -> bool:
    return (
        a.kind == b.kind == "step"
        and a.final
        and b.final
        and a.direction == b.direction
        and (a.place, a.micro_batch) == (b.place, b.micro_batch)
        and b.inputs[0] == a.outputs[0]
        and a.wave == b.wave == -1
    )


def _joint(a: Task, b: Task) -> Joint:
    return (a.place, a.micro_batch, min(a.layers[-1], b.layers[0]))
