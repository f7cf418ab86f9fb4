"""The controller on made-up readings, and in training runs whose model turns unfriendly and friendly again."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from hf_layerpar.config import LayerParallelConfig, describe
from hf_layerpar.errors import ConfigurationError
from hf_layerpar.plan.ladder import StackShape, escalation, exact_settings, predicted_share
from hf_layerpar.training import watching
from hf_layerpar.training.controller import Controller, Reading
from tests.multiproc import RankPool
from tests.training import runs, scenarios

START = LayerParallelConfig(strategy="mgrit", coarse_operator="identity")
LADDER = [
    *(LayerParallelConfig(strategy="mgrit", coarse_operator=o) for o in ("identity", "rediscretize", "aggregate")),
    exact_settings(START),
]


class World:
    """Answers measurements from a table of biases (or factors), and notes what was measured."""

    def __init__(self, ladder, biases=None, factors=None) -> None:
        self.ladder, self.biases, self.factors = list(ladder), biases, factors
        self.measured: list[str] = []

    def __call__(self, settings: LayerParallelConfig, *, factors: bool) -> Reading:
        self.measured.append(describe(settings))
        place = self.ladder.index(settings)
        return Reading(
            rho_forward=self.factors[place] if self.factors and factors else None,
            bias=self.biases[place] if self.biases else None,
        )


def test_paper_goes_exact_for_good():
    ladder = [START, exact_settings(START)]
    controller = Controller("paper", ladder, bound=0.2)
    assert controller.check(World(ladder, factors=[0.99])) == (Reading(rho_forward=0.99), None)
    _, reason = controller.check(World(ladder, factors=[1.2]))
    assert reason == "convergence factor 1.2 > 1"
    assert controller.is_exact
    assert controller.is_done


def test_paper_looks_at_factors_only():
    ladder = [START, exact_settings(START)]
    controller = Controller("paper", ladder, bound=0.2)
    assert controller.check(World(ladder, factors=[0.5], biases=[5.0]))[1] is None


@pytest.mark.parametrize("bad", [1.5, math.nan, math.inf])
def test_raise_climbs_one_step_a_check(bad):
    ladder = escalation(START)
    controller = Controller("raise", ladder, bound=0.2)
    places = []
    while not controller.is_done:
        controller.check(World(ladder, factors=[bad] * len(ladder)))
        places.append(controller.place)
    assert places == list(range(1, len(ladder)))


def test_adaptive_climbs_to_the_first_good_settings_in_one_check():
    controller = Controller("adaptive", LADDER, bound=0.2)
    world = World(LADDER, biases=[0.9, math.nan, 0.15])
    reading, reason = controller.check(world)
    assert reading.bias == 0.9
    assert reason == "bias 0.9 > 0.2"
    assert [(place, one.bias) for place, one in controller.readings if place != 1] == [(0, 0.9), (2, 0.15)]
    assert controller.settings == LADDER[2]
    assert world.measured == [describe(s) for s in LADDER[:3]]


def test_adaptive_comes_down_with_hysteresis_and_skips_what_is_bad_between():
    controller = Controller("adaptive", LADDER, bound=0.2)
    controller.check(World(LADDER, biases=[0.9, 0.9, 0.15]))
    for _ in range(3):  # inside the bound, but not well inside
        assert controller.check(World(LADDER, biases=[0.15, 0.15, 0.05]))[1] is None
    reasons = [controller.check(World(LADDER, biases=[0.05, 0.9, 0.05]))[1] for _ in range(2)]
    assert sum(reason is not None for reason in reasons) == 1
    assert controller.place == 0


def test_adaptive_returns_from_the_exact_solve_by_the_least_biased_settings():
    controller = Controller("adaptive", LADDER, bound=0.2)
    controller.check(World(LADDER, biases=[0.9, 0.3, 0.4]))
    assert controller.is_exact
    assert not controller.is_done
    world = World(LADDER, biases=[0.9, 0.3, 0.4])
    reading, reason = controller.check(world)
    assert (reading.bias, reason) == (0.3, None)
    assert controller.readings == [(1, reading)]
    assert world.measured == [describe(LADDER[1])]
    _, reason = controller.check(World(LADDER, biases=[0.9, 0.05, 0.4]))
    assert reason == "bias 0.05 <= 0.1 with cheaper settings"
    assert controller.place == 1


def test_a_restored_controller_decides_as_the_first_would():
    biases = [[0.9, 0.3, 0.1], [0.9, 0.3, 0.1], [0.9, 0.05, 0.3], [0.01, 0.3, 0.3], [0.9, 0.9, 0.9], [0.01, 0.01, 0.01]]
    whole = Controller("adaptive", LADDER, bound=0.2)
    states = []
    for row in biases:
        states.append(json.dumps(whole.state_dict()))
        whole.check(World(LADDER, biases=row))
    for k, state in enumerate(states):
        again = Controller("adaptive", LADDER, bound=0.2)
        again.load_state_dict(json.loads(state))
        for row in biases[k:]:
            again.check(World(LADDER, biases=row))
        assert again.state_dict() == whole.state_dict()


def test_on_another_ladder_it_starts_exact():
    controller = Controller("adaptive", LADDER, bound=0.2)
    controller.load_state_dict(Controller("adaptive", escalation(START)[1:], bound=0.2).state_dict())
    assert controller.is_exact


WATCHED = {"strategy": "mgrit", "coarsening": 2, "check_every": 2, "max_steps": 16, "learning_rate": 1e-5}
POLICIES = {
    "paper": {"controller": "paper", "coarse_operator": "rediscretize"},
    "raise": {"controller": "raise", "coarse_operator": "rediscretize"},
    "adaptive": {"controller": "adaptive", "controller_ranks": 4, "controller_bound": 0.3},
}
WILD, CALM = 5, 10  # after these steps the layers' increments grow, and shrink again


def names(result: dict) -> dict[int, str]:
    """Settings in force after the check at each step."""
    return {entry["step"]: entry["lp_check_name"] for entry in result["checks"]}


@pytest.fixture(scope="module")
def whole(ranks1: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict, Path]]:
    found = {}
    for policy, settings in POLICIES.items():
        folder = tmp_path_factory.mktemp(policy)
        saving = {"save_strategy": "steps", "save_steps": 7}
        run = ranks1.run(scenarios.train_swinging, str(folder), WATCHED | settings | saving, WILD, CALM)
        found[policy] = run[0], folder
    return found


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_notices_within_two_checks(policy, whole):
    result, _ = whole[policy]
    seen = names(result)
    before = seen[4]
    assert any(seen.get(step, "pipeline") != before for step in (6, 8))
    reasons = [entry["lp_check_reason"] for entry in result["checks"] if "lp_check_reason" in entry]
    assert reasons
    before = ""
    for entry in result["checks"]:  # what was measured first is what was in force, unless that was exact
        first = entry["lp_check_readings"][0]
        if before.startswith("mgrit"):
            assert first["name"] == before
        assert {f"lp_check_{k}": v for k, v in first.items() if k not in ("name", "setting")}.items() <= entry.items()
        if policy == "adaptive" and "lp_check_reason" in entry:
            assert entry["lp_check_bound"] == 0.3
            chosen = [one for one in entry["lp_check_readings"] if one["name"] == entry["lp_check_name"]]
            assert entry["lp_check_name"] == "pipeline" or chosen[-1]["bias"] <= 0.3
        before = entry["lp_check_name"]
    assert ("bias" if policy == "adaptive" else "convergence factor") in reasons[-1 if policy != "adaptive" else 0]


def test_adaptive_comes_back_and_paper_does_not(whole):
    adaptive = names(whole["adaptive"][0])
    assert adaptive[8] == "pipeline" or adaptive[8] != adaptive[4]
    assert adaptive[14] != "pipeline"
    assert list(whole["adaptive"][0]["shares"]) == sorted(whole["adaptive"][0]["shares"])
    paper = whole["paper"][0]
    assert names(paper)[max(names(paper))] == "pipeline"
    assert paper["modes"][-1] == ("exact", "exact")


@pytest.mark.parametrize("policy", POLICIES)
def test_resume_in_each_mode_continues_identically(policy, whole, ranks1: RankPool, ranks2: RankPool, tmp_path: Path):
    result, folder = whole[policy]
    for pool in (ranks1, ranks2):
        settings = WATCHED | POLICIES[policy] | {"lp_size": pool.world}
        for step in (7, 14):
            out, start = str(tmp_path / f"{pool.world}-{step}"), str(folder / f"checkpoint-{step}")
            ranks = pool.run(scenarios.train_swinging, out, settings, WILD, CALM, start)
            assert ranks[0]["weights"] == result["weights"]
            assert names(ranks[0]) == names(result)
            assert all(rank["settings"] == result["settings"] for rank in ranks)


@pytest.mark.parametrize("split", [None, "interleaved"])
def test_two_by_two_ranks_agree_on_every_decision(split, ranks4: RankPool, tmp_path: Path):
    settings = WATCHED | POLICIES["adaptive"] | {"lp_size": 2, "split": split}
    ranks = ranks4.run(scenarios.train_swinging, str(tmp_path), settings, WILD, CALM)
    assert all(names(rank) == names(ranks[0]) for rank in ranks)
    assert len(set(names(ranks[0]).values())) > 1
    assert len({rank["copies"] for rank in ranks} - {None}) == 1


def test_layers_are_read_on_the_ranks_that_hold_them(ranks1: RankPool, ranks2: RankPool, tmp_path: Path):
    settings = WATCHED | POLICIES["paper"] | {"max_steps": 3, "check_layers": True}
    found = []
    for pool in (ranks1, ranks2):
        size = {"lp_size": pool.world}
        runs_of_ranks = pool.run(scenarios.train_swinging, str(tmp_path / str(pool.world)), settings | size, 99, 99)
        found += [run["checks"][-1]["lp_check_lipschitz"] for run in runs_of_ranks]
    assert len(found[0]) == 18
    assert min(found[0]) > 0
    assert found[1] == found[2] == pytest.approx(found[0], rel=1e-5)


def test_watching_changes_nothing_where_nothing_is_decided(ranks1: RankPool, tmp_path: Path):
    settings = WATCHED | {"max_steps": 5, "coarse_operator": "aggregate"}
    plain = ranks1.run(scenarios.train_swinging, str(tmp_path / "a"), settings, 99, 99)[0]
    watched = ranks1.run(
        scenarios.train_swinging,
        str(tmp_path / "b"),
        settings | {"controller": "paper", "check_gradient": True},
        99,
        99,
    )[0]
    assert watched["weights"] == plain["weights"]
    check = watched["checks"][0]
    assert 0.9 < check["lp_check_cosine"] <= 1
    assert {
        "lp_check_rho_forward",
        "lp_check_rho_backward",
        "lp_check_bias_to_noise",
        "lp_check_bias",
        "lp_check_seconds",
    } <= set(check)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"controller": "sometimes"}, r"controller='sometimes' is unknown; use one of off, paper, raise, adaptive"),
        ({"controller": "paper", "check_every": 0}, r"check_every=0 must be an integer of at least 1"),
        ({"controller": "adaptive", "controller_bound": 0.0}, r"controller_bound=0.0 must be positive"),
        ({"controller": "adaptive", "controller_ranks": 0}, r"controller_ranks=0 must be an integer of at least 1"),
        (
            {"controller": "adaptive", "per_device_train_batch_size": 1},
            r"per_device_train_batch_size of at least 2, not 1",
        ),
    ],
)
def test_arguments_are_checked(settings, message, tmp_path: Path):
    with pytest.raises(ConfigurationError, match=message):
        runs.arguments(str(tmp_path), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"controller": "raise", "strategy": "pipeline"}, r"controller='raise' watches MGRIT, but strategy='pipeline'"),
        ({"controller": "adaptive"}, r"no MGRIT setting .* on 1 ranks"),
    ],
)
def test_policies_need_something_to_choose_from(settings, message, tmp_path: Path):
    with pytest.raises(ConfigurationError, match=message):
        runs.trainer(str(tmp_path), "llama", settings)


def test_one_process_plans_for_ranks_with_intervals_dealt_out(tmp_path: Path):
    """The layers themselves stay where they are: all on the one."""
    settings = {"strategy": "mgrit", "coarsening": 8, "layers": 16, "controller": "adaptive", "controller_ranks": 8}
    settings |= {"controller_bound": 99.0, "max_steps": 2, "check_every": 1}
    shares = {}
    for split in (None, "interleaved"):
        run = runs.trainer(str(tmp_path), "llama", settings | {"split": split})
        watch = run._watch
        assert watch is not None
        shares[split] = {describe(config): share for config, share in watch.shares.items()}
        run.train()
        checks = [entry for entry in run.state.log_history if "lp_check_setting" in entry]
        assert len(checks) == 2
        assert all(entry["lp_check_share"] == shares[split][entry["lp_check_name"]] for entry in checks)
    name, start = "mgrit aggregate 1/1 c=8", run.args.layer_parallel_config
    stack = StackShape(16, (0, 0), dealt=(0, 8, 16))
    assert run.layer_parallel.shapes == (stack,)
    assert shares["interleaved"][name] == predicted_share(start, [stack], 8) < shares[None][name]
    assert shares["interleaved"]["pipeline"] == predicted_share(exact_settings(start), [stack], 8)
    with pytest.raises(ConfigurationError, match=r"leaves lp ranks \[7\] of 8 without a layer"):
        runs.trainer(str(tmp_path), "llama", settings | {"split": "interleaved", "coarsening": 4})


@pytest.mark.parametrize(("check_gradient", "warned"), [(False, True), (True, False)])
def test_exact_solves_have_no_convergence_factor(check_gradient, warned, tmp_path: Path, monkeypatch):
    """Two intervals: twice one iteration is exact, and a factor of 0 would praise it."""
    warnings: list[str] = []
    monkeypatch.setattr(watching.logger, "warning_once", warnings.append)
    settings = {"strategy": "mgrit", "coarsening": 2, "controller": "raise", "check_gradient": check_gradient}
    run = runs.trainer(str(tmp_path), "llama", settings | {"controller_bound": 99.0, "check_every": 1, "max_steps": 2})
    run.train()
    checks = [entry for entry in run.state.log_history if "lp_check_setting" in entry]
    assert len(checks) == 2
    assert not any("lp_check_rho_forward" in check or "lp_check_rho_backward" in check for check in checks)
    assert [message.partition(":")[0] for message in warnings] == warned * 2 * [
        "controller='raise' sees nothing of mgrit aggregate 1/1 c=2"
    ]
