"""Forwards whose ends (embeddings, head, loss) are shared out: each lp rank computes them for its rows of the batch.

The loss is that of the whole batch, alike on all ranks, and `.grad` of every parameter is what replicated ends give, to
rounding. What differs:

- Batched outputs (logits) have the own rows only. Losses that the caller makes from them are a rank's share.
- With dropout in the ends other masks are drawn than with replicated ends (and so in the layers behind them).
- Gradients of the ends are summed over the lp ranks in the backward, as in data parallelism.

`sliced_ends=True` asks for it, and it is done for a forward with gradient that is given labels and at least one row for
each of several lp ranks. Others compute replicated ends, as do batches whose slices the layers' arguments don't fit: a
mask on one rank and none on another (flash attention with padding), or tables with as many rows as a slice (DeBERTa
with one row a rank). The ranks decide that together. A loss that can't be put together from slices is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.utils.generic import find_labels

from hf_layerpar.errors import ConfigurationError, UnsupportedModelError
from hf_layerpar.ode.families import shared_modules
from hf_layerpar.ode.stack import LayerStack
from hf_layerpar.parallel.communicator import Communicator
from hf_layerpar.parallel.ends import CannotSlice, Slices, summed_gradients
from hf_layerpar.parallel.engine import Settings
from hf_layerpar.parallel.loss_terms import LossTerms


class SlicedEnds:
    """The `runner` of stacks that are solved over several lp ranks."""

    def __init__(self, communicator: Communicator, stacks: Sequence[LayerStack], settings: Settings) -> None:
        self.communicator, self.stacks, self.settings = communicator, tuple(stacks), settings

    def __call__(self, model: PreTrainedModel, stock: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """The output of the model's stock forward, with sliced ends where they are asked for and can be had.

        Raises:
            ConfigurationError: an input has another number of rows than the labels, or the ends couple rows.
            UnsupportedModelError: the loss, or a layer argument, can't be put together from slices.
            RankMismatchError: the lp ranks were given different inputs.
        """
        batch_size = self._rows_to_slice(model, stock, args, kwargs)
        if batch_size is None:
            return stock(*args, **kwargs)
        device = next(model.parameters()).device
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        facts = {
            "sliced ends of a batch": batch_size,
            "inputs": [(tuple(t.shape), str(t.dtype), t.requires_grad) for t in tensors],
        }
        self.communicator.agree(facts, device)
        given = _by_name(stock, args, kwargs)
        _check_rows(given, batch_size)
        modules = list(self._end_modules(model))
        _refuse_coupled_rows(modules)
        # one draw from the main stream per forward keeps the lp ranks' streams in step
        slices = Slices(self.communicator, batch_size, seed=int(torch.randint(2**62, (), dtype=torch.int64)))
        try:
            with _explicit_masks(_has_padding(given)):
                return self._sliced(slices, modules, stock, args, kwargs, device)
        except CannotSlice:
            return stock(*args, **kwargs)

    def _rows_to_slice(
        self, model: PreTrainedModel, stock: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
    ) -> int | None:
        """The batch size of a forward whose ends are to be sliced."""
        if not (self.settings.next_config.sliced_ends and torch.is_grad_enabled()):
            return None
        given = _by_name(stock, args, kwargs)
        for name in find_labels(type(model)):
            labels = given.get(name)
            if labels is None:
                continue
            if not isinstance(labels, Tensor) or labels.ndim == 0:
                raise ConfigurationError(
                    f"sliced_ends=True can't cut {name}, a {type(labels).__name__}, into the rows of each lp rank; "
                    "give a tensor with the batch as its first dimension, or use sliced_ends=False"
                )
            return len(labels) if len(labels) >= self.communicator.size else None
        return None

    def _sliced(
        self,
        slices: Slices,
        modules: list[nn.Module],
        stock: Callable[..., Any],
        args: tuple,
        kwargs: dict[str, Any],
        device: torch.device,
    ) -> Any:
        batch_size = sum(slices.counts)

        def cut(leaf: Any) -> Any:
            has_rows = isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == batch_size
            return slices.cut(leaf) if has_rows else leaf

        with (
            slices.random_stream(device),
            summed_gradients(modules, self.communicator),
            LossTerms() as terms,
            self._solving(slices, terms),
        ):
            output = stock(*tree_map(cut, args), **tree_map(cut, kwargs))
        loss = output[0] if isinstance(output, tuple) else output.get("loss")
        if not isinstance(loss, Tensor) or loss.ndim:
            raise UnsupportedModelError(
                f"sliced_ends=True needs the model's loss, a scalar, but its forward returned a {type(loss).__name__} "
                "for the labels given; give it all labels that its loss needs, or use sliced_ends=False"
            )
        counted = kwargs.get("num_items_in_batch") is not None
        loss = terms.whole(loss, self.communicator, sums_are_divided=counted)
        if isinstance(output, tuple):
            return (loss, *output[1:])
        output["loss"] = loss
        return output

    @contextmanager
    def _solving(self, slices: Slices, terms: LossTerms) -> Iterator[None]:
        """The stacks solve the whole batch; models inside the one that runs are left as they are."""

        def solve(solver: Any, calls: Any, x: Tensor) -> Tensor:
            with terms.suspended():
                return slices.solve(solver, calls, x)

        before = [(stack, stack.solver) for stack in self.stacks]
        for stack, solver in before:
            stack.solver, stack.runner = partial(solve, solver), None
        try:
            yield
        finally:
            for stack, solver in before:
                stack.solver, stack.runner = solver, self

    def _end_modules(self, module: nn.Module) -> Iterator[nn.Module]:
        """The modules outside the layers, and those inside that all ranks keep."""
        layers = {id(layer) for stack in self.stacks for layer in stack.layers}
        ahead = [module]
        while ahead:
            module = ahead.pop()
            if id(module) in layers:
                ahead += [module.get_submodule(name) for name in shared_modules(module)]
            else:
                yield module
                ahead += module.children()


def _by_name(stock: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(signature(stock).parameters, args, strict=False)) | kwargs


def _check_rows(given: dict[str, Any], batch_size: int) -> None:
    for name, value in given.items():
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) not in (1, batch_size):
                raise ConfigurationError(
                    f"sliced_ends=True can't cut {name} of shape {tuple(leaf.shape)}: its first dimension is neither 1 "
                    f"nor the {batch_size} rows of the labels; use sliced_ends=False"
                )


def _refuse_coupled_rows(modules: Sequence[nn.Module]) -> None:
    for module in modules:
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise ConfigurationError(
                f"sliced_ends=True with a {type(module).__name__} outside the layers: its statistics would be those of "
                "a slice; use sliced_ends=False, or put it into evaluation mode"
            )


def _has_padding(given: dict[str, Any]) -> bool:
    """Whether some mask `[B, T]` among the inputs leaves something out."""
    masks = [value for name, value in given.items() if "mask" in name and isinstance(value, Tensor) and value.ndim == 2]
    return not all(bool(mask.all()) for mask in masks)


@contextmanager
def _explicit_masks(wanted: bool) -> Iterator[None]:
    """Attention masks are made also for slices without padding, where transformers would leave them out: the layers
    solve the whole batch, and elsewhere in it is some."""
    if not wanted:
        yield
        return
    here = ALL_MASK_ATTENTION_FUNCTIONS._local_mapping  # the instance's own entries go before the global ones
    before = dict(here)
    here.update({name: partial(_explicit_mask, make) for name, make in ALL_MASK_ATTENTION_FUNCTIONS.items()})
    try:
        yield
    finally:
        here.clear()
        here.update(before)


def _explicit_mask(make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if kwargs.get("attention_mask") is not None:
        kwargs |= {name: False for name in kwargs if name.startswith("allow_is_")}
    return make(*args, **kwargs)
