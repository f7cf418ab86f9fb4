"""The Trainer's arguments with the layer-parallel settings beside them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from transformers import TrainingArguments

from hf_layerpar.config import LayerParallelConfig, Operator, Relaxation, Strategy
from hf_layerpar.parallel.mesh import check_lp_size


@dataclass
class LayerParallelTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` plus `lp_size` and the fields of `LayerParallelConfig`, by the same names.

    They are ordinary fields, so `HfArgumentParser` reads them from the command line, from YAML and from JSON.
    `per_device_train_batch_size` counts per dp rank: the lp ranks of one dp rank share its batch.

    Raises ConfigurationError where lp_size does not divide the number of processes, or a setting is out of range.
    """

    lp_size: int = field(default=1, metadata={"help": "Processes that share one model's layers; divides the world."})
    strategy: Strategy = field(
        default=LayerParallelConfig.strategy,
        metadata={"help": "How the layers are solved: serial, pipeline (both exact) or mgrit."},
    )
    levels: int = field(default=LayerParallelConfig.levels, metadata={"help": "MGRIT: levels of the hierarchy."})
    coarsening: list[int] = field(
        default_factory=lambda: [LayerParallelConfig.coarsening],  # type: ignore[list-item]
        metadata={"help": "MGRIT: fine steps per coarse step; one number, or one per coarse level, finest first."},
    )
    relaxation: Relaxation = field(default=LayerParallelConfig.relaxation, metadata={"help": "MGRIT: F or FCF."})
    forward_iterations: int = field(
        default=LayerParallelConfig.forward_iterations, metadata={"help": "MGRIT: iterations forward; 0 is exact."}
    )
    backward_iterations: int = field(
        default=LayerParallelConfig.backward_iterations, metadata={"help": "MGRIT: iterations backward; 0 is exact."}
    )
    coarse_operator: Operator = field(
        default=LayerParallelConfig.coarse_operator,
        metadata={"help": "MGRIT: an interval's coarse stand-in: rediscretize, aggregate or identity."},
    )
    damping: float = field(
        default=LayerParallelConfig.damping, metadata={"help": "MGRIT: a correction is scaled by 1 - damping."}
    )
    micro_batches: int = field(
        default=LayerParallelConfig.micro_batches, metadata={"help": "Pieces the batch is cut into inside a forward."}
    )
    stacked: bool = field(
        default=LayerParallelConfig.stacked,
        metadata={"help": "MGRIT on one device: evaluate independent layers together, with stacked weights."},
    )

    def __post_init__(self) -> None:
        if not isinstance(self.coarsening, list | tuple):  # YAML and Python callers give one number
            self.coarsening = [self.coarsening]
        self.coarsening = list(self.coarsening)
        _ = self.layer_parallel_config  # validates before the process group is started
        super().__post_init__()
        check_lp_size(self.world_size, self.lp_size)

    @property
    def layer_parallel_config(self) -> LayerParallelConfig:
        """The settings as `parallelize` takes them."""
        names = [f.name for f in dataclasses.fields(LayerParallelConfig)]
        values = {name: getattr(self, name) for name in names}
        values["coarsening"] = self.coarsening[0] if len(self.coarsening) == 1 else tuple(self.coarsening)
        return LayerParallelConfig(**values)
