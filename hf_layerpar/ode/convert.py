"""`convert_to_ode`: read a HuggingFace model as Euler steps of an ODE, keeping its class, keys and behaviour."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from torch import nn
from transformers import PreTrainedModel

from hf_layerpar.config import (
    CONFIG_KEY,
    MOST_STEPS,
    Buffers,
    Form,
    Interpolation,
    OdeSettings,
    buffer_places,
    checks_of,
    names,
    num_buffers,
    one_of,
    optional,
    whole,
)
from hf_layerpar.errors import ConfigurationError, UnsupportedModelError
from hf_layerpar.ode import fold
from hf_layerpar.ode.families import check_supported, find_stacks
from hf_layerpar.ode.model_forward import FORWARDS, intercept
from hf_layerpar.ode.stack import LayerStack

_VIEW = "_hf_layerpar_view"

Model = TypeVar("Model", bound=nn.Module)


@dataclass(eq=False)
class OdeView:
    """What `convert_to_ode` made of a model: its settings and its stacks, in the order of `named_modules()`.

    Kept on the model itself, so a deepcopy of the model has a view of its own layers. load: of a model whose layers are
    on the meta device, what gives those their weights that are still there (`hf_layerpar.loading`).
    """

    settings: OdeSettings
    stacks: tuple[LayerStack, ...]
    load: Callable[[], None] | None = None


def ode_view(model: nn.Module) -> OdeView:
    """The view of a converted model, also through wrappers (PEFT, DistributedDataParallel, torch.compile).

    Raises:
        UnsupportedModelError: the model isn't converted.
    """
    view = _find_view(model)
    if view is None:
        raise UnsupportedModelError(f"{type(model).__name__} is not converted; call convert_to_ode(model) first")
    return view


def convert_to_ode(
    model: Model,
    step_size: float | None = None,
    num_steps: int | None = None,
    form: Form | Literal["auto"] = "auto",
    interpolation: Interpolation | None = None,
    buffers: Buffers | None = None,
    stacks: Sequence[str] | None = None,
) -> Model:
    """Turn every layer of a model's stacks into an Euler step of size h. At h = 1 nothing it computes changes.

    Args:
        model: a transformers model, or a PEFT model around one. Its layers must map a state `[B, T, D]` to a state of
            the same shape. Or any other module with such layers (diffusers' transformers): at step size 1 and in the
            depth that it has.
        step_size: h of the inner steps, in (0, 1]; default 1.
        num_steps: inner steps of every stack, buffers not counted; default: layers / step_size, which keeps the final
            time. Another number than the stack has builds a deeper or shallower model from interpolated weights.
        form: "euler", x + h (layer(x) - x), or "split", h on every residual branch inside the layer (pre-LN layers
            only, folds into a stock checkpoint); "auto" takes "split" where all layers allow it.
        interpolation: weights of a refined stack, "constant" (layers repeated; the default) or "linear".
        buffers: layers of every stack that stay as they are: (open, close), the first and the last ones, or (open,
            places of layers between, close), as in (2, 11, 2); places in `model`. Default (0, 0).
        stacks: names of the layer lists to take (`named_modules()` has them; the last parts are enough), such as
            ["language_model.layers"] of a vision-language model; default: all that are found. The others stay as they
            are, and on lp ranks belong to what is outside the layers.

    A model whose config carries settings of an earlier conversion (a checkpoint of ours) gets those back; arguments may
    repeat them but not contradict them.

    Returns:
        The same object where no stack changes its depth, else a new model of the same class, `model` being left alone.

    Raises:
        ConfigurationError: a value out of range, a fractional number of steps, or a contradiction of stored settings.
        UnsupportedModelError: no stack, layerdrop, a model already converted, or a form that a layer doesn't have.
    """
    base = _hf_model(model)
    view = _find_view(model)
    if view is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} is already converted ({view.settings}); ode_view(model) gives its stacks. To use "
            "other settings, convert a model loaded anew"
        )
    num_steps = optional(whole(1, MOST_STEPS))("num_steps", num_steps)
    form = one_of(Literal["auto", "euler", "split"])("form", form)
    check_supported(base)
    stored = _stored(base)
    chosen = optional(names)("stacks", stacks) if stored is None else OdeSettings.from_dict(stored).stacks
    found = find_stacks(base, chosen)
    depths = {path: len(layers) for path, layers in found.items()}
    if stored is None:
        settings = OdeSettings(
            step_size=1.0 if step_size is None else step_size,
            form=_choose_form(found, form),
            interpolation="constant" if interpolation is None else interpolation,
            buffers=(0, 0) if buffers is None else buffers,
            stacks=chosen,
        )
        steps = {path: _inner_steps(path, depth, settings, num_steps) for path, depth in depths.items()}
        _check_plain(base, found, steps, settings)
    else:
        settings = OdeSettings.from_dict(stored)
        asked = {"step_size": step_size, "form": None if form == "auto" else form, "interpolation": interpolation}
        _check_agreement(settings, asked | {"buffers": buffers, "stacks": stacks})
        steps = {path: depth - num_buffers(settings.buffers) for path, depth in depths.items()}
        if num_steps is not None and any(count != num_steps for count in steps.values()):
            raise ConfigurationError(
                f"num_steps={num_steps} contradicts the checkpoint, whose stacks have {steps} inner steps; leave "
                "num_steps out, or refine the original model"
            )
    if any(steps[path] != depth - num_buffers(settings.buffers) for path, depth in depths.items()):
        # imports much of transformers that plain conversions don't need
        from hf_layerpar.ode.refine import refined, refined_buffers

        if base is not model:
            raise UnsupportedModelError(
                f"the adapters of a {type(model).__name__} belong to its {depths} layers, so its depth can't change; "
                "refine the base model with convert_to_ode first, then wrap it"
            )
        moved = {path: refined_buffers(depth, steps[path], settings) for path, depth in depths.items()}
        if len(set(moved.values())) > 1:
            raise ConfigurationError(
                f"buffers={settings.buffers} have other places in each of the refined stacks, {moved}; use buffers at "
                "the ends alone, or a step_size without num_steps"
            )
        assert isinstance(base, PreTrainedModel)  # others were refused above
        base = refined(base, steps, settings)
        settings = dataclasses.replace(settings, buffers=next(iter(moved.values())))
        return _attach(base, base, settings)  # pyright: ignore[reportReturnType]
    return _attach(model, base, settings)


@contextmanager
def borrowed_view(model: nn.Module) -> Iterator[OdeView]:
    """The view of a converted model, or of any other one at step size 1 that lasts only inside.

    Afterwards every module has the `forward` that it came with, whatever was put on it inside.

    Raises:
        UnsupportedModelError: as `convert_to_ode`; or the model's config carries settings that were not applied.
    """
    before = {module: {k: v for k, v in vars(module).items() if k in FORWARDS} for module in model.modules()}
    view = _find_view(model)
    if view is None:
        base = _hf_model(model)
        check_supported(base)
        if _stored(base) is not None:
            raise UnsupportedModelError(
                f"the config of this {type(base).__name__} carries settings of an earlier conversion, but the model "
                "isn't converted; call convert_to_ode(model), or load it with hf_layerpar.from_pretrained"
            )
        settings = OdeSettings()
        view = OdeView(
            settings, tuple(LayerStack(path, layers, settings) for path, layers in find_stacks(base).items())
        )
        intercept(base, view.stacks)
    try:
        yield view
    finally:
        for module, kept in before.items():
            for name in FORWARDS:
                vars(module).pop(name, None)
            vars(module).update(kept)


def _attach(model: Model, base: nn.Module, settings: OdeSettings) -> Model:
    from hf_layerpar.ode.saving import attach_saving  # imported here: what is saved is read off a view

    unfolded = dataclasses.replace(settings, folded=False)
    stacks = tuple(LayerStack(path, layers, unfolded) for path, layers in find_stacks(base, settings.stacks).items())
    if settings.form == "split":
        for stack in stacks:
            for layer, step_size in zip(stack.layers, stack.step_sizes, strict=True):
                fold.install_scaling(layer, step_size)
    if settings.folded:
        fold.unfold_(base)
    intercept(base, stacks)
    setattr(base, _VIEW, OdeView(unfolded, stacks))
    if isinstance(base, PreTrainedModel):
        setattr(base.config, CONFIG_KEY, unfolded.to_dict())
        attach_saving(base)
    return model


def _find_view(model: nn.Module) -> OdeView | None:
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return next((vars(module)[_VIEW] for module in modules if _VIEW in vars(module)), None)


def _hf_model(model: nn.Module) -> nn.Module:
    """The transformers model in `model`, or itself where there is none."""
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"convert_to_ode needs a model (a torch.nn.Module); got {type(model).__name__}")
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)


def _stored(base: nn.Module) -> dict[str, Any] | None:
    """The settings of an earlier conversion that a model was loaded with."""
    return getattr(base.config, CONFIG_KEY, None) if isinstance(base, PreTrainedModel) else None


def _check_plain(
    base: nn.Module, stacks: Mapping[str, Sequence[nn.Module]], steps: Mapping[str, int], settings: OdeSettings
) -> None:
    """Raises UnsupportedModelError for what only transformers' models can do, or only layers that are called once."""
    deeper = [path for path, layers in stacks.items() if steps[path] != len(layers) - num_buffers(settings.buffers)]
    repeated = [path for path in deeper if len(set(stacks[path])) < len(stacks[path])]
    if repeated:
        raise UnsupportedModelError(
            f"{repeated[0]} of {type(base).__name__} calls its layers again and again, so more steps need no other "
            "layers: load the model with a larger num_hidden_layers in its config, and give num_steps as many"
        )
    if isinstance(base, PreTrainedModel):
        return
    if deeper:
        depths = {path: len(layers) for path, layers in stacks.items()}
        raise UnsupportedModelError(
            f"{type(base).__name__} is no transformers model, so it isn't known how one of another depth than {depths} "
            "is built; leave step_size and num_steps out"
        )
    if settings.step_size != 1:
        raise UnsupportedModelError(
            f"step_size={settings.step_size} of a {type(base).__name__}, which is no transformers model: its "
            "checkpoints have no place for a step size, so they would load as another network; leave step_size out"
        )


def _choose_form(stacks: Mapping[str, Sequence[nn.Module]], form: str) -> Form:
    without = [
        f"{path}.0 ({type(layer).__name__})"
        for path, layers in stacks.items()
        if (layer := next((layer for layer in layers if not fold.has_split_form(layer)), None)) is not None
    ]
    if form == "split" and without:
        raise UnsupportedModelError(
            f"form='split' needs layers known to be pre-LN, but {', '.join(without)} is not; use form='euler'"
        )
    if form == "auto":
        return "euler" if without else "split"
    return form  # pyright: ignore[reportReturnType]  # OdeSettings refuses unknown values


def _inner_steps(path: str, depth: int, settings: OdeSettings, num_steps: int | None) -> int:
    try:
        inner = depth - len(buffer_places(settings.buffers, depth))
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from None
    if num_steps is not None:
        return num_steps
    exact = inner / settings.step_size
    if exact > MOST_STEPS:
        raise ConfigurationError(
            f"{inner} inner layers of {path} at step_size={settings.step_size} make {exact:g} steps, and the limit is "
            f"{MOST_STEPS}; choose a larger step_size, or give num_steps"
        )
    steps = round(exact)
    if abs(exact - steps) > 1e-6 * exact:
        raise ConfigurationError(
            f"{inner} inner layers of {path} at step_size={settings.step_size} make {exact:g} steps, not a whole "
            f"number; choose a step_size that divides {inner}, or give num_steps"
        )
    return steps


def _check_agreement(settings: OdeSettings, asked: dict[str, object]) -> None:
    for name, value in asked.items():
        stored = getattr(settings, name)
        if value is not None and checks_of(OdeSettings)[name](name, value) != stored:
            raise ConfigurationError(
                f"{name}={value!r} contradicts {name}={stored!r}, with which this checkpoint was made "
                f"(config.{CONFIG_KEY}); leave {name} out, or convert the original model"
            )
