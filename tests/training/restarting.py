"""A training script that comes back by itself: it resumes where a checkpoint is. A fault on rank 1, once.

restarting.py FAULT FOLDER LP_SIZE
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transformers import TrainerCallback

from tests.training.runs import trainer

STEP = 5


class Fault(TrainerCallback):
    def __init__(self, kind: str, once: Path) -> None:
        self.kind, self.once = kind, once

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if self.kind == "none" or state.global_step != STEP or args.process_index != 1 or self.once.exists():
            return
        self.once.touch()
        if self.kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "exception":
            raise ValueError("a fault on purpose")
        if self.kind == "hung":
            time.sleep(600)


def main() -> None:
    kind, folder, lp_size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    settings = {"lp_size": lp_size, "max_steps": 8, "save_strategy": "steps", "save_steps": 2, "ddp_timeout": 15}
    run = trainer(str(folder), "llama", settings)
    run.add_callback(Fault(kind, folder / "fault"))
    run.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))
    run.save_model(str(folder / "model"))


if __name__ == "__main__":
    main()
