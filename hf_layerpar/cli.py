"""The `hf-layerpar` command.

`check` diagnoses a model, `convert` writes its ODE form, `plan` predicts a step, `report` shows a run's logs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from hf_layerpar.cli_check import add_check
from hf_layerpar.cli_convert import add_convert
from hf_layerpar.cli_errors import Parser, refused
from hf_layerpar.cli_settings import add_setting, listed
from hf_layerpar.config import LayerParallelConfig, OdeSettings, describe, shown, whole
from hf_layerpar.errors import ConfigurationError
from hf_layerpar.plan.costs import Costs
from hf_layerpar.plan.memory import fullest, parts_text, size_of, size_text
from hf_layerpar.plan.ownership import balanced_split, contiguous_owner, interleaved_owner, two_blocks_owner
from hf_layerpar.plan.planner import Accuracy, Choice, check_fits, check_shape, check_size, plan_step, predict_step
from hf_layerpar.plan.schedules import SCHEDULES, Placement
from hf_layerpar.plan.simulate import Timeline
from hf_layerpar.plan.step import check_config, interval_points
from hf_layerpar.report.command import add_report
from hf_layerpar.report.drawing import check_folder, check_picture
from hf_layerpar.report.timeline import as_text, draw


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code: 2, with the reason on stderr, for what can't be done."""
    options = _parser().parse_args(arguments)
    try:
        # what can't be written is refused before anything is computed
        if getattr(options, "png", None):
            check_picture(options.png)
        if getattr(options, "json", None):
            check_folder(options.json)
        options.run(options)
    except Exception as error:
        return refused(error)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="hf-layerpar",
        description="Layer-parallel training: models diagnosed and converted, steps predicted, runs reviewed.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_report(commands)
    _add_plan(commands)
    add_check(commands, _positive)
    add_convert(commands, _positive)
    return parser


PLANNED = tuple(f.name for f in dataclasses.fields(LayerParallelConfig) if f.name != "cuda_graphs")
"""Settings that plans know of."""

COMMON = ("step", "vjp", "weights", "tail", "latency", "bandwidth", "state_bytes")
"""Prices that people set; the others are mostly measured."""

