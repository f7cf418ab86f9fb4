"""Measures settings of the solver against the exact solve, on a model's own loss.

Shapes: B batch, T tokens, D hidden; a state is `[B, T, D]`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_layerpar.config import Buffers, LayerParallelConfig
from hf_layerpar.diagnosis.layers import with_sides
from hf_layerpar.diagnosis.readings import SettingReading
from hf_layerpar.errors import ConfigurationError
from hf_layerpar.ode.ends import Ends
from hf_layerpar.ode.phases import ModelPhases
from hf_layerpar.ode.rehearsal import Rehearsed, batch_rows, check_parts, cut_rows, rehearse
from hf_layerpar.ode.stack import LayerStack, is_checkpointed
from hf_layerpar.plan.part import RankPart
from hf_layerpar.plan.step import Anatomy, Pass, build_step
from hf_layerpar.plan.tasks import Direction
from hf_layerpar.run.gradients import Agreement, batch_noise, first_half, gradients_aside, products
from hf_layerpar.run.held import Held
from hf_layerpar.run.layers import Common, Entry, kept_streams
from hf_layerpar.run.step import Step
from hf_layerpar.run.transport import LocalTransport

Gradient = list[Tensor | None]
"""Of the layers' trainable parameters, in the order of `Bench.params`; None where the loss doesn't depend on one."""

EXACT = LayerParallelConfig(strategy="pipeline")


@dataclass(frozen=True)
class Solve:
    """One training step of one batch.

    ends: the state behind every pass through a stack. factors: ||r2|| / ||r1|| of the sweeps of a direction, the
        largest over the passes; none where they make less than two iterations.
    """

    loss: float
    gradient: Gradient
    ends: Mapping[int, Tensor]
    factors: Mapping[Direction, float]


class Bench:
    """Training steps of a model in this process, which leave no gradient and no moved random stream behind.

    buffers: layers of every stack that are solved exactly (see `OdeSettings`).
    Raises ConfigurationError when no parameter of any layer is trainable.
    """

    def __init__(self, model: nn.Module, stacks: Sequence[LayerStack]) -> None:
        self.model, self.stacks = model, tuple(stacks)
        self.buffers: Buffers = (0, 0)
        self.ends = Ends(model, self.stacks, 1)
        self._last: tuple[Any, Rehearsed] | None = None
        layers = [layer for stack in stacks for layer in stack.layers]
        self.params = list(dict.fromkeys(p for layer in layers for p in layer.parameters() if p.requires_grad))
        if not self.params:
            raise ConfigurationError(
                f"0 of the parameters in the {len(layers)} layers of {type(model).__name__} require a gradient, so "
                "there is no gradient to compare; unfreeze some (or add adapters) first"
            )

    @property
    def device(self) -> torch.device:
        return self.params[0].device

    def solve(self, inputs: Mapping[str, Any], config: LayerParallelConfig) -> Solve:
        """A step of `inputs` by `config`. Every step of the same inputs sees the same dropout masks.

        Raises ConfigurationError when the model returns no loss for these inputs.
        """
        training = any(layer.training for stack in self.stacks for layer in stack.layers)
        with kept_streams(self.device):
            seed = int(torch.randint(2**62, (), dtype=torch.int64)) if training else None
            rehearsed = self._rehearsed(inputs)
            depths = [len(self.stacks[s].layers) for s in rehearsed.stacks]
            passes = [Pass((0,) * n, self.buffers, bool(s)) for n, s in zip(depths, rehearsed.sides, strict=True)]
            plan = build_step(config, Anatomy(tuple(passes), (0,) * (len(passes) + 1), rehearsed.needs), 1)
            phases = self._phases(inputs, rehearsed)
            # the states behind the stacks are what later phases are given
            behind = {
                plan.values[v].place: v
                for task in plan.tasks
                if task.kind == "phase" and task.direction == "forward"
                for v in task.inputs
            }
            part = RankPart.of(plan, 0)
            step = Step(part, phases, LocalTransport(), Common(seed, is_checkpointed), device=self.device)
            with gradients_aside(list(self.model.parameters())):
                step.work(part, keep=set(behind.values()))
                gradient = [p.grad for p in self.params]
        factors: dict[Direction, float] = {}
        for (_, direction), squares in step.outcome.residuals.items():
            if len(squares) > 1:
                first, second = squares[:2].sqrt().tolist()
                factors[direction] = max(factors.get(direction, 0.0), second / first if first else 0.0)
        return Solve(
            float(step.outcome.losses[0, 0]), gradient, {k: step.values[v] for k, v in behind.items()}, factors
        )

    def entries(self, inputs: Mapping[str, Any]) -> dict[str, Entry]:
        """By path, how a batch comes to each stack, with states and arguments to time layers on: without their graphs,
        and what depends on earlier stacks made of the states that enter these."""
        with kept_streams(self.device):
            rehearsed = self._rehearsed(inputs)
            phases, found = self._phases(inputs, rehearsed), []
            for k in range(len(rehearsed.stacks)):
                entry = phases.enter(k, 0, [before.x for before in found], real=False)
                found.append(Entry(entry.x, with_sides(entry, [t.detach() for t in entry.sources])))
        return {self.stacks[s].path: entry for s, entry in zip(rehearsed.stacks, found, strict=True)}

    def part(self, inputs: Mapping[str, Any], pieces: int) -> Mapping[str, Any] | None:
        """The first of so many micro-batches; None where the batch, or its loss, can't be cut."""
        rows = rows_of(self.model, inputs)
        if not 1 < pieces <= rows:
            return None
        try:
            parts = cut_rows(inputs, rows, pieces)
            with kept_streams(self.device):
                whole = self._rehearsed(inputs)
                check_parts(whole, [self._rehearsed(part) for part in parts], f"micro_batches={pieces}")
        except ConfigurationError:
            return None
        return parts[0]

    def end_bytes(self, inputs: Mapping[str, Any]) -> dict[str, float]:
        """What the model's ends take: their parameters, what the front keeps for its backward, and what the tail takes
        while it runs, by their names in `Costs`."""
        parameters = list(self.model.parameters())
        with kept_streams(self.device):
            rehearsed = self._rehearsed(inputs)
            states = [entry.x for entry in self.entries(inputs).values()]
            phases, last = self._phases(inputs, rehearsed), len(rehearsed.stacks)
            leaves = [states[k].detach().requires_grad_() if k in rehearsed.needs[last] else None for k in range(last)]
            with gradients_aside(parameters):
                there = [leaf for leaf in leaves if leaf is not None]
                for p in parameters:  # so that the backward adds to what is there
                    p.grad = torch.zeros_like(p)
                    there += [p, p.grad]
                with Held(there) as front:
                    entry = phases.enter(0, 0, [None] * last, real=True)
                    kept = front.now - entry.x.untyped_storage().nbytes()
                del entry
                with Held(there) as tail:
                    loss = phases.finish(0, (0, 1), leaves)
                    assert loss is not None
                    loss.backward()
        used = rehearsed.uses[last]
        trained = [p for p in used if p.value is not None and p.value.requires_grad]
        sizes = {p: p.shape.numel() * p.dtype.itemsize for p in self.ends}
        # what no phase uses stays on the first rank
        behind = set(used) - {p for uses in rehearsed.uses[:-1] for p in uses}
        added = max((sizes[p] for p in trained), default=0)
        return {
            "front_bytes": sum(size for p, size in sizes.items() if p not in behind),
            "tail_bytes": sum(size for p, size in sizes.items() if p in used),
            "shared_bytes": sum(size for p, size in sizes.items() if p in used and p not in behind),
            "front_graph_bytes": max(0.0, kept),
            "tail_graph_bytes": max(0.0, tail.most - added),
            "tail_added_bytes": added,
        }

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """What the model returns of a batch. Raises ConfigurationError for none."""
        loss = getattr(self.model(**batch), "loss", None)
        if not isinstance(loss, Tensor):
            raise ConfigurationError(
                f"{type(self.model).__name__} returned no loss for a batch of {sorted(batch)}; add labels to the "
                "batch, or use the model class with the head that is to be trained"
            )
        return loss

    # ---- inside
    def _rehearsed(self, inputs: Mapping[str, Any]) -> Rehearsed:
        if self._last is None or self._last[0] is not inputs:
            self._last = (inputs, rehearse(self.loss, inputs, self.stacks, self.ends, loss=True))
        return self._last[1]

    def _phases(self, inputs: Mapping[str, Any], rehearsed: Rehearsed) -> ModelPhases:
        rows = [rows_of(self.model, inputs)]
        return ModelPhases(self.loss, [inputs], rows, self.stacks, self.ends, rehearsed, Entry, terms=None, trains=True)


