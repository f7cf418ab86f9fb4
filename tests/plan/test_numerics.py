"""What plans say, worked out without processes on any number of ranks: MGRIT against the serial oracle, in float64."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import pytest
import torch
from torch import Tensor, nn

from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.plan.builder import PlanBuilder
from hf_layerpar.plan.operators import OPERATORS, CoarseOperator
from hf_layerpar.plan.ownership import contiguous_owner
from hf_layerpar.plan.step import Anatomy, Pass, build_step
from tests.plan.interpreter import DIM, F64, Run, Toy, reference
from tests.plan.shapes import random_anatomy, two_stacks
from tests.problems import Linear, blocks, relative

NAMES = ("rediscretize", "aggregate", "identity")
BATCH = torch.randn(6, 3, DIM, dtype=F64, generator=torch.Generator().manual_seed(0))


def mgrit(iterations: int, **settings) -> LayerParallelConfig:
    both = {"forward_iterations": iterations, "backward_iterations": iterations}
    return LayerParallelConfig(**({"strategy": "mgrit"} | both | settings))


def dealt(num_layers: int, num_ranks: int) -> tuple[int, ...]:
    return tuple(n % num_ranks for n in range(num_layers))


def solve(config: LayerParallelConfig, model: Toy, num_ranks: int = 1, micro_batches: int = 1) -> Run:
    return Run(build_step(config, model.anatomy, num_ranks, micro_batches), model, BATCH)


def same(run: Run, expected: dict[str, Tensor]) -> bool:
    assert set(run.gradients) == set(expected)
    return all(torch.equal(run.gradients[name], grad) for name, grad in expected.items())


# ---- exactness
@pytest.mark.parametrize("operator", NAMES)
@pytest.mark.parametrize("relaxation", ["F", "FCF"])
@pytest.mark.parametrize("coarsening", [4, (3, 2), (2, 2, 2)])
@pytest.mark.parametrize("owner", [contiguous_owner(13, 1), contiguous_owner(13, 3), dealt(13, 2)])
def test_exact_after_as_many_iterations_as_intervals(operator, relaxation, coarsening, owner):
    """n intervals: exact after n iterations (F) or ceil((n-1)/2)+1 (FCF), forward and adjoint, on any ranks; bit-equal,
    since a converged interval is never combined with a correction of zero."""
    config = LayerParallelConfig(coarsening=coarsening)
    intervals = math.ceil(13 / config.factors[0])
    enough = intervals if relaxation == "F" else math.ceil((intervals - 1) / 2) + 1
    settings = {"coarsening": coarsening, "relaxation": relaxation, "coarse_operator": operator}
    model = Toy(Anatomy.of_stack(owner))
    # exact in micro-batches too: the same ones
    exact = solve(LayerParallelConfig(schedule="gpipe"), model, max(owner) + 1, 2)
    expected = exact.gradients
    assert max(relative(expected[n], g) for n, g in reference(model, BATCH).items()) < 1e-12
    model.zero_grad()
    run = solve(mgrit(enough, **settings), model, max(owner) + 1, 2)
    assert same(run, expected)
    assert all(torch.equal(run.ends[m], exact.ends[m]) for m in range(2))
    inexact = solve(mgrit(enough - 1, **settings), model, max(owner) + 1, 2)
    assert not any(torch.equal(inexact.ends[m], exact.ends[m]) for m in range(2))


@pytest.mark.parametrize("operator", NAMES)
@pytest.mark.parametrize(("coarsening", "relaxation"), [(4, "F"), (4, "FCF"), ((2, 2), "F")])
@pytest.mark.parametrize("owner", [contiguous_owner(13, 1), contiguous_owner(13, 3), dealt(13, 2)])
def test_exact_layers_between_take_no_iterations(operator, coarsening, relaxation, owner):
    """Layers 4 and 9 are their own coarse steps: as many iterations as other intervals are exact, bit for bit, with
    any operator."""
    settings = {"coarsening": coarsening, "relaxation": relaxation, "coarse_operator": operator}
    run = Pass(owner, (0, 4, 9, 0))
    model = Toy(Anatomy((run,), (owner[0], owner[-1]), ((), (0,))))
    exact = solve(LayerParallelConfig(schedule="gpipe"), model, max(owner) + 1, 2)
    gradients, enough = exact.gradients, 3 if coarsening == 4 else 6
    for acceleration in ("none", "krylov"):
        found = solve(mgrit(enough, acceleration=acceleration, **settings), model, max(owner) + 1, 2)
        assert same(found, gradients)
    if relaxation == "F":
        inexact = solve(mgrit(enough - 1, **settings), model, max(owner) + 1, 2)
        assert not any(torch.equal(inexact.ends[m], exact.ends[m]) for m in range(2))


def test_an_exact_layer_costs_nothing_beside_itself():
    """Its coarse step is the relaxation's own evaluation."""
    anatomy = Anatomy.of_stack((0,) * 14, (0, 4, 0))
    plan = build_step(mgrit(2, coarse_operator="identity"), anatomy, 1)
    steps = [t for t in plan.tasks if t.kind == "step" and t.direction == "forward" and 4 in t.layers]
    # at the nested guess, then at the corrected state, which is that of the last relaxation
    assert [t.final for t in steps] == [False, True]


