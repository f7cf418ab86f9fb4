"""Would Anderson acceleration help MGRIT's forward, as a Krylov method helps its backward?

    python recipes/benchmarks/forward_anderson.py [--only smollm2]

The forward's corrections, u' = C(u') + F(u) - C(u) over the interval ends, are a fixed-point iteration. Anderson (1965)
combines all that is known, for each row of the batch: of the tries u_i with results G(u_i) the weights that add up to 1
and make the residual sum w_i (G(u_i) - u_i) smallest (each interval's over its first), and goes on from sum w_i G(u_i).
Here both are run on a stack as it is, outside of the package, and the error of the end state is compared after every
iteration (the first is the nested start and the relaxation, so the first combination is possible in the third).

Written to recipes/benchmarks/results/forward_anderson.json. Models: those of `diagnose_models.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that a checkout runs without being installed

import torch
from torch import Tensor

from hf_layerpar import convert_to_ode, ode_view
from hf_layerpar.diagnosis.measure import Bench
from hf_layerpar.plan.operators import OPERATORS
from recipes.benchmarks.diagnose_models import CASES
from recipes.benchmarks.launch import RESULTS
from recipes.results import print_table, versions, write_json

ITERATIONS = 6
COARSENING = 4
BUFFERS = (2, 2)

Step = Callable[[Tensor], Tensor]


def coarse_steps(name: str, steps: Sequence[Step]) -> Step:
    """What stands in for an interval of these layers."""
    if name == "identity":
        return lambda x: x
    if name == "aggregate":
        return lambda x: x + sum((step(x) - x for step in steps), torch.zeros_like(x))
    return lambda x: x + len(steps) * (steps[0](x) - x)


def chain(steps: Sequence[Step], x: Tensor) -> Tensor:
    for step in steps:
        x = step(x)
    return x


def combined(tries: list[list[Tensor]], results: list[list[Tensor]]) -> list[Tensor]:
    """Anderson's next try, row by row: lists over tries of lists over interval ends, `[B, T, D]` each."""
    residuals = [[g - u for g, u in zip(gs, us, strict=True)] for gs, us in zip(results, tries, strict=True)]
    scales = [r.flatten(1).double().norm(dim=1).clamp_min(1e-30) for r in residuals[0]]
    flat = [
        torch.cat([r.flatten(1).double() / s[:, None] for r, s in zip(rs, scales, strict=True)], 1) for rs in residuals
    ]
    differences = torch.stack([b - a for a, b in pairwise(flat)], 2)  # [B, J T D, K - 1]
    gamma = torch.linalg.lstsq(differences, flat[-1][..., None]).solution[..., 0]  # [B, K - 1]
    found = []
    for places in zip(*results, strict=True):
        gains = [b - a for a, b in pairwise(places)]
        back = [share.to(gain.dtype)[:, None, None] * gain for share, gain in zip(gamma.T, gains, strict=True)]
        found.append(places[-1] - torch.stack(back).sum(0))
    return found


@torch.no_grad()
def errors(steps: Sequence[Step], x: Tensor, operator: str, accelerated: bool) -> list[float]:
    """Of the end state, relative, after 1, 2, ... iterations."""
    opening, close = BUFFERS
    x = chain(steps[:opening], x)
    inner, last = steps[opening : len(steps) - close], steps[len(steps) - close :]
    intervals = [inner[i : i + COARSENING] for i in range(0, len(inner), COARSENING)]
    coarse = [coarse_steps(operator, interval) for interval in intervals]
    exact = chain(last, chain(inner, x))
    u = [x]
    for step in coarse[:-1]:
        u.append(step(u[-1]))
    found, tries, results = [], [], []
    for _ in range(ITERATIONS):
        fine = [chain(interval, start) for interval, start in zip(intervals, u, strict=True)]
        end = chain(last, fine[-1])
        found.append(float((end - exact).norm() / exact.norm()))
        before = [step(start) for step, start in zip(coarse, u, strict=True)]
        new = [x]
        for j in range(len(intervals) - 1):
            new.append(coarse[j](new[j]) + fine[j] - before[j])
        tries.append(u[1:])
        results.append(new[1:])
        u = [x, *combined(tries, results)] if accelerated and len(tries) > 1 else new
    return found


def run(name: str) -> dict[str, Any]:
    case = CASES[name]
    model, batches = case.build(1)
    if not case.converted:
        convert_to_ode(model)
    model.eval()
    (stack,) = ode_view(model).stacks
    (entry,) = Bench(model, [stack]).entries(batches[0]).values()
    steps: list[Step] = [lambda x, call=call: call.step(x, call.args, call.kwargs) for call in entry.calls]
    rows = {}
    for operator in OPERATORS:
        rows[operator] = {
            side: errors(steps, entry.x.detach(), operator, side == "Anderson") for side in ("plain", "Anderson")
        }
    return {"layers": len(steps), "errors": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(CASES), nargs="+", default=["control", "smollm2"])
    parser.add_argument("--output", type=Path, default=RESULTS / "forward_anderson.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {name: run(name) for name in options.only}
    write_json(
        options.output,
        {"coarsening": COARSENING, "buffers": BUFFERS, "models": found, "versions": versions()},
    )
    print_table(
        [
            (f"{name} {operator} {side}", "  ".join(f"{e:.1e}" for e in values))
            for name, of_model in found.items()
            for operator, sides in of_model["errors"].items()
            for side, values in sides.items()
        ]
    )


if __name__ == "__main__":
    main()
