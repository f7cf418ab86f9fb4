"""The controller benchmark: what it runs, and what it makes of runs. (The runs are those of the GPT-2 recipe.)"""

from __future__ import annotations

import pytest

from hf_layerpar.config import LayerParallelConfig
from recipes.benchmarks import controller
from recipes.benchmarks.controller_picture import draw


def made_up(side: str, seed: int, loss: float, checks: list[dict] | None = None, operator: str = "aggregate") -> dict:
    strategy = "pipeline" if side == "serial" else "mgrit"
    settings = LayerParallelConfig(strategy=strategy, coarse_operator=operator).to_dict()
    row = {"step": 200, "settings": "mgrit aggregate 1/1 c=4", "cosine": 0.9, "norm_ratio": 1.0, "bias_to_noise": 0.1}
    return {
        "run": f"h=1 {side}, seed {seed}",
        "h": "h=1",
        "side": side,
        "seed": seed,
        "steps": 400,
        "evaluation": [[200, loss + 1], [400, loss]],
        "settings": {"layer_parallel": settings},
        "checks": checks or [],
        "gradients": [row] if side == "serial" else [],
        "losses": [],
        "seconds": 1.0,
    }


def check(step: int, name: str, **more: object) -> dict:
    return {"step": step, "lp_check_name": name, "lp_check_setting": 0, "lp_check_seconds": 0.5} | more


RUNS = [
    made_up("serial", 0, 2.0),
    made_up("serial", 1, 2.25),
    made_up("pure aggregate c=4 1/1", 0, 2.5),
    made_up(
        "raise",
        0,
        2.125,
        [
            check(0, "mgrit rediscretize 1/1 c=4", lp_check_rho_forward=0.5),
            check(100, "mgrit rediscretize 1/1 c=4 damping 0.25"),
            check(300, "pipeline", lp_check_reason="convergence factor 2 > 1"),
        ],
        "rediscretize",
    ),
]


def test_the_most_telling_runs_come_first_and_none_twice():
    wanted = controller.jobs(2000, [0, 1, 2], [])
    names = [job["run"] for job in wanted]
    assert len(set(names)) == len(names)
    assert names[:2] == ["h=1/16 serial, seed 0, 2000 steps", "h=1/16 adaptive, seed 0, 2000 steps"]
    every = {(job["h"], job["side"], job["seed"]) for job in wanted if job["steps"] == 2000}
    assert every >= {(h, side, 0) for h in controller.STEP_SIZES for side in controller.SIDES}
    assert every >= {(h, side, s) for h in controller.STEP_SIZES for side in controller.CONTROLLED for s in (1, 2)}
    assert every >= {("h=1/16", side, s) for side in (*controller.FIRST, *controller.CANDIDATES) for s in (1, 2)}
    assert len(every) == len([job for job in wanted if job["steps"] == 2000])
    assert [job["run"] for job in controller.jobs(10, [0], ["h=1 paper"])] == ["h=1 paper, seed 0, 10 steps"]


def test_summary_counts_steps_in_each_setting():
    found = controller.summarise(RUNS)["h=1"]
    assert found["serial_spread"] == pytest.approx(0.25)
    assert found["sides"]["pure aggregate c=4 1/1"]["minus_serial"] == {0: 0.5}
    (run,) = found["sides"]["raise"]["runs"]
    assert run["layer_parallel"] == pytest.approx(0.75)
    assert sum(run["settings"].values()) == pytest.approx(1)
    assert run["check_seconds"] == pytest.approx(1.5)
    exact = found["sides"]["serial"]["predicted_share"]
    assert all(0 < share < limit for share, limit in zip(run["predicted_share"], exact, strict=True))


def test_runs_of_operators_that_are_gone_are_read():
    old = made_up("pure mean c=4 1/1", 0, 3.0, operator="mean")
    old["settings"]["layer_parallel"] |= {"levels": 2, "damping": 0.0, "sliced_ends": False}
    checks = [check(0, "mgrit linear exact/2 c=4"), check(200, "pipeline")]
    adaptive = made_up("adaptive", 0, 2.0, checks)
    sides = controller.summarise([*RUNS, old, adaptive])["h=1"]["sides"]
    identity = controller.predicted_share(
        LayerParallelConfig(strategy="mgrit", coarse_operator="identity"), [controller.SHAPE], 8
    )
    assert sides["pure mean c=4 1/1"]["predicted_share"][controller.RANKS.index(8)] == pytest.approx(identity)
    (run,) = sides["adaptive"]["runs"]
    assert run["settings"] == {"mgrit linear exact/2 c=4": 0.5, "pipeline": 0.5}


def test_picture(tmp_path):
    path = tmp_path / "found.png"
    draw({"summary": controller.summarise(RUNS), "runs": RUNS}, path)
    assert path.stat().st_size > 10_000
