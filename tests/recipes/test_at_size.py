"""The deep network's benchmarks (`at_size`, `settings_map`, `race`): what they run, and what they make of runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_layerpar.config import LayerParallelConfig, describe
from recipes.benchmarks import at_size, pool, race, settings_map
from recipes.benchmarks.at_size_picture import draw

AGGREGATE = LayerParallelConfig(strategy="mgrit", coarse_operator="aggregate")


def made_up(side: str, seed: int, loss: float, steps: int = 60, checks: tuple[dict, ...] = ()) -> dict[str, Any]:
    config = LayerParallelConfig() if side.startswith("serial") else AGGREGATE
    gradients = [
        {"step": step, "settings": name, "penalty": 0.0, "cosine": cosine}
        for step, cosine in ((30, 0.999), (60, 0.995))
        for name in settings_map.CONFIGS
        if side == "serial"
    ]
    return {
        "run": f"h=1 {side}, seed {seed}, {steps} steps",
        "h": "h=1",
        "side": side,
        "seed": seed,
        "steps": steps,
        "penalty": 0.0,
        "evaluation": [[steps // 2, loss + 1], [steps, loss]],
        "settings": {"layer_parallel": config.to_dict()},
        "options": list(at_size.SIDES[side]),
        "checks": list(checks),
        "gradients": gradients,
    }


def check(step: int, name: str) -> dict[str, Any]:
    return {"step": step, "lp_check_name": name}


RUNS = [
    made_up("serial", 0, 2.0),
    made_up("serial", 1, 2.25),
    made_up("serial", 0, 3.0, steps=10),
    made_up("aggregate 1/1", 0, 2.5),
    made_up("adaptive", 0, 2.125, checks=(check(0, describe(AGGREGATE)), check(45, "pipeline"))),
]


def test_the_most_telling_runs_come_first_and_none_twice() -> None:
    wanted = at_size.jobs(3000, [])
    names = [job["run"] for job in wanted]
    assert len(set(names)) == len(names)
    assert names[:2] == ["h=1/16 serial, seed 0, 3000 steps", "h=1/16 aggregate 1/1, seed 0, 3000 steps"]
    long = {(job["h"], job["side"], job["seed"]) for job in wanted if job["steps"] == 3000}
    assert long == {(h, side, seed) for h in at_size.STEP_SIZES for side in at_size.SIDES for seed in at_size.SEEDS}
    short = [job for job in wanted if job["steps"] == 375]
    assert {job["penalty"] for job in short} == set(at_size.PENALTIES)
    assert all(job["probes"] for job in short)
    assert [job["run"] for job in at_size.jobs(3000, ["h=1/4 serial"])] == [n for n in names if "h=1/4 serial" in n]


def test_long_runs_are_compared_with_serial_of_their_seed(tmp_path) -> None:
    found = at_size.summarise(RUNS)["h=1"]
    assert found["serial_spread"] == 0.25
    assert found["sides"]["serial"]["final_losses"] == {0: 2.0, 1: 2.25}
    assert found["sides"]["aggregate 1/1"]["minus_serial"] == {0: 0.5}
    adaptive = found["sides"]["adaptive"]
    assert adaptive["shares_of_steps"] == [{describe(AGGREGATE): 0.75, "pipeline": 0.25}]
    # its layers stay dealt out, those of the others are where they are fastest
    dealt = at_size.predicted_shares(RUNS, dealt=True)
    mgrit, exact = dealt[describe(AGGREGATE)], dealt["pipeline"]
    assert mgrit[0] == found["sides"]["aggregate 1/1"]["predicted_share"][0]
    assert exact[0] > found["sides"]["serial"]["predicted_share"][0]
    assert adaptive["predicted_share"] == pytest.approx(
        [0.75 * m + 0.25 * e for m, e in zip(mgrit, exact, strict=True)]
    )
    draw({"summary": {"h=1": found}, "runs": RUNS}, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


class Inline:
    """A pool that works the jobs here, and notes them."""

    def __init__(self) -> None:
        self.worked: list[str] = []

    def __call__(self, processes: int) -> Inline:
        return self

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def imap_unordered(self, work: Callable[[dict], dict], jobs: list[dict]) -> Iterator[dict]:
        self.worked += [job["run"] for job in jobs]
        return map(work, jobs)


def test_runs_with_other_options_are_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    inline = Inline()
    monkeypatch.setattr(pool, "worker_pool", inline)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")

    def run(*jobs: dict[str, Any]) -> list[tuple[str, Any]]:
        found = pool.run_missing(
            jobs, lambda job: job, lambda runs: {}, tmp_path / "runs.json", processes=1, fresh=False
        )
        return [(job["run"], job.get("options")) for job in found["runs"]]

    old, new, plain = {"run": "a", "options": ["--x"]}, {"run": "a", "options": ["--x", "--y"]}, {"run": "b"}
    assert run(old, plain) == run(old, plain) == [("a", ["--x"]), ("b", None)]
    assert run(new) == [("b", None), ("a", ["--x", "--y"])]
    assert run(new, plain) == [("a", ["--x", "--y"]), ("b", None)]
    assert inline.worked == ["a", "b", "a"]
    adaptive = [job["options"] for job in at_size.jobs(3000, ["adaptive"])]
    assert all(options[options.index("--split") + 1] == "interleaved" for options in adaptive)
    assert at_size.DEALT.dealt == tuple(range(2, 35, 4))


def test_the_map_has_the_fastest_of_the_settings_whose_gradients_are_good() -> None:
    cosines = settings_map.least_cosines(RUNS)
    assert cosines == {"h=1": dict.fromkeys(settings_map.CONFIGS, 0.995)}
    fast, slow, *_ = settings_map.CONFIGS
    shares = {
        (name, ranks, count): {"exact": 0.5, fast: 0.25, slow: 0.75}.get(name, 1.0)
        for name in ("exact", *settings_map.CONFIGS)
        for ranks in settings_map.RANKS
        for count in settings_map.MICRO_BATCHES
    }
    good = settings_map.cells(cosines, shares, 1024)
    assert len(good) == len(settings_map.RANKS) * len(settings_map.MICRO_BATCHES)
    assert {cell["winner"] for cell in good} == {fast}
    cosines["h=1"][fast] = 0.5
    assert {(cell["winner"], cell["mgrit"]) for cell in settings_map.cells(cosines, shares, 1024)} == {("exact", slow)}
    none = settings_map.cells({"h=1": dict.fromkeys(settings_map.CONFIGS, 0.5)}, shares, 1024)
    assert all("mgrit" not in cell for cell in none)


def test_the_target_is_reached_between_two_evaluations() -> None:
    curve = [(10, 3.0, 1.0), (20, 2.0, 3.0), (30, 1.5, 5.0)]
    assert race.seconds_to(2.5, curve) == 2.0
    assert race.seconds_to(3.0, curve) == 1.0
    assert race.seconds_to(1.0, curve) is None


def test_a_simulated_race_has_the_settings_in_force_and_the_checks() -> None:
    table = {"dim": 8, "batch": 1, "costs": {"step": 1.0}}
    plain = {"side": race.STOCK, "settings": {"layer_parallel": None}, "checks": [], "curve": [(2, 1.5, 9.0)]}
    assert race.simulated_curve(plain, table) == [(2, 1.5, 2 * 36 * 3)]
    exact = race.simulated_step(race.ADAPTIVE, LayerParallelConfig(), table)
    mgrit = race.simulated_step(race.ADAPTIVE, AGGREGATE, table)
    watched = {"side": race.ADAPTIVE, "settings": {"layer_parallel": AGGREGATE.to_dict()}, "steps": 3}
    watched |= {"checks": [check(0, describe(AGGREGATE)), check(2, "pipeline")], "curve": [(2, 1.5, 0), (3, 1.0, 0)]}
    (_, _, middle), (_, _, end) = race.simulated_curve(watched, table)
    assert middle == pytest.approx(exact + 3 * mgrit)
    assert end == pytest.approx(middle + 3 * exact)
