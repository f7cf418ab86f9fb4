"""`diagnose`: what layer-parallel training would do to a model, measured before it is trained."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hf_layerpar.config import LayerParallelConfig, OdeSettings
from hf_layerpar.diagnosis.layers import LayerReader
from hf_layerpar.diagnosis.measure import EXACT, Bench, exact_reference, read_settings, rows_of
from hf_layerpar.diagnosis.predict import Predictor
from hf_layerpar.diagnosis.readings import Diagnosis, LayerReading, SettingReading
from hf_layerpar.diagnosis.suggest import suggest, suggest_buffers
from hf_layerpar.errors import ConfigurationError, UnsupportedModelError
from hf_layerpar.ode.convert import borrowed_view
from hf_layerpar.ode.stack import LayerStack
from hf_layerpar.plan.costs import Costs
from hf_layerpar.plan.operators import OPERATORS
from hf_layerpar.run.calibrate import calibrate
from hf_layerpar.run.layers import kept_streams

ITERATIONS = ((0, 1), (0, 2), (1, 1), (2, 1), (2, 2))
"""Forward and backward iterations that are tried; 0 is an exact sweep."""

COARSENINGS = (2, 4, 8)
_LEAST_INTERVALS = 4  # with fewer, two iterations are the serial chain or next to it
_MICRO_BATCHES = (1, 2, 4, 8)
_CUT = 4  # micro-batches at which it is read off what a cut costs

Batch = Mapping[str, Any]


def diagnose(
    model: nn.Module,
    batches: Batch | Sequence[Batch],
    *,
    ranks: int = 8,
    buffers: tuple[int, int] | None = None,
    coarsenings: Sequence[int] | None = None,
    costs: Costs | None = None,
    progress: Callable[[str], None] | None = None,
) -> Diagnosis:
    """Reads a model's layers, measures every setting of the solver against the exact gradient, and says what to use.

    The first batch serves all readings; the setting about to be suggested is then confirmed on the others. Use batches
    of the size and length that a training step will see, with labels, and `model.train()` if it has dropout. The model
    comes back as it was: no gradients, no moved random stream; one that isn't converted is read at step size 1.

    Args:
        model: in one process and not spread over ranks (diagnose first, then parallelize), on its device.
        batches: what the model's forward takes, one or several.
        ranks: lp ranks to predict for, at most the layers of the shortest stack.
        buffers: open and close layers solved exactly; default: the model's own where it has some or a step size other
            than 1, else those that `suggest_buffers` finds.
        coarsenings: default: those of 2, 4 and 8 that leave four intervals, and 2.
        costs: of a layer for the whole batch; measured by default, for each stack, with messages that cost nothing.
        progress: told what is being done.

    Raises:
        UnsupportedModelError: no stack can be read, or the model is spread over ranks.
        ConfigurationError: no batch, no loss, nothing trainable in the layers, or a number out of range.
    """
    began = time.perf_counter()
    # plain dicts, as pytrees take a tokenizer's BatchEncoding for a leaf
    batches = [dict(batch) for batch in ([batches] if isinstance(batches, Mapping) else batches)]
    if not batches:
        raise ConfigurationError("0 batches were given; diagnose needs at least one, with labels")
    if ranks < 1:
        raise ConfigurationError(f"ranks={ranks} must be at least 1")
    rows = rows_of(model, batches[0])
    note = progress or (lambda text: None)
    with borrowed_view(model) as view:
        for stack in view.stacks:
            if stack.sharded:
                raise UnsupportedModelError(
                    f"{stack.path} is spread over lp ranks; diagnose needs all layers in one process: call it before "
                    "parallelize"
                )
        bench = Bench(model, view.stacks)
        entries = bench.entries(batches[0])
        note("reading the layers")
        with kept_streams(bench.device):
            layers = _read(model, view.stacks, batches[0])
        part = bench.part(batches[0], min(_CUT, rows))
        by_stack = dict.fromkeys(entries, costs or Costs())
        if costs is None:
            smaller = {} if part is None else bench.entries(part)
            for path, entry in entries.items():
                less = smaller.get(path)
                by_stack[path] = calibrate(entry.calls, entry.x, part=None if less is None else (less.calls, less.x))
        if buffers is None:
            own = view.settings.buffers
            fixed = any(own) or view.settings.step_size != 1
            buffers = own if fixed else suggest_buffers(layers)
        buffers = OdeSettings(buffers=buffers).buffers
        depths = {path: len(entry.calls) for path, entry in entries.items()}
        shortest = min(depths.values())
        if sum(buffers) >= shortest:
            raise ConfigurationError(
                f"buffers={buffers} leave {shortest - sum(buffers)} of {shortest} layers to MGRIT; use fewer buffers"
            )
        ranks = min(ranks, shortest)
        configs = _candidates(shortest - sum(buffers), coarsenings)
        micro_batches = [m for m in _MICRO_BATCHES if m == 1 or (part is not None and m <= rows)]
        predictor = Predictor(depths, by_stack, ranks, buffers, micro_batches)
        note(f"predicting {len(configs)} settings")
        pipeline = predictor.fastest(EXACT)
        predictions = {config: predictor.fastest(config) for config in configs}

        bench.buffers = buffers
        note("exact gradients")
        reference = exact_reference(bench, batches[0])
        loss, noise = reference.exact.loss, reference.noise
        noise = None if noise is None else noise / reference.norm
        found = []
        for reading in read_settings(bench, batches[0], reference, configs):
            note(f"{reading.name}: cosine {reading.cosine:.4f}")
            found.append(reading)
        settings = _with_factors(found)
        del reference  # its gradient
        while True:  # until the setting that the verdict rests on was measured on every batch
            suggestion = suggest(list(settings.values()), predictions, pipeline, layers, buffers, ranks)
            best = suggestion.best
            if best is None or best.batches == len(batches):
                break
            note(f"{best.name}: the other batches")
            settings[best.config] = _confirmed(bench, batches[1:], best)
    return Diagnosis(
        model=type(model).__name__,
        training=model.training,
        rows=rows,
        tokens=next(iter(entries.values())).x.shape[1],
        batches=len(batches),
        ranks=ranks,
        buffers=buffers,
        loss=loss,
        noise=noise,
        layers=layers,
        settings=tuple(settings.values()),
        predictions=tuple(predictions[config] for config in configs),
        pipeline=pipeline,
        costs=by_stack,
        suggestion=suggestion,
        seconds=time.perf_counter() - began,
    )


def _read(model: nn.Module, stacks: Sequence[LayerStack], inputs: Batch) -> tuple[LayerReading, ...]:
    readers = [(stack, stack.solver, LayerReader(stack)) for stack in stacks]
    try:
        for stack, _, reader in readers:
            stack.solver = reader
        with torch.no_grad():
            model(**inputs)
    finally:
        for stack, solver, _ in readers:
            stack.solver = solver
    return tuple(reading for _, _, reader in readers for reading in reader.readings)


def _candidates(inner: int, coarsenings: Sequence[int] | None) -> list[LayerParallelConfig]:
    """Every operator, coarsening and number of iterations for `inner` steps between the buffers."""
    if coarsenings is None:
        coarsenings = [c for c in COARSENINGS if inner // c >= _LEAST_INTERVALS or (c == 2 and inner > c)]
    for c in coarsenings:
        if not 2 <= c < inner:
            raise ConfigurationError(
                f"coarsening {c} doesn't fit {inner} layers between the buffers; use 2 to {inner - 1}"
            )
    return [
        LayerParallelConfig(
            strategy="mgrit",
            coarse_operator=operator,
            coarsening=c,
            forward_iterations=forward,
            backward_iterations=backward,
        )
        for operator in OPERATORS
        for c in coarsenings
        for forward, backward in ITERATIONS
    ]


def _with_factors(found: Sequence[SettingReading]) -> dict[LayerParallelConfig, SettingReading]:
    """The readings by their config. What a second iteration shows of an operator and coarsening is given to the
    settings with a single one too."""
    forward: dict[tuple, float | None] = {}
    backward: dict[tuple, float | None] = {}

    def keys(config: LayerParallelConfig) -> tuple[tuple, tuple]:
        key = (config.coarse_operator, config.coarsening)
        return key, (*key, config.forward_iterations > 0)  # the adjoint of exact states may converge otherwise

    for reading in found:
        forward_key, backward_key = keys(reading.config)
        if reading.forward_factor is not None:
            forward[forward_key] = reading.forward_factor
        if reading.backward_factor is not None:
            backward[backward_key] = reading.backward_factor
    by_config = {}
    for reading in found:
        forward_key, backward_key = keys(reading.config)
        by_config[reading.config] = replace(
            reading,
            forward_factor=forward[forward_key] if reading.config.forward_iterations else None,
            backward_factor=backward[backward_key],
        )
    return by_config


def _confirmed(bench: Bench, batches: Sequence[Batch], reading: SettingReading) -> SettingReading:
    """The worst of a setting's reading and those of more batches."""
    for inputs in batches:
        reference = exact_reference(bench, inputs)
        (other,) = read_settings(bench, inputs, reference, [reading.config])
        reading = _worse(reading, other)
    return reading


def _worse(a: SettingReading, b: SettingReading) -> SettingReading:
    """Of each figure the worse; the convergence factors stay those of the first."""
    noises = [r.bias_to_noise for r in (a, b) if r.bias_to_noise is not None]
    return replace(
        a,
        state_error=_largest(a.state_error, b.state_error),
        loss_error=_largest(a.loss_error, b.loss_error),
        cosine=-_largest(-a.cosine, -b.cosine),
        norm_ratio=max(a.norm_ratio, b.norm_ratio, key=lambda r: abs(r - 1.0)),
        bias_to_noise=_largest(*noises) if noises else None,
        batches=a.batches + b.batches,
    )


def _largest(*values: float) -> float:
    """A value that is no number counts as the largest."""
    return max(values, key=lambda value: math.inf if math.isnan(value) else value)
