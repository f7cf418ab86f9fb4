"""The paper's systems in small: their commands, one short run, the summaries and the pictures."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AutoTokenizer

from hf_layerpar import from_pretrained
from hf_layerpar.plan.simulate import Costs
from recipes import pretrain_bert
from recipes.benchmarks import fine_tuning, paper, paper_speed
from recipes.benchmarks.paper_networks import NETWORKS
from recipes.benchmarks.paper_picture import draw
from recipes.benchmarks.paper_speed_picture import draw as draw_speed
from recipes.benchmarks.systems import SYSTEMS


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_side_is_a_command_of_its_recipe(name):
    system = SYSTEMS[name]
    for side in system.sides:
        recipe, args = system.module.parse(system.command(side, 3, "somewhere"))
        assert (args.seed, args.max_steps, args.output_dir) == (3, system.steps, "somewhere")
        assert (args.strategy == "pipeline") == side.startswith("serial")
        assert args.controller == (side if side in ("paper", "adaptive") else "off")
        if side in ("paper", "switched"):
            config = args.layer_parallel_config
            assert (config.coarse_operator, config.coarsening) == ("rediscretize", system.coarsening)
            assert (config.forward_iterations, config.backward_iterations) == (system.forward, system.backward)
        assert recipe.agreement_batches == 0


def short(name: str, steps: int, *options: str) -> dict:
    system = SYSTEMS[name]
    return {name: dataclasses.replace(system, steps=steps, options=(*system.options, *options))}


def test_a_switched_run_ends_exact(monkeypatch, tmp_path):
    monkeypatch.setattr(paper, "MODELS", tmp_path)
    small = short("gpt", 20, "--eval_steps", "10", "--width", "16", "--logging_steps", "1", "--max_eval_blocks", "4")
    monkeypatch.setattr(paper, "SYSTEMS", small)
    jobs = {job["side"]: job for job in paper.jobs("gpt", [0])}
    run = paper.run_job(jobs["switched"])
    assert [entry["step"] for entry in run["evaluation"]] == [10, 20]
    log = (paper.folder_of(jobs["switched"]) / "result.json").read_text()
    modes = [line.split('"')[3] for line in log.splitlines() if '"lp_backward_mode"' in line]
    assert modes == ["mgrit"] * 13 + ["exact"] * 7
    summary = paper.summarise(SYSTEMS["gpt"], [run])
    assert summary["sides"]["switched"]["final"] == {0: run["metrics"]["validation"]["loss"]}
    assert summary["sides"]["switched"]["minus_serial"] == {}


def run(side: str, seed: int, loss: float) -> dict:
    evaluation = [{"step": 10, "loss": loss + 1}, {"step": 20, "loss": loss}]
    base = {"side": side, "seed": seed, "metrics": {"validation": {"loss": loss}}, "evaluation": evaluation}
    checks = [{"step": 5, "lp_check_rho_forward": 0.5, "lp_check_name": "pipeline", "lp_check_reason": "why"}]
    return base | {"checks": checks if side == "paper" else []}


RUNS = [run("serial", 0, 2.0), run("serial", 1, 2.25), run("paper", 0, 2.5), run("paper", 1, 2.25)]
RUNS += [run("serial, no buffers", 0, 1.0), run("paper, no buffers", 0, 4.0)]


def test_summary_compares_with_serial_of_the_same_seed_and_network(tmp_path):
    found = paper.summarise(SYSTEMS["gpt"], RUNS)
    assert found["serial_spread"] == 0.25
    assert found["sides"]["paper"]["minus_serial"] == {0: 0.5, 1: 0.0}
    assert found["sides"]["paper"]["switches"] == {0: [(5, "pipeline")], 1: [(5, "pipeline")]}
    assert found["sides"]["paper, no buffers"]["minus_serial"] == {0: 3.0}
    draw({"runs": RUNS, "summary": found}, tmp_path / "found.png")
    assert (tmp_path / "found.png").stat().st_size > 10_000


def test_fine_tuning_compares_over_the_same_seeds():
    def tuned(side: str, pretrained: int, seed: int, accuracy: float) -> dict:
        where = {"task": "movies", "side": side, "pretraining_seed": pretrained, "seed": seed}
        splits = {"validation": {"accuracy": 0.5, "majority": 0.5}, "test": {"accuracy": accuracy, "majority": 0.5}}
        return where | {"rows": {"train": 9, "validation": 1, "test": 3}, "metrics": splits}

    runs = [tuned("serial", 0, 0, 0.75), tuned("serial", 1, 0, 0.5), tuned("adaptive", 1, 0, 1.0)]
    row = fine_tuning.summarise([*runs, tuned("new", 0, 0, 0.5), tuned("new", 1, 0, 0.5)])["summary"]["movies"]
    assert row["majority"] == 0.5
    one = {"runs": 1, "accuracy": 0.875, "minus_serial": 0.375, "standard_error": None}
    assert row["sides"]["adaptive"] == one
    assert row["sides"]["new"]["minus_serial"] == -0.09375
    assert row["sides"]["new"]["standard_error"] == pytest.approx(0.09375)
    jobs = fine_tuning.jobs(fine_tuning.TASKS, [0, 1])
    assert len({job["run"] for job in jobs}) == len(jobs) == 2 * 2 * 4 * 4


def test_a_new_network_is_not_trained(monkeypatch, tmp_path):
    monkeypatch.setattr(paper, "MODELS", tmp_path)
    monkeypatch.setattr(fine_tuning, "SYSTEMS", short("bert", 9, "--width", "16", "--max_eval_blocks", "4"))
    job = fine_tuning.network_of(fine_tuning.NEW, 3)
    fine_tuning.make_network(job)
    saved = from_pretrained(paper.folder_of(job) / "model")
    recipe, args = pretrain_bert.parse(["--width", "16", "--seed", "3"])
    tokenizer = AutoTokenizer.from_pretrained(paper.folder_of(job) / "model")
    new = pretrain_bert.build_model(recipe, tokenizer, args.seed)
    for name, value in new.state_dict().items():
        assert torch.equal(saved.state_dict()[name], value), name


@pytest.mark.parametrize("name", NETWORKS)
def test_predicted_speedups(name, tmp_path):
    network = dataclasses.replace(NETWORKS[name], measured=32, depths=(32, 64))
    costs = {f"stack {i}": dataclasses.asdict(Costs(bandwidth=1e6)) for i in range(network.stacks)}
    sides = {side: {"ratio": 0.8} for side in paper_speed.settings_of(network)}
    serial = {paper_speed.SERIAL: {"seconds": {"median": 3.0 * 32 * network.stacks + 6.0}}}
    found = {"sides": sides | serial, "costs": costs, "parameters": {"layers": 1000, "ends": 100}}
    predicted = paper_speed.predictions(network, found)
    assert predicted["ends_seconds"] == pytest.approx(6.0)
    for depth, settings in predicted["speedup"].items():
        for side, values in settings.items():
            assert len(values) == len([ranks for ranks in paper_speed.RANKS if ranks <= int(depth) // 2])
            assert all(0 < value <= ranks for value, ranks in zip(values, paper_speed.RANKS, strict=False)), side
    exact = predicted["speedup"]["32"]["pipeline M=1"]
    assert exact[0] == pytest.approx(1.0)
    assert predicted["speedup"]["64"]["identity 1/1 c=" + str(network.coarsening)][3] > exact[3]
    assert {row["devices"] for row in predicted["with_data_parallel"]} == set(paper_speed.DEVICES)
    about = {"paper": network.figure, "measured_depth": 32, "stacks": network.stacks}
    content = about | {"measured_on_2_ranks": found, "predicted": predicted}
    draw_speed({"networks": {name: content}}, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 10_000
