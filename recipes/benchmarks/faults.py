"""What every rank is told when something goes wrong on one of them, and how long it takes.

    python recipes/benchmarks/faults.py [--ranks 2 3 2x2] [--only TEXT ...]

`--ranks`: of the layer axis, or data parallel x layer axis. Every fault runs in a training of its own, on fresh
processes with `ddp_timeout=20`: the error's kind and first words by rank, and the seconds from the start of the last
rank's script to the end of the last rank (all but one that hangs on purpose). A rank that is killed on purpose says
nothing; any other that ends without an error of this package, or is still there after three minutes, is marked as
silent. Written to recipes/benchmarks/results/faults.json; with `--only` the others stay there as they were.
"""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that a checkout runs without being installed

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from hf_layerpar import (
    LayerParallelConfig,
    LayerParallelTrainer,
    LayerParallelTrainingArguments,
    convert_to_ode,
    parallelize,
)
from hf_layerpar.errors import LayerParallelError
from recipes.benchmarks.launch import RESULTS, ROOT
from recipes.results import print_table, versions, write_json

TIMEOUT, PATIENCE = 20, 180.0
VOCABULARY, TOKENS = 64, 8
KILLED = -signal.SIGKILL
HUNG = "hung in a step"


class Rows(Dataset):
    def __init__(self, length: int = 64) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        ids = torch.randint(VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def network(layers: int = 6) -> Any:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=layers, n_head=2, n_positions=TOKENS)
    return GPT2LMHeadModel(config)


def trainer(folder: str, model: Any = None, rows: int = 64, **settings: Any) -> LayerParallelTrainer:
    defaults: dict[str, Any] = {"lp_size": int(os.environ["FAULTS_LP_SIZE"]), "max_steps": 6, "save_steps": 3}
    defaults |= {"per_device_train_batch_size": 4, "ddp_timeout": TIMEOUT, "use_cpu": True}
    args = LayerParallelTrainingArguments(output_dir=folder, report_to=[], disable_tqdm=True, **(defaults | settings))
    return LayerParallelTrainer(network() if model is None else model, args, train_dataset=Rows(rows))


class AtStep(TrainerCallback):
    def __init__(self, step: int, act: Callable[[], None]) -> None:
        self.step, self.act = step, act

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.act()


def in_layer(act: Callable[[], Any]) -> Callable[[str, int], None]:
    """A training in which rank 1 does `act` in one of its layers in the third step."""

    def run(folder: str, rank: int) -> None:
        made = trainer(folder)
        layer, calls = made.model.transformer.h[-1 if rank else 0], [0]

        def hook(*given: Any) -> None:
            calls[0] += 1
            if rank == 1 and calls[0] == 3:
                act()

        (layer if rank < 2 else made.model.transformer.h[3]).register_forward_hook(hook)
        if rank == 1:
            made.add_callback(AtStep(3, act))
        made.train()

    return run


def fail(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


def unlike(**values: tuple[Any, Any]) -> Callable[[str, int], None]:
    """A training in which rank 1 has the second of these settings, the others the first."""
    return lambda folder, rank: train(folder, **{name: pair[rank == 1] for name, pair in values.items()})


def train(folder: str, **more: Any) -> None:
    trainer(folder, **more).train()


def own_loop(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[str, int], None]:
    """Steps in a loop of one's own, in which rank 1 gets a changed batch."""

    def run(folder: str, rank: int) -> None:
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT))
        handle = parallelize(convert_to_ode(network()), LayerParallelConfig())
        batch = {"input_ids": torch.arange(4 * TOKENS).view(4, TOKENS) % VOCABULARY}
        batch["labels"] = batch["input_ids"]
        for _ in range(3):
            handle.train_step(change(batch) if rank == 1 else batch)

    return run


def disk_full(module: str, name: str, on_rank: int) -> Callable[[str, int], None]:
    """A training in which a file can't be written on one rank."""

    def run(folder: str, rank: int) -> None:
        if rank == on_rank:
            owner = import_module(module)

            def full(*args: Any, **kwargs: Any) -> None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            setattr(owner, name, full)
        train(folder)

    return run


def damaged(pattern: str, damage: Callable[[Path], None]) -> Callable[[str, int], None]:
    """A training that is resumed from a checkpoint with a damaged file."""

    def run(folder: str, rank: int) -> None:
        train(folder, max_steps=3)
        torch.distributed.barrier()
        if rank == 0:
            paths = list(Path(folder, "checkpoint-3").glob(pattern))
            assert paths, f"the checkpoint has no {pattern}"
            for path in paths:
                damage(path)
        torch.distributed.barrier()
        trainer(folder).train(resume_from_checkpoint=True)

    return run


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


