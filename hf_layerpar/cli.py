"""The `hf-layerpar` command.

`check` diagnoses a model, `convert` writes its ODE form, `plan` predicts a step, `report` shows a run's logs.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from hf_layerpar.cli_check import add_check
from hf_layerpar.cli_convert import add_convert
from hf_layerpar.config import LayerParallelConfig, OdeSettings, Operator, Relaxation, Strategy
from hf_layerpar.errors import ConfigurationError, LayerParallelError
from hf_layerpar.plan.ownership import contiguous_owner, interleaved_owner
from hf_layerpar.plan.planner import Accuracy, Choice, plan_step, predict_step
from hf_layerpar.plan.simulate import Costs, StepTimeline
from hf_layerpar.plan.strategies import interval_points
from hf_layerpar.report.command import add_report
from hf_layerpar.report.timeline import as_text, draw


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code: 2, with the reason on stderr, for what can't be done."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (LayerParallelError, OSError) as error:
        print(f"hf-layerpar: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-layerpar",
        description="Layer-parallel training: models diagnosed and converted, steps predicted, runs reviewed.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_report(commands)
    plan = commands.add_parser(
        "plan",
        help="time line, idle share, traffic and memory of one training step",
        description="Predicts one training step (forward and backward) of a layer stack over the lp ranks. A layer "
        "forward, an input-vjp and a weight-vjp of the whole batch take 1 unless --cost says otherwise.",
    )
    plan.set_defaults(run=_plan)
    plan.add_argument("--layers", type=_positive, required=True, help="layers of the stack, buffers included")
    plan.add_argument("--ranks", type=_positive, required=True, help="lp ranks")
    default = LayerParallelConfig()
    plan.add_argument("--strategy", choices=get_args(Strategy), default=default.strategy)
    plan.add_argument("--levels", type=int, default=default.levels)
    plan.add_argument("--coarsening", type=int, nargs="+", default=[default.coarsening], metavar="C")
    plan.add_argument("--relaxation", choices=get_args(Relaxation), default=default.relaxation)
    plan.add_argument("--forward-iterations", type=int, default=default.forward_iterations)
    plan.add_argument("--backward-iterations", type=int, default=default.backward_iterations)
    plan.add_argument("--coarse-operator", choices=get_args(Operator), default=default.coarse_operator)
    plan.add_argument("--damping", type=float, default=default.damping)
    plan.add_argument("--micro-batches", type=int, default=default.micro_batches)
    plan.add_argument("--buffers", type=int, nargs=2, default=(0, 0), metavar=("OPEN", "CLOSE"))
    owner = plan.add_mutually_exclusive_group()
    owner.add_argument("--split", type=int, nargs="+", metavar="LAYERS", help="layers of each rank")
    owner.add_argument("--interleaved", action="store_true", help="each MGRIT interval dealt out to all ranks")
    names = ", ".join(f.name for f in dataclasses.fields(Costs))
    plan.add_argument("--cost", action="append", default=[], metavar="NAME=VALUE", help=f"one of {names}")
    plan.add_argument("--tasks", action="store_true", help="print the tasks of both sweeps too")
    plan.add_argument("--png", type=Path, metavar="FILE", help="draw the time line (needs matplotlib)")
    plan.add_argument(
        "--choose",
        choices=get_args(Accuracy),
        metavar="ACCURACY",
        help=f"search for the fastest setting instead, of accuracy {', '.join(get_args(Accuracy))}; tries 1, 2, 4 ... "
        "up to --micro-batches",
    )
    add_check(commands, _positive)
    add_convert(commands, _positive)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a positive integer")
    return int(text)


def _plan(options: argparse.Namespace) -> None:
    costs = _costs(options.cost)
    buffers = OdeSettings(buffers=tuple(options.buffers)).buffers
    if options.choose and options.split:
        raise ConfigurationError("--choose finds the split; leave --split out")
    if options.choose:
        config, owner = _choose(options, costs)
    else:
        factors = options.coarsening
        config = LayerParallelConfig(
            strategy=options.strategy,
            levels=options.levels,
            coarsening=factors[0] if len(factors) == 1 else tuple(factors),
            relaxation=options.relaxation,
            forward_iterations=options.forward_iterations,
            backward_iterations=options.backward_iterations,
            coarse_operator=options.coarse_operator,
            damping=options.damping,
            micro_batches=options.micro_batches,
        )
        owner = _owner(options, config)
    step = predict_step(config, owner, costs, num_ranks=options.ranks, buffers=buffers)
    if options.tasks:
        print(step.forward.plan, step.backward.plan, sep="\n")
    print(as_text(step))
    print(summary(step))
    if options.png:
        draw({_title(config): step}, options.png, **({"unit": "units of the costs"} if options.cost else {}))
        print(f"drawn to {options.png}")


def summary(step: StepTimeline) -> str:
    """Time, idle share, traffic and memory of a step, a line each."""
    idle, peaks, costs = step.idle_shares, step.peaks, step.forward.costs
    most = max(range(len(peaks)), key=lambda r: (peaks[r].bytes, peaks[r].graphs, peaks[r].states))
    messages = sum(len(sweep.plan.messages()) for sweep in (step.forward, step.backward))
    memory = f"memory  rank {most} holds {peaks[most].graphs} layer graphs and {peaks[most].states} states"
    lines = [
        f"time    {step.makespan:.4g}: forward {step.forward.makespan:.4g}, backward {step.backward.makespan:.4g}",
        f"serial  {step.serial:.4g} on one rank; predicted share of serial {step.share:.3f} ({1 / step.share:.2f}x)",
        f"idle    {100 * step.idle_share:.1f} % of rank time (ranks {100 * min(idle):.1f} to {100 * max(idle):.1f} %)",
        f"traffic {messages} messages" + (f", {step.bytes_moved:.4g} bytes" if costs.state_bytes else ""),
        f"{memory} (of a micro-batch) at most" + (f", {peaks[most].bytes:.4g} bytes" if peaks[most].bytes else ""),
    ]
    return "\n".join(lines)


def _choose(options: argparse.Namespace, costs: Costs) -> tuple[LayerParallelConfig, Sequence[int]]:
    pieces = [2**k for k in range(max(1, options.micro_batches).bit_length())]
    choices = plan_step(
        options.layers,
        options.ranks,
        costs,
        accuracy=options.choose,
        buffers=tuple(options.buffers),
        micro_batches=pieces,
        interleaved=options.interleaved,
    )
    print(f"{'share':>6}  setting and layers of each rank")
    for choice in choices[:10]:
        print(f"{choice.share:6.3f}  {_title(choice.config)}, {_layout(choice)}")
    return choices[0].config, choices[0].owner


def _owner(options: argparse.Namespace, config: LayerParallelConfig) -> Sequence[int]:
    """As `parallelize` shares the layers out, or as asked for."""
    layers, ranks, buffers = options.layers, options.ranks, tuple(options.buffers)
    points = interval_points(config, layers, buffers)
    if options.interleaved:
        if not points:
            raise ConfigurationError(f"--interleaved needs the intervals of --strategy mgrit, not {config.strategy}")
        return interleaved_owner(layers, ranks, points, buffers)
    return contiguous_owner(layers, ranks, boundaries=points, split=options.split)


def _costs(settings: Sequence[str]) -> Costs:
    names = [f.name for f in dataclasses.fields(Costs)]
    values: dict[str, float] = {}
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


def _title(config: LayerParallelConfig) -> str:
    pieces = f"{config.micro_batches} micro-batch{'es' if config.micro_batches > 1 else ''}"
    if config.strategy != "mgrit":
        return f"{config.strategy}, {pieces}"
    factors = ",".join(map(str, config.factors))
    return (
        f"mgrit {config.coarse_operator} {config.forward_iterations}/{config.backward_iterations}, c={factors}"
        f"{', FCF' if config.relaxation == 'FCF' else ''}, {pieces}"
    )


if __name__ == "__main__":
    sys.exit(main())
