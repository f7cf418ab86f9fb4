"""Plans in waves: pure data, checked without tensors."""

import dataclasses
from collections import Counter

import pytest

from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.errors import ConfigurationError
from hf_layerpar.plan.strategies import build_plan


def stacked(**settings) -> LayerParallelConfig:
    return LayerParallelConfig(strategy="mgrit", stacked=True, **settings)


def plans(config, num_layers, **more):
    return [build_plan(config, d, (0,) * num_layers, num_ranks=1, **more) for d in ("forward", "backward")]


def sizes(plan) -> list[int]:
    return [len(run) for run in plan.groups() if run[0].kind == "step"]


def final_sets(plan) -> set[tuple[int, ...]]:
    return {tuple(t.layer for t in run) for run in plan.groups() if run[0].final}


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
def test_number_and_sizes_of_waves(operator, iterations, expected):
    config = stacked(
        coarsening=8, coarse_operator=operator, forward_iterations=iterations, backward_iterations=iterations
    )
    for plan in plans(config, 64):
        assert Counter(sizes(plan)) == expected


@pytest.mark.parametrize("relaxation", ["F", "FCF"])
@pytest.mark.parametrize("operator", ["rediscretize", "aggregate", "identity"])
@pytest.mark.parametrize(("levels", "coarsening"), [(2, 4), (3, (3, 2))])
@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("num_layers", [13, 16])
def test_plans_in_waves_are_valid(relaxation, operator, levels, coarsening, iterations, num_layers):
    config = stacked(
        relaxation=relaxation,
        coarse_operator=operator,
        levels=levels,
        coarsening=coarsening,
        forward_iterations=iterations,
        backward_iterations=iterations,
    )
    for micro_batches in (1, 3):
        for buffers in ((0, 0), (1, 2)):
            forward, backward = plans(config, num_layers, micro_batches=micro_batches, buffers=buffers)
            assert max(sizes(forward)) > 1
            # the adjoint finds the graphs that the forward kept, whatever the length of the last interval
            assert final_sets(forward) == final_sets(backward)
            outer = {(n,) for n in (*range(buffers[0]), *range(num_layers - buffers[1], num_layers))}
            assert outer <= final_sets(forward)
            assert sum(t.final for t in forward.tasks) == num_layers * micro_batches


def test_layers_of_different_kinds_share_no_wave():
    kinds = [n % 2 for n in range(16)]
    config = stacked(coarsening=4, coarse_operator="aggregate")
    for plan in plans(config, 16, kinds=kinds):
        assert all(len({kinds[t.layer] for t in run}) == 1 for run in plan.groups() if run[0].kind == "step")
        assert Counter(sizes(plan)) == {2: 3 * 2, 4: 4}  # coarse steps are cut in two, places hold one kind
    assert all(set(sizes(plan)) == {1} for plan in plans(config, 16, kinds=range(16)))


def test_an_exact_sweep_has_no_waves():
    forward, backward = plans(stacked(coarsening=4, forward_iterations=0), 16)
    assert sizes(forward) == [1] * 16
    assert max(sizes(backward)) == 4


def test_validate_finds_faults_in_waves():
    plan = plans(stacked(coarsening=2, coarse_operator="identity"), 4)[0]
    plan.validate()
    first, second = (run for run in plan.groups() if run[0].wave >= 0)
    rest = [t for t in plan.tasks if t not in (*first, *second)]

    def changed(*tasks):
        return dataclasses.replace(plan, tasks=(*tasks, *rest))

    joined = [dataclasses.replace(t, wave=first[0].wave) for t in second]
    for tasks, message in (
        ((*first, *joined), "before they are made"),
        ((first[0], *second, first[1]), "before they are made|through already"),
        ((first[0], dataclasses.replace(first[1], final=False), *second), "mixed wave"),
        ((first[0], dataclasses.replace(first[1], layer=first[0].layer), *second), "twice in a wave"),
    ):
        with pytest.raises(AssertionError, match=message):
            changed(*tasks).validate()


def test_waves_are_printed():
    lines = str(plans(stacked(coarsening=2, coarse_operator="identity"), 4)[0]).splitlines()
    assert sum(" wave " in line for line in lines) == 4


def test_refusals_name_the_remedy():
    with pytest.raises(ConfigurationError, match=r"stacked=True with strategy='pipeline'.*use strategy='mgrit'"):
        LayerParallelConfig(stacked=True)
    with pytest.raises(ConfigurationError, match=r"stacked=True with lp_size=2.*use stacked=False or lp_size=1"):
        build_plan(stacked(), "forward", (0,) * 4 + (1,) * 4, num_ranks=2)
