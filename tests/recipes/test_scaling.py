"""The committed scaling table is what the simulator says today, and its comparisons follow from it."""

import json

import pytest

from recipes.benchmarks.launch import RESULTS
from recipes.benchmarks.scaling import MICRO_BATCHES, RANKS, cases, comparisons

CONTENT = json.loads((RESULTS / "scaling.json").read_text())


@pytest.mark.parametrize(("ranks", "micro_batches"), [(4, 1), (8, 4), (128, 1)])
def test_the_table_is_up_to_date(ranks, micro_batches):
    """When the plans change: python recipes/benchmarks/scaling.py"""
    place = {"ranks": ranks, "micro_batches": micro_batches}
    assert cases(ranks, micro_batches) == [case for case in CONTENT["cases"] if place.items() <= case.items()]


def test_every_place_is_covered_and_compared():
    assert {(c["ranks"], c["micro_batches"]) for c in CONTENT["cases"]} == {
        (p, m) for p in RANKS for m in MICRO_BATCHES
    }
    assert comparisons(CONTENT["cases"]) == CONTENT["mgrit_against_the_best_pipeline"]
    for entry in CONTENT["mgrit_against_the_best_pipeline"]:
        assert entry["times_faster"] == pytest.approx(entry["pipeline_share"] / entry["mgrit_share"], abs=1e-3)
        assert entry["times_faster_than_pipeline_of_any_micro_batches"] <= entry["times_faster"]
