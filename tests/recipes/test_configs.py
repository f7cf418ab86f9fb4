"""The accelerate config files start as many gloo processes as their names say, each on the CPU."""

from __future__ import annotations

import json

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


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_cpu_config_starts_its_processes(processes, tmp_path):
    script, out = tmp_path / "who.py", tmp_path / "out"
    script.write_text(SCRIPT)
    out.mkdir()
    launch(processes, script, [str(out)], timeout=120)
    found = {p.stem: json.loads(p.read_text()) for p in out.iterdir()}
    backend = "gloo" if processes > 1 else None
    assert found == {str(r): {"backend": backend, "device": "cpu", "size": processes} for r in range(processes)}


def test_gpu_config_asks_for_eight_gpus():
    settings = yaml.safe_load((CONFIGS / "gpu_8.yaml").read_text())
    assert (settings["num_processes"], settings["distributed_type"], settings["use_cpu"]) == (8, "MULTI_GPU", False)


def test_failing_script_is_reported_with_its_output(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text("raise SystemExit('gave up on purpose')")
    with pytest.raises(RuntimeError, match="gave up on purpose"):
        launch(1, script, [], timeout=120)
