"""Trains for half an hour on two ranks while the controller moves up and down, and watches what must not change.

    python recipes/benchmarks/soak.py [--minutes 30]

A GPT-2 with tied embeddings in the Trainer, `controller="adaptive"`, evaluation and checkpoints on the way. Every 200
steps the controller's bound is set to next to nothing or to more than any bias in turn, so that it goes to the exact
pipeline and back. Each rank notes its resident memory twice a minute; every 100 steps the tied weight, of which both
ranks have a copy, is compared bit for bit. Written to recipes/benchmarks/results/soak.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that a checkout runs without being installed

import itertools

import torch
import torch.distributed as dist
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from hf_layerpar import LayerParallelTrainer, LayerParallelTrainingArguments, convert_to_ode
from recipes.benchmarks.launch import RESULTS, launch
from recipes.benchmarks.resident import status_bytes
from recipes.results import print_table, versions, write_json

VOCABULARY, WIDTH, LAYERS, TOKENS = 512, 64, 12, 32
TURN, COMPARE, NOTE_SECONDS = 200, 100, 30.0
BOUNDS = (1e-9, 1e9)


class Rows(Dataset):
    def __len__(self) -> int:
        return 4096

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = torch.randint(VOCABULARY, (), generator=torch.Generator().manual_seed(index))
        ids = (start + torch.arange(TOKENS) * (1 + index % 3)) % VOCABULARY  # something that can be learnt
        return {"input_ids": ids, "labels": ids}


class Soak(TrainerCallback):
    """Turns the controller, takes notes, and ends the run for all ranks when rank 0 says that time is up."""

    def __init__(self, seconds: float) -> None:
        self.until, self.noted = time.monotonic() + seconds, 0.0
        self.trainer: Any = None
        self.notes: list[dict[str, float]] = []
        self.settings: list[str] = []
        self.compared = self.differing = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        watch = self.trainer._watch
        watch.controller.bound = BOUNDS[state.global_step // TURN % 2]
        if (name := str(watch.controller.place)) != (self.settings[-1] if self.settings else ""):
            self.settings.append(name)
        if time.monotonic() - self.noted > NOTE_SECONDS:
            self.noted = time.monotonic()
            self.notes.append({"step": state.global_step, "resident": status_bytes("VmRSS")})
        if state.global_step % COMPARE == 0:
            weight = self.trainer.model.transformer.wte.weight.detach()
            digest = hashlib.sha256(weight.numpy().tobytes()).hexdigest()
            said: list[Any] = [None, None]
            dist.all_gather_object(said, (digest, time.monotonic() > self.until))
            self.compared += 1
            self.differing += said[0][0] != said[1][0]
            control.should_training_stop = said[0][1]


def run_rank(options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=4, n_positions=TOKENS, **ends)
    )
    args = LayerParallelTrainingArguments(
        output_dir=options.folder,
        lp_size=2,
        strategy="mgrit",
        coarsening=3,
        coarse_operator="identity",
        controller="adaptive",
        check_every=50,
        controller_bound=BOUNDS[0],
        max_steps=10**7,
        per_device_train_batch_size=8,
        eval_strategy="steps",
        eval_steps=1000,
        save_steps=1000,
        save_total_limit=1,
        logging_steps=100,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    callback = Soak(60.0 * options.minutes)
    trainer = LayerParallelTrainer(
        convert_to_ode(model),
        args,
        train_dataset=Rows(),
        eval_dataset=torch.utils.data.Subset(Rows(), range(32)),
        callbacks=[callback],
    )
    callback.trainer = trainer
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    found = {"notes": callback.notes, "settings": callback.settings, "steps": trainer.state.global_step}
    found |= {"compared": callback.compared, "differing": callback.differing, "losses": [losses[0], losses[-1]]}
    every: list[Any] = [None, None]
    dist.all_gather_object(every, found)
    if dist.get_rank() == 0:
        write_json(options.rank_output, {"ranks": every})
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--output", type=Path, default=RESULTS / "soak.json")
    parser.add_argument("--folder", help=argparse.SUPPRESS)  # both are given to the ranks this script starts
    parser.add_argument("--rank_output", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_output is not None:
        run_rank(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "found.json"
        arguments = ["--minutes", str(options.minutes), "--folder", folder, "--rank_output", str(output)]
        launch(2, Path(__file__), arguments, timeout=60.0 * options.minutes + 600.0)
        found = json.loads(output.read_text())
    for rank in found["ranks"]:
        resident = [note["resident"] for note in rank["notes"]]
        third = len(resident) // 3
        # the first third warms up: caches, allocators, every setting once
        rank["growth"] = max(resident[2 * third :]) / max(resident[third : 2 * third]) - 1 if third else None
        places = list(map(int, rank["settings"]))
        rank["up"] = sum(b > a for a, b in itertools.pairwise(places))
        rank["down"] = sum(b < a for a, b in itertools.pairwise(places))
    result = {"command": [Path(sys.argv[0]).name], "minutes": options.minutes, **found}
    write_json(options.output, result | {"versions": versions()})
    keys = ("steps", "up", "down", "compared", "differing", "growth", "losses")
    print_table([(key, "  ".join(str(rank[key]) for rank in found["ranks"])) for key in keys])


if __name__ == "__main__":
    main()
