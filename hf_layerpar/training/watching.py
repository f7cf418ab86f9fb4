"""Checks during training: measures the settings in force on the batch of the moment, and applies what the controller
decides, alike on all ranks."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.utils import logging

from hf_layerpar.agreement import GradientProbe, batch_rows
from hf_layerpar.config import MOST_ITERATIONS, LayerParallelConfig, describe
from hf_layerpar.diagnosis.sharded import lipschitz_of_layers
from hf_layerpar.errors import ConfigurationError
from hf_layerpar.plan.ladder import (
    cheapest_first,
    escalation,
    exact_settings,
    first_offer,
    predicted_share,
)
from hf_layerpar.run.mesh import Mesh
from hf_layerpar.run.step_report import SweepReport
from hf_layerpar.run.transport import peer_loss
from hf_layerpar.sharding import LayerParallel
from hf_layerpar.training.arguments import LayerParallelTrainingArguments
from hf_layerpar.training.controller import Controller, Policy, Reading

logger = logging.get_logger(__name__)

STATE = "LayerParallelController"
"""Where a Trainer's state keeps the controller's: `state.stateful_callbacks[STATE]`."""

Loss = Callable[[Mapping[str, Any]], Tensor]


class Watch:
    """The controller of one training run, with its measurements.

    args: `controller`, `check_every`, `check_gradient`, `check_layers`, `controller_bound` and `controller_ranks`.
    Raises ConfigurationError for settings that leave the policy nothing to choose from.
    """

    def __init__(self, args: LayerParallelTrainingArguments, handle: LayerParallel, mesh: Mesh) -> None:
        self.handle, self.mesh = handle, mesh
        self.every = args.check_every
        self.ranks = args.controller_ranks or args.lp_size
        self.with_gradient = args.check_gradient or args.controller == "adaptive"
        # bias adds up over the batches of a step, their noise averages out
        self.batches_per_step = args.gradient_accumulation_steps * mesh.dp_size
        ladder = _ladder(args.controller, args.layer_parallel_config, handle, self.ranks)
        start = first_offer(ladder, handle.shapes) if args.controller == "adaptive" else 0
        self.controller = Controller(args.controller, ladder, bound=args.controller_bound, start=start)
        self.shares = {settings: predicted_share(settings, handle.shapes, self.ranks) for settings in ladder}
        self.with_layers = args.check_layers
        self._checked: int | None = None

    def start(self, state: dict[str, Any] | None) -> None:
        """Begins a run, or goes on with one from its stored state."""
        self._checked = None
        if state is not None:
            self._checked = state["attributes"]["checked"]
            self.controller.load_state_dict(state["attributes"]["controller"])
        self.handle.config = self.controller.settings

    def state(self) -> dict[str, Any]:
        """In the form in which a Trainer's state keeps callbacks."""
        return {"args": {}, "attributes": {"checked": self._checked, "controller": self.controller.state_dict()}}

    def due(self, step: int, inputs: Mapping[str, Any]) -> bool:
        """Whether to check before this step: the first, and one in every `every`. A check that the batch is too small
        for waits for the next one. Alike on all ranks."""
        if self.controller.is_done:
            return False
        if self._checked is not None and step // self.every == self._checked // self.every:
            return False
        return not self.with_gradient or self._least(batch_rows(inputs)) >= 2

    def check(self, step: int, model: nn.Module, inputs: Mapping[str, Any], loss: Loss) -> tuple[dict, dict]:
        """Checks, moves the model to what was decided, and returns what to log: numbers, and what trackers don't take
        (texts, and lists). Collective."""
        began = time.perf_counter()
        self._checked = step
        probe = GradientProbe(model, inputs, loss)
        controller = self.controller
        reading, reason = controller.check(lambda settings, *, factors: self._measure(probe, settings, factors=factors))
        decided = self._from_first(controller.state_dict())
        controller.load_state_dict(decided)
        self.handle.config = controller.settings
        numbers = {f"lp_check_{name}": value for name, value in _read(reading).items()}
        if self.with_gradient and controller.policy != "paper":
            numbers["lp_check_bound"] = controller.bound
        # the settings in force from here on, and each that was measured under its own name
        texts: dict[str, Any] = {"lp_check_name": describe(controller.settings)}
        texts["lp_check_readings"] = [
            {"name": describe(controller.ladder[place]), "setting": place, **_read(one)}
            for place, one in controller.readings
        ]
        if reason:
            texts["lp_check_reason"] = reason
        unseen = reading.rho is None and (reading.bias is None or controller.policy == "paper")
        if unseen and not controller.is_exact:
            logger.warning_once(
                f"controller={controller.policy!r} sees nothing of {describe(controller.settings)}: on so few "
                "intervals the doubled iterations are exact, and no convergence factor says how good the ones in force "
                "are. Use controller='adaptive', or 'raise' with check_gradient=True."
            )
        if self.with_layers:
            texts["lp_check_lipschitz"] = lipschitz_of_layers(self.handle, lambda: loss(inputs))
        numbers |= {
            "lp_check_setting": controller.place,
            "lp_check_share": self.shares[controller.ladder[controller.place]],
            "lp_check_seconds": time.perf_counter() - began,
        }
        return numbers, texts

    def _measure(self, probe: GradientProbe, settings: LayerParallelConfig, *, factors: bool) -> Reading:
        found: dict[str, float] = {}
        if factors:
            doubled = dataclasses.replace(
                settings,
                forward_iterations=min(2 * settings.forward_iterations, MOST_ITERATIONS),
                backward_iterations=min(2 * settings.backward_iterations, MOST_ITERATIONS),
            )
            probe.gradient(doubled)
            report = probe.handle.report()
            assert report is not None
            for direction in ("forward", "backward"):
                sweeps = [s[direction] for s in report.sweeps.values()]
                if any(sweep.convergence_factors for sweep in sweeps):  # alike on all ranks, as `_worst` must be called
                    factor = self._worst(max(map(_last_factor, sweeps)))
                    if factor != -math.inf:
                        found[f"rho_{direction}"] = factor
        if self.with_gradient:
            compared = probe.compare(settings)
            bias, noise, norm = (
                self._mean_square(value) for value in (compared["bias"], probe.noise, compared["exact_norm"])
            )
            of_step = noise**2 / self.batches_per_step
            whole = max(0.0, norm**2 - noise**2) + of_step
            found |= {
                "cosine": self._mean(compared["cosine"]),
                "norm_ratio": self._mean(compared["norm_ratio"]),
                "bias_to_noise": bias / of_step**0.5 if of_step else float("inf"),
                "bias": bias / whole**0.5 if whole else float("inf"),
            }
        return Reading(**found)

    # ---- over the dp ranks (the lp ranks of each have the same numbers)
    def _reduced(self, value: float, op: dist.ReduceOp.RedOpType) -> float:
        if self.mesh.dp_size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.handle.device)
        with peer_loss("the comparison of checks"):
            dist.all_reduce(tensor, op=op, group=self.mesh.dp_group)
        return float(tensor)

    def _mean(self, value: float) -> float:
        return self._reduced(value, dist.ReduceOp.SUM) / self.mesh.dp_size

    def _mean_square(self, value: float) -> float:
        return self._mean(value**2) ** 0.5

    def _worst(self, value: float) -> float:
        return self._reduced(value, dist.ReduceOp.MAX)

    def _least(self, value: float) -> float:
        return self._reduced(value, dist.ReduceOp.MIN)

    def _from_first(self, value: Any) -> Any:
        if self.mesh.world_size == 1:
            return value
        said = [value]
        with peer_loss("the controller's decision"):
            dist.broadcast_object_list(said, 0)
        return said[0]


def _read(reading: Reading) -> dict[str, float]:
    """What was measured."""
    return {name: value for name, value in dataclasses.asdict(reading).items() if value is not None}


def _last_factor(sweep: SweepReport) -> float:
    """The last convergence factor; -inf where there is none. A residual of zero is that of a solve with as many
    iterations as make it exact, whatever its convergence."""
    factors = zip(sweep.convergence_factors, sweep.residuals[1:], strict=True)
    return next((factor for factor, residual in reversed([*factors]) if residual), -math.inf)


def _ladder(
    policy: Policy, config: LayerParallelConfig, handle: LayerParallel, ranks: int
) -> list[LayerParallelConfig]:
    if policy == "adaptive":
        return cheapest_first(config, handle.shapes, ranks)
    if config.strategy != "mgrit":
        raise ConfigurationError(
            f"controller={policy!r} watches MGRIT, but strategy={config.strategy!r} is exact; use strategy='mgrit' or "
            "controller='off'"
        )
    return escalation(config, handle.shapes) if policy == "raise" else [config, exact_settings(config)]
