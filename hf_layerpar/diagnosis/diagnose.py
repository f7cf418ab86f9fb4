"""`diagnose`: what layer-parallel training would do to a model, measured before it is trained."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hf_layerpar.config import Acceleration, Buffers, LayerParallelConfig, OdeSettings, buffer_places, num_buffers
from hf_layerpar.diagnosis.layers import AdjointReader, LayerReader, adjoint_growths
from hf_layerpar.diagnosis.measure import EXACT, Bench, Reference, exact_reference, read_settings, rows_of
from hf_layerpar.diagnosis.predict import Predictor
from hf_layerpar.diagnosis.readings import BufferTrial, Diagnosis, LayerReading, SettingReading
from hf_layerpar.diagnosis.suggest import PROBE, best_trial, proposed_buffers, suggest
from hf_layerpar.errors import ConfigurationError, UnsupportedModelError
from hf_layerpar.ode.convert import borrowed_view
from hf_layerpar.ode.stack import LayerStack
from hf_layerpar.plan.costs import Costs
from hf_layerpar.plan.operators import OPERATORS
from hf_layerpar.plan.step import interval_points
from hf_layerpar.run.calibrate import calibrate
from hf_layerpar.run.layers import kept_streams

ITERATIONS = ((0, 1), (0, 2), (1, 1), (2, 1), (2, 2))
"""Forward and backward iterations that are tried; 0 is an exact sweep."""

ACCELERATED = ((0, 2), (0, 3))
"""Those that are tried with Krylov acceleration too. It doesn't help `identity`."""

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
    buffers: Buffers | None = None,
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
        buffers: layers solved exactly, as of `convert_to_ode`; default: the model's own where it has some or a step
            size other than 1, else the best of those that `proposed_buffers` finds in the readings.
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
            layers = _with_adjoints(bench, _read(model, view.stacks, batches[0]), batches[0])
        part = bench.part(batches[0], min(_CUT, rows))
        by_stack = dict.fromkeys(entries, costs or Costs())
        if costs is None:
            smaller = {} if part is None else bench.entries(part)
            for path, entry in entries.items():
                less = smaller.get(path)
                by_stack[path] = calibrate(entry.calls, entry.x, part=None if less is None else (less.calls, less.x))
            ends = bench.end_bytes(batches[0])
            for path, side in ((next(iter(entries)), "front"), (list(entries)[-1], "tail")):
                own = {name: size for name, size in ends.items() if name.startswith((side, "shared"))}
                by_stack[path] = dataclasses.replace(by_stack[path], **own)
        depths = {path: len(entry.calls) for path, entry in entries.items()}
        shortest = min(depths.values())
        own = view.settings.buffers
        if buffers is None and (any(own) or view.settings.step_size != 1):
            buffers = own
        if buffers is not None:
            buffers = OdeSettings(buffers=buffers).buffers
            buffer_places(buffers, shortest)  # or refuses them
        ranks = min(ranks, shortest)
        note("exact gradients")
        reference = exact_reference(bench, batches[0])
        loss, noise = reference.exact.loss, reference.noise
        noise = None if noise is None else noise / reference.norm
        trials: tuple[BufferTrial, ...] = ()
        if buffers is None:
            proposed = proposed_buffers(layers)
            if len(proposed) > 1:
                trials = tuple(_tried(bench, batches[0], reference, proposed, depths, note))
            buffers = best_trial(trials) if trials else proposed[0]
        configs = _candidates(shortest, buffers, coarsenings)
        micro_batches = [m for m in _MICRO_BATCHES if m == 1 or (part is not None and m <= rows)]
        predictor = Predictor(depths, by_stack, ranks, buffers, micro_batches)
        note(f"predicting {len(configs)} settings")
        pipeline = predictor.fastest(EXACT)
        predictions = {config: predictor.fastest(config) for config in configs}

        bench.buffers = buffers
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
        trials=trials,
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


