"""Interception of a layer list: each layer's call becomes an Euler step, run in line or handed to a solver all at once.

No model code is rewritten and no module is moved. A layer gets an instance attribute `forward`; the model's own loop
calls it as before. Without a solver it evaluates the layer. With one, all layers but the last record their arguments
and hand on what stands for a state (`Later`), and the last one gives the recorded calls to the solver. How layers
return their state is found by evaluating the first of each kind on stand-ins of its parameters.

Hooks on a layer run when the layer is evaluated and not when it is recorded, so they see real states: those of every
sweep, last those of the final one.

Shapes: B batch, T tokens, D hidden; a state is `[B, T, D]`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from hf_layerpar.compat.torch import (
    CALL,
    COMPILED_CALL,
    DisableTorchFunction,
    buffer_slots,
    call_uncompiled,
    compiled_call,
    parameter_slots,
    tree_leaves,
    tree_map,
)
from hf_layerpar.compat.transformers import collected_outputs
from hf_layerpar.config import OdeSettings, buffer_places, shown
from hf_layerpar.errors import UnsupportedModelError
from hf_layerpar.ode.cache import add_stand_in, find_cache, is_splittable
from hf_layerpar.ode.compiled import Compiler
from hf_layerpar.ode.families import Family, Later, Packing, family_of, later


@dataclass(eq=False)
class RecordedCall:
    """One layer's call in one model forward.

    layer: its parameters may be None, where another rank owns it.
    index: its place in the stack.
    args, kwargs: what the model gave it after the state.
    """

    layer: nn.Module
    index: int
    args: tuple
    kwargs: dict[str, Any]
    stack: LayerStack

    def step(self, x: Tensor, args: tuple, kwargs: dict[str, Any], *, compiled: bool = True) -> Tensor:
        """One Euler step of this layer from `x` `[B, T, D]` with the given arguments (the recorded ones, or slices or
        copies of them), at the layer's own step size. At h = 1 it is the layer's output itself.

        compiled: as the stack's layers were compiled, if they were; code has no second derivatives."""
        return self.stack.step(self.index, x, args, kwargs, compiled=compiled)


Solver = Callable[[Sequence[RecordedCall], Tensor], Tensor]
"""Maps (the calls of all layers of a stack, buffers included; x_0) to x_N."""

_Shapes = tuple[tuple[str, str, torch.Size, torch.dtype, bool], ...]
"""(module, attribute, shape, dtype, is a parameter) of a layer's parameters and buffers."""

ModelRunner = Callable[["ModelForward", tuple, dict[str, Any]], Any]
"""Maps (what stands for a model's forward, the arguments) to the forward's output; it calls `ModelForward.run`."""


@dataclass(slots=True, eq=False)
class LayerForward:
    """The `forward` put on a layer. Plain data, so that deepcopy and pickle follow it to the copied stack."""

    stack: LayerStack
    index: int

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.stack.stock_forward(self.index))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.stack.call(self.index, args, kwargs)


