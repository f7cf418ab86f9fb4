"""Solves a stack's forward and backward over the lp ranks, as one autograd node."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.mgrit.ladder import exact_settings
from hf_layerpar.mgrit.plan import Direction, Plan
from hf_layerpar.mgrit.strategies import build_plan
from hf_layerpar.parallel.communicator import Communicator
from hf_layerpar.parallel.deferral import make_deferrable
from hf_layerpar.parallel.executor import RankPart, execute
from hf_layerpar.parallel.fits import Key, RunningFits
from hf_layerpar.parallel.increments import Increments
from hf_layerpar.parallel.program import LayerCall, Program
from hf_layerpar.parallel.runs import joints
from hf_layerpar.parallel.stackable import Kinds, fingerprint, obstacle
from hf_layerpar.parallel.stacked import StackedProgram


@dataclass(frozen=True)
class SweepReport:
    """What one sweep measured.

    residuals: C-point residual norm ||r|| after each iteration, over all lp ranks (empty for an exact sweep).
    convergence_factors: ||r^(k+1)|| / ||r^(k)|| (arXiv 2601.09026, section 4); above 1 the sweep diverges.
    seconds, waited: wall time of the solve on this rank, and the part of it spent waiting for messages.
    penalty: the increment penalty that the forward adds to the loss, alpha included; None where it is off.
    stacked: independent layers were evaluated together (the setting `stacked`, where the layers allow it).
    """

    mode: Literal["exact", "mgrit"]
    iterations: int
    residuals: tuple[float, ...]
    seconds: float
    waited: float
    penalty: float | None = None
    stacked: bool = False

    @property
    def convergence_factors(self) -> tuple[float, ...]:
        return tuple(b / a if a else 0.0 for a, b in pairwise(self.residuals))


class Settings(Protocol):
    @property
    def next_config(self) -> LayerParallelConfig: ...

    @property
    def loss_scale(self) -> float: ...


class StackState(Protocol):
    @property
    def needs_recompute(self) -> bool: ...

    @property
    def cached_tokens(self) -> int | None: ...


class StackEngine:
    """The solver of one stack; called in the place of the layer loop with every layer's recorded call.

    `settings.next_config` is asked for the settings of each solve and `settings.loss_scale` for what its loss will be
    multiplied by, `stack.needs_recompute` for whether graphs are recomputed in the backward (gradient checkpointing),
    `stack.cached_tokens` for whether (not None) layers add to a KV cache.
    fits: those of the fitted coarse operators. learning: whether training solves add to them.
    """

    def __init__(
        self,
        communicator: Communicator,
        owner: Sequence[int],
        buffers: tuple[int, int],
        settings: Settings,
        stack: StackState,
    ) -> None:
        self.communicator, self.owner, self.buffers = communicator, tuple(owner), buffers
        self.settings, self.stack = settings, stack
        self._prepared = False
        self.fits, self.learning = RunningFits(), True
        self._verdicts: dict[tuple, tuple[tuple[int, ...], str | None]] = {}  # kinds, or why not
        self._reports: dict[Direction, tuple[Tensor | None, float, float, bool]] = {}
        self._penalty: Tensor | None = None

    def __call__(self, calls: Sequence[LayerCall], x: Tensor) -> Tensor:
        """x_N `[B, T, D]` from x_0 `[B, T, D]`. Collective over the lp ranks.

        Raises RankMismatchError on all ranks when their batches, settings or random streams differ.
        """
        with_grad = torch.is_grad_enabled()
        training = any(call.layer.training for call in calls)
        # one draw from the main stream per training forward keeps the lp ranks' streams in step
        seed = int(torch.randint(2**62, (), dtype=torch.int64)) if training else None
        config = self.settings.next_config
        config = config if with_grad else exact_settings(config)
        facts = {
            "shape": tuple(x.shape),
            "dtype": str(x.dtype),
            "gradients": with_grad,
            "seed": seed,
            "settings": config,
            "loss scale": self.settings.loss_scale,
            "cached tokens": self.stack.cached_tokens,
        }
        self.communicator.agree(facts, x.device)
        caching = self.stack.cached_tokens is not None  # a cache takes the whole batch at once
        micro_batches = 1 if caching else max(1, min(config.micro_batches, x.shape[0]))
        recompute = with_grad and self.stack.needs_recompute
        increments = None
        if with_grad and config.increment_penalty:
            inner = range(self.buffers[0], len(calls) - self.buffers[1])
            tokens = x[..., 0].numel()
            increments = Increments(inner, tokens, config.increment_penalty, self.settings.loss_scale)
        learning = training and with_grad and self.learning
        if learning:
            self.fits.commit()
        program = Program(calls, x, micro_batches=micro_batches, seed=seed, recompute=recompute, increments=increments)
        stacked = self._stacked(config, program, x) if config.stacked else None
        if stacked is not None:
            parts = self._parts(config, micro_batches, kinds=stacked.kinds)
        else:
            config = dataclasses.replace(config, stacked=False)
            # without graphs runs gain nothing, and recomputed they would bring back all their graphs at once; a penalty
            # on every step's increment needs the states inside
            joined = with_grad and not recompute and increments is None
            parts = self._parts(config, micro_batches, joined=joined)
            if with_grad and parts["backward"].plan.split_weights:
                self._prepare(calls)
                program.split_weights = True
        solve = _Solve(self, config, parts, stacked or program, learning)
        if not with_grad:
            return solve.forward(x)
        # the anchor makes the result require grad on every rank, also where nothing local is trainable: all ranks
        # take part in the backward or none does
        anchor = torch.zeros((), device=x.device, requires_grad=True)
        return _Node.apply(solve, anchor, x, *program.side, *program.params)  # type: ignore[return-value]

    def _prepare(self, calls: Sequence[LayerCall]) -> None:
        """Makes the weight gradients of the own layers deferrable, once."""
        if not self._prepared:
            for call, owner in zip(calls, self.owner, strict=True):
                if owner == self.communicator.rank:
                    make_deferrable(call.layer)
            self._prepared = True

    def _parts(
        self,
        config: LayerParallelConfig,
        micro_batches: int,
        *,
        joined: bool = False,
        kinds: tuple[int, ...] | None = None,
    ) -> Mapping[Direction, RankPart]:
        communicator = self.communicator
        return _rank_parts(
            config, self.owner, communicator.size, micro_batches, self.buffers, communicator.rank, joined, kinds
        )

    def _stacked(self, config: LayerParallelConfig, program: Program, x: Tensor) -> StackedProgram | None:
        """The program that evaluates layers together; where these can't be, a warning that says why, and None."""
        key = (config, program.micro_batches, fingerprint(program))
        if key not in self._verdicts:
            kinds = Kinds(program)
            trial = self._stacked_program(config, program, tuple(kinds.kinds), x)
            waves = sorted(layers for layers in trial.kept if len(layers) > 1)
            with trial.running(keep_graphs=False):
                reason = obstacle(trial, kinds, waves, x)
            self._verdicts[key] = tuple(kinds.kinds), reason
            if reason is not None:
                warnings.warn(f"stacked=True, but layers are evaluated one at a time: {reason}", stacklevel=2)
        kinds, reason = self._verdicts[key]
        return None if reason is not None else self._stacked_program(config, program, kinds, x)

    def _stacked_program(
        self, config: LayerParallelConfig, program: Program, kinds: tuple[int, ...], x: Tensor
    ) -> StackedProgram:
        backward = self._parts(config, program.micro_batches, kinds=kinds)["backward"]
        final = (group[0].final for group in backward.groups)
        return StackedProgram(
            program.calls,
            x,
            kinds=kinds,
            kept=frozenset(layers for layers, is_final in zip(backward.layers, final, strict=True) if is_final),
            micro_batches=program.micro_batches,
            seed=program.seed,
            recompute=program.recompute,
        )

    def record(
        self, direction: Direction, residuals: Tensor | None, seconds: float, waited: float, stacked: bool
    ) -> None:
        self._reports[direction] = (residuals, seconds, waited, stacked)

    def record_penalty(self, penalty: Tensor | None) -> None:
        self._penalty = penalty

    def load_fits(self, state: Mapping[Key, tuple[Tensor, Tensor]]) -> None:
        """Takes from the fits of all lp ranks those of the intervals whose ends this rank makes."""

        def is_mine(key: Key) -> bool:
            _, direction, first, stop = key
            return self.owner[stop - 1 if direction == "forward" else first] == self.communicator.rank

        self.fits.load_state_dict({key: moments for key, moments in state.items() if is_mine(key)})

    def report(self, direction: Direction) -> SweepReport | None:
        """The last sweep of this direction, None before the first. Collective when that sweep was inexact or penalised
        increments."""
        if direction not in self._reports:
            return None
        residuals, seconds, waited, stacked = self._reports[direction]
        penalty = None
        if direction == "forward" and self._penalty is not None:
            penalty = float(self._sum(self._penalty))
        if residuals is None:
            return SweepReport("exact", 0, (), seconds, waited, penalty, stacked)
        total = self._sum(residuals)
        return SweepReport("mgrit", len(total), tuple(total.sqrt().tolist()), seconds, waited, penalty, stacked)

    def _sum(self, mine: Tensor) -> Tensor:
        total = mine.clone()
        self.communicator.all_reduce(total)
        return total


