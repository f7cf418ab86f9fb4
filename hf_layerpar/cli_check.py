"""`hf-layerpar check`: diagnoses a model on real text. Everything heavy is imported when it runs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_layerpar.cli_errors import reading
from hf_layerpar.cli_settings import add_setting
from hf_layerpar.config import OdeSettings, whole
from hf_layerpar.errors import ConfigurationError


def add_check(commands: Any, positive: Callable[[str], int]) -> None:
    """Adds the command to the parsers of `hf-layerpar`. positive: the type of its counts."""
    check = commands.add_parser(
        "check",
        help="Measure whether a model can be trained layer-parallel, and with which settings.",
        description="Reads a model's layers, compares the gradient of every solver setting with the exact one on a few "
        "batches, predicts the step on so many ranks, and says in one sentence what to use. Give the batch size and "
        "length of a training step.",
    )
    check.set_defaults(run=_check)
    check.add_argument("model", metavar="MODEL", help="Local folder, or name on the hub.")
    source = check.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--text", type=Path, metavar="FILE", help="Text to make batches of; lines of label<TAB>text for classification."
    )
    source.add_argument("--random", action="store_true", help="Random tokens instead; says little about training.")
    check.add_argument(
        "--task",
        choices=("causal-lm", "masked-lm", "sequence-classification"),
        help="With another task than its own a model gets a new head. (default: by the model's architecture)",
    )
    for name, default, meaning in (
        ("batches", 2, "Batches that are read."),
        ("batch-size", 4, "Rows of a batch."),
        ("tokens", 64, "Tokens of a row, at least 2."),
        ("ranks", 8, "lp ranks to predict for."),
    ):
        check.add_argument(
            f"--{name}", type=positive, default=default, metavar="N", help=f"{meaning} (default: {default})"
        )
    check.add_argument(
        "--coarsening",
        type=positive,
        nargs="+",
        metavar="N",
        help="Fine steps per coarse step, each number tried by itself. (default: those that fit of 2, 4, 8)",
    )
    add_setting(check, OdeSettings, "buffers", unset="by trial")
    check.add_argument("--threads", type=positive, metavar="N", help="Processor threads. (default: as torch chooses)")
    check.add_argument("--json", type=Path, metavar="FILE", help="Write everything that was read.")
    check.add_argument("--png", type=Path, metavar="FILE", help="Draw it; needs matplotlib.")


def _check(options: argparse.Namespace) -> None:
    import torch
    import transformers

    from hf_layerpar.diagnosis.batches import labels_in, load_model, random_batches, task_of, text_batches
    from hf_layerpar.diagnosis.diagnose import diagnose
    from hf_layerpar.report.diagnosis import draw_diagnosis, print_diagnosis

    whole(2)("--tokens", options.tokens)  # of one token nothing follows
    for name in ("batches", "batch_size", "ranks"):
        whole(1)(f"--{name.replace('_', '-')}", getattr(options, name))
    if options.threads:
        torch.set_num_threads(whole(1, 1024)("--threads", options.threads))
    num_labels = 2
    if options.task == "sequence-classification" and options.text:
        num_labels = max(num_labels, labels_in(options.text))
    with reading(options.model):
        model = load_model(options.model, options.task, num_labels)
        tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    task = options.task or task_of(model.config)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and options.tokens > limit:
        raise ConfigurationError(f"--tokens {options.tokens} is more than the {limit} positions of the model")
    size = {"count": options.batches, "rows": options.batch_size, "tokens": options.tokens}
    if options.random:
        batches = random_batches(tokenizer, task, num_labels=model.config.num_labels or 2, **size)
    else:
        batches = text_batches(tokenizer, task, options.text, **size)
    found = diagnose(
        model,
        batches,
        ranks=options.ranks,
        buffers=None if options.buffers is None else tuple(options.buffers),
        coarsenings=options.coarsening,
        progress=lambda text: print(text, file=sys.stderr),
    )
    print_diagnosis(found)
    if options.json:
        options.json.write_text(json.dumps(found.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if options.png:
        draw_diagnosis(found, options.png)
