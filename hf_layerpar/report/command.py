"""`hf-layerpar report`: what a training run did, from its logs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from hf_layerpar.report.pictures import draw_run
from hf_layerpar.report.run import as_text, read_run, summary


def add_report(commands: Any) -> None:
    """Adds the command to the parsers of `hf-layerpar`."""
    report = commands.add_parser(
        "report",
        help="Losses, settings and switches of a training run, as text and picture.",
        description="Reads trainer_state.json of a Trainer's output_dir (or of its newest checkpoint) and says which "
        "settings trained which share of the steps, when and why they changed, and how the losses compare.",
    )
    report.set_defaults(run=_report)
    report.add_argument("folder", type=Path, metavar="RUN", help="output_dir of the run.")
    report.add_argument(
        "--against", type=Path, nargs="+", default=[], metavar="RUN", help="Runs to compare its losses with."
    )
    report.add_argument("--png", type=Path, metavar="FILE", help="Draw the run; needs matplotlib.")
    report.add_argument("--json", type=Path, metavar="FILE", help="Write the summary.")


def _report(options: argparse.Namespace) -> None:
    run, against = read_run(options.folder), [read_run(folder) for folder in options.against]
    print(as_text(run, against))
    if options.json:
        options.json.write_text(json.dumps(summary(run, against), indent=1) + "\n", encoding="utf-8")
        print(f"written to {options.json}")
    if options.png:
        draw_run(run, options.png, against)
        print(f"drawn to {options.png}")
