"""One process's solves as CUDA graphs: what the layers of a step do, captured once for each kind of step and replayed.

A small layer takes a GPU less time than Python takes to launch it. A replay launches all of them at once. The model's
ends (embeddings, head, loss) stay outside, as they may do anything; what lies between two of them is one graph:

    enter | forward of all layers | tail and its backward | backward of all layers | backward of the entry
    run     replayed                run                     replayed                 run

A graph works on the memory that it was captured with. So states and layer arguments are copied into it, and gradients
out of it.

Shapes: a state is `[B, T, D]`.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_layerpar.compat.torch import (
    add_,
    copies_of,
    has_gradient_hooks,
    hook_counts,
    parameter_slots,
    tree_unflatten,
)
from hf_layerpar.errors import ConfigurationError, UnsupportedModelError
from hf_layerpar.plan.part import RankPart
from hf_layerpar.plan.tasks import Task
from hf_layerpar.run.gradients import gradients_aside
from hf_layerpar.run.increments import Increments
from hf_layerpar.run.layers import Common, Entry, LayerCall
from hf_layerpar.run.stackable import module_facts
from hf_layerpar.run.step import Outcome, Step

_WARM_UP = 2
"""Steps of a kind that run as usual before it is captured: libraries set themselves up in the first."""
_MOST_KINDS, _MOST_CAPTURED = 64, 8
"""Kinds of steps that are remembered, and those whose graphs are kept: each holds its gradients and states."""

Place = tuple[int, int]
"""(pass, micro-batch)."""


class Graph(Protocol):
    def replay(self) -> None: ...


class Recorder(Protocol):
    def record(self, work: Callable[[], None]) -> Graph:
        """What `work()` makes the device do, to be done again and again. It isn't done now."""
        ...

    def random_state(self) -> Tensor:
        """Of the stream that the device draws from."""
        ...


class CudaRecorder:
    """All graphs share one pool of memory, for only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool = device, torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], None]) -> Graph:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        try:
            # other threads (one that pins batches) may allocate meanwhile
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                work()
        finally:
            torch.cuda.set_stream(stream)  # a capture that fails leaves its own
        return graph

    def random_state(self) -> Tensor:
        return torch.cuda.get_rng_state(self._device)


def recorder_of(device: torch.device) -> Recorder:
    """Raises ConfigurationError for a device without CUDA graphs."""
    if device.type != "cuda":
        raise ConfigurationError(
            f"cuda_graphs=True with a model on {str(device)!r}: only CUDA devices have graphs; move the model to one, "
            "or use cuda_graphs=False"
        )
    return CudaRecorder(device)


class Captured:
    """What was captured of one model's steps; a warning says why a kind of step can't be."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._recorder = recorder_of(device)
        self._seen: Counter[tuple] = Counter()
        self._programs: dict[tuple, Program | None] = {}  # None: can't be captured
        self._warned: set[str] = set()

    def run(
        self, make: Callable[..., Step], part: RankPart, entries: dict[Place, Entry], common: Common, facts: tuple
    ) -> Outcome:
        """A step, replayed where one of its kind was captured.

        make: a step of the class given first, with other arguments instead of its own. entries: of every pass and
        micro-batch, for what layers are called with. facts: what else makes a kind.
        """
        parameters = _parameters(entries.values())
        called = tuple((place, _call_facts(entry), module_facts(entry)) for place, entry in entries.items())
        key = (id(part), facts, called, tuple((p.data_ptr(), p.dtype) for p in parameters))
        if key in self._programs:
            program = self._programs[key]
            return make(Step).run() if program is None else make(_Replay, program=program).run()
        self._seen[key] += 1
        if self._seen[key] < _WARM_UP:
            if len(self._seen) > _MOST_KINDS:
                self._seen.clear()
                self._warn(f"{_MOST_KINDS} steps of other kinds (sizes, objects given to layers) and none twice")
            return make(Step).run()
        while len(self._programs) >= _MOST_CAPTURED:
            del self._programs[next(iter(self._programs))]
        self._programs[key] = None
        if (why := _obstacle(entries.values(), parameters)) is not None:
            self._warn(why)
            return make(Step).run()
        program = Program(part, parameters)
        outcome = make(_Watched, program=program).run()
        try:
            program.capture(
                self._recorder, make(Step, common=dataclasses.replace(common, seed=None), finished=None, entered=None)
            )
            self._programs[key] = program
        except Exception as error:  # whatever CUDA or a layer raises where it can't be captured: it is the reason
            first: BaseException = error
            while first.__context__ is not None:  # the last one says that a capture has failed, and not why
                first = first.__context__
            text = str(first).strip().splitlines() or [type(first).__name__]
            self._warn(text[0])
        return outcome

    def _warn(self, why: str) -> None:
        if why not in self._warned:
            self._warned.add(why)
            warnings.warn(f"cuda_graphs=True, but layers are launched one by one: {why}", stacklevel=2)


