"""The accelerate config files start as many gloo processes as their names say, each on the CPU."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import yaml

from recipes.benchmarks.launch import CONFIGS, launch

SCRIPT = """
import json, sys
from pathlib import Path
import torch.distributed as dist
from accelerate import PartialState

state = PartialState(cpu=True)
found = {"backend": dist.get_backend() if dist.is_initialized() else None, "device": state.device.type,
         "size": state.num_processes}
Path(sys.argv[1], f"{state.process_index}.json").write_text(json.dumps(found))
if dist.is_initialized():
    dist.destroy_process_group()
"""


@pytest.mark.parametrize("processes", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2)), 4])
def test_cpu_config_starts_its_processes(processes, tmp_path):
    script, out = tmp_path / "who.py", tmp_path / "out"
    script.write_text(SCRIPT)
    out.mkdir()
    launch(processes, script, [str(out)], timeout=120)
    found = {p.stem: json.loads(p.read_text()) for p in out.iterdir()}
    backend = "gloo" if processes > 1 else None
    assert found == {str(r): {"backend": backend, "device": "cpu", "size": processes} for r in range(processes)}


@pytest.mark.parametrize(("name", "machines", "processes"), [("gpu_2", 1, 2), ("gpu_8", 1, 8), ("gpu_2x8", 2, 16)])
def test_gpu_configs_ask_for_their_gpus(name, machines, processes):
    settings = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    found = tuple(settings[key] for key in ("num_machines", "num_processes", "distributed_type", "use_cpu"))
    assert found == (machines, processes, "MULTI_GPU", False)


def test_the_slurm_script_starts_one_agent_a_node(tmp_path):
    """With stand-ins for SLURM's commands: what each node would run."""
    for name, does in (("scontrol", "printf 'node7\\nnode8\\n'"), ("srun", 'echo "$@"')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_PER_NODE": "h100:8"}
    env = os.environ | job | {"SLURM_JOB_ID": "5", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(CONFIGS / "slurm.sh"), "train.py", "--lp_size", "8"]
    said = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    assert said.startswith("torchrun --nnodes 2 --nproc_per_node 8 ")
    assert said.endswith("--rdzv_endpoint node7:29500 train.py --lp_size 8\n")


def test_failing_script_is_reported_with_its_output(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text("raise SystemExit('gave up on purpose')")
    with pytest.raises(RuntimeError, match="gave up on purpose"):
        launch(1, script, [], timeout=120)
