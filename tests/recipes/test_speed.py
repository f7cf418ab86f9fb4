"""The speed harness at its smallest; nothing here depends on how long anything takes."""

from __future__ import annotations

import json

import pytest
import torch

from recipes.benchmarks.alternate import accuracy, measure
from recipes.benchmarks.sides import Entry, Side
from recipes.benchmarks.torch_pipelines import PIPELINES
from tests.recipes.launched import benchmark

ONLY = ["2 threads", "ddp", "tensor", "M=2", "ours M", "rediscretize 2 levels 2/1", "3 levels", "spread", "c=2"]
INTERLEAVED = "mgrit aggregate 2 levels 1/1 M=1 c=2 interleaved"
TORCH = {f"{schedule} M=2" for schedule in PIPELINES}
OURS = {f"ours M={m}" for m in (1, 2, 4, 8)}


@pytest.mark.slow
def test_every_side_stands_beside_its_accuracy(tmp_path):
    arguments = ["--layers", "4", "--rounds", "1", "--cost_seconds", "0.2", "--only", *ONLY]
    other = {"table": "stack", "layers": 999, "ranks": 1}
    (tmp_path / "speed.json").write_text(json.dumps({"tables": [other]}))
    result = benchmark("speed", tmp_path / "speed.json", *arguments)
    assert result["tables"].pop(0) == other
    command = ["speed.py", *arguments, "--output", str(tmp_path / "speed.json")]
    assert all(t["command"] == command for t in result["tables"])
    assert all(t["machine"]["cores"] >= 1 for t in result["tables"])
    assert result["versions"]["torch"] == torch.__version__
    tables = {(t["table"], t["ranks"]): t["sides"] for t in result["tables"]}
    assert set(tables) == {(table, ranks) for table in ("stack", "ends") for ranks in (1, 2)}
    for (table, ranks), sides in tables.items():
        first = next(iter(sides))
        assert first == ("serial, 1 thread" if table == "stack" else "stock, 1 thread")
        for name, side in sides.items():
            if "3 levels" in name:  # refused for four layers, and said so
                assert "too deep for 4 steps" in side["error"]
                continue
            assert side["seconds"]["median"] > 0
            assert side["ratio"] == pytest.approx(side["seconds"]["median"] / sides[first]["seconds"]["median"])
            assert len(side["seconds"]["all"]) == 1
            assert len(side["memory_growth_bytes"]) == ranks
            assert max(side["memory_growth_bytes"]) > 2**20
            if name != INTERLEAVED:  # one interval of four layers: MGRIT is exact too
                assert side["gradient"]["cosine"] == pytest.approx(1, abs=1e-9), name
                assert side["gradient"]["relative_error"] < 2e-6, name
                assert side["gradient"]["norm_ratio"] == pytest.approx(1, abs=1e-6), name
    two = tables["stack", 2]
    assert {"ddp", "tensor parallel", *TORCH, *OURS, "ours blocks M=2", "ours v M=2"} < set(two)
    assert "error" not in two["tensor parallel"]
    assert 0.99 < two[INTERLEAVED]["gradient"]["cosine"] < 1 - 1e-6  # and what is inexact is seen to be
    assert {"ddp", *TORCH, *OURS, "mgrit identity 2 levels 1/1 M=1 spread"} < set(tables["ends", 2])
    for sides in (two, tables["ends", 2]):
        for name in OURS:  # what the planner picked from costs that were measured
            assert sides[name]["settings"]["schedule"] == "list"
            assert sides[name]["settings"]["split"] in ("v", "interleaved", [1, 3], [2, 2], [3, 1])
            measured, predicted = sides[name]["seconds"]["median"], sides[name]["predicted_seconds"]
            assert sides[name]["predicted_over_measured"] == pytest.approx(predicted / measured)
    for table in result["tables"]:
        assert ("costs" in table) == (table["ranks"] == 2)
        for costs in table.get("costs", {}).values():
            assert (costs["tail"] > 0) == (table["table"] == "ends")
    assert "ours M=1" in tables["ends", 1]


def test_overhead_is_a_share_of_the_step(tmp_path):
    result = benchmark("overhead", tmp_path / "overhead.json", "--layers", "4", "--steps", "1")
    assert {n: len(ranks) for n, ranks in result["ranks"].items()} == {"1": 1, "2": 2}
    for ranks in result["ranks"].values():
        for found in (share for by_name in ranks for share in by_name.values()):
            assert 0 < found["overhead_share"] < 1
            assert 0 <= found["waiting_share"] < 1
    (alone,) = result["ranks"]["1"]
    # four forwards, one vjp of the run that they are, and the backwards of what is before and behind the stack
    assert alone["exact"]["evaluations"] == 7
    assert alone["exact"]["waiting_share"] < 0.01


