"""What ranks hold, by hand; whether it fits into their memory, and what would."""

from __future__ import annotations

import dataclasses
import json

import pytest

from hf_layerpar.cli import main
from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.errors import ConfigurationError
from hf_layerpar.plan.costs import Costs
from hf_layerpar.plan.memory import size_of, size_text
from hf_layerpar.plan.planner import check_fits, plan_step, predict_step
from hf_layerpar.plan.simulate import simulate
from tests.plan.shapes import exact_step

BYTES = {
    "state_bytes": 1.0,
    "graph_bytes": 32.0,
    "pending_bytes": 16.0,
    "work_bytes": 4.0,
    "added_bytes": 3.0,
    "tail_added_bytes": 50.0,
    "front_graph_bytes": 2.0,
    "tail_graph_bytes": 100.0,
    "layer_bytes": 1000.0,
    "front_bytes": 300.0,
    "tail_bytes": 500.0,
    "shared_bytes": 200.0,
    "trained_share": 0.5,
}


def test_what_two_ranks_hold_by_hand() -> None:
    """Three layers each, two micro-batches; the first rank keeps both of them, the second one at a time."""
    first, last = simulate(exact_step("1f1b", 6, 2, 2), Costs(**BYTES)).peaks
    assert (first.parameters, last.parameters) == (3300.0, 3500.0)
    for peak in (first, last):
        assert peak.gradients == peak.parameters / 2 + 100.0
        assert peak.optimizer == peak.parameters
        assert peak.bytes == peak.parameters + peak.gradients + peak.optimizer + peak.activations
    # at its first backward: two micro-batches of three layers, their fronts and states, the adjoint that came, work
    assert (first.graphs, first.activations) == (6, 6 * 32 + 2 * 2 + first.states + 4 + 3)
    # three layers' graphs while the tail runs, with the end state and its adjoint
    assert (last.graphs, last.activations) == (3, 3 * 32 + 100 + 50 + 2)


def test_what_waits_for_weight_gradients() -> None:
    whole, split = (
        simulate(exact_step(name, 4, 1, 1), Costs(graph_bytes=32.0, pending_bytes=16.0)).peaks[0].activations
        for name in ("1f1b", "zb_h1")
    )
    assert whole == 4 * 32
    assert split <= whole + 16


def test_checkpointing_keeps_states_and_takes_longer() -> None:
    costs = Costs(**BYTES | {"tail_graph_bytes": 0.0, "tail_added_bytes": 0.0})
    kept, again = (
        predict_step(LayerParallelConfig(schedule="1f1b"), [0] * 4 + [1] * 4, c, num_ranks=2)
        for c in (costs, costs.recomputed())
    )
    assert again.makespan > kept.makespan
    assert all(b.activations < a.activations / 2 for a, b in zip(kept.peaks, again.peaks, strict=True))
    assert [p.parameters for p in again.peaks] == [p.parameters for p in kept.peaks]


@pytest.mark.parametrize(
    ("text", "size"),
    [("1000", 1e3), ("24GB", 24e9), ("24 GiB", 24 * 2**30), ("1.5m", 1.5e6), ("8e9", 8e9), ("80gib", 80 * 2**30)],
)
def test_sizes(text: str, size: float) -> None:
    assert size_of(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "24XB", "GiB", "1e300", "nan", "9" * 50])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigurationError, match="no size of a memory"):
        size_of(text)


def test_sizes_are_shown_in_powers_of_two() -> None:
    assert [size_text(s) for s in (12, 2**20, 1.5 * 2**30)] == ["12 bytes", "1 MiB", "1.5 GiB"]


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    config, costs, owner = LayerParallelConfig(micro_batches=2), Costs(**BYTES), [r for r in range(2) for _ in range(4)]
    step = predict_step(config, owner, costs, num_ranks=2)
    needed = max(peak.bytes for peak in step.peaks)
    check_fits(step, needed, config, costs)
    with pytest.raises(ConfigurationError) as refused:
        check_fits(step, needed - 1, config, costs)
    said = str(refused.value)
    assert said.startswith(f"rank 1 takes {size_text(needed)} (parameters 4.39 KiB, gradients 2.29 KiB, ")
    assert "it fits with gradient checkpointing (" in said
    assert "or with 4 micro-batches (" in said
    assert "or on 4 ranks (" in said
    with pytest.raises(ConfigurationError, match=r"it fits on 8 ranks \(.* KiB\)$"):
        check_fits(step, 4000, config, costs)
    with pytest.raises(ConfigurationError, match="neither gradient checkpointing, 32 micro-batches nor 8 ranks"):
        check_fits(step, 100, config, costs)


def test_the_planner_leaves_out_what_does_not_fit() -> None:
    costs = dataclasses.replace(Costs(), layer_bytes=10.0, graph_bytes=100.0)
    every = plan_step(8, 2, costs, accuracy="good", micro_batches=(1, 4))
    sizes = sorted({choice.bytes for choice in every})
    some = plan_step(8, 2, costs, accuracy="good", micro_batches=(1, 4), memory=sizes[0])
    assert 0 < len(some) < len(every)
    assert {choice.bytes for choice in some} == {sizes[0]}
    with pytest.raises(ConfigurationError, match="are allowed; it fits "):
        plan_step(8, 2, costs, accuracy="good", micro_batches=(1, 4), memory=sizes[0] - 1)


def test_the_command_takes_measured_costs_and_a_limit(capsys, tmp_path) -> None:
    measured, plan = tmp_path / "check.json", ["plan", "--layers", "8", "--ranks", "2", "--micro-batches", "4"]
    costs = {name: value * 2**20 if name != "trained_share" else value for name, value in BYTES.items()}
    measured.write_text(json.dumps({"costs": {"layers": {"step": 2.0, "bandwidth": None, **costs}}}))
    assert main([*plan, "--costs", str(measured), "--memory", "100GiB"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("memory  rank 1 holds")
    assert "parameters 4.39 GiB, gradients 2.29 GiB, optimizer 4.39 GiB, activations " in line
    assert main([*plan, "--costs", str(measured), "--memory", "10GiB"]) == 2
    said = capsys.readouterr().err
    assert "10 GiB are allowed; it fits on 4 ranks (" in said
    assert main([*plan, "--choose", "high", "--costs", str(measured), "--memory", "10GiB"]) == 2
    assert "it fits on 4 ranks" in capsys.readouterr().err
    for text, message in (
        ("{}", "has no costs in it (KeyError"),
        ('{"costs": {"a": {}, "b": {}}}', "costs of 2 stacks, a, b"),
    ):
        measured.write_text(text)
        assert main([*plan, "--costs", str(measured)]) == 2
        assert message in capsys.readouterr().err
    assert main([*plan, "--memory", "1GiB"]) == 2
    assert "says nothing without what a layer takes: give --costs FILE" in capsys.readouterr().err
