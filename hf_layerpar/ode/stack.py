"""Interception of a layer list: each layer's call becomes an Euler step, run in line or handed to a solver all at once.

No model code is rewritten and no module is moved. A layer gets an instance attribute `forward`; the model's own loop
calls it as before. Without a solver it evaluates the layer. With one, all layers but the last record their arguments
and hand on what stands for a state (`Later`), and the last one gives the recorded calls to the solver.

Hooks on a layer run when the layer is evaluated and not when it is recorded, so they see real states: those of every
sweep, last those of the final one.

Shapes: B batch, T tokens, D hidden; a state is `[B, T, D]`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from hf_layerpar.compat.torch import CALL, COMPILED_CALL, call_uncompiled, compiled_call, tree_leaves
from hf_layerpar.compat.transformers import collected_outputs
from hf_layerpar.config import OdeSettings, buffer_places, shown
from hf_layerpar.errors import UnsupportedModelError
from hf_layerpar.ode.cache import add_stand_in, find_cache, is_splittable
from hf_layerpar.ode.compiled import Compiler
from hf_layerpar.ode.convention import Convention
from hf_layerpar.ode.families import Family
from hf_layerpar.ode.packing import Later, Packing, Packings, later
from hf_layerpar.ode.stand_ins import ZeroLayers, shadowed


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


_PLAIN = (type(None), bool, int, float, str, Tensor)

Solver = Callable[[Sequence[RecordedCall], Tensor], Tensor]
"""Maps (the calls of all layers of a stack, buffers included; x_0) to x_N."""


@dataclass(slots=True, eq=False)
class LayerForward:
    """The `forward` put on a layer. Plain data, so that deepcopy and pickle follow it to the copied stack."""

    stack: LayerStack
    index: int

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.stack.convention.stock_forward(self.index))

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


class LayerStack:
    """The layers of one ModuleList, read as Euler steps.

    path: name of the ModuleList in the HuggingFace model, as in its `named_modules()`.
    step_sizes: h of each layer; buffer layers have 1.
    convention: how the layers are called.
    solver: None evaluates each layer in line; otherwise it gets the recorded calls of the whole stack.
    runner: runs the forwards of the models that hold the stack, where they are parallelized (a `ModelRunner`).
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
        self.runner: Callable[..., Any] | None = None
        self.foreign: frozenset[int] = frozenset()
        self._evaluating = False
        self.trains: bool | None = None
        self.serial_reason: str | None = None
        self.drops_hidden_states = False
        self.in_line_because: str | None = None
        self.compiler: Compiler | None = None
        self._plainly = False
        self.convention = Convention(path, self.layers)
        self._zeros = ZeroLayers(self.layers)
        self._packings = Packings(self.convention, self._zeros)
        self._records: list[RecordedCall] = []
        self._start: Tensor | None = None
        self._handed: Tensor | None = None
        self._parts_handed: tuple[Tensor, ...] = ()
        self._shared: tuple = ()

    def install(self) -> None:
        """Put a `LayerForward` and a `LayerCall` on every layer."""
        for layer in dict.fromkeys(self.layers):
            index = self.layers.index(layer)
            layer.forward = LayerForward(self, index)
            compiled = compiled_call(layer)
            setattr(layer, CALL if compiled is None else COMPILED_CALL, LayerCall(self, index, compiled))

    def note_shapes(self) -> None:
        """To be called where all layers are whole: from now on layers may lose their parameters."""
        self._zeros.note_shapes()

    @property
    def sharded(self) -> bool:
        """Some layers live on other ranks."""
        return bool(self.foreign)

    def check_compilable(self) -> None:
        """Raises UnsupportedModelError for layers with a forward of their own, which no class's code stands for."""
        for index, original in enumerate(self.convention.originals):
            if original is not None:
                raise UnsupportedModelError(
                    f"{self.convention.name(index)} has a forward of its own ({shown(original)}, as of accelerate's "
                    "device hooks), and layers are compiled by their class; load the model without device_map, or "
                    "compile nothing"
                )

    def step(self, index: int, x: Tensor, args: tuple, kwargs: dict[str, Any], *, compiled: bool = True) -> Tensor:
        """One Euler step of layer `index` from `x` `[B, T, D]`, without gradient checkpointing (the solver's job)."""
        before, self._evaluating, self._plainly = (self._evaluating, self._plainly), True, not compiled
        try:
            output = self.convention.evaluate(index, self.layers[index], x, args, kwargs)  # its hooks run
        finally:
            self._evaluating, self._plainly = before
        return self._euler(index, x, self.convention.state_in(index, output, x, kwargs))

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
            return self.convention.stock_forward(index)(*args, **kwargs)
        return self.compiler(type(layer).forward)(layer, *args, **kwargs)

    def _in_line(self, index: int, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
        output = self._forward(index, *self.convention.merged(x, args, kwargs))
        if self._is_plain(index):
            return output
        state = self._euler(index, x, self.convention.state_in(index, output, x, kwargs))
        return self.convention.family.with_parts(output, self.convention.parts(state, kwargs))

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
                f"{self.convention.name(index)} was called where layer {len(self._records)} was expected; a solver "
                "needs the layers of a stack called once each and in order (layers skipped or repeated?)"
            )
        if x is not self._handed:
            raise UnsupportedModelError(self._between(index - 1))
        args, kwargs = self.convention.family.with_shared(args, kwargs, self._shared)
        for value in (*args, *kwargs.values()):
            if isinstance(value, Later):
                raise UnsupportedModelError(value.what)
            if not isinstance(value, _PLAIN):  # most are; looking into them takes long
                for leaf in tree_leaves(value):
                    if isinstance(leaf, Later):
                        raise UnsupportedModelError(leaf.what)
        self._records.append(RecordedCall(self.layers[index], index, args, kwargs, self))
        start = self._start
        assert start is not None
        if self._shared:
            packing = Packing.with_shared(self._shared)
        else:
            packing = self._packings.of(index, start, args, kwargs, sharded=self.sharded)
        if index < len(self.layers) - 1:
            self._handed, self._parts_handed = start, self.convention.parts(start, kwargs)
            if not self._is_seen_by_a_compiler(index + 1):
                what = self._between(index)
                self._parts_handed = tuple(later(part, what, is_state=True) for part in self._parts_handed)
                self._handed = self._parts_handed[0]
            return packing.pack(self._parts_handed, args, kwargs)
        calls = self._records
        self.forget()
        assert self.solver is not None
        return packing.pack(self.convention.parts(self.solver(calls, start), kwargs), args, kwargs)

    def _make_shared(self, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> tuple:
        family = self.convention.family
        if type(family) is Family:
            return ()
        with shadowed(self._zeros.parameters(0, x.device, but=family.shared_modules)):
            return family.shared(self.layers[0], x, args, kwargs)

    def _is_seen_by_a_compiler(self, index: int) -> bool:
        """What the layer is given: it was compiled after the interception."""
        compiled = compiled_call(self.layers[index])
        return compiled is not None and not isinstance(compiled, LayerCall)

    def _between(self, index: int) -> str:
        return (
            f"the model reads or changes the state between layers {index} and {index + 1} of {self.path} (or stops "
            "there: is config.num_hidden_layers smaller than the stack, or early exit on?), so the layers are not one "
            "sequence of steps. Switch off what does it, leave this stack out of the conversion "
            f"(stacks=[...]), or run the model without parallelize{self._packings.unseen}"
        )

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
        parts, args, kwargs = self.convention.split(index, args, kwargs)
        if len(parts) > 1 and [id(part) for part in parts] == [id(part) for part in self._parts_handed]:
            assert self._handed is not None
            return self._handed, args, kwargs
        return self.convention.joined(index, parts), args, kwargs


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
