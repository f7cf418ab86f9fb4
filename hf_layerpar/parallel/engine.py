"""Solves a stack's forward and backward over the lp ranks, as one autograd node."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.mgrit.plan import Direction
from hf_layerpar.mgrit.strategies import build_plan
from hf_layerpar.parallel.communicator import Communicator
from hf_layerpar.parallel.deferral import make_deferrable
from hf_layerpar.parallel.executor import RankPart, execute
from hf_layerpar.parallel.program import LayerCall, Program
from hf_layerpar.parallel.stackable import Kinds, fingerprint, obstacle
from hf_layerpar.parallel.stacked import StackedProgram


@dataclass(frozen=True)
class SweepReport:
    """What one sweep measured.

    residuals: C-point residual norm ||r|| after each iteration, over all lp ranks (empty for an exact sweep).
    convergence_factors: ||r^(k+1)|| / ||r^(k)|| (arXiv 2601.09026, section 4); above 1 the sweep diverges.
    seconds, waited: wall time of the solve on this rank, and the part of it spent waiting for messages.
    stacked: independent layers were evaluated together (the setting `stacked`, where the layers allow it).
    """

    mode: Literal["exact", "mgrit"]
    iterations: int
    residuals: tuple[float, ...]
    seconds: float
    waited: float
    stacked: bool = False

    @property
    def convergence_factors(self) -> tuple[float, ...]:
        return tuple(b / a if a else 0.0 for a, b in pairwise(self.residuals))


class HasNextConfig(Protocol):
    @property
    def next_config(self) -> LayerParallelConfig: ...


class HasNeedsRecompute(Protocol):
    @property
    def needs_recompute(self) -> bool: ...


class StackEngine:
    """The solver of one stack; called in the place of the layer loop with every layer's recorded call.

    `settings.next_config` is asked for the settings of each solve, `stack.needs_recompute` for whether graphs are
    recomputed in the backward (gradient checkpointing).
    """

    def __init__(
        self,
        communicator: Communicator,
        owner: Sequence[int],
        buffers: tuple[int, int],
        settings: HasNextConfig,
        stack: HasNeedsRecompute,
    ) -> None:
        self.communicator, self.owner, self.buffers = communicator, tuple(owner), buffers
        self.settings, self.stack = settings, stack
        self._prepared = False
        self._verdicts: dict[tuple, tuple[tuple[int, ...], str | None]] = {}  # kinds, or why not
        self._reports: dict[Direction, tuple[Tensor | None, float, float, bool]] = {}

    def __call__(self, calls: Sequence[LayerCall], x: Tensor) -> Tensor:
        """x_N `[B, T, D]` from x_0 `[B, T, D]`. Collective over the lp ranks.

        Raises RankMismatchError on all ranks when their batches, settings or random streams differ.
        """
        with_grad = torch.is_grad_enabled()
        training = any(call.layer.training for call in calls)
        # one draw from the main stream per training forward keeps the lp ranks' streams in step
        seed = int(torch.randint(2**62, (), dtype=torch.int64)) if training else None
        config = self.settings.next_config
        config = config if with_grad else exact_config(config)
        facts = {
            "shape": tuple(x.shape),
            "dtype": str(x.dtype),
            "gradients": with_grad,
            "seed": seed,
            "settings": config,
        }
        self.communicator.agree(facts, x.device)
        micro_batches = max(1, min(config.micro_batches, x.shape[0]))
        program = Program(
            calls, x, micro_batches=micro_batches, seed=seed, recompute=with_grad and self.stack.needs_recompute
        )
        stacked = self._stacked(config, program, x) if config.stacked else None
        if stacked is None:
            config = dataclasses.replace(config, stacked=False)
            if with_grad and self.part(config, "backward", micro_batches).plan.split_weights:
                self._prepare(calls)
                program.split_weights = True
        solve = _Solve(self, config, stacked or program)
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
        backward = self.part(config, "backward", program.micro_batches, kinds)
        return StackedProgram(
            program.calls,
            x,
            kinds=kinds,
            kept=frozenset(tuple(t.layer for t in run) for run in backward.runs if run[0].final),
            micro_batches=program.micro_batches,
            seed=program.seed,
            recompute=program.recompute,
        )

    def part(
        self,
        config: LayerParallelConfig,
        direction: Direction,
        micro_batches: int,
        kinds: tuple[int, ...] | None = None,
    ) -> RankPart:
        return _rank_part(
            config,
            direction,
            self.owner,
            self.communicator.size,
            micro_batches,
            self.buffers,
            self.communicator.rank,
            kinds,
        )

    def record(
        self, direction: Direction, residuals: Tensor | None, seconds: float, waited: float, stacked: bool
    ) -> None:
        self._reports[direction] = (residuals, seconds, waited, stacked)

    def report(self, direction: Direction) -> SweepReport | None:
        """The last sweep of this direction, None before the first. Collective when that sweep was inexact."""
        if direction not in self._reports:
            return None
        residuals, seconds, waited, stacked = self._reports[direction]
        if residuals is None:
            return SweepReport("exact", 0, (), seconds, waited)
        total = residuals.clone()
        self.communicator.all_reduce(total)
        return SweepReport("mgrit", len(total), tuple(total.sqrt().tolist()), seconds, waited, stacked)


class _Solve:
    """One forward and its backward(s)."""

    def __init__(self, engine: StackEngine, config: LayerParallelConfig, program: Program) -> None:
        self.engine, self.config, self.program = engine, config, program

    def forward(self, x: Tensor, *, keep_graphs: bool = False) -> Tensor:
        with self.program.running(keep_graphs=keep_graphs):
            return self._run("forward", x)

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
        engine, program = self.engine, self.program
        began = time.perf_counter()
        part = engine.part(self.config, direction, program.micro_batches, program.kinds)
        outcome = execute(part, program.split(x), program.evaluator(direction), engine.communicator)
        together = len(part.runs) < len(part.tasks)
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
def _rank_part(
    config: LayerParallelConfig,
    direction: Direction,
    owner: tuple[int, ...],
    num_ranks: int,
    micro_batches: int,
    buffers: tuple[int, int],
    rank: int,
    kinds: tuple[int, ...] | None,
) -> RankPart:
    plan = build_plan(
        config, direction, owner, num_ranks=num_ranks, micro_batches=micro_batches, buffers=buffers, kinds=kinds
    )
    return RankPart.of(plan, rank)


def exact_config(config: LayerParallelConfig) -> LayerParallelConfig:
    """The exact solve that goes with `config`: the pipeline, with the same micro-batches."""
    return LayerParallelConfig(strategy="pipeline", micro_batches=config.micro_batches)
