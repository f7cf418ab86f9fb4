"""Which layers can be evaluated together, found out before a solve: by what they are, then by trying it once."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_layerpar.compat.torch import CALL, OWN_TENSORS, hook_counts
from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.plan.tasks import Plan
from hf_layerpar.run.layers import Entry, Layers
from hf_layerpar.run.stacked import StackedLayers, Wave, Weights
from hf_layerpar.run.step import LayersOf

Numbers = frozenset[tuple[str, str]]
"""(module path in the layer, attribute) of whole numbers in which layers of one kind differ, such as `layer_idx`."""


class Kinds:
    """The kinds of the layers of `program`: equal numbers for layers that differ in nothing but their weights, the
    tensors among their arguments, and whole numbers that are taken for a layer's place in the stack (the trial makes
    sure that nothing depends on them).

    kinds: a number for each layer. reason: why neighbours are of different kinds, from the first such pair.
    """

    def __init__(self, program: Layers) -> None:
        self.kinds: list[int] = []
        self.reason: str | None = None
        self._numbers: list[set[tuple[str, str]]] = []
        firsts: list[int] = []
        for n, call in enumerate(program.calls):
            for kind, first in enumerate(firsts):
                numbers: set[tuple[str, str]] = set()
                why = _difference(program.calls[first].layer, call.layer, numbers)
                why = why or _argument_difference(program.arguments(first), program.arguments(n))
                if why is None:
                    self.kinds.append(kind)
                    self._numbers[kind] |= numbers
                    break
                self.reason = self.reason or f"layer {n} is unlike layer {first} ({why})"
            else:
                self.kinds.append(len(firsts))
                firsts.append(n)
                self._numbers.append(set())

    def numbers(self, layer: int) -> Numbers:
        return frozenset(self._numbers[self.kinds[layer]])


def fingerprint(program: Layers) -> tuple:
    """What `Kinds` and the trial depend on, as far as it may change between solves: modules, modes, hooks, what the
    arguments are (but for sizes), and precision."""
    first = program.arguments(0)[0]
    arguments: list[Any] = []
    for n in range(len(program.calls)):
        for j, leaf in enumerate(program.arguments(n)[0]):
            if isinstance(leaf, Tensor):
                like = j < len(first) and isinstance(first[j], Tensor) and first[j].shape == leaf.shape
                arguments.append((leaf.dtype, leaf.ndim, like))
            else:
                arguments.append(leaf if leaf is None or isinstance(leaf, bool | int | float | str) else type(leaf))
    return module_facts(program.entry), tuple(arguments), program.entry.autocast, bool(program.entry.sides)


def module_facts(entry: Entry) -> tuple:
    """Of all modules of the layers, those things that may change between solves: which they are, modes, hooks."""
    return tuple((id(m), m.training, hook_counts(m)) for m in entry.modules)


class OneDevice:
    """Plans of one rank whose independent layers are evaluated together, where they can be.

    What is found out about a model's layers is kept; a warning says why layers can't be stacked.
    """

    def __init__(self) -> None:
        self._verdicts: dict[tuple, tuple[tuple[tuple[int, ...], ...], str | None]] = {}  # kinds, or why not
        self._weights: dict[Wave, Weights] = {}

    def plan(
        self, config: LayerParallelConfig, build: Callable[..., Plan], passes: Sequence[Layers]
    ) -> tuple[Plan, LayersOf] | None:
        """The plan, and what makes its layers; None where they are to be evaluated one at a time.

        build: the plan for (config, kinds=...). passes: the layers of each pass of one micro-batch.
        """
        key = (config, tuple(map(fingerprint, passes)))
        if key not in self._verdicts:
            found = [Kinds(layers) for layers in passes]
            kinds = tuple(tuple(k.kinds) for k in found)
            make = _maker(build(config, kinds=kinds), kinds, self._weights)
            reason = None
            for k, layers in enumerate(passes):
                trial: Any = make(layers.entry, layers.common, k, 0, None)
                waves = sorted(wave for wave in trial.kept if len(wave) > 1)
                reason = reason or obstacle(trial, found[k], waves, layers.entry.x)
            self._verdicts[key] = kinds, reason
            if reason is not None:
                warnings.warn(f"stacked=True, but layers are evaluated one at a time: {reason}", stacklevel=2)
        kinds, reason = self._verdicts[key]
        if reason is not None:
            return None
        plan = build(config, kinds=kinds)
        return plan, _maker(plan, kinds, self._weights)


def _maker(plan: Plan, kinds: Sequence[Sequence[int]], weights: dict[Wave, Weights]) -> LayersOf:
    kept: dict[int, set[Wave]] = {k: set() for k in range(len(kinds))}
    for group in plan.groups():
        first = group[0]
        if first.kind == "step" and first.final and first.direction == "backward":
            kept[first.place].add(tuple(n for task in group for n in task.layers))

    def make(entry: Any, common: Any, place: int, micro_batch: int, increments: Any) -> Layers:
        return StackedLayers(entry, common, place, micro_batch, kinds=kinds[place], kept=kept[place], weights=weights)

    return make


def obstacle(program: StackedLayers, kinds: Kinds, waves: Sequence[Wave], x: Tensor) -> str | None:
    """Why the waves (with several layers, from the plans) can't be evaluated as such, None if they can.

    Each wave is evaluated once from x `[B, T, D]`, its layers together and alone; the results must agree.
    """
    x = x.detach()
    if program.entry.sides:
        return "layer arguments require grad (encoder states, position biases)"
    if not waves:
        return kinds.reason or "no interval has a layer that another one could be evaluated with"
    for wave in waves:
        why = _trial(program, kinds.numbers(wave[0]), wave, x)
        if why is not None:
            return why
    return None


def _trial(program: StackedLayers, numbers: Numbers, wave: Wave, x: Tensor) -> str | None:
    template = program.calls[wave[0]].layer
    name = f"layers {wave[0]} to {wave[-1]} ({type(template).__name__})"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with _without(template, numbers):
                together, vjps = program.try_wave(wave, x)
        except Exception as error:  # whatever a layer raises where it can't be evaluated so: it is the reason
            text = str(error).strip().splitlines() or [type(error).__name__]
            random = "random operation" in text[0]
            return f"{name} draw random numbers (dropout in training mode)" if random else f"{name}: {text[0]}"
    slow = [str(w.message) for w in caught if "batching rule" in str(w.message)]
    if slow:
        return f"{name}: {slow[0].split('. ')[0]}"
    eps = _precision(program, x)
    for i, layer in enumerate(wave):
        alone, vjp = program.try_layer(layer, x)
        # by the increments: the states themselves would hide a difference in them
        for base, a, b in ((x, together[i], alone), (torch.ones_like(x), vjps[i], vjp)):
            error, increment = float((a - b).norm()), float((b - base).norm())
            if not error <= 16 * (eps**0.75 * increment + eps * float(base.norm())):
                return (
                    f"layer {layer} ({type(template).__name__}) gives other values among others than alone "
                    f"(relative difference {error / increment if increment else error:.1e})"
                )
    return None


def _precision(program: Layers, x: Tensor) -> float:
    """The coarsest rounding in a layer: of the state, of the autocast, or of matrix products in reduced precision."""
    reduced = x.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return max(torch.finfo(x.dtype).eps, torch.finfo(program.entry.autocast or x.dtype).eps, 2**-10 if reduced else 0.0)


@contextmanager
def _without(layer: nn.Module, numbers: Numbers) -> Iterator[None]:
    """The layer lacks these attributes inside, so that what depends on them raises AttributeError."""
    taken = [(vars(layer.get_submodule(path)), name) for path, name in numbers]
    held = [(values, name, values.pop(name)) for values, name in taken]
    try:
        yield
    finally:
        for values, name, value in held:
            values[name] = value


def _difference(a: nn.Module, b: nn.Module, numbers: set[tuple[str, str]]) -> str | None:
    """The first thing but weights in which two layers differ, None if there is none; whole numbers go to `numbers`."""
    if type(a) is not type(b):
        return f"{type(b).__name__} and not {type(a).__name__}"
    inner_a, inner_b = dict(a.named_modules()), dict(b.named_modules())
    if list(inner_a) != list(inner_b):
        return f"{type(b).__name__} with other submodules"
    for path, module in inner_a.items():
        other = inner_b[path]
        name = f"{path}." if path else ""
        if type(module) is not type(other):
            return f"{path} is {type(other).__name__} and not {type(module).__name__}"
        mine, its = vars(module), vars(other)
        for key in [*mine, *(k for k in its if k not in mine)]:
            if key in OWN_TENSORS:
                continue
            if key not in mine or key not in its:
                return f"{name}{key} is set in one of them"
            if key.endswith("_hooks") and isinstance(mine[key], dict):
                same = _same(list(mine[key].values()), list(its[key].values()))
            else:
                same = _same(mine[key], its[key]) or (key in ("forward", CALL) and _is_put_there(mine[key], its[key]))
            if not same:
                if type(mine[key]) is int and type(its[key]) is int:
                    numbers.add((path, key))
                else:
                    return f"{name}{key} differs"
    tensors = [dict([*layer.named_parameters(), *layer.named_buffers()]) for layer in (a, b)]
    if [(n, _facts(t)) for n, t in tensors[0].items()] != [(n, _facts(t)) for n, t in tensors[1].items()]:
        return "weights of other names, shapes or dtypes"
    return None


def _argument_difference(a: tuple[list[Any], Any], b: tuple[list[Any], Any]) -> str | None:
    if a[1] != b[1]:
        return "called with other arguments"
    for x, y in zip(a[0], b[0], strict=True):
        both = isinstance(x, Tensor) and isinstance(y, Tensor)
        if not (_facts(x) == _facts(y) if both else _same(x, y)):
            return "called with arguments of other values or shapes"
    return None


def _facts(t: Tensor) -> tuple:
    return tuple(t.shape), t.dtype, t.device


_CODE = (FunctionType, BuiltinFunctionType, MethodType, functools.partial, type)


def _is_put_there(a: Any, b: Any) -> bool:
    """Whether both are objects of one class that stand for the layer's forward (the interception's): not code."""
    return type(a) is type(b) and not isinstance(a, _CODE)


def _same(a: Any, b: Any, depth: int = 0) -> bool:
    """Whether two attributes mean the same: one object, equal plain values, or objects of one class made of such.

    Modules are compared by class where an attribute's object holds them; tensors only by identity.
    """
    if a is b:
        return True
    if type(a) is not type(b) or depth > 8:
        return False
    if isinstance(a, functools.partial):
        return _same((a.func, a.args, a.keywords), (b.func, b.args, b.keywords), depth + 1)
    if isinstance(a, MethodType):
        return a.__func__ is b.__func__ and _same(a.__self__, b.__self__, depth + 1)
    if isinstance(a, (Tensor, *_CODE)):
        return False
    if isinstance(a, str | int | float | complex | bytes | torch.dtype | torch.device | torch.Size | frozenset | set):
        return a == b
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(_same(x, y, depth + 1) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(x, y, depth + 1) for x, y in zip(a.values(), b.values(), strict=True))
    if isinstance(a, nn.Module | RemovableHandle):
        return True
    return hasattr(a, "__dict__") and _same(vars(a), vars(b), depth + 1)