_EXAMPLE = """example, with the time line as a picture:
  hf-layerpar plan --layers 128 --ranks 8 --strategy mgrit --micro-batches 4 --cost tail=3 --png step.png"""


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        help="Time line, idle share, traffic and memory of one training step.",
        usage="%(prog)s --layers N --ranks N [OPTION ...]",
        description="Predicts one training step (forward and backward) of a layer stack over the lp ranks.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    plan.set_defaults(run=_plan)
    step = plan.add_argument_group("the step")
    step.add_argument(
        "--layers", type=_positive, required=True, metavar="N", help="Layers of the stack, buffers included; required."
    )
    add_setting(step, OdeSettings, "buffers")
    for name in PLANNED:
        add_setting(step, LayerParallelConfig, name)
    step.add_argument(
        "--checkpointing", action="store_true", help="Evaluate layers again in the backward. (default: off)"
    )
    step.add_argument(
        "--choose",
        choices=get_args(Accuracy),
        help="Search for the fastest setting instead, with 1, 2, 4 ... up to --micro-batches. exact: pipelines; high: "
        "aggregate with a correction of the forward or an exact one; good: without too; any: all operators. "
        "(default: no search)",
    )
    machine = plan.add_argument_group(
        "the machine",
        "Prices are of the whole batch, in any unit. Those that are often set, and defaults:\n" + listed(Costs, COMMON),
    )
    machine.add_argument("--ranks", type=_positive, required=True, metavar="N", help="lp ranks; required.")
    owner = machine.add_mutually_exclusive_group()
    owner.add_argument(
        "--split", type=int, nargs="+", metavar="N", help="Layers of each rank. (default: as `parallelize` shares them)"
    )
    owner.add_argument(
        "--interleaved",
        action="store_true",
        help="Deal each MGRIT interval out to all ranks, or two blocks of a pipeline to each. (default: off)",
    )
    machine.add_argument(
        "--cost",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="A price, of those above or of --list-costs; may be given again.",
    )
    names = [f.name for f in dataclasses.fields(Costs)]
    machine.add_argument(
        "--list-costs", action="version", version=listed(Costs, names), help="Say what all prices mean, and exit."
    )
    machine.add_argument(
        "--costs",
        type=Path,
        metavar="FILE",
        help="Prices that `hf-layerpar check MODEL --json FILE` measured, before those of --cost. (default: none)",
    )
    machine.add_argument(
        "--memory",
        metavar="SIZE",
        help="Of a rank, as in 24GiB: refuse what takes more, and say what would fit. (default: no limit)",
    )
    output = plan.add_argument_group("output")
    output.add_argument("--tasks", action="store_true", help="Print the tasks too. (default: off)")
    output.add_argument(
        "--png", type=Path, metavar="FILE", help="Draw the time line; needs matplotlib. (default: not drawn)"
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or len(text) > 40 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{shown(text)} must be a positive integer")
    return int(text)


def _plan(options: argparse.Namespace) -> None:
    costs = _costs(options.cost, {} if options.costs is None else _measured(options.costs))
    costs = costs.recomputed() if options.checkpointing else costs
    memory = None if options.memory is None else size_of(options.memory)
    if memory is not None and not (costs.graph_bytes and costs.layer_bytes):
        raise ConfigurationError(
            f"--memory {options.memory} says nothing without what a layer takes: give --costs FILE, or --cost "
            "layer_bytes=, graph_bytes= and the others in bytes"
        )
    buffers = OdeSettings(buffers=tuple(options.buffers)).buffers
    if options.choose and options.split:
        raise ConfigurationError("--choose finds the split; leave --split out")
    for name in ("layers", "ranks"):
        whole(1, MOST_LAYERS)(f"--{name}", getattr(options, name))
    config = LayerParallelConfig(**{name: getattr(options, name) for name in PLANNED})
    check_config(config, options.ranks)
    if options.choose:
        config, owner = _choose(options, costs, memory)
    else:
        check_size(config, options.layers, options.ranks)
        owner = _owner(options, config, costs)
        check_shape(options.layers, options.ranks, buffers)
    step = predict_step(config, owner, costs, num_ranks=options.ranks, buffers=buffers)
    if options.tasks:
        print(step.plan)
    print(as_text(step))
    print(summary(step))
    if memory is not None:
        check_fits(step, memory, config, costs, buffers=buffers)
    if options.png:
        unit = {"unit": "units of the costs"} if options.cost or options.costs else {}
        draw({describe(config, pieces=True): step}, options.png, **unit)
        print(f"drawn to {options.png}")


MOST_LAYERS = 1_000_000
"""Also of ranks."""

_ASSUMED = (
    "assumed: half a batch takes half the time, messages and launches take none. That flatters micro-batches and many "
    "ranks where layers are small: there, measure (`hf-layerpar check MODEL`), or give --cost fixed_share=, overhead= "
    "and latency="
)


def summary(step: Timeline) -> str:
    """Time, idle share, traffic and memory of a step, a line each."""
    idle, peaks = step.idle_shares, step.peaks
    most = fullest(step)
    memory = f"memory  rank {most} holds {peaks[most].graphs} layer graphs and {peaks[most].states} states"
    moved = f", {step.bytes_moved:.4g} bytes" if step.costs.state_bytes else ""
    time = f"time    {step.makespan:.4g}"
    if step.share:  # else there is nothing to compare with
        time += f", on one rank {step.serial:.4g}; predicted share of serial {step.share:.3f} ({1 / step.share:.2f}x)"
    lines = [
        time,
        f"idle    {100 * step.idle_share:.1f} % of rank time (ranks {100 * min(idle):.1f} to {100 * max(idle):.1f} %)",
        f"traffic {len(step.plan.messages)} messages{moved}",
        f"{memory} (of a micro-batch) at most"
        + (f", {size_text(peaks[most].bytes)}: {parts_text(peaks[most])}" if peaks[most].bytes else ""),
    ]
    return "\n".join(lines)


def _choose(
    options: argparse.Namespace, costs: Costs, memory: float | None
) -> tuple[LayerParallelConfig, Sequence[int]]:
    pieces = [2**k for k in range(max(1, options.micro_batches).bit_length())]
    choices = plan_step(
        options.layers,
        options.ranks,
        costs,
        accuracy=options.choose,
        buffers=tuple(options.buffers),
        micro_batches=pieces,
        interleaved=options.interleaved,
        memory=memory,
        note=print,
    )
    print(f"{'share':>6}  setting and layers of each rank")
    for choice in choices[:10]:
        print(f"{choice.share:6.3f}  {describe(choice.config, pieces=True)}, {_layout(choice)}")
    if not any((costs.fixed_share, costs.overhead, costs.send + costs.transfer())):
        print(_ASSUMED)
    return choices[0].config, choices[0].owner


def _owner(options: argparse.Namespace, config: LayerParallelConfig, costs: Costs) -> Sequence[int]:
    """As `parallelize` shares the layers out, or as asked for."""
    layers, ranks, buffers, split = options.layers, options.ranks, tuple(options.buffers), options.split
    points = interval_points(config, layers, buffers)
    if points and options.interleaved:
        return interleaved_owner(layers, ranks, points)
    if not points and not split and ranks <= layers:
        placement: Placement = getattr(SCHEDULES[config.schedule], "placement", "blocks")
        placement = "interleaved" if options.interleaved else placement
        if ranks > 1 and placement != "blocks":
            return two_blocks_owner(layers, ranks, placement)
        tail = 0.0 if config.ends == "spread" else costs.tail
        split = balanced_split(layers, ranks, costs.graph_step + costs.final_vjp, 0.0, tail)
    return contiguous_owner(layers, ranks, boundaries=points, split=split)


def _measured(path: Path) -> dict[str, float]:
    """The costs in what `check` wrote."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["costs"]
        stacks = {str(name): dict(costs) for name, costs in found.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigurationError(
            f"{path} has no costs in it ({type(error).__name__}: {error}); give what `hf-layerpar check MODEL --json "
            "FILE` wrote"
        ) from error
    if len(stacks) != 1:
        raise ConfigurationError(
            f"{path} has the costs of {len(stacks)} stacks, {', '.join(sorted(stacks))}; a plan is of one: give its "
            "costs by --cost"
        )
    (costs,) = stacks.values()
    # JSON has no infinity
    return {f.name: costs[f.name] for f in dataclasses.fields(Costs) if costs.get(f.name) is not None}


def _costs(settings: Sequence[str], values: dict[str, float]) -> Costs:
    names = [f.name for f in dataclasses.fields(Costs)]
    for setting in settings:
        name, _, value = setting.partition("=")
        try:
            values[name] = float(value)
        except ValueError:
            raise ConfigurationError(f"--cost {setting}: {value!r} is no number; write NAME=VALUE") from None
        if name not in names:
            raise ConfigurationError(f"--cost {setting}: {name!r} is unknown; use one of {', '.join(names)}")
    return Costs(**values)


def _layout(choice: Choice) -> str:
    if isinstance(choice.split, str):
        return choice.split
    few, many = min(choice.split), max(choice.split)
    return f"blocks of {few}" + (f" to {many}" if many > few else "")


if __name__ == "__main__":
    sys.exit(main())
