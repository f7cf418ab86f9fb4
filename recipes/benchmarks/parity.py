"""Does the layer-parallel run train like the stock one? The GLUE recipe in several layouts, from the same seed.

    python recipes/benchmarks/parity.py [--steps 60] [--only refined]

Stock Trainer in one process, ours in one, ours as the exact pipeline over two; each without dropout and with the
model's own. Without dropout all three do the same arithmetic. With dropout ours draws one seed a layer, the same on any
number of ranks, so ours agree with each other and stock sees other masks. The refined network is trained exactly and
with MGRIT (one and two iterations a sweep), over two processes. Written to recipes/benchmarks/results/glue_parity.json;
with --only, the runs whose name does not start so stay there as they are.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that a checkout runs without being installed

from safetensors.torch import load_file

from recipes.benchmarks.launch import RESULTS, ROOT, launch
from recipes.results import print_table, write_json

SCRIPT = ROOT / "recipes" / "glue_bert.py"
REFINED = str(ROOT / "recipes" / "glue_bert_refined.yaml")
BATCH = ["--per_device_train_batch_size", "16"]
NO_DROPOUT = ["--dropout", "0.0"]
RUNS: dict[str, tuple[int, list[str]]] = {
    "stock, no dropout": (1, ["--stock", *NO_DROPOUT]),
    "1 process, no dropout": (1, NO_DROPOUT),
    "pipeline on 2, no dropout": (2, NO_DROPOUT),
    "stock": (1, ["--stock"]),
    "1 process": (1, []),
    "pipeline on 2": (2, []),
    "refined, pipeline on 2": (2, [REFINED, "--strategy", "pipeline", "--micro_batches", "4"]),
    "refined, mgrit 1/1 on 2": (2, [REFINED, "--forward_iterations", "1", "--backward_iterations", "1"]),
    "refined, mgrit 2/2 on 2": (2, [REFINED, "--forward_iterations", "2", "--backward_iterations", "2"]),
}
PAIRS = (
    ("stock, no dropout", "1 process, no dropout"),
    ("stock, no dropout", "pipeline on 2, no dropout"),
    ("stock", "1 process"),
    ("1 process", "pipeline on 2"),
    ("refined, pipeline on 2", "refined, mgrit 1/1 on 2"),
    ("refined, pipeline on 2", "refined, mgrit 2/2 on 2"),
)
"""Compared with each other; stock and ours with dropout differ by their masks, the last two by MGRIT's error."""


def compare(first: dict[str, Any], second: dict[str, Any], first_dir: Path, second_dir: Path) -> dict[str, float]:
    """Largest differences of the losses of the steps and of the final weights, and the test accuracies' difference."""
    losses = [[step["loss"] for step in run["steps"]] for run in (first, second)]
    weights = [load_file(folder / "model" / "model.safetensors") for folder in (first_dir, second_dir)]
    if weights[0].keys() != weights[1].keys():
        raise RuntimeError(
            f"the two models hold different tensors: {sorted(weights[0].keys() ^ weights[1].keys())[:4]}"
        )
    return {
        "max_loss_difference": max(abs(a - b) for a, b in zip(*losses, strict=True)),
        "max_weight_difference": max(float((weights[0][k] - weights[1][k]).abs().max()) for k in weights[0]),
        "test_accuracy_difference": second["metrics"]["test"]["accuracy"] - first["metrics"]["test"]["accuracy"],
    }


def entry(name: str, run: dict[str, Any]) -> dict[str, Any]:
    """What the result keeps of a run's result.json. No times: parity runs may share the machine with others."""
    kept = {key: run["settings"][key] for key in ("layer_parallel", "ode", "training")}
    kept |= {key: run[key] for key in ("metrics", "gradient_agreement", "versions")}
    return {"processes": RUNS[name][0], "losses": [step["loss"] for step in run["steps"]]} | kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--only", default="", help="Beginning of the names of the runs to make.")
    parser.add_argument("--output", type=Path, default=RESULTS / "glue_parity.json")
    options = parser.parse_args()
    names = [name for name in RUNS if name.startswith(options.only)]
    if not names:
        parser.error(f"no run starts with {options.only!r}; they are {list(RUNS)}")

    result: dict[str, Any] = {"runs": {}, "comparisons": {}}
    if len(names) < len(RUNS) and options.output.exists():
        before = json.loads(options.output.read_text())
        result["runs"] = {name: run for name, run in before["runs"].items() if name in RUNS and name not in names}
        pairs = {f"{a} / {b}" for a, b in PAIRS if a in result["runs"] and b in result["runs"]}
        result["comparisons"] = {pair: found for pair, found in before["comparisons"].items() if pair in pairs}
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch) / str(i) for i, name in enumerate(names)}
        found: dict[str, dict[str, Any]] = {}
        for name, folder in folders.items():
            processes, arguments = RUNS[name]
            launch(
                processes, SCRIPT, [*arguments, "--max_steps", str(options.steps), "--output_dir", str(folder), *BATCH]
            )
            found[name] = json.loads((folder / "result.json").read_text())
            accuracy = found[name]["metrics"]["test"]["accuracy"]
            print(f"{name}: test accuracy {accuracy:.4f}, {found[name]['seconds']['training']:.0f} s", flush=True)
        for a, b in PAIRS:
            if a in found and b in found:
                result["comparisons"][f"{a} / {b}"] = compare(found[a], found[b], folders[a], folders[b])
    result["runs"] |= {name: entry(name, run) for name, run in found.items()}
    write_json(options.output, result)
    table = {f"{pair}: {key}": value for pair, values in result["comparisons"].items() for key, value in values.items()}
    print_table([(name, f"{value:.3g}") for name, value in table.items()])


if __name__ == "__main__":
    main()
