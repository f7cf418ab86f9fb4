"""Plans worked out on one process, all ranks in one loop: what a plan says, without the machinery that runs it.

`Toy` is a model with any anatomy. Its parts are cut as the plan cuts them; plain autograd on the whole is the oracle.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from hf_layerpar.plan.step import Anatomy
from hf_layerpar.plan.tasks import Plan, Task
from tests.problems import F64, Block

DIM = 4


class Toy(nn.Module):
    """Front, passes of layers, middles and a head; every phase depends on the end states that the anatomy says."""

    def __init__(self, anatomy: Anatomy, passes: Sequence[nn.ModuleList] | None = None, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.anatomy = anatomy
        self.passes = nn.ModuleList(
            passes or [nn.ModuleList(Block(DIM, 0.25) for _ in run.owner) for run in anatomy.passes]
        )
        self.phases = nn.ModuleList(nn.Linear(DIM, DIM) for _ in anatomy.ranks)
        self.sides = nn.ParameterList(torch.randn(DIM) for _ in anatomy.passes)
        self.to(F64)

    def enter(self, place: int, rows: Tensor, given: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The state and the sides of pass `place`."""
        x = self.phases[place](rows + sum(given))
        return x, [(1 + self.sides[place]) * (1 + sum(given))] * self.anatomy.passes[place].sides

    def loss(self, given: Sequence[Tensor]) -> Tensor:
        """Losses of parts of the rows add up."""
        return self.phases[-1](sum(given)).square().sum()

    def forward(self, rows: Tensor) -> Tensor:
        ends: list[Tensor] = []
        for k, layers in enumerate(self.passes):
            x, sides = self.enter(k, rows, [ends[j] for j in self.anatomy.needs[k]])
            for layer in layers:
                x = layer(x, *sides)
            ends.append(x)
        return self.loss([ends[j] for j in self.anatomy.needs[-1]])


def reference(model: Toy, batch: Tensor) -> dict[str, Tensor]:
    """Gradients of the whole batch by plain autograd."""
    model.zero_grad()
    model(batch).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


