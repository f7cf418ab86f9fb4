"""Two lp ranks each take about half of what one takes for layers, gradients and Adam state."""

from __future__ import annotations

import json

import pytest

from recipes.benchmarks.launch import ROOT, launch


@pytest.mark.slow
def test_two_ranks_hold_half_each(tmp_path):
    output = tmp_path / "memory.json"
    launch(1, ROOT / "recipes" / "benchmarks" / "memory.py", ["--output", str(output)], timeout=600)
    result = json.loads(output.read_text())
    assert [len(found) for found in result["ranks"].values()] == [1, 2]
    whole = result["ranks"]["1"][0]["layers"]
    assert whole["weights"] >= 200 * 10**6
    for key in ("weights", "gradients"):
        assert sum(rank["layers"][key] for rank in result["ranks"]["2"]) == whole[key], "layers were lost or held twice"
    assert result["ratio_2_to_1"]["layers_gradients_adam"] <= 0.55
    assert 0 < result["ratio_2_to_1"]["peak_resident"] < 0.75
