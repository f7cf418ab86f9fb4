"""Plans in waves: pure data, checked without tensors; and that they are the same numbers."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch

from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.errors import ConfigurationError
from hf_layerpar.plan.step import Anatomy, Pass, build_step
from hf_layerpar.plan.tasks import Direction, Plan, Task
from tests.plan.interpreter import DIM, F64, Run, Toy
from tests.plan.shapes import two_stacks
from tests.problems import relative


def stacked(**settings) -> LayerParallelConfig:
    return LayerParallelConfig(strategy="mgrit", stacked=True, **settings)


def step(config: LayerParallelConfig, num_layers: int, micro_batches: int = 1, buffers=(0, 0), kinds=None) -> Plan:
    anatomy = Anatomy.of_stack((0,) * num_layers, buffers)
    return build_step(config, anatomy, 1, micro_batches, kinds=kinds)


def groups(plan: Plan, direction: Direction) -> list[tuple[Task, ...]]:
    return [g for g in plan.groups() if g[0].kind == "step" and g[0].direction == direction]


def sizes(plan: Plan, direction: Direction) -> list[int]:
    return [len(group) for group in groups(plan, direction)]


def final_sets(plan: Plan, direction: Direction) -> set[tuple[int, ...]]:
    return {tuple(sorted(t.layers[0] for t in group)) for group in groups(plan, direction) if group[0].final}


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    ("operator", "iterations", "expected"),
    [  # 64 layers in 8 intervals of 8
        ("aggregate", 1, {8: 7 + 8}),  # 7 coarse steps of 8 layers, 8 places of 8 intervals: 120 evaluations
        ("rediscretize", 1, {1: 7, 8: 8}),
        ("identity", 1, {8: 8}),
        # the first relaxation needs no last interval, the second coarse sweep starts at the second
        ("aggregate", 2, {8: 7 + 6 + 8, 7: 8 - 1}),
        ("identity", 2, {7: 8, 8: 8}),
    ],
)
def test_number_and_sizes_of_waves(operator, iterations, expected, direction):
    config = stacked(
        coarsening=8, coarse_operator=operator, forward_iterations=iterations, backward_iterations=iterations
    )
    assert Counter(sizes(step(config, 64), direction)) == expected


@pytest.mark.parametrize("relaxation", ["F", "FCF"])
@pytest.mark.parametrize("operator", ["rediscretize", "aggregate", "identity"])
@pytest.mark.parametrize("coarsening", [4, (3, 2)])
@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("num_layers", [13, 16])
def test_plans_in_waves_are_valid(relaxation, operator, coarsening, iterations, num_layers):
    config = stacked(
        relaxation=relaxation,
        coarse_operator=operator,
        coarsening=coarsening,
        forward_iterations=iterations,
        backward_iterations=iterations,
        acceleration="krylov" if num_layers == 16 else "none",
    )
    for micro_batches in (1, 3):
        for buffers in ((0, 0), (1, 2), (0, 6, 0)):
            plan = step(config, num_layers, micro_batches, buffers)
            plan.validate()
            assert max(sizes(plan, "forward")) > 1
            # the adjoint finds the graphs that the forward kept, whatever the length of the last interval
            assert final_sets(plan, "forward") == final_sets(plan, "backward")
            outer = {(n,) for n in (*range(buffers[0]), *range(num_layers - buffers[-1], num_layers))}
            assert outer <= final_sets(plan, "forward")
            finals = Counter(t.direction for t in plan.tasks if t.final)
            assert finals == dict.fromkeys(("forward", "backward"), num_layers * micro_batches)


def test_micro_batches_share_no_wave():
    plan = step(stacked(coarsening=4), 16, 3)
    assert all(len({t.micro_batch for t in group}) == 1 for group in groups(plan, "forward"))
    assert {t.micro_batch for t in plan.tasks} == {0, 1, 2}


def test_layers_of_different_kinds_share_no_wave():
    kinds = tuple(n % 2 for n in range(16))
    config = stacked(coarsening=4, coarse_operator="aggregate")
    plan = step(config, 16, kinds=(kinds,))
    for direction in ("forward", "backward"):
        assert all(len({kinds[t.layers[0]] for t in group}) == 1 for group in groups(plan, direction))
        # coarse steps are cut in two, places hold one kind
        assert Counter(sizes(plan, direction)) == {2: 3 * 2, 4: 4}
    alone = step(config, 16, kinds=(tuple(range(16)),))
    assert set(sizes(alone, "forward")) == set(sizes(alone, "backward")) == {1}
    assert all(t.wave == -1 for t in alone.tasks)


def test_passes_have_kinds_of_their_own():
    anatomy = two_stacks((0,) * 8, (0,) * 8)
    kinds = ((0,) * 8, tuple(range(8)))
    plan = build_step(stacked(coarsening=2), anatomy, 1, kinds=kinds)
    widths = {k: max(len(g) for g in plan.groups() if g[0].kind == "step" and g[0].place == k) for k in range(2)}
    assert widths == {0: 4, 1: 1}


def test_an_exact_sweep_has_no_waves():
    plan = step(stacked(coarsening=4, forward_iterations=0), 16)
    assert sizes(plan, "forward") == [1] * 16
    assert max(sizes(plan, "backward")) == 4


def test_a_forward_alone_has_no_waves():
    plan = build_step(stacked(), Anatomy.of_stack((0,) * 8), 1, 2, trains=False)
    assert all(t.wave == -1 for t in plan.tasks)


@pytest.mark.parametrize("operator", ["rediscretize", "aggregate", "identity"])
@pytest.mark.parametrize("iterations", [(1, 1), (2, 1), (0, 2), (2, 0)])
def test_waves_are_the_same_numbers(operator, iterations):
    """As the plan of one task after the other, though some steps are evaluated again."""
    buffers = (1, 1)
    anatomy = Anatomy((Pass((0,) * 13, buffers, sides=True),), (0, 0), ((), (0,)))
    config = LayerParallelConfig(
        strategy="mgrit",
        coarsening=3,
        coarse_operator=operator,
        forward_iterations=iterations[0],
        backward_iterations=iterations[1],
    )
    model, batch = Toy(anatomy), torch.randn(4, 3, DIM, dtype=F64, generator=torch.Generator().manual_seed(0))
    plans = [build_step(dataclasses.replace(config, stacked=s), anatomy, 1, 2) for s in (False, True)]
    one, waves = (Run(plan, model, batch) for plan in plans)
    assert max(relative(waves.gradients[n], g) for n, g in one.gradients.items()) < 1e-14
    assert waves.residuals == pytest.approx(one.residuals)


def test_validate_finds_faults_in_waves():
    plan = step(stacked(coarsening=2, coarse_operator="identity"), 4)
    plan.validate()
    waves = [group for group in plan.groups() if group[0].wave >= 0]
    first, second = waves[:2]
    front, rest = plan.tasks[:1], [t for t in plan.tasks[1:] if t not in (*first, *second)]
    assert front[0].kind == "phase"
    joined = [dataclasses.replace(t, wave=first[0].wave) for t in second]
    for tasks, message in (
        ((*first, *joined), "before they are made"),
        ((first[0], *second, first[1]), "before they are made|through already"),
        ((first[0], dataclasses.replace(first[1], final=False), *second), "mixed wave"),
        ((first[0], dataclasses.replace(first[1], layers=first[0].layers), *second), "a layer twice"),
    ):
        with pytest.raises(AssertionError, match=message):
            dataclasses.replace(plan, tasks=(*front, *tasks, *rest)).validate()


def test_waves_are_printed():
    lines = str(step(stacked(coarsening=2, coarse_operator="identity"), 4)).splitlines()
    assert sum(" wave " in line for line in lines) == 8


def test_refusals_name_the_remedy():
    with pytest.raises(ConfigurationError, match=r"stacked=True with strategy='pipeline'.*use strategy='mgrit'"):
        LayerParallelConfig(stacked=True)
    with pytest.raises(ConfigurationError, match=r"stacked=True with increment_penalty=0.1: .*use one of them"):
        stacked(increment_penalty=0.1)
    with pytest.raises(ConfigurationError, match=r"stacked=True with lp_size=2.*use stacked=False or lp_size=1"):
        build_step(stacked(), Anatomy.of_stack((0,) * 4 + (1,) * 4), 2)