@dataclass(frozen=True)
class Reference:
    """The exact solve of one batch. noise: of its gradient (`batch_noise`), None for one row."""

    exact: Solve
    noise: float | None

    @property
    def norm(self) -> float:
        return _against(self.exact.gradient, self.exact.gradient).exact_norm


def exact_reference(bench: Bench, inputs: Mapping[str, Any]) -> Reference:
    """The exact gradient of a batch, and how far those of others lie apart."""
    exact, noise, rows = bench.solve(inputs, EXACT), None, rows_of(bench.model, inputs)
    if rows > 1:
        part = bench.solve(first_half(inputs, rows), EXACT)
        noise = batch_noise(_against(part.gradient, exact.gradient), rows)
    return Reference(exact, noise)


def read_settings(
    bench: Bench, inputs: Mapping[str, Any], reference: Reference, configs: Sequence[LayerParallelConfig]
) -> Iterator[SettingReading]:
    """One reading for each config, for one batch. The convergence factors are None but where a sweep makes two
    iterations."""
    exact = reference.exact
    for config in configs:
        found = bench.solve(inputs, config)
        pairs = [(found.ends[k], end) for k, end in exact.ends.items()]
        agreement = _against(found.gradient, exact.gradient)
        yield SettingReading(
            config=config,
            state_error=max(float((a - b).float().norm() / b.float().norm()) for a, b in pairs),
            loss_error=abs(found.loss - exact.loss) / abs(exact.loss),
            cosine=agreement.cosine,
            norm_ratio=agreement.norm_ratio,
            bias_to_noise=agreement.bias / reference.noise if reference.noise else None,
            forward_factor=found.factors.get("forward"),
            backward_factor=found.factors.get("backward"),
        )


def rows_of(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    """B of a batch. Raises ConfigurationError for one without a tensor."""
    rows = batch_rows(inputs, getattr(model, "main_input_name", None))
    if not rows:
        raise ConfigurationError(f"a batch of {sorted(inputs)} holds no tensor; give what the model's forward takes")
    return rows


def _against(gradient: Gradient, exact: Gradient) -> Agreement:
    pairs = [(a, b) for a, b in zip(gradient, exact, strict=True) if a is not None or b is not None]
    sums = [
        products(torch.zeros_like(b) if a is None else a, torch.zeros_like(a) if b is None else b)  # type: ignore[arg-type]
        for a, b in pairs
    ]
    return Agreement(*torch.stack(sums).sum(0).tolist()) if sums else Agreement(0.0, 0.0, 0.0, 0.0)
