"""Interception of a layer list: each layer's call becomes an Euler step, run in line or handed to a solver all at once.

No model code is rewritten and no module is moved. A layer gets an instance attribute `forward`; the model's own loop
calls it as before. Without a solver it evaluates the layer. With one, all layers but the last record their arguments
and hand the state back untouched, and the last one gives the recorded calls to the solver. (So a forward hook that
somebody puts on a single layer sees that layer's output only while no solver is set.)

Shapes: B batch, T tokens, D hidden; a state is `[B, T, D]`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils import output_capturing

from hf_layerpar.config import OdeSettings
from hf_layerpar.errors import UnsupportedModelError
from hf_layerpar.ode.cache import add_stand_in, find_cache, is_splittable
from hf_layerpar.ode.families import LEADING_STATE, family_of


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

    def step(self, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """One Euler step of this layer from `x` `[B, T, D]` with the given arguments (the recorded ones, or slices or
        copies of them), at the layer's own step size. At h = 1 it is the layer's output itself."""
        return self.stack.step(self.index, x, args, kwargs)


Solver = Callable[[Sequence[RecordedCall], Tensor], Tensor]
"""Maps (the calls of all layers of a stack, buffers included; x_0) to x_N."""

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
        given = self.named(args, kwargs)
        cache_asked_for = given.get("use_cache") is not None or given.get("past_key_values") is not None
        if "use_cache" in self.names[len(args) :] and not cache_asked_for:
            kwargs = kwargs | {"use_cache": False}
        reason = next((name for name in _PER_LAYER_OUTPUTS if self._wants(name, given)), None)
        before = [stack.serial_reason for stack in solved]
        for stack in solved:
            stack.serial_reason = stack.serial_reason or reason
        try:
            output = self.stock(*args, **kwargs)
            for stack in solved:
                stack.check_complete()
        finally:
            for stack, earlier in zip(solved, before, strict=True):
                stack.serial_reason = earlier
                stack.forget()
        return output

    @property
    def names(self) -> list[str]:
        return list(inspect.signature(self.stock).parameters)

    def named(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments by name."""
        return dict(zip(self.names, args, strict=False)) | kwargs

    def _wants(self, name: str, given: dict[str, Any]) -> bool:
        value = given.get(name)
        # `is not False`: output_hidden_states may be an index, and 0 is one
        config = getattr(self.model, "config", None)
        return bool(getattr(config, name, False)) if value is None else value is not False