@pytest.mark.parametrize("operator", NAMES)
def test_each_iteration_makes_one_more_interval_exact(operator):
    layers = blocks(12, dim=DIM)
    for k in (1, 2, 3):  # layers that do nothing carry the state after interval k to the end
        idle = nn.ModuleList([*layers[: 4 * k], *(nn.Identity() for _ in range(12 - 4 * k))])
        model = Toy(Anatomy.of_stack((0,) * 12), [idle])
        with torch.no_grad():
            exact = nn.Sequential(*idle)(model.enter(0, BATCH, ())[0])
        for iterations in (1, 2, 3):
            plan = build_step(mgrit(iterations, coarse_operator=operator, backward_iterations=0), model.anatomy, 1)
            # idle layers have no vjp worth the name: the forward alone
            tasks = tuple(t for t in plan.tasks if t.direction == "forward" and t.place == 0)
            (end,) = (t.inputs[0] for t in plan.tasks if t.kind == "phase" and t.place == 1)
            forward = Run(dataclasses.replace(plan, tasks=tasks), model, BATCH)
            # C-point k needs k corrections; the end of the last interval needs the C-point it starts at
            assert (relative(forward.values[end], exact) < 1e-14) == (iterations >= min(k + 1, 3))


@pytest.mark.parametrize("operator", NAMES)
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_residuals_show_convergence(operator, micro_batches):
    """Each iteration halves them and the error, or better."""
    owner = contiguous_owner(24, 2)
    model = Toy(Anatomy.of_stack(owner), [blocks(24, dim=DIM, h=1 / 24)])
    expected = reference(model, BATCH)
    errors = []
    for iterations in (1, 2, 3, 4):
        run = solve(mgrit(iterations, coarse_operator=operator), model, 2, micro_batches)
        errors.append(max(relative(run.gradients[name], grad) for name, grad in expected.items()))
    assert all(b < 0.5 * a for a, b in itertools.pairwise(errors))
    for direction in ("forward", "backward"):
        found = [run.residuals[0, direction, i] for i in (1, 2, 3, 4)]
        assert all(b < 0.25 * a for a, b in itertools.pairwise(found))


def test_a_forward_that_diverges_shows_in_the_residuals():
    """Layers far from one another at a large step: rediscretised corrections grow."""
    layers = blocks(32, dim=DIM, h=4.0)
    model = Toy(Anatomy.of_stack((0,) * 32), [layers])
    run = solve(mgrit(3, coarse_operator="rediscretize"), model)
    assert run.residuals[0, "forward", 2] > run.residuals[0, "forward", 1]