class Run:
    """A plan worked on `batch`, cut along its rows.

    gradients: by parameter. ends: of the last pass, by micro-batch. residuals: (pass, direction, iteration) -> sum of
    squares. losses: by (micro-batch, piece). values: by their numbers.
    """

    def __init__(self, plan: Plan, model: Toy, batch: Tensor) -> None:
        self.plan, self.model = plan, model
        bounds = [len(batch) * m // plan.micro_batches for m in range(plan.micro_batches + 1)]
        self.rows = [batch[a:b] for a, b in pairwise(bounds)]
        self.ends: dict[int, Tensor] = {}
        self.losses: dict[tuple[int, int], Tensor] = {}
        self.residuals: dict[tuple[int, str, int], float] = {}
        self.values: dict[int, Any] = {}
        self._phases: dict[tuple[int, int], tuple[list[Tensor], list[Tensor]]] = {}
        self._side_grads: dict[tuple[int, int, int], list[Tensor]] = {}  # (pass, micro-batch, layer)
        model.zero_grad()
        missing = list(plan.reductions)
        for task in plan.tasks:
            made = getattr(self, f"_{task.kind}")(task, [self.values[v] for v in task.inputs])
            self.values.update(zip(task.outputs, made, strict=True))
            for reduction in [r for r in missing if self.values.keys() >= set(r.terms)]:
                missing.remove(reduction)
                self.values[reduction.value] = sum(self.values[v] for v in reduction.terms)
        self.gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        self.loss = float(sum(self.losses.values()))

    # ---- ends
    def _phase(self, task: Task, given: list[Any]) -> list[Any]:
        k, m, last = task.place, task.micro_batch, len(self.plan.passes)
        if task.direction == "backward":
            results, leaves = self._phases.pop((k, m))
            torch.autograd.backward(results, [given[0], *(given[1] if len(given) > 1 else [])])
            return [leaf.grad for leaf in leaves]
        leaves = [t.detach().requires_grad_(self.plan.trains) for t in given]
        if k == last:
            self.ends[m] = given[-1]
            loss = self.model.loss(leaves)
            self.losses[m, task.piece[0]] = loss.detach()
            if not self.plan.trains:
                return []
            loss.backward()
            return [leaf.grad for leaf in leaves]
        x, sides = self.model.enter(k, self.rows[m], leaves)
        self._phases[k, m] = ([x, *sides], leaves)
        return [x.detach(), *([[t.detach() for t in sides]] if sides else [])]

    def _cut(self, task: Task, given: list[Tensor]) -> list[Tensor]:
        n, rows = len(task.outputs), len(given[0])
        return [given[0][rows * i // n : rows * (i + 1) // n] for i in range(n)]

    def _join(self, task: Task, given: list[Tensor]) -> list[Tensor]:
        return [torch.cat(given)]

    def _collect(self, task: Task, given: list[Any]) -> list[Any]:
        so_far = isinstance(given[0], list)
        total = [t.clone() for t in given[0]] if so_far else None
        for layer in task.layers:
            grads = self._side_grads.pop((task.place, task.micro_batch, layer))
            total = grads if total is None else [a + b for a, b in zip(total, grads, strict=True)]
        return [total]

    # ---- layers
    def _step(self, task: Task, given: list[Any]) -> list[Any]:
        layers = self.model.passes[task.place]
        if task.direction == "backward":
            return self._vjp(task, given)
        x, sides = given[0], given[1] if len(given) > 1 else []
        if len(task.outputs) == 1:  # keeps nothing
            with torch.no_grad():
                for n in task.layers:
                    x = layers[n](x, *sides)
            return [x]
        leaf = x = x.detach().requires_grad_()
        own = {n: [t.detach().requires_grad_() for t in sides] for n in task.layers}
        for n in task.layers:
            x = layers[n](x, *own[n])
        return [x.detach(), (leaf, own, x)]

    def _vjp(self, task: Task, given: list[Any]) -> list[Any]:
        lam, *graphs = given
        (leaf, own, y), *more = graphs  # a block is one graph
        assert not more
        assert sorted(own) == sorted(task.layers), "the backward goes through a graph that isn't its own"
        params = [p for n in own for p in self.model.passes[task.place][n].parameters()]
        if not task.final:
            return [torch.autograd.grad(y, leaf, lam, retain_graph=True)[0]]
        split = self.plan.is_split(task)
        inputs = [leaf, *(t for sides in own.values() for t in sides)]
        grad, *rest = torch.autograd.grad(y, [*inputs, *([] if split else params)], lam, retain_graph=split)
        for n, sides in own.items():
            self._side_grads[task.place, task.micro_batch, n] = rest[: len(sides)]
            rest = rest[len(sides) :]
        self._add(params, rest)
        return [grad, (y, params, lam)] if split else [grad]

    def _weights(self, task: Task, given: list[Any]) -> list[Any]:
        ((y, params, lam),) = given
        self._add(params, torch.autograd.grad(y, params, lam))
        return []

    @staticmethod
    def _add(params: Sequence[nn.Parameter], grads: Sequence[Tensor]) -> None:
        for param, grad in zip(params, grads, strict=False):  # none where they are split off
            param.grad = grad if param.grad is None else param.grad + grad

    # ---- arithmetic
    def _combine(self, task: Task, given: list[Tensor]) -> list[Tensor]:
        return [sum(c * t for c, t in zip(task.coefficients, given, strict=True))]  # type: ignore[list-item]

    def _products(self, task: Task, given: list[Tensor]) -> list[Tensor]:
        """The residuals themselves, `[places, tries, rows, numbers]`, over the norm of the first try of the place."""
        places, size, _ = self.plan.values[task.output].shape
        tries, rows = (size + 1) // 2, len(given[0])
        found = torch.zeros(places, tries, rows, given[0][0].numel(), dtype=F64)
        for i, slot in enumerate(task.slots):
            ends, states = (given[2 * tries * i + k : 2 * tries * (i + 1) : 2] for k in (0, 1))
            for k, (end, x) in enumerate(zip(ends, states, strict=True)):
                found[slot, k] = (end - x).flatten(1) / states[0].flatten(1).norm(dim=1, keepdim=True)
        return [found]

    def _least(self, task: Task, given: list[Tensor]) -> list[Tensor]:
        """The tries with weights by least squares on the residuals, row by row."""
        residuals, *states = given
        _, tries, rows, _ = residuals.shape
        made = [torch.zeros_like(states[0]) for _ in task.outputs]
        for row in range(rows):
            first, *others = residuals[:, :, row].transpose(0, 1).flatten(1)
            steps = torch.stack([other - first for other in others], 1)
            y = torch.linalg.lstsq(steps, -first[:, None], driver="gelsd").solution[:, 0].tolist()
            for place, end in enumerate(made):
                own = [state[row] for state in states[place * tries : (place + 1) * tries]]
                end[row] = own[0] + sum(w * (state - own[0]) for w, state in zip(y, own[1:], strict=True))
        return made

    def _residual(self, task: Task, given: list[Tensor]) -> list[Tensor]:
        key = (task.place, task.direction, task.iteration)
        self.residuals[key] = self.residuals.get(key, 0.0) + float((given[0] - given[1]).square().sum())
        return []