_MODEL_FORWARD = "_hf_layerpar_forward"
FORWARDS = ("forward", _MODEL_FORWARD)
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
    """

    def __init__(self, path: str, layers: Sequence[nn.Module], settings: OdeSettings) -> None:
        self.path = path
        self.layers = list(layers)
        self.settings = settings
        opening, closing = settings.buffers
        inner = len(self.layers) - opening - closing
        self.step_sizes = (1.0,) * opening + (settings.step_size,) * inner + (1.0,) * closing
        self.solver: Solver | None = None
        self.runner: ModelRunner | None = None
        self.foreign: frozenset[int] = frozenset()
        self._evaluating = False
        self.trains: bool | None = None
        self.serial_reason: str | None = None
        self._family = family_of(self.layers[0])
        self._records: list[RecordedCall] = []
        self._start: Tensor | None = None
        self._shared: tuple = ()
        # forwards that others put on the instances before us (accelerate's device hooks)
        self._originals = [vars(layer).get("forward") for layer in self.layers]

    def install(self) -> None:
        """Put a `LayerForward` on every layer."""
        for index, layer in enumerate(self.layers):
            layer.forward = LayerForward(self, index)

    @property
    def sharded(self) -> bool:
        """Some layers live on other ranks."""
        return bool(self.foreign)

    @property
    def needs_recompute(self) -> bool:
        """Gradient checkpointing is on for the layers, so a solver must recompute them in its backward."""
        return any(layer.training and getattr(layer, "gradient_checkpointing", False) for layer in self.layers)

    def stock_forward(self, index: int) -> Callable[..., Any]:
        """The layer's forward as it was before the interception."""
        layer = self.layers[index]
        return self._originals[index] or type(layer).forward.__get__(layer)

    def step(self, index: int, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """One Euler step of layer `index` from `x` `[B, T, D]`, without gradient checkpointing (the solver's job)."""
        before, self._evaluating = self._evaluating, True
        try:
            with _without_checkpointing(self.layers[index]):
                output = self.layers[index](x, *args, **kwargs)  # its hooks run
        finally:
            self._evaluating = before
        state = self._family.state(output)
        if not isinstance(state, Tensor):
            raise UnsupportedModelError(
                f"{self._name(index)} returns a {type(output).__name__}, not its state alone; this layer class can't "
                "be solved layer-parallel before hf_layerpar.ode.families knows its output. It works without a solver"
            )
        return self._euler(index, x, state)

    def call(self, index: int, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What the model's loop gets for calling layer `index`."""
        if self._evaluating:
            return self.stock_forward(index)(*args, **kwargs)
        x, args, kwargs = self._split_state(index, args, kwargs)
        if self.solver is None:
            return self._in_line(index, x, args, kwargs)
        cache = find_cache((*args, *kwargs.values()))
        reason = self._needs_serial(cache)
        if reason is None:
            return self._record(index, x, args, kwargs)
        if self.sharded:
            raise UnsupportedModelError(
                f"{reason} needs every layer's value on this rank, but {self.path} is spread over lp ranks. Call "
                "without it (use_cache=False, or a DynamicCache under torch.no_grad(); no output_hidden_states or "
                "output_attentions), or load the saved checkpoint without parallelize"
            )
        return self._in_line(index, x, args, kwargs)

    def check_complete(self) -> None:
        """Raises UnsupportedModelError when the loop stopped before the last layer, which would have run the solver."""
        if self._records:
            raise UnsupportedModelError(
                f"the model called {len(self._records)} of the {len(self.layers)} layers of {self.path}; a solver "
                "needs all of them (is config.num_hidden_layers smaller than the stack, or early exit on?)"
            )

    def forget(self) -> None:
        """Drop what an unfinished forward recorded."""
        self._records, self._start, self._shared = [], None, ()

    def _in_line(self, index: int, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
        output = self.stock_forward(index)(x, *args, **kwargs)
        if self._is_plain(index):
            return output
        family = self._family
        if isinstance(output, tuple) and not isinstance(family.state(output), Tensor):
            family = LEADING_STATE
        return family.with_state(output, self._euler(index, x, family.state(output)))

    def _record(self, index: int, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
        if index == 0:
            self.forget()
            self._start = x
            self._shared = self._family.shared(self.layers[0], x, args, kwargs)
        if index != len(self._records):
            raise UnsupportedModelError(
                f"{self._name(index)} was called where layer {len(self._records)} was expected; a solver needs the "
                "layers of a stack called once each and in order (layers skipped or repeated?)"
            )
        if x is not self._start:
            raise UnsupportedModelError(
                f"the model changes the state between layers {index - 1} and {index} of {self.path}, so the layers are "
                "not one sequence of steps. Switch off what changes it, or run the model without parallelize"
            )
        args = self._family.with_shared(args, self._shared)
        self._records.append(RecordedCall(self.layers[index], index, args, kwargs, self))
        if index < len(self.layers) - 1:
            return self._family.pack(x, self._shared)
        calls, shared = self._records, self._shared
        self.forget()
        assert self.solver is not None
        return self._family.pack(self.solver(calls, x), shared)

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
        collecting = output_capturing._active_collector.get()
        if collecting:
            return f"output_{next(iter(collecting))}"
        return self.serial_reason

    def _split_state(self, index: int, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, tuple, dict[str, Any]]:
        if args:
            return args[0], args[1:], kwargs
        name = next(iter(inspect.signature(self.stock_forward(index)).parameters))
        return kwargs[name], (), {key: value for key, value in kwargs.items() if key != name}

    def _name(self, index: int) -> str:
        return f"{self.path}.{index} ({type(self.layers[index]).__name__})"


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
        if isinstance(module, PreTrainedModel):
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
