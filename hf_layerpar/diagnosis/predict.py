"""How long a step would take over the lp ranks with each setting, from what a layer costs here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from hf_layerpar.config import Buffers, LayerParallelConfig
from hf_layerpar.diagnosis.readings import Prediction
from hf_layerpar.errors import ConfigurationError
from hf_layerpar.plan.costs import Costs
from hf_layerpar.plan.ownership import INTERLEAVED, contiguous_owner, interleaved_owner
from hf_layerpar.plan.planner import predict_step
from hf_layerpar.plan.simulate import Timeline
from hf_layerpar.plan.step import interval_points


class Predictor:
    """Predicts the steps of a model as the sum over its stacks, each solved over `ranks`.

    depths, costs: layers of every stack, and what one of them costs for the whole batch, by the stack's path.
    micro_batches: the numbers to try, in ascending order, as long as more of them help.
    """

    def __init__(
        self,
        depths: Mapping[str, int],
        costs: Mapping[str, Costs],
        ranks: int,
        buffers: Buffers,
        micro_batches: Sequence[int],
    ) -> None:
        self.depths, self.costs, self.ranks, self.buffers = dict(depths), dict(costs), ranks, buffers
        self.micro_batches = tuple(micro_batches)

    def fastest(self, config: LayerParallelConfig) -> Prediction:
        """The step of `config` with the micro-batches, and the split of `parallelize`, that make it fastest."""
        serial = sum(self.costs[path].serial(depth) for path, depth in self.depths.items())
        found: list[Prediction] = []
        splits: tuple[Literal["interleaved"] | None, ...] = (None,)
        if config.strategy == "mgrit" and config.coarse_operator == "aggregate" and self.ranks > 1:
            splits = (None, INTERLEAVED)
        for split in splits:
            fewer = math.inf
            for pieces in self.micro_batches:
                setting = replace(config, micro_batches=pieces)
                try:
                    steps = [self._step(path, setting, split) for path in self.depths]
                except ConfigurationError:
                    if split is None:
                        raise
                    break  # intervals too short to deal every rank a layer
                seconds = sum(step.makespan for step in steps)
                if seconds >= fewer:  # more of them only make it longer, and their plans are long to make
                    break
                fewer, share = seconds, seconds / serial if serial else 1.0
                # stacks are passed one after the other, and what all of them keep is there at once
                ranks = zip(*(step.peaks for step in steps), strict=True)
                size = max(sum(peak.bytes for peak in peaks) for peaks in ranks)
                found.append(Prediction(config=setting, split=split, seconds=seconds, share=share, bytes=size))
        return min(found, key=lambda prediction: prediction.seconds)

    def _step(self, path: str, config: LayerParallelConfig, split: str | None) -> Timeline:
        depth = self.depths[path]
        points = interval_points(config, depth, self.buffers)
        owner = (
            interleaved_owner(depth, self.ranks, points)
            if split == INTERLEAVED
            else contiguous_owner(depth, self.ranks, boundaries=points)
        )
        return predict_step(config, owner, self.costs[path], num_ranks=self.ranks, buffers=self.buffers)