@dataclass(slots=True, eq=False)
class LayerCall:
    """The `_call_impl` put on a layer: what runs a module's hooks around its `forward`. A recorded call runs none.

    compiled: what runs them where the layer was compiled before; a compiler must not see what is recorded.
    """

    stack: LayerStack
    index: int
    compiled: Callable[..., Any] | None = None

    @torch.compiler.disable(recursive=False)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.stack.is_recording(args, kwargs):  # pyright: ignore[reportAttributeAccessIssue]
            return self.stack.record(self.index, args, kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        if self.compiled is not None:
            return self.compiled(*args, **kwargs)
        layer = self.stack.layers[self.index]
        return call_uncompiled(layer, args, kwargs)


@dataclass(slots=True, eq=False)
class ModelForward:
    """The `forward` put on each model that holds stacks.

    A parallelized model's calls go to its `runner`. While a stack has a solver, the forward turns the KV cache off
    unless the caller asked for it (as `generate` does), tells the stacks of requests for per-layer values, and checks
    that no layer was left out. An attribute and not a hook, because PEFT calls `forward` past the hooks.
    """

    model: nn.Module
    stacks: tuple[LayerStack, ...]
    original: Callable[..., Any] | None

    @property
    def stock(self) -> Callable[..., Any]:
        return self.original or type(self.model).forward.__get__(self.model)

    @property
    def __func__(self) -> Callable[..., Any]:
        """What accelerate takes from a bound method, wraps (mixed precision) and binds to the model again.

        It finds the model's own `ModelForward`, so the bound method follows a deepcopy of the model.
        """

        def forward(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
            return vars(model)[_MODEL_FORWARD](*args, **kwargs)

        forward.__signature__ = inspect.signature(type(self.model).forward)  # pyright: ignore[reportFunctionMemberAccess]
        return forward

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.stock)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        runner = self.stacks[0].runner
        return self.run(args, kwargs) if runner is None else runner(self, args, kwargs)

    def run(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The forward, in line or with the stacks' solvers."""
        solved = [stack for stack in self.stacks if stack.solver is not None]
        if not solved:
            return self.stock(*args, **kwargs)
        checkpointing = getattr(self.model, "gradient_checkpointing", None)
        if isinstance(checkpointing, bool) and not isinstance(self.model, PreTrainedModel):
            for layer in (layer for stack in solved for layer in stack.layers):
                vars(layer)["gradient_checkpointing"] = checkpointing  # in diffusers' models the loop's affair
        given = self.named(args, kwargs)
        cache_asked_for = given.get("use_cache") is not None or given.get("past_key_values") is not None
        if "use_cache" in self.names[len(args) :] and not cache_asked_for:
            kwargs = kwargs | {"use_cache": False}
        if "use_mems" in self.names[len(args) :] and given.get("use_mems") is None:  # XLNet's
            kwargs = kwargs | {"use_mems": False}
        if solved[0].drops_hidden_states and "output_hidden_states" in given:
            kwargs = kwargs | {"output_hidden_states": False}
            given |= kwargs
        reason = next((name for name in _PER_LAYER_OUTPUTS if self._wants(name, given)), None)
        drops = reason is None and getattr(getattr(self.model, "config", None), "use_weighted_layer_sum", None) is False
        before = [(stack.serial_reason, stack.drops_hidden_states) for stack in solved]
        for stack in solved:
            stack.serial_reason = stack.serial_reason or reason
            stack.drops_hidden_states = stack.drops_hidden_states or drops
        try:
            output = self.stock(*args, **kwargs)
            for stack in solved:
                stack.check_complete()
        finally:
            for stack, earlier in zip(solved, before, strict=True):
                stack.serial_reason, stack.drops_hidden_states = earlier
                stack.forget()
        return output

    @property
    def names(self) -> tuple[str, ...]:
        if self.original is None:
            return _names_of(type(self.model).forward)[1:]  # without self
        return _names_of(self.original)

    def named(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments by name."""
        return dict(zip(self.names, args, strict=False)) | kwargs

    def _wants(self, name: str, given: dict[str, Any]) -> bool:
        value = given.get(name)
        # `is not False`: output_hidden_states may be an index, and 0 is one
        config = getattr(self.model, "config", None)
        return bool(getattr(config, name, False)) if value is None else value is not False


@lru_cache(maxsize=256)
def _names_of(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


_SIZES = "_hf_layerpar_sizes"
"""Among a recorded layer's arguments the second dimensions of the parts of its state, if it has several."""
_MODEL_FORWARD = "_hf_layerpar_forward"
FORWARDS = ("forward", CALL, COMPILED_CALL, _MODEL_FORWARD)
"""Attributes that `intercept` puts on modules."""
_PER_LAYER_OUTPUTS = ("output_hidden_states", "output_attentions")


class LayerStack:
    """The layers of one ModuleList, read as Euler steps.

    path: name of the ModuleList in the HuggingFace model, as in its `named_modules()`.
    step_sizes: h of each layer; buffer layers have 1.
    solver: None evaluates each layer in line; otherwise it gets the recorded calls of the whole stack.
    runner: runs the forwards of the models that hold the stack, where they are parallelized.
    foreign: places of the layers whose parameters this rank lacks; with some, the stack can't be evaluated in line.
    trains: whether the running forward will go backward, where its grad mode doesn't tell (in a rehearsal).
    serial_reason: what the running model forward asked for that needs each layer's own value, if anything.
    drops_hidden_states: whether the running forward is of a head that asks for hidden states to drop them: those of
        speech models with `use_weighted_layer_sum=False`, unless hidden states are asked of themselves.
    in_line_because: why the last forward evaluated the layers in line although there was a solver.
    compiler: compiles the layers' forwards, or None.
    """

    def __init__(self, path: str, layers: Sequence[nn.Module], settings: OdeSettings) -> None:
        self.path = path
        self.layers = list(layers)
        self.settings = settings
        buffers = buffer_places(settings.buffers, len(self.layers))
        self.step_sizes = tuple(1.0 if n in buffers else settings.step_size for n in range(len(self.layers)))
        if len(set(self.layers)) < len(self.layers) and len(set(self.step_sizes)) > 1:
            raise UnsupportedModelError(
                f"buffers={settings.buffers} and step_size={settings.step_size} of {path}, which calls one layer again "
                "and again: it can't have two step sizes; leave buffers out, or use step_size=1"
            )
        self.solver: Solver | None = None
        self.runner: ModelRunner | None = None
        self.foreign: frozenset[int] = frozenset()
        self._evaluating = False
        self.trains: bool | None = None
        self.serial_reason: str | None = None
        self.drops_hidden_states = False
        self.in_line_because: str | None = None
        self.compiler: Compiler | None = None
        self._plainly = False
        self._family = family_of(self.layers[0])
        self._packings: dict[Any, Packing] = {}  # by place, and by class and shapes
        self._shapes: list[_Shapes] = []
        self._unseen = ""
        self._records: list[RecordedCall] = []
        self._start: Tensor | None = None
        self._handed: Tensor | None = None
        self._parts_handed: tuple[Tensor, ...] = ()
        self._shared: tuple = ()
        # forwards that others put on the instances before us (accelerate's device hooks)
        self._originals = [vars(layer).get("forward") for layer in self.layers]

    def install(self) -> None:
        """Put a `LayerForward` and a `LayerCall` on every layer."""
        for layer in dict.fromkeys(self.layers):
            index = self.layers.index(layer)
            layer.forward = LayerForward(self, index)
            compiled = compiled_call(layer)
            setattr(layer, CALL if compiled is None else COMPILED_CALL, LayerCall(self, index, compiled))

    def note_shapes(self) -> None:
        """To be called where all layers are whole: from now on layers may lose their parameters."""
        self._shapes = [_shapes_of(layer) for layer in self.layers]

    @property
    def sharded(self) -> bool:
        """Some layers live on other ranks."""
        return bool(self.foreign)

    def stock_forward(self, index: int) -> Callable[..., Any]:
        """The layer's forward as it was before the interception."""
        layer = self.layers[index]
        return self._originals[index] or type(layer).forward.__get__(layer)

    def check_compilable(self) -> None:
        """Raises UnsupportedModelError for layers with a forward of their own, which no class's code stands for."""
        for index, original in enumerate(self._originals):
            if original is not None:
                raise UnsupportedModelError(
                    f"{self._name(index)} has a forward of its own ({shown(original)}, as of accelerate's device "
                    "hooks), and layers are compiled by their class; load the model without device_map, or compile "
                    "nothing"
                )

    def step(self, index: int, x: Tensor, args: tuple, kwargs: dict[str, Any], *, compiled: bool = True) -> Tensor:
        """One Euler step of layer `index` from `x` `[B, T, D]`, without gradient checkpointing (the solver's job)."""
        before, self._evaluating, self._plainly = (self._evaluating, self._plainly), True, not compiled
        try:
            with _without_checkpointing(self.layers[index]):
                given, named = self._apart(x, args, kwargs)
                output = self.layers[index](*given, **named)  # its hooks run
        finally:
            self._evaluating, self._plainly = before
        return self._euler(index, x, self._checked(index, x, output, kwargs))

    def call(self, index: int, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What the model's loop gets for calling layer `index`."""
        if self._evaluating:
            return self._forward(index, args, kwargs)
        x, args, kwargs = self._split_state(index, args, kwargs)
        if self.solver is None:
            return self._in_line(index, x, args, kwargs)
        self.in_line_because = reason = self._needs_serial(find_cache((*args, *kwargs.values())))
        if reason is None:
            return self._record(index, x, args, kwargs)
        if self.sharded:
            raise UnsupportedModelError(
                f"{reason} needs every layer's value on this rank, but {self.path} is spread over lp ranks. "
                f"{remedy_for(reason)} Or load the saved checkpoint without parallelize"
            )
        return self._in_line(index, x, args, kwargs)

    @torch.compiler.disable
    def record(self, index: int, args: tuple, kwargs: dict[str, Any]) -> Any:
        """`call` of what `is_recording`: no work for a compiler."""
        self.in_line_because = None
        return self._record(index, *self._split_state(index, args, kwargs))

    @torch.compiler.disable
    def is_recording(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        """A call with these arguments is recorded, and not evaluated."""
        if self.solver is None or self._evaluating:
            return False
        return self._needs_serial(find_cache((*args, *kwargs.values()))) is None

    def check_complete(self) -> None:
        """Raises UnsupportedModelError when the loop stopped before the last layer, which would have run the solver."""
        if self._records:
            raise UnsupportedModelError(
                f"the model called {len(self._records)} of the {len(self.layers)} layers of {self.path}; a solver "
                "needs all of them (is config.num_hidden_layers smaller than the stack, or early exit on?)"
            )

    def forget(self) -> None:
        """Drop what an unfinished forward recorded."""
        self._records, self._start, self._handed, self._shared = [], None, None, ()
        self._parts_handed = ()

    def _forward(self, index: int, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The layer's own forward, compiled where it may be. With a KV cache every layer would need code of its own, as
        each has its own place there."""
        layer: Any = self.layers[index]
        caching = find_cache((*args, *kwargs.values())) is not None
        if self.compiler is None or self._plainly or is_checkpointed(layer) or caching:
            return self.stock_forward(index)(*args, **kwargs)
        return self.compiler(type(layer).forward)(layer, *args, **kwargs)

    def _in_line(self, index: int, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
        output = self._forward(index, *self._apart(x, args, kwargs))
        if self._is_plain(index):
            return output
        state = self._euler(index, x, self._checked(index, x, output, kwargs))
        return self._family.with_parts(output, self._parts(state, kwargs))

    def _record(self, index: int, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
        place = len(self._records)
        if place < len(self.layers) and self.layers[place] is self.layers[index]:
            index = place  # of a layer that is called again and again
        if index == 0:
            self.forget()
            self._start = self._handed = x
            self._shared = self._make_shared(x, args, kwargs)
        if index != len(self._records):
            raise UnsupportedModelError(
                f"{self._name(index)} was called where layer {len(self._records)} was expected; a solver needs the "
                "layers of a stack called once each and in order (layers skipped or repeated?)"
            )
        if x is not self._handed:
            raise UnsupportedModelError(self._between(index - 1))
        args, kwargs = self._family.with_shared(args, kwargs, self._shared)
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Later):
                raise UnsupportedModelError(leaf.what)
        self._records.append(RecordedCall(self.layers[index], index, args, kwargs, self))
        start = self._start
        assert start is not None
        packing = Packing.with_shared(self._shared) if self._shared else self._packing(index, start, args, kwargs)
        if index < len(self.layers) - 1:
            self._handed, self._parts_handed = start, self._parts(start, kwargs)
            if not self._is_seen_by_a_compiler(index + 1):
                what = self._between(index)
                self._parts_handed = tuple(later(part, what, is_state=True) for part in self._parts_handed)
                self._handed = self._parts_handed[0]
            return packing.pack(self._parts_handed, args, kwargs)
        calls = self._records
        self.forget()
        assert self.solver is not None
        return packing.pack(self._parts(self.solver(calls, start), kwargs), args, kwargs)

    def _make_shared(self, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> tuple:
        if type(self._family) is Family:
            return ()
        modules = self._family.shared_modules
        mine = [s for s in self._shapes_of(0) if not any(f"{s[0]}.".startswith(f"{name}.") for name in modules)]
        with shadowed(self._stand_ins(0, mine, x.device, buffers=False)):
            return self._family.shared(self.layers[0], x, args, kwargs)

    def _is_seen_by_a_compiler(self, index: int) -> bool:
        """What the layer is given: it was compiled after the interception."""
        compiled = compiled_call(self.layers[index])
        return compiled is not None and not isinstance(compiled, LayerCall)

    def _between(self, index: int) -> str:
        return (
            f"the model reads or changes the state between layers {index} and {index + 1} of {self.path} (or stops "
            "there: is config.num_hidden_layers smaller than the stack, or early exit on?), so the layers are not one "
            "sequence of steps. Switch off what does it, leave this stack out of the conversion "
            f"(stacks=[...]), or run the model without parallelize{self._unseen}"
        )

    def _packing(self, index: int, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> Packing:
        """How a layer returns its state: the first of its kind is evaluated, the same on every rank."""
        if index not in self._packings:
            shapes = self._shapes_of(index)
            kind = (type(self.layers[index]), shapes)
            if kind not in self._packings:
                self._packings[kind] = self._find_packing(index, shapes, x, args, kwargs)
            self._packings[index] = self._packings[kind]
        return self._packings[index]

    def _shapes_of(self, index: int) -> _Shapes:
        return self._shapes[index] if self._shapes else _shapes_of(self.layers[index])

    def _stand_ins(
        self, index: int, shapes: Iterable[tuple], device: torch.device, *, buffers: bool = True
    ) -> list[tuple[tuple[nn.Module, str], Tensor]]:
        """What `shadowed` takes to make a layer's parameters (and buffers) read as zeros."""
        found = []
        for name, key, shape, dtype, is_parameter in shapes:
            if buffers or is_parameter:
                zeros = torch.zeros(() if is_parameter else shape, dtype=dtype, device=device)
                found.append(((self.layers[index].get_submodule(name), key), zeros.expand(shape)))
        return found

    def _find_packing(self, index: int, shapes: _Shapes, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> Packing:
        layer, forward = self.layers[index], self.stock_forward(index)
        shadows = self._stand_ins(index, shapes, x.device)
        args, kwargs = tree_map(_own, (args, kwargs), is_leaf=lambda leaf: isinstance(leaf, Cache))
        devices = [x.device] if x.is_cuda else []
        start = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
        output: Any = start
        # a rehearsal's linear maps make tensors that some layers can't write to, and zeros are no weights for others
        off = DisableTorchFunction
        lacks = self.sharded or any(p.is_meta for p in layer.parameters())  # the layer's own parameters
        ways = [(nullcontext, shadows), (off, shadows)] + ([] if lacks else [(off, [])])
        with torch.no_grad(), torch.random.fork_rng(devices), _without_checkpointing(layer):
            for number, (mode, values) in enumerate(ways, 1):
                try:
                    with mode(), shadowed(values):
                        given, named = self._apart(start, args, kwargs)
                        output, self._unseen = forward(*given, **named), ""
                    break
                except Exception as error:
                    if number == len(ways) and not lacks:
                        raise
                    self._unseen = f" ({self._name(index)} could not be evaluated ahead on zeros: {error})"
        self._checked(index, x, output, kwargs)
        return Packing.of(output, self._family.parts_of(output), self._name(index), args, kwargs)

    def _checked(self, index: int, x: Tensor, output: Any, kwargs: dict[str, Any]) -> Tensor:
        """The state in the output of a layer that was called with `x` and `kwargs`."""
        given = self._parts(x, kwargs)
        found = self._family.parts_of(output)
        if len(given) > 1:
            found = tuple(old if new is None else new for old, new in zip(given, found, strict=True))
        for old, new in zip(given, found, strict=True):
            if not isinstance(new, Tensor):
                raise UnsupportedModelError(
                    f"{self._name(index)} returns a {type(output).__name__} that doesn't begin with its state, so it "
                    "is no step from state to state; leave this stack out of the conversion (stacks=[...])"
                )
            if new.shape != old.shape:
                raise UnsupportedModelError(
                    f"{self._name(index)} makes a state of shape {tuple(new.shape)} of one of shape "
                    f"{tuple(old.shape)}, so it is no step from state to state; leave this stack out of the "
                    "conversion (stacks=[...])"
                )
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)

    def count_in_cache(self, calls: Sequence[RecordedCall], x: Tensor) -> None:
        """The tokens of `x` `[B, T, D]` count as cached for the layers that were evaluated on other ranks."""
        cache = find_cache((*calls[0].args, *calls[0].kwargs.values()))
        for index in self.foreign if cache is not None else ():
            assert cache is not None
            add_stand_in(cache, self.layers[index], x)

    def _euler(self, index: int, x: Tensor, y: Tensor) -> Tensor:
        # x + 1 * (y - x) would not be bit-equal to y
        return y if self._is_plain(index) else x + self.step_sizes[index] * (y - x)

    def _is_plain(self, index: int) -> bool:
        # in the split form the layer scales its own branches
        return self.step_sizes[index] == 1 or self.settings.form == "split"

    def _needs_serial(self, cache: Cache | None) -> str | None:
        trains = torch.is_grad_enabled() if self.trains is None else self.trains
        if cache is not None and not (self.sharded and is_splittable(cache) and not trains):
            gradients = " with gradients" if trains else ""
            return f"a KV cache{gradients} (use_cache=True or past_key_values: {type(cache).__name__})"
        collecting = collected_outputs()
        if collecting:
            return f"output_{next(iter(collecting))}"
        return self.serial_reason

    def _split_state(self, index: int, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, tuple, dict[str, Any]]:
        if args and not self._family.state:
            return args[0], args[1:], kwargs
        original = self._originals[index]
        names = _names_of(type(self.layers[index]).forward)[1:] if original is None else _names_of(original)
        given = dict(zip(names, args, strict=False)) | kwargs
        if not self._family.state:
            return given.pop(names[0]), (), given
        parts = tuple(given.pop(name) for name in self._family.state)
        given[_SIZES] = tuple(part.shape[1] for part in parts)
        if [id(part) for part in parts] == [id(part) for part in self._parts_handed]:
            assert self._handed is not None
            return self._handed, (), given
        if len({(part.shape[0], part.shape[2:]) for part in parts}) > 1:
            raise UnsupportedModelError(
                f"the state of {self._name(index)} is in parts of shapes {[tuple(part.shape) for part in parts]}, "
                "which can't be solved as one: they may only differ in their second dimension"
            )
        return torch.cat(parts, dim=1), (), given

    def _parts(self, x: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        """The tensors that make up the state of a layer that was called with `kwargs`."""
        return x.split(kwargs[_SIZES], dim=1) if self._family.state else (x,)

    def _apart(self, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The arguments with which the model calls a layer: `_split_state` undone."""
        if not self._family.state:
            return (x, *args), kwargs
        named = dict(zip(self._family.state, self._parts(x, kwargs), strict=True)) | kwargs
        del named[_SIZES]
        return (), named

    def _name(self, index: int) -> str:
        return f"{self.path}.{index} ({type(self.layers[index]).__name__})"


def is_checkpointed(layer: nn.Module) -> bool:
    """Whether a layer is to be evaluated again in the backward, as its own flag says."""
    return layer.training and bool(getattr(layer, "gradient_checkpointing", False))


class NeedsSerialError(UnsupportedModelError):
    """What was asked for needs each layer's own value while the model's forward runs."""


def remedy_for(reason: str) -> str:
    """What to do about what needs each layer's own value, in sentences."""
    if "KV cache" in reason:
        return "Call without it (use_cache=False, or a DynamicCache under torch.no_grad())."
    name = reason.split()[0]
    text = (
        f"Call without it ({name}=False, also in the config), or leave this stack out of the conversion (stacks=[...])."
    )
    if name == "output_router_logits":
        text += " (The auxiliary loss of routers is made of the logits of all layers together, which no rank has.)"
    if name == "output_hidden_states":
        text += " (Some models of transformers ask for it themselves.)"
    return text


def _shapes_of(layer: nn.Module) -> _Shapes:
    return tuple(
        (name, key, value.shape, value.dtype, isinstance(value, nn.Parameter))
        for name, module in layer.named_modules()
        for key, value in (*parameter_slots(module).items(), *buffer_slots(module).items())
        if value is not None
    )


def _own(leaf: Any) -> Any:
    return copy.deepcopy(leaf) if isinstance(leaf, Cache) else leaf


@contextmanager
def shadowed(shadows: Iterable[tuple[tuple[nn.Module, str], Tensor]]) -> Iterator[None]:
    """Attributes of modules read as other tensors inside. (An entry of `__dict__` goes before `_parameters`, which
    state dicts, optimizers and `.to` look at.)"""
    placed = []
    try:
        for (module, key), tensor in shadows:
            vars(module)[key] = tensor
            placed.append((module, key))
        yield
    finally:
        for module, key in placed:
            vars(module).pop(key, None)


@contextmanager
def _without_checkpointing(layer: Any) -> Iterator[None]:
    if not getattr(layer, "gradient_checkpointing", False):
        yield
        return
    layer.gradient_checkpointing = False
    try:
        yield
    finally:
        layer.gradient_checkpointing = True


def intercept(model: nn.Module, stacks: tuple[LayerStack, ...]) -> None:
    """Put our `forward` on the layers of `stacks` and on every HuggingFace model in `model` that holds some of them."""
    for stack in stacks:
        stack.install()
    for module in model.modules():
        if isinstance(module, PreTrainedModel) or module is model:
            inside = set(module.modules())
            held = tuple(stack for stack in stacks if stack.layers[0] in inside)
            if held:
                forward = ModelForward(module, held, vars(module).get("forward"))
                setattr(module, _MODEL_FORWARD, forward)
                module.forward = forward


def intercept_root(model: nn.Module, stacks: tuple[LayerStack, ...]) -> None:
    """Put our `forward` on the module that is parallelized, where `intercept` has not."""
    if _MODEL_FORWARD not in vars(model):
        forward = ModelForward(model, stacks, vars(model).get("forward"))
        object.__setattr__(model, _MODEL_FORWARD, forward)
        object.__setattr__(model, "forward", forward)