def _with_adjoints(bench: Bench, layers: Sequence[LayerReading], inputs: Batch) -> tuple[LayerReading, ...]:
    """The readings with what the layers do to the adjoint."""
    readers = [(stack, stack.solver, AdjointReader()) for stack in bench.stacks]
    try:
        for stack, _, reader in readers:
            stack.solver = reader
        with torch.enable_grad():
            growths = adjoint_growths([reader for _, _, reader in readers], bench.loss(inputs))
    finally:
        for stack, solver, _ in readers:
            stack.solver = solver
    return tuple(
        replace(layer, adjoint=growth)
        for layer, growth in zip(layers, (g for own in growths for g in own), strict=True)
    )


def _tried(
    bench: Bench,
    inputs: Batch,
    reference: Reference,
    proposed: Sequence[Buffers],
    depths: Mapping[str, int],
    note: Callable[[str], None],
) -> Iterator[BufferTrial]:
    """What `PROBE` makes of the proposals, as far as it leaves enough intervals around them to be inexact."""
    for buffers in proposed:
        least = PROBE.backward_iterations + 1 + len(buffers) - 2
        grids = (replace(PROBE, coarsening=c) for c in (4, 2))
        config = next((c for c in grids if _fits(c, depths.values(), buffers, least)), None)
        if config is None:
            return
        bench.buffers = buffers
        (reading,) = read_settings(bench, inputs, reference, [config])
        note(f"buffers {buffers}: cosine {reading.cosine:.4f} with {reading.name}")
        yield BufferTrial(buffers=buffers, cosine=reading.cosine)


def _fits(config: LayerParallelConfig, depths: Iterable[int], buffers: Buffers, least: int = 2) -> bool:
    """Whether the grid of `config` has at least so many intervals in stacks of these depths."""
    try:
        points = [interval_points(config, depth, buffers) for depth in depths]
    except ConfigurationError:
        return False
    return min(map(len, points)) > least


def _candidates(depth: int, buffers: Buffers, coarsenings: Sequence[int] | None) -> list[LayerParallelConfig]:
    """Every operator, coarsening and number of iterations for a stack of `depth` layers."""
    inner = depth - num_buffers(buffers)

    def fits(c: int) -> bool:
        return 2 <= c < inner and _fits(replace(PROBE, coarsening=c), [depth], buffers)

    if coarsenings is None:
        coarsenings = [c for c in COARSENINGS if fits(c) and (c == 2 or inner // c >= _LEAST_INTERVALS)]
    for c in coarsenings:
        if not fits(c):
            raise ConfigurationError(
                f"coarsening {c} doesn't fit {inner} layers between the buffers {buffers}; use 2 to {inner - 1}, or "
                "fewer buffers"
            )
    plain: list[tuple[int, int, Acceleration]] = [(*pair, "none") for pair in ITERATIONS]
    accelerated: list[tuple[int, int, Acceleration]] = [(*pair, "krylov") for pair in ACCELERATED]
    return [
        LayerParallelConfig(
            strategy="mgrit",
            coarse_operator=operator,
            coarsening=c,
            forward_iterations=forward,
            backward_iterations=backward,
            acceleration=acceleration,
        )
        for operator in OPERATORS
        for c in coarsenings
        for forward, backward, acceleration in plain + (accelerated if operator != "identity" else [])
    ]


def _with_factors(found: Sequence[SettingReading]) -> dict[LayerParallelConfig, SettingReading]:
    """The readings by their config. What a second iteration shows of an operator and coarsening is given to the
    settings with a single one too."""
    forward: dict[tuple, float | None] = {}
    backward: dict[tuple, float | None] = {}

    def keys(config: LayerParallelConfig) -> tuple[tuple, tuple]:
        key = (config.coarse_operator, config.coarsening, config.acceleration)
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
            backward_factor=backward[backward_key] if reading.backward_factor is None else reading.backward_factor,
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
