"""`hf-layerpar convert`: a checkpoint into its ODE form, and back. Everything heavy is imported when it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from hf_layerpar.cli_errors import reading
from hf_layerpar.cli_settings import add_setting
from hf_layerpar.config import Form, OdeSettings
from hf_layerpar.errors import ConfigurationError


def add_convert(commands: Any, positive: Callable[[str], int]) -> None:
    """Adds the command to the parsers of `hf-layerpar`. positive: the type of its counts."""
    convert = commands.add_parser(
        "convert",
        help="Write a checkpoint in its ODE form, or an ODE form as a plain checkpoint.",
        description="Reads every layer of a checkpoint as Euler steps of size h and writes the result as a new "
        "checkpoint, with tokenizer and processor. With --to-stock it takes the settings off again, where stock "
        "transformers computes the same without them.",
    )
    convert.set_defaults(run=_convert)
    convert.add_argument("source", metavar="SOURCE", help="Local folder, or name on the hub.")
    convert.add_argument("target", metavar="TARGET", type=Path, help="New folder.")
    add_setting(convert, OdeSettings, "step_size", unset="1")
    convert.add_argument(
        "--num-steps", type=positive, metavar="N", help="Inner steps of every stack. (default: layers / step size)"
    )
    add_setting(
        convert, OdeSettings, "form", unset="auto, split where layers allow it", choices=("auto", *get_args(Form))
    )
    add_setting(convert, OdeSettings, "interpolation", unset="constant")
    add_setting(convert, OdeSettings, "buffers", unset="0 0")
    convert.add_argument("--to-stock", action="store_true", help="A checkpoint of ours into a plain one.")


def _convert(options: argparse.Namespace) -> None:
    settings = {name: getattr(options, name) for name in ("step_size", "num_steps", "form", "interpolation", "buffers")}
    settings = {name: value for name, value in settings.items() if value is not None}
    if options.to_stock and settings:
        given = ", ".join(f"--{name.replace('_', '-')}" for name in settings)
        raise ConfigurationError(f"--to-stock takes the settings off; leave out {given}")
    from hf_layerpar.ode.transfer import to_ode, to_stock

    with reading(options.source):
        if options.to_stock:
            to_stock(options.source, options.target)
            said = " is a plain checkpoint"
        else:
            said = f": {to_ode(options.source, options.target, **settings)}"
    print(f"{options.target}{said}")
