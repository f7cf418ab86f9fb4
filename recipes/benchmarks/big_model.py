"""Peak memory of the processes that share a model which no one of them should hold: 4 ranks and a Llama of 2 GB.

    python recipes/benchmarks/big_model.py

A checkpoint of random weights is made in a temporary folder, in shards, and one in the folded form. Then each phase
runs in 4 fresh processes. A process may take at most 1.1 times what it owns (its layers, and all that is outside of
layers; in training four times: parameters, gradients and two states of AdamW) and 1 GB. Written to
recipes/benchmarks/results/big_model.json; with `--phases` the others stay there as they were.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that a checkout runs without being installed

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from hf_layerpar import (
    LayerParallelConfig,
    LayerParallelTrainer,
    LayerParallelTrainingArguments,
    from_pretrained,
    layer_parallel,
    ode_view,
)
from hf_layerpar.checkpoint.reading import read_weights
from recipes.benchmarks.launch import RESULTS, ROOT
from recipes.benchmarks.resident import bytes_of
from recipes.results import print_table, versions, write_json

RANKS = 4
MODEL: dict[str, Any] = {
    "num_hidden_layers": 36,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "vocab_size": 32000,
}
PLAIN, FOLDED = "plain", "folded"  # subfolders of the checkpoints


# ---- phases: each gets the folder with the checkpoints and returns the model that it ends with
def load(folder: Path) -> Any:
    return from_pretrained(folder / PLAIN, layer_parallel=LayerParallelConfig())


def load_refined(folder: Path) -> Any:
    return from_pretrained(folder / PLAIN, layer_parallel=LayerParallelConfig(), step_size=1 / 2)


def load_folded(folder: Path) -> Any:
    return from_pretrained(folder / FOLDED, layer_parallel=LayerParallelConfig())


def save(folder: Path) -> Any:
    model = load(folder)
    model.save_pretrained(folder / "saved")
    return model


def save_folded(folder: Path) -> Any:
    model = load_folded(folder)
    model.save_pretrained(folder / "saved folded")
    return model


def read_back(folder: Path) -> Any:
    """What resuming and loading the best model do with weights."""
    model = load(folder)
    read_weights(layer_parallel(model), folder / PLAIN)()
    return model


def train(folder: Path, steps: int = 1, resume: bool = False) -> Any:
    """With AdamW on a few tokens; every step is saved with the state of the optimizer."""
    rows = [{"input_ids": torch.arange(16) + row, "labels": torch.arange(16) + row} for row in range(2)]
    args = LayerParallelTrainingArguments(
        str(folder / "run"),
        lp_size=RANKS,
        max_steps=steps,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        per_device_train_batch_size=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = LayerParallelTrainer(str(folder / PLAIN), args, train_dataset=rows)  # type: ignore[arg-type]
    trainer.train(resume_from_checkpoint=resume)
    return trainer.model


def resume(folder: Path) -> Any:
    return train(folder, steps=2, resume=True)


PHASES: dict[str, Callable[[Path], Any]] = {
    "load": load,
    "load, twice as deep": load_refined,
    "load the folded form": load_folded,
    "save": save,
    "save the folded form": save_folded,
    "read back": read_back,
    "train a step, save": train,
    "resume, train a step, save": resume,
}
COPIES = {phase: 4 if "train" in phase else 1 for phase in PHASES}
"""Of all that a process owns: parameters, and in training their gradients and two states of AdamW."""


# ---- one process
def measure(phase: str, folder: Path) -> dict[str, Any]:
    """Runs a phase as one of the ranks, and returns what it owns and what it took at most."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    before = _peak()
    model = PHASES[phase](folder)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.sum()  # a file that is mapped takes no memory until it is read
    handle, view = layer_parallel(model), ode_view(model)
    layers = [p for stack in view.stacks for layer in stack.layers for p in layer.parameters()]
    ends = sum(p.shape.numel() * p.dtype.itemsize for p in handle.ends)  # also those that other ranks keep
    own, peak = bytes_of(layers), _peak()
    allowed = int(1.1 * COPIES[phase] * (own + ends) + 10**9)
    found = {"rank": handle.lp_rank, "own_layers": own, "ends": ends, "before": before, "peak": peak}
    return found | {"allowed": allowed, "within": peak <= allowed}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def make_checkpoints(folder: Path) -> None:
    """Both, in a process of its own, whose memory doesn't count."""
    torch.manual_seed(0)
    config = LlamaConfig(**MODEL, architectures=["LlamaForCausalLM"])
    LlamaForCausalLM(config).save_pretrained(folder / PLAIN, max_shard_size="200MB")
    model = from_pretrained(config, step_size=1 / 4, num_steps=MODEL["num_hidden_layers"])
    model.save_pretrained(folder / FOLDED, max_shard_size="200MB")
    assert json.loads((folder / FOLDED / "config.json").read_text())["hf_layerpar"]["folded"]


# ---- all of them
def run(arguments: list[str], processes: int = 1) -> None:
    """This script in fresh processes, one thread each."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run([*command, str(Path(__file__)), *arguments], cwd=ROOT, env=environment, check=True, timeout=1800)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "big_model.json")
    parser.add_argument("--phases", nargs="+", choices=list(PHASES), default=list(PHASES))
    parser.add_argument("--phase", help=argparse.SUPPRESS)  # given to the processes that this script starts
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.phase is not None:
        found = measure(options.phase, options.folder)
        write_json(options.folder / f"{found['rank']}.json", found)
        dist.barrier()
        dist.destroy_process_group()
        return
    if options.folder is not None:
        make_checkpoints(options.folder)
        return

    phases: dict[str, list[dict[str, Any]]] = {}
    if options.output.exists() and options.phases != list(PHASES):
        phases = json.loads(options.output.read_text(encoding="utf-8"))["phases"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(["--folder", name])
        files = [file.stat().st_size for file in (folder / PLAIN).glob("*.safetensors")]
        for phase in options.phases:
            run(["--phase", phase, "--folder", name], RANKS)
            phases[phase] = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]
    result = {
        "settings": {"model": MODEL, "ranks": RANKS, "dtype": "float32", "bytes": sum(files), "files": len(files)},
        "phases": phases,
        "within": all(rank["within"] for ranks in phases.values() for rank in ranks),
        "versions": versions(),
    }
    write_json(options.output, result)
    gigabytes = {
        key: [f"{rank[key] / 1e9:.2f}" for ranks in phases.values() for rank in ranks] for key in ("peak", "allowed")
    }
    labels = [f"{phase}, rank {rank['rank']}" for phase, ranks in phases.items() for rank in ranks]
    rows = [
        (label, f"peak {peak} GB, allowed {most} GB")
        for label, peak, most in zip(labels, *gigabytes.values(), strict=True)
    ]
    print_table([*rows, ("within", str(result["within"]))])


if __name__ == "__main__":
    main()
