"""Under a launcher and with trackers, as a user would run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.multiproc import RankPool, free_port
from tests.training import runs, scenarios


def launched(processes: int, folder: Path, *options: str) -> dict[str, float]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    command += ["--master_port", str(free_port()), str(Path(__file__).with_name("script.py"))]
    command += ["--output_dir", str(folder), "--use_cpu", "--max_steps", "6", "--seed", "3", "--logging_steps", "1"]
    command += ["--per_device_train_batch_size", "4", "--learning_rate", "1e-3", *options]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((folder / "result.json").read_text())


def test_torchrun(ranks1: RankPool, tmp_path: Path) -> None:
    tracked = ["--report_to", "tensorboard", "--run_name", "x", "--save_strategy", "no"]
    metrics = launched(
        2, tmp_path / "two", "--lp_size", "2", "--strategy", "pipeline", "--micro_batches", "2", *tracked
    )
    one = ranks1.run(runs.train, str(tmp_path), "bert_classifier", {"max_steps": 6, "micro_batches": 2})[0]
    stock = hf.BertForSequenceClassification.from_pretrained(tmp_path / "two")
    assert runs.digest(stock.state_dict()) == one["weights"]
    samples = runs.Samples("bert_classifier", 7, 1000)
    batch = hf.default_data_collator([samples[i] for i in range(7)])
    with torch.no_grad():
        loss = stock.eval()(**batch).loss.item()
    assert metrics["eval_loss"] == pytest.approx(loss, abs=1e-5)
    (events,) = (tmp_path / "two" / "runs").glob("*")
    written = EventAccumulator(str(events)).Reload()
    assert {"train/loss", "train/lp_seconds", "train/lp_waited"} <= set(written.Tags()["scalars"])
    assert [e.value for e in written.Scalars("train/loss")] == pytest.approx(one["losses"], abs=1e-5)


def on_the_cpu_unasked(output_dir: str) -> tuple[bool, int]:
    args = runs.arguments(output_dir, use_cpu=False, lp_size=2)
    return args.use_cpu, args.world_size


@pytest.mark.skipif(torch.accelerator.is_available(), reason="an accelerator is what is meant then")
def test_without_an_accelerator_use_cpu_is_meant(ranks2: RankPool, tmp_path: Path) -> None:
    assert ranks2.run(on_the_cpu_unasked, str(tmp_path)) == [(True, 2)] * 2


def test_adapters(ranks1: RankPool, ranks2: RankPool, tmp_path: Path) -> None:
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-2}
    one = ranks1.run(scenarios.train_adapters, str(tmp_path / "one"), settings)[0]
    two = ranks2.run(scenarios.train_adapters, str(tmp_path / "two"), settings | {"lp_size": 2})[0]
    assert two["weights"] == one["weights"]
    middle = str(tmp_path / "two" / "checkpoint-3")
    assert "adapter_model.safetensors" in os.listdir(middle)
    for pool in (ranks1, ranks2):
        again = pool.run(scenarios.train_adapters, str(tmp_path / "again"), settings | {"lp_size": pool.world}, middle)[
            0
        ]
        assert again["weights"] == one["weights"]


def test_iterable_datasets(ranks1: RankPool, ranks2: RankPool, ranks4: RankPool, tmp_path: Path) -> None:
    one = ranks1.run(scenarios.train_on_streams, str(tmp_path), {})[0]
    assert one["labels"] == [i % 2 for i in range(13)]
    assert ranks2.run(scenarios.train_on_streams, str(tmp_path), {"lp_size": 2})[0] == one
    flat = ranks2.run(scenarios.train_on_streams, str(tmp_path), {})[0]
    grid = ranks4.run(scenarios.train_on_streams, str(tmp_path), {"lp_size": 2})[0]
    assert grid["weights"] == flat["weights"] != one["weights"]
    assert grid["labels"] == flat["labels"] == one["labels"]