FAULTS: dict[str, Callable[[str, int], None]] = {
    "killed in a step": in_layer(lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "exception in a step": in_layer(fail(ValueError("a fault on purpose"))),
    "out of memory in a step": in_layer(fail(torch.OutOfMemoryError("a fault on purpose"))),
    HUNG: in_layer(lambda: time.sleep(PATIENCE)),
    "other learning rate": unlike(learning_rate=(1e-3, 2e-3)),
    "other weight decay": unlike(weight_decay=(0.0, 0.1)),
    "other optimizer": unlike(optim=("adamw_torch", "sgd")),
    "other number of steps": unlike(max_steps=(6, 7)),
    "other save steps": unlike(save_steps=(3, 2)),
    "other accumulation": unlike(gradient_accumulation_steps=(1, 2)),
    "other lp_size": lambda folder, rank: train(folder, **({"lp_size": 1} if rank == 1 else {})),
    "other micro-batches": unlike(micro_batches=(1, 2)),
    "other length of data": unlike(rows=(64, 60)),
    "other number of layers": lambda folder, rank: train(folder, model=network(6 + 2 * (rank == 1))),
    "other step size": lambda folder, rank: train(
        folder, model=convert_to_ode(network(), step_size=0.5 if rank == 1 else 0.25, num_steps=6)
    ),
    "other rows in a loop": own_loop(lambda batch: {k: t.flip(0) for k, t in batch.items()}),
    "fewer rows in a loop": own_loop(lambda batch: {k: t[:3] for k, t in batch.items()}),
    "other inputs in a loop": own_loop(lambda batch: batch | {"attention_mask": torch.ones(4, TOKENS)}),
    "disk full at the weights": disk_full("transformers.modeling_utils", "safe_save_file", 0),
    "disk full at the optimizer": disk_full("torch", "save", 1),
    "weights cut off": damaged("*.safetensors", cut),
    "trainer state cut off": damaged("trainer_state.json", cut),
    "optimizer missing": damaged("optimizer/.metadata", Path.unlink),
}


def run_rank(name: str, folder: str, output: Path) -> None:
    rank = int(os.environ["RANK"])
    output.with_suffix(".began").write_text(str(time.time()), encoding="utf-8")
    try:
        FAULTS[name](folder, rank)
        found = {"error": None}
    except BaseException as error:
        found = {"error": type(error).__name__, "ours": isinstance(error, LayerParallelError), "says": str(error)[:300]}
    output.write_text(json.dumps(found), encoding="utf-8")
    os._exit(0)  # no rank waits for another at the end


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def outcome(name: str, ranks: str) -> dict[str, Any]:
    """By rank what it was told. ranks: "lp" or "dp x lp"."""
    *dp_size, lp_size = map(int, ranks.split("x"))
    processes = lp_size * math.prod(dp_size)
    with tempfile.TemporaryDirectory() as folder:
        ended = 0.0
        began, world = time.monotonic(), {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        world |= {"FAULTS_LP_SIZE": str(lp_size)}
        world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
        started = []
        for rank in range(processes):
            output = Path(folder, f"rank{rank}.json")
            command = [sys.executable, __file__, "--fault", name, "--folder", folder, "--rank_output", str(output)]
            environment = os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            started.append((output, subprocess.Popen(command, cwd=ROOT, env=environment, **quiet)))  # type: ignore[call-overload]
        found: dict[int, Any] = {}
        hangs = {1} if name == HUNG else set()
        for rank in sorted(range(processes), key=lambda rank: rank in hangs):
            output, process = started[rank]
            if rank in hangs:
                process.kill()
                process.wait()
                found[rank] = {"error": None, "killed": True}
                continue
            try:
                code = process.wait(max(0.1, PATIENCE - (time.monotonic() - began)))
            except subprocess.TimeoutExpired:
                process.kill()
                code = None
            said = json.loads(output.read_text(encoding="utf-8")) if output.is_file() else {"error": None}
            found[rank] = said | {"killed": code == KILLED, "late": code is None}
            ended = time.time()
        seconds = ended - max(float(o.with_suffix(".began").read_text(encoding="utf-8")) for o, _ in started)
    cause = {"exception in a step": "ValueError", "out of memory in a step": "OutOfMemoryError"}.get(name)
    for rank, said in found.items():
        said["silent"] = not (said["killed"] or said.get("ours") or (rank == 1 and said["error"] == cause is not None))
    by_rank = [found[rank] for rank in range(processes)]
    return {"fault": name, "ranks": ranks, "seconds": seconds, "by_rank": by_rank}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", default=["2", "3", "2x2"])
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="faults whose name contains one of these")
    parser.add_argument("--output", type=Path, default=RESULTS / "faults.json")
    for name in ("--fault", "--folder"):
        parser.add_argument(name, help=argparse.SUPPRESS)  # given to the ranks this script starts
    parser.add_argument("--rank_output", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.fault is not None:
        run_rank(options.fault, options.folder, options.rank_output)
        return
    names = [n for n in FAULTS if not options.only or any(text in n for text in options.only)]
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    if options.only and options.output.exists():
        known = json.loads(options.output.read_text(encoding="utf-8"))["faults"]
        rows = {(row["fault"], row["ranks"]): row for row in known}
    for name in names:
        for ranks in options.ranks:
            row = rows[name, ranks] = outcome(name, ranks)
            told = [said["error"] or ("killed" if said["killed"] else "nothing") for said in row["by_rank"]]
            mark = "  SILENT" if any(said["silent"] for said in row["by_rank"]) else ""
            print_table([(f"{name}, {ranks} ranks", f"{row['seconds']:5.1f} s  {', '.join(told)}{mark}")])
    table = list(rows.values())
    how = {"command": [Path(sys.argv[0]).name, *sys.argv[1:]], "ddp_timeout": TIMEOUT}
    how |= {"longest": max(row["seconds"] for row in table)}
    how |= {"silent": [(r["fault"], r["ranks"]) for r in table if any(said["silent"] for said in r["by_rank"])]}
    write_json(options.output, how | {"faults": table, "versions": versions()})


if __name__ == "__main__":
    main()