class _Solve:
    """One forward and its backward(s). learning: what they observe enters the fits of the next one."""

    def __init__(
        self,
        engine: StackEngine,
        config: LayerParallelConfig,
        parts: Mapping[Direction, RankPart],
        program: Program,
        learning: bool,
    ) -> None:
        self.engine, self.config, self.parts, self.program, self.learning = engine, config, parts, program, learning

    def forward(self, x: Tensor, *, keep_graphs: bool = False) -> Tensor:
        with self.program.running(keep_graphs=keep_graphs):
            y = self._run("forward", x)
        increments = self.program.increments
        self.engine.record_penalty(None if increments is None else increments.penalty(y))
        return y

    def backward(self, lam: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
        """lam_0, the gradients of the side tensors (summed over the lp ranks) and those of the own parameters."""
        program = self.program
        program.begin_backward()
        with program.running(keep_graphs=True):
            lam = self._run("backward", lam.contiguous())
        side_grads, param_grads = program.take_gradients()
        for grad in side_grads:
            self.engine.communicator.all_reduce(grad)
        return lam, side_grads, param_grads

    def _run(self, direction: Direction, x: Tensor) -> Tensor:
        engine, program, operator = self.engine, self.program, self.config.coarse_operator

        def fit(span: tuple[int, int], x: Tensor) -> Tensor:
            return engine.fits.apply((operator, direction, *span), x)

        def observe(span: tuple[int, int], micro_batch: int, start: Tensor, end: Tensor) -> None:
            if self.learning:
                engine.fits.observe((operator, direction, *span), micro_batch, start, end)

        began = time.perf_counter()
        part = self.parts[direction]
        evaluate = program.evaluator(direction, fit, observe)
        outcome = execute(part, program.split(x), evaluate, engine.communicator)
        together = any(len(group) > 1 for group in part.groups)
        engine.record(direction, outcome.residuals, time.perf_counter() - began, outcome.waited, together)
        return program.join(outcome.ends)


class _Node(torch.autograd.Function):
    """The whole stack as one autograd node. Inputs: the state, the side tensors, the own trainable parameters."""

    @staticmethod
    def forward(ctx: Any, solve: _Solve, anchor: Tensor, x: Tensor, *tensors: Tensor) -> Tensor:
        ctx.solve = solve
        return solve.forward(x.detach(), keep_graphs=True)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, lam: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        lam, side_grads, param_grads = ctx.solve.backward(lam)
        needed = ctx.needs_input_grad
        return (None, None, lam if needed[2] else None, *side_grads, *param_grads)


@lru_cache(maxsize=256)
def _rank_parts(
    config: LayerParallelConfig,
    owner: tuple[int, ...],
    num_ranks: int,
    micro_batches: int,
    buffers: tuple[int, int],
    rank: int,
    joined: bool,
    kinds: tuple[int, ...] | None,
) -> dict[Direction, RankPart]:
    """This rank's parts of both sweeps. joined: with the runs that both have."""
    directions: tuple[Direction, ...] = get_args(Direction)
    plans: dict[Direction, Plan] = {
        d: build_plan(config, d, owner, num_ranks=num_ranks, micro_batches=micro_batches, buffers=buffers, kinds=kinds)
        for d in directions
    }
    shared = set.intersection(*(joints(plan, rank) for plan in plans.values())) if joined else set()
    return {d: RankPart.of(plan, rank, shared) for d, plan in plans.items()}
