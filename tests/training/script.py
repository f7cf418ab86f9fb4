"""A user's training script: arguments from the command line, train, evaluate, save."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transformers import HfArgumentParser

from hf_layerpar.training.arguments import LayerParallelTrainingArguments
from hf_layerpar.training.trainer import LayerParallelTrainer
from tests.training.runs import Samples, build


def main() -> None:
    (args,) = HfArgumentParser(LayerParallelTrainingArguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    trainer = LayerParallelTrainer(
        build("bert_classifier"),
        args,
        train_dataset=Samples("bert_classifier", 64),
        eval_dataset=Samples("bert_classifier", 7, 1000),
    )
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        Path(args.output_dir, "result.json").write_text(json.dumps(metrics))
    trainer.end()


if __name__ == "__main__":
    main()