@dataclass
class _Piece:
    """Neighbours among the plan's groups: one of the model's phases, or what lies between two of them.

    outputs: what phases need of it.
    """

    groups: range
    phase: Task | None
    graph: Graph | None = None
    outputs: dict[int, Tensor] = field(default_factory=dict)


class Program:
    """The graphs of one kind of step, with the tensors that they read and write."""

    def __init__(self, part: RankPart, parameters: Sequence[nn.Parameter]) -> None:
        self.part, self.parameters = part, list(parameters)
        self.pieces: list[_Piece] = []
        for i, group in enumerate(part.groups):
            if group[0].kind == "phase":
                self.pieces.append(_Piece(range(i, i + 1), group[0]))
            elif not self.pieces or self.pieces[-1].phase is not None:
                self.pieces.append(_Piece(range(i, i + 1), None))
            else:
                self.pieces[-1].groups = range(self.pieces[-1].groups.start, i + 1)
        self._read: set[int] = set()  # values, by graphs
        self._asked: set[int] = set()  # by phases
        for piece in self.pieces:
            kind = self._read if piece.phase is None else self._asked
            kind.update(v for i in piece.groups for task in part.groups[i] for v in task.inputs)
        # filled by a step that runs as usual
        self._inputs: dict[int, Tensor] = {}
        self._entries: dict[Place, Entry] = {}
        self._arguments: dict[Place, list[Tensor]] = {}
        # and by the capture
        self._gradients: list[Tensor | None] = []
        self.norms: dict[Any, list[list[Tensor]]] = {}
        self.increments: dict[int, Increments | None] = {}

    def _enters(self, phase: Task) -> bool:
        return phase.direction == "forward" and phase.place < len(self.part.plan.passes)

    def note(self, phase: Task, step: Step) -> None:
        """What a phase made, and what the layers behind it are called with: held where graphs will read it."""
        for value in self._read.intersection(phase.outputs):
            self._inputs[value] = step.values[value].detach().clone()
        if self._enters(phase):
            place = (phase.place, phase.micro_batch)
            entry = step.layers[place].entry
            held = {id(t): t.detach().clone() for t in _tensors(entry)}
            calls: list[LayerCall] = []
            for n, call in enumerate(entry.calls):
                leaves, tree = entry.arguments(n)
                args, kwargs = tree_unflatten([held.get(id(leaf), leaf) for leaf in leaves], tree)
                recorded: Any = call
                calls.append(dataclasses.replace(recorded, args=args, kwargs=kwargs))
            self._entries[place] = dataclasses.replace(entry, calls=calls)
            self._arguments[place] = list(held.values())

    @torch.no_grad()
    def load(self, phase: Task, step: Step) -> None:
        """The same of a later step, to where graphs read it."""
        for value in self._read.intersection(phase.outputs):
            self._inputs[value].copy_(step.values[value])
        if self._enters(phase):
            place = (phase.place, phase.micro_batch)
            found, held = _tensors(step.layers[place].entry), self._arguments[place]
            if [(t.shape, t.dtype) for t in found] != [(t.shape, t.dtype) for t in held]:
                raise UnsupportedModelError(
                    f"cuda_graphs=True: the layers of micro-batch {phase.micro_batch} are called with other arguments "
                    "than a moment ago with the same batch; use cuda_graphs=False"
                )
            for mine, given in zip(held, found, strict=True):
                mine.copy_(given)

    def capture(self, recorder: Recorder, step: Step) -> None:
        """By a step that isn't run otherwise. Raises whatever keeps its work from being captured."""
        with gradients_aside(self.parameters):
            for piece in self.pieces:
                if piece.phase is None:

                    def work(groups: range = piece.groups) -> None:
                        for i in groups:
                            step.work_group(self.part, i)
                        step.measure()

                    piece.graph = recorder.record(work)
                    piece.outputs = {v: step.values[v] for v in self._asked if v in step.values}
                    continue
                if self._enters(piece.phase):
                    k, m = place = (piece.phase.place, piece.phase.micro_batch)
                    step.layers[place] = step.make_layers(self._entries[place], step.common, k, m, step.increments[k])
                step.values |= {v: self._inputs[v] for v in self._read.intersection(piece.phase.outputs)}
            self._gradients = [p.grad for p in self.parameters]
            self.norms, self.increments = step.outcome.norms, step.increments
            before = recorder.random_state()
            for piece in self.pieces:
                if piece.graph is not None:
                    piece.graph.replay()
            if not torch.equal(before, recorder.random_state()):
                raise UnsupportedModelError("layers draw random numbers (dropout in training mode)")

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Those of a replay to the parameters' own, as copies: somebody may still hold them when the next one writes
        over what it made."""
        made = [(p, grad) for p, grad in zip(self.parameters, self._gradients, strict=True) if grad is not None]
        add_([p.grad for p, _ in made if p.grad is not None], [grad for p, grad in made if p.grad is not None])
        new = [(p, grad) for p, grad in made if p.grad is None]
        for (p, _), grad in zip(new, copies_of([grad for _, grad in new]), strict=True):
            p.grad = grad


class _Watched(Step):
    """A step that runs as usual, and notes what graphs will read."""

    def __init__(self, *args: Any, program: Program, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._program = program

    def work_group(self, part: RankPart, i: int, keep: Set[int] = frozenset()) -> None:
        super().work_group(part, i, keep)
        if part.groups[i][0].kind == "phase":
            self._program.note(part.groups[i][0], self)


class _Replay(Step):
    """A step whose layers' work is replayed."""

    def __init__(self, *args: Any, program: Program, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._program, self.increments = program, program.increments

    def work(self, part: RankPart, keep: Set[int] = frozenset()) -> None:
        program = self._program
        with self.outcome.working.timed():
            for piece in program.pieces:
                if piece.graph is not None:
                    piece.graph.replay()
                    self.values |= piece.outputs
                elif piece.phase is not None:
                    self.work_group(part, piece.groups.start)
                    program.load(piece.phase, self)
            program.add_gradients()
        self.outcome.norms = program.norms
        if self._finished is not None:
            for piece in program.pieces:
                for i in piece.groups if piece.phase is None else ():
                    self._count(part.groups[i])


def _tensors(entry: Entry) -> list[Tensor]:
    """The tensors that the layers are called with beside the state, each once."""
    leaves = (leaf for n in range(len(entry.calls)) for leaf in entry.arguments(n)[0])
    return list({id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}.values())


def _call_facts(entry: Entry) -> tuple:
    """What layers are called with, but for what is in tensors: sizes, which of them are one, and all else."""
    places: dict[int, int] = {}
    facts: list[Any] = [entry.x.shape, entry.x.dtype, entry.autocast, bool(entry.sides)]
    for n in range(len(entry.calls)):
        leaves, tree = entry.arguments(n)
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                facts.append((leaf.shape, leaf.dtype, leaf.device, places.setdefault(id(leaf), len(places))))
            else:
                plain = leaf is None or isinstance(leaf, bool | int | float | str)
                facts.append(leaf if plain else id(leaf))
        facts.append(tree)
    return tuple(facts)


def _parameters(entries: Iterable[Entry]) -> list[nn.Parameter]:
    slots = (parameter_slots(m).values() for entry in entries for m in entry.modules)
    return list({id(p): p for found in slots for p in found if p is not None and p.requires_grad}.values())


def _obstacle(entries: Iterable[Entry], parameters: Sequence[nn.Parameter]) -> str | None:
    if any(entry.sides for entry in entries):
        return "layer arguments require grad (encoder states, position biases)"
    if any(map(has_gradient_hooks, parameters)):
        return "somebody waits for gradients of layers (hooks)"
    if any(any(hook_counts(m)) for entry in entries for m in entry.modules):
        return "modules of layers have forward hooks, which a graph would leave out"
    return None
