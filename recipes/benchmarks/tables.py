"""Writes the README's benchmark tables from the JSON files, between its `<!-- table: name -->` marks.

    python recipes/benchmarks/tables.py

A figure in the README comes from a file that a command wrote; a test checks that this command would change nothing.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that a checkout runs without being installed

from recipes.benchmarks.launch import RESULTS, ROOT

README = ROOT / "README.md"
MARK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def load(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def parity() -> str:
    result = load("glue_parity.json")
    rows = [
        [
            pair.replace(" / ", " against "),
            f"{found['max_loss_difference']:.1e}",
            f"{found['max_weight_difference']:.1e}",
            f"{found['test_accuracy_difference']:+.4f}",
        ]
        for pair, found in result["comparisons"].items()
    ]
    return markdown(["runs", "largest loss difference", "largest weight difference", "test accuracy"], rows)


def parity_runs() -> str:
    rows = []
    for name, run in load("glue_parity.json")["runs"].items():
        test, agreement = run["metrics"]["test"], run["gradient_agreement"]
        cosines = [
            ", ".join(f"{batch['cosine']:.3f}" for batch in agreement.get(when, [])) or "exact"
            for when in ("before", "after")
        ]
        rows.append([name, f"{test['accuracy']:.4f}", f"{test['f1']:.4f}", *cosines])
    return markdown(["run", "test accuracy", "F1", "gradient cosine before", "after"], rows)


def memory() -> str:
    result = load("memory.json")
    one = result["ranks"]["1"][0]
    rows = []
    for rank in (one, *result["ranks"]["2"]):
        label = "one rank" if rank is one else f"rank {rank['lp_rank']} of two"
        layers, resident = rank["layers"], rank["resident"]["peak"]
        parts = [f"{layers[part] / 2**20:.0f}" for part in ("weights", "gradients", "adam", "sum")]
        ratio = f"{layers['sum'] / one['layers']['sum']:.2f}"
        rows.append([label, *parts, ratio, f"{resident / 2**20:.0f}", f"{resident / one['resident']['peak']:.2f}"])
    head = ["MiB", "layer weights", "gradients", "Adam", "sum", "ratio", "whole process at its peak", "ratio"]
    return markdown(head, rows)


def speed() -> str:
    """Ratios to serial one-thread torch on two ranks, by depth, with the cosine of the shallowest."""
    tables = [t for t in load("speed.json")["tables"] if t["table"] == "stack" and t["ranks"] == 2]
    tables.sort(key=lambda t: t["layers"])
    rows = []
    for name, side in tables[0]["sides"].items():
        cells = []
        for table in tables:
            found = table["sides"][name]
            cells.append(f"{found['ratio']:.2f}" if "ratio" in found else "fails")
        cosine = f"{side['gradient']['cosine']:.4f}" if "gradient" in side else side["error"].split("\n")[0][:60]
        rows.append([name, *cells, cosine])
    return markdown(["side", *(f"N={t['layers']}" for t in tables), f"cosine (N={tables[0]['layers']})"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "parity": parity,
    "parity_runs": parity_runs,
    "memory": memory,
    "speed": speed,
}


def filled(text: str) -> str:
    """The README with every marked table written anew. KeyError for a mark that names no table."""
    return MARK.sub(lambda match: match[1] + TABLES[match[2]]() + match[3], text)


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