def test_one_device(tmp_path):
    """Stacked sides are what they say: falling back would be their error."""
    only = ["identity 1/1", "aggregate 1/1", "exact"]
    arguments = ["--device", "cpu", "--rounds", "1", "--only", *only]
    result = benchmark("one_device", tmp_path / "one_device.json", *arguments)
    assert result["device"].startswith("CPU")
    bare, model = ((t["sizes"]["layers"], t["sides"]) for t in result["tables"])
    assert (bare[0], model[0]) == (6, 6)
    assert set(bare[1]) == {
        "serial",
        "ours exact",
        *(f"mgrit {way}, {how}" for way in only[:2] for how in ("one at a time", "stacked")),
    }
    assert set(model[1]) == {"stock", "ours exact", *(f"mgrit {way}, stacked" for way in only[:2])}
    for name, side in bare[1].items():
        assert side["seconds"]["median"] > 0
        alone = bare[1][name.replace("stacked", "one at a time")]["gradient"]
        assert side["gradient"]["cosine"] == pytest.approx(alone["cosine"], abs=1e-6)
    for sides in (bare[1], model[1]):
        assert sides["ours exact"]["gradient"]["cosine"] == pytest.approx(1.0, abs=1e-9)
        assert 0.9 < sides["mgrit identity 1/1, stacked"]["gradient"]["cosine"] < 1 - 1e-6


def test_heavy_head(tmp_path):
    """Where the ends are changes who computes what, and no gradient."""
    arguments = ["--layers", "8", "--vocabulary", "500", "--rounds", "1"]
    result = benchmark("heavy_head", tmp_path / "found.json", *arguments)
    assert result["head_in_layers"] > 0
    sides = result["sides"]
    for name, distance in result["gradient_distance_of_spread_ends"].items():
        assert 0 < distance < 1e-6
        apart = [sides[f"{name}, ends {ends}"]["gradient"]["relative_error"] for ends in ("first_last", "spread")]
        assert apart[1] == pytest.approx(apart[0], abs=1e-6)
        assert (apart[0] < 1e-6) == (name == "exact")
        medians = [sides[f"{name}, ends {ends}"]["seconds"]["median"] for ends in ("first_last", "spread")]
        assert result["spread_over_first_last"][name]["ratio"] == pytest.approx(medians[1] / medians[0])


def test_a_big_vocabulary_is_on_the_ranks_of_the_ends(tmp_path):
    words, width = 4000, 32
    sizes = ["--vocabulary", str(words), "--width", str(width), "--layers", "4"]
    ranks = benchmark("big_vocabulary", tmp_path / "found.json", *sizes)["ranks"]
    assert [rank["layers"] for rank in ranks] == [[0], [1], [2], [3]]
    assert [rank["embedding_rows"] for rank in ranks] == [words, 0, 0, words]
    for rank in ranks:
        table = 4 * width * rank["embedding_rows"]
        assert rank["embedding_bytes"] == table
        assert 0 < rank["parameter_bytes"] - table < 4 * words * width / 2
        assert rank["gradient_bytes"] == rank["parameter_bytes"]
        assert rank["step_growth_bytes"] >= table


def test_accuracy_tells_wrong_gradients():
    exact = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}
    right = {name: t.clone() for name, t in exact.items()}
    assert accuracy(right, exact) == {"cosine": 1.0, "relative_error": 0.0, "norm_ratio": 1.0}
    assert accuracy({n: 0.5 * t for n, t in exact.items()}, exact) == {
        "cosine": 1.0,
        "relative_error": 0.5,
        "norm_ratio": 0.5,
    }
    turned = accuracy({"a": torch.tensor([0.0, 3.0]), "b": exact["b"]}, exact)
    assert turned["cosine"] == pytest.approx(16 / 25)
    with pytest.raises(RuntimeError, match="answer for 2 gradient entries, the model has 3"):
        accuracy({"a": exact["a"]}, exact)


def test_step_without_gradients_is_not_timed():
    weight = torch.nn.Parameter(torch.ones(2))
    exact = {"weight": torch.ones(2)}
    idle = Entry("idle", {}, lambda: Side(lambda: None, [weight], {"weight": weight}))
    assert "made no gradients" in measure([idle], exact, 1)["idle"]["error"]

    steps = []

    def first_time_only() -> None:
        steps.append(1)
        if len(steps) == 1:
            weight.sum().backward()

    once = Entry("once", {}, lambda: Side(first_time_only, [weight], {"weight": weight}))
    with pytest.raises(RuntimeError, match="made no gradients"):
        measure([once], exact, 1)
