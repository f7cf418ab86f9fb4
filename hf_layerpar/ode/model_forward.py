"""The forward of a model that holds stacks: its calls go to a runner, and its layers' calls are a solver's to make.

No model code is rewritten and no module is moved: layers and models get an instance attribute `forward`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_layerpar.compat.torch import CALL, COMPILED_CALL
from hf_layerpar.ode.convention import argument_names, stock_forward
from hf_layerpar.ode.stack import LayerStack

_MODEL_FORWARD = "_hf_layerpar_forward"
FORWARDS = ("forward", CALL, COMPILED_CALL, _MODEL_FORWARD)
"""Attributes that `intercept` puts on modules."""
_PER_LAYER_OUTPUTS = ("output_hidden_states", "output_attentions")

ModelRunner = Callable[["ModelForward", tuple, dict[str, Any]], Any]
"""Maps (what stands for a model's forward, the arguments) to the forward's output; it calls `ModelForward.run`."""


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
        return stock_forward(self.model, self.original)

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
        runner: ModelRunner | None = self.stacks[0].runner
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
        return argument_names(self.model, self.original)

    def named(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments by name."""
        return dict(zip(self.names, args, strict=False)) | kwargs

    def _wants(self, name: str, given: dict[str, Any]) -> bool:
        value = given.get(name)
        # `is not False`: output_hidden_states may be an index, and 0 is one
        config = getattr(self.model, "config", None)
        return bool(getattr(config, name, False)) if value is None else value is not False


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
