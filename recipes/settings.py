"""Settings of the recipes: dataclasses, an optional YAML file and options, and what every recipe sets alike."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from torch import nn
from transformers import HfArgumentParser, PreTrainedModel, Seq2SeqTrainingArguments

from hf_layerpar.config import OdeSettings, num_buffers
from hf_layerpar.errors import ConfigurationError
from hf_layerpar.ode.convert import convert_to_ode
from hf_layerpar.training.arguments import LayerParallelTrainingArguments

Recipe = TypeVar("Recipe")


@dataclass
class NetworkArguments:
    """A network of new layers: inner layers, one Euler step of size h each, between buffer layers of step size 1."""

    width: int = field(default=128, metadata={"help": "Hidden size; the MLPs are four times as wide."})
    heads: int = field(default=4, metadata={"help": "Attention heads."})
    inner_layers: int = field(default=16, metadata={"help": "Layers between the buffers, one Euler step each."})
    buffers: list[int] = field(
        default_factory=lambda: [2, 2],
        metadata={"help": "Layers kept exact: open and close, or open, places between, close."},
    )
    step_size: float = field(default=1 / 16, metadata={"help": "h of the inner layers."})
    form: str = field(default="auto", metadata={"help": "'euler', 'split' or 'auto' (split where layers are pre-LN)."})
    dropout: float = field(default=0.0, metadata={"help": "Every dropout rate of the network."})
    agreement_batches: int = field(
        default=2, metadata={"help": "Batches on which an MGRIT gradient is compared with the exact one."}
    )

    def __post_init__(self) -> None:
        if self.heads < 1 or self.width % self.heads:
            raise ConfigurationError(f"width={self.width} must be a multiple of heads={self.heads}")

    @property
    def num_layers(self) -> int:
        return self.inner_layers + num_buffers(OdeSettings(buffers=tuple(self.buffers)).buffers)

    def as_ode(self, model: PreTrainedModel) -> nn.Module:
        """The network with `num_layers` layers a stack in its ODE form."""
        return convert_to_ode(
            model,
            step_size=self.step_size,
            num_steps=self.inner_layers,
            form=self.form,  # type: ignore[arg-type]
            buffers=tuple(self.buffers),  # type: ignore[arg-type]
        )


def common_settings() -> dict[str, Any]:
    """What every recipe sets differently from the training arguments' own defaults."""
    return {
        "lp_size": int(os.environ.get("WORLD_SIZE", "1")),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),  # without it, processes on the CPU would not find each other
    }


class _Parser(HfArgumentParser):
    """Its help has the recipe's options first, then those of the layer axis, and of the Trainer's hundred the names."""

    def format_help(self) -> str:
        formatter = self._get_formatter()
        formatter.add_text(self.description)
        kinds = [{f.name for f in dataclasses.fields(t)} for t in (self.dataclass_types[0], Seq2SeqTrainingArguments)]
        sections: tuple[list[Any], ...] = ([], [], [])
        for action in map(copy.copy, self._actions[1:]):  # the first is --help
            name = action.dest
            action.option_strings = action.option_strings[:1]
            sections[0 if name in kinds[0] else 2 if name in kinds[1] else 1].append(action)
        for title, actions in zip(("the recipe", "layers over processes"), sections, strict=False):
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        formatter.start_section("training, as transformers' Seq2SeqTrainingArguments")
        names = dict.fromkeys(f"--{action.dest}" for action in sections[2])
        formatter.add_text(textwrap.fill(" ".join(names), 90, break_on_hyphens=False))
        formatter.end_section()
        return formatter.format_help()


def parse_settings(
    recipe: type[Recipe], defaults: dict[str, Any], argv: Sequence[str], about: str | None
) -> tuple[Recipe, LayerParallelTrainingArguments]:
    """Settings from an optional YAML file (first) and options (after it), for a recipe's dataclass and the training.

    defaults: of either, used where neither file nor options say anything. about: what `--help` begins with.
    Raises ConfigurationError for a setting in the file that no option is called, and for a stream that several workers
    read.
    """
    types: Any = (recipe, LayerParallelTrainingArguments)
    parser = _Parser(types, description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = {action.dest for action in parser._actions}
    argv = list(argv)
    if argv and argv[0].endswith((".yaml", ".yml")):
        path = argv.pop(0)
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        unknown = sorted(set(loaded) - known)
        if unknown:
            raise ConfigurationError(f"{path} sets {unknown}, which no option is called; see --help for the options")
        defaults = defaults | loaded
    parser.set_defaults(**defaults)
    found, args = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    if str(args.resume_from_checkpoint).lower() == "true":  # as an option it is text
        args.resume_from_checkpoint = True
    if getattr(found, "streaming", False) and args.dataloader_num_workers:
        raise ConfigurationError(
            f"dataloader_num_workers={args.dataloader_num_workers} with streaming: each worker would leave out its own "
            "first rows instead of the validation rows, and train on the rest of these; use 0"
        )
    return found, args