@pytest.mark.parametrize("operator", NAMES)
@pytest.mark.parametrize("relaxation", ["F", "FCF"])
@pytest.mark.parametrize("iterations", [1, 2])
def test_the_adjoint_is_mgrit_on_the_reversed_transposed_stack(operator, relaxation, iterations):
    """For linear layers the inexact adjoint sweep is the same MGRIT run forward on the reversed stack of transposed
    layers (alike within an interval, so that its first layer is the first from both ends)."""
    generator = torch.Generator().manual_seed(5)
    interval = [torch.randn(DIM, DIM, dtype=F64, generator=generator) / 3 for _ in range(4)]
    matrices = [interval[n // 4] for n in range(16)]
    owner = contiguous_owner(16, 2)
    settings = {"relaxation": relaxation, "coarse_operator": operator}

    def sweep(matrices: list[Tensor], config: LayerParallelConfig) -> tuple[Toy, Run]:
        model = Toy(Anatomy.of_stack(owner), [nn.ModuleList(Linear(a, 1 / 4) for a in matrices)])
        with torch.no_grad():  # a front that adds nothing, and a loss whose gradient is twice the end state
            for phase in model.phases:
                phase.weight.copy_(torch.eye(DIM))
                phase.bias.zero_()
        return model, solve(config, model, 2)

    # the adjoint of the entry state is the gradient of the front's bias, row by row
    model, run = sweep(matrices, mgrit(0, backward_iterations=iterations, **settings))
    lam = 2 * run.ends[0]
    transposed, _ = sweep([a.T for a in reversed(matrices)], mgrit(0))
    plan = build_step(mgrit(iterations, backward_iterations=0, **settings), transposed.anatomy, 2)
    expected = Run(plan, transposed, lam).ends[0]
    assert relative(model.phases[0].bias.grad, expected.sum((0, 1))) < 1e-12  # type: ignore[arg-type]
    exact = reference(model, BATCH)["phases.0.bias"]
    assert relative(expected.sum((0, 1)), exact) > 1e-6  # inexact indeed


# ---- any anatomy
def test_inexact_sweeps_of_one_direction_leave_the_other_exact():
    anatomy = two_stacks(contiguous_owner(9, 2), contiguous_owner(7, 2))
    model = Toy(anatomy)
    exact = solve(LayerParallelConfig(schedule="gpipe"), model, 2)
    ends, gradients = exact.ends, exact.gradients
    backward = solve(mgrit(0, coarsening=2, backward_iterations=1), model, 2)
    assert torch.equal(backward.ends[0], ends[0])
    assert not same(backward, gradients)
    forward = solve(mgrit(1, coarsening=2, backward_iterations=0), model, 2)
    assert not torch.equal(forward.ends[0], ends[0])


def test_enough_iterations_are_exact_on_any_anatomy():
    """Several passes, sides, buffers, dealt layers: the bits of the exact step, whatever the operator."""
    rng = random.Random(0)
    for _ in range(12):
        num_ranks, micro_batches = rng.randint(1, 4), rng.randint(1, 2)
        anatomy = dataclasses.replace(random_anatomy(rng, num_ranks), tail_pieces=1)
        model = Toy(anatomy)
        exact = solve(LayerParallelConfig(), model, num_ranks, micro_batches).gradients
        acceleration = rng.choice(["none", "krylov"])
        config = mgrit(12, coarsening=rng.choice([2, 3]), coarse_operator=rng.choice(NAMES), acceleration=acceleration)
        assert same(solve(config, model, num_ranks, micro_batches), exact)


# ---- your own operator
class Halves(CoarseOperator):
    """The first layer of an interval stands for its first half, the middle one for the rest."""

    def terms(self, span: range) -> tuple[tuple[int, float], ...]:
        half = len(span) // 2
        return ((span[0], float(half)), (span[half], float(len(span) - half))) if half else ((span[0], 1.0),)


class Relayed(CoarseOperator):
    """Writes its own tasks: the first and the last layer of the interval one after the other."""

    def emit(self, build: PlanBuilder, layers, x: int, *, interleaved: bool, plus=()) -> int:
        y = build.step(layers[-1], build.step(layers[0], x)) if len(layers) > 1 else build.step(layers[0], x)
        return build.combine([(1.0, y), *plus], build.home(y))


@pytest.mark.parametrize("own", [Halves(), Relayed()], ids=["terms", "emit"])
@pytest.mark.parametrize("owner", [contiguous_owner(12, 2), dealt(12, 3)], ids=["blocks", "dealt"])
def test_an_operator_of_your_own(own, owner, monkeypatch):
    monkeypatch.setitem(OPERATORS, "own", own)
    model = Toy(Anatomy((Pass(owner, sides=True),), (0, owner[-1]), ((), (0,))), [blocks(12, dim=DIM, h=1 / 12)])
    expected = reference(model, BATCH)
    errors = []
    for iterations in (1, 2, 3):
        # cached plans know an operator by its name alone
        plan = build_step(mgrit(iterations, coarse_operator="own"), model.anatomy, max(owner) + 1)
        gradients = Run(plan, model, BATCH).gradients
        errors.append(max(relative(gradients[name], grad) for name, grad in expected.items()))
    assert errors[1] < 0.5 * errors[0]
    assert errors[2] < 1e-12  # three intervals
