"""The HuggingFace Trainer on a dp x lp mesh."""

from hf_layerpar.training.arguments import LayerParallelTrainingArguments
from hf_layerpar.training.trainer import LayerParallelTrainer

__all__ = ["LayerParallelTrainer", "LayerParallelTrainingArguments"]
