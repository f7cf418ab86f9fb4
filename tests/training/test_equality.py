"""The same training at every lp size: losses, gradient norms and final weights.

The logged losses are means over all processes, and a mean of equal numbers may round.
"""

from __future__ import annotations

import pytest

from hf_layerpar.run.step_report import StepReport, SweepReport
from hf_layerpar.training.callbacks import solver_log
from tests import zoo
from tests.multiproc import RankPool
from tests.training import evaluating, runs, scenarios

FAMILIES = ("bert_classifier", "llama")
LENGTHS = (12, pytest.param(50, marks=pytest.mark.slow))


@pytest.mark.parametrize("family", [pytest.param("bert_classifier", marks=pytest.mark.slow), "llama", "gpt2"])
@pytest.mark.parametrize("steps", LENGTHS)
def test_steps_are_the_same_at_every_lp_size(
    family: str, steps: int, ranks1: RankPool, ranks2: RankPool, ranks3: RankPool, tmp_path
) -> None:
    settings = {"max_steps": steps, "max_grad_norm": 0.5, "include_num_input_tokens_seen": "all"}
    one = ranks1.run(runs.train, str(tmp_path), family, settings)[0]
    for pool in (ranks2, ranks3):
        many = pool.run(runs.train, str(tmp_path), family, settings | {"lp_size": pool.world})
        assert many[0]["losses"] == pytest.approx(one["losses"], abs=1e-6)
        assert many[0]["norms"] == one["norms"]
        assert many[0]["weights"] == one["weights"]
        assert len({r["copies"] for r in many} - {None}) == (family == "gpt2")  # tied embeddings
        assert many[0]["tokens"] == one["tokens"] == steps * 4 * 12
        assert many[0]["flops"] == one["flops"]
        assert max(r["parameters"] for r in many) < one["parameters"]
    assert len(set(one["losses"])) > 0.8 * steps, "the run doesn't train"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("steps", LENGTHS)
def test_data_parallel_times_layer_parallel(
    family: str, steps: int, ranks2: RankPool, ranks4: RankPool, tmp_path
) -> None:
    settings = {"max_steps": steps, "gradient_accumulation_steps": 2, "max_grad_norm": 0.3}
    flat = ranks2.run(runs.train, str(tmp_path), family, settings)[0]
    grid = ranks4.run(runs.train, str(tmp_path), family, settings | {"lp_size": 2})[0]
    assert grid["losses"] == pytest.approx(flat["losses"], abs=1e-6)
    assert grid["norms"] == flat["norms"]
    assert grid["weights"] == flat["weights"]


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_encoder_decoder(family: str, ranks1: RankPool, ranks2: RankPool, ranks3: RankPool, tmp_path) -> None:
    """The gradient of the encoder's states is a sum over the decoder's layers, and taken in their order."""
    settings = {"max_steps": 10, "micro_batches": 2}
    one = ranks1.run(runs.train, str(tmp_path), family, settings)[0]
    for pool in (ranks2, ranks3):
        many = pool.run(runs.train, str(tmp_path), family, settings | {"lp_size": pool.world})
        assert many[0]["losses"] == pytest.approx(one["losses"], abs=1e-6)
        assert many[0]["weights"] == one["weights"]
        assert len({r["copies"] for r in many} - {None}) == 1


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"bf16": True, "gradient_accumulation_steps": 2}, id="bf16"),
        pytest.param({"activation_checkpointing": True}, id="activation checkpointing"),
        pytest.param({"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2}, id="label smoothing"),
        pytest.param({"strategy": "mgrit", "coarsening": [2], "forward_iterations": 2}, id="mgrit"),
        pytest.param({"micro_batches": 2, "optim": "sgd", "optim_args": "momentum=0.9"}, id="micro-batches, sgd"),
    ],
)
def test_settings_keep_the_lp_sizes_equal(settings: dict, ranks1: RankPool, ranks2: RankPool, tmp_path) -> None:
    settings = settings | {"max_steps": 6}
    one = ranks1.run(runs.train, str(tmp_path), "llama", settings)[0]
    two = ranks2.run(runs.train, str(tmp_path), "llama", settings | {"lp_size": 2})[0]
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-6)
    assert two["weights"] == one["weights"]


DEALT = {"strategy": "mgrit", "coarsening": 3, "split": "interleaved"}


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"split": "interleaved"}, id="two blocks"),
        pytest.param({"split": "v"}, id="v"),
        pytest.param(DEALT | {"forward_iterations": 0, "backward_iterations": 0}, id="exact, dealt out"),
        pytest.param(DEALT | {"forward_iterations": 2, "backward_iterations": 2}, id="mgrit, dealt out"),
    ],
)
def test_every_split_trains_as_one_process(
    settings: dict, ranks1: RankPool, ranks2: RankPool, ranks3: RankPool, tmp_path
) -> None:
    """MGRIT has as many iterations as intervals, which make it exact."""
    common = {"max_steps": 5, "layers": 6, "max_grad_norm": 0.5}
    one = ranks1.run(runs.train, str(tmp_path), "llama", common)[0]
    for pool in (ranks1, ranks2, ranks3):
        many = pool.run(runs.train, str(tmp_path), "llama", common | settings | {"lp_size": pool.world})
        assert many[0]["losses"] == pytest.approx(one["losses"], abs=1e-6)
        assert many[0]["norms"] == one["norms"]
        assert many[0]["weights"] == one["weights"]
    assert len(set(one["losses"])) == 5


@pytest.mark.parametrize(("family", "part"), [("bart", "encoder"), ("t5", "encoder"), ("gpt2", "input_embeddings")])
def test_frozen_parts(family: str, part: str, ranks1: RankPool, ranks2: RankPool, tmp_path) -> None:
    settings = {"max_steps": 4, "micro_batches": 2}
    one = ranks1.run(scenarios.train_frozen, str(tmp_path), family, settings, part)[0]
    two = ranks2.run(scenarios.train_frozen, str(tmp_path), family, settings | {"lp_size": 2}, part)[0]
    assert two["weights"] == one["weights"]
    assert len(set(one["losses"])) == 4


@pytest.mark.compat
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [{}, {"label_smoothing_factor": 0.1}], ids=["plain", "label smoothing"])
def test_as_the_stock_trainer(family: str, settings: dict, ranks1: RankPool, ranks2: RankPool, tmp_path) -> None:
    settings = settings | {"max_steps": 10, "max_grad_norm": 0.5, "dtype": "float64"}
    stock = ranks1.run(runs.train_stock, str(tmp_path), family, settings)[0]
    ours = ranks2.run(runs.train, str(tmp_path), family, settings | {"lp_size": 2, "dropout": 0.0})[0]
    assert ours["losses"] == pytest.approx(stock["losses"], abs=1e-5)
    assert ours["norms"] == pytest.approx(stock["norms"], rel=1e-5)


@pytest.mark.parametrize("family", zoo.in_every_version([*FAMILIES, "t5"], "llama"))
def test_accumulation_is_one_big_batch(
    family: str, ranks1: RankPool, ranks2: RankPool, ranks4: RankPool, tmp_path
) -> None:
    """8 samples a step: in one batch; in two at lp=2; in two on each of two dp ranks at lp=2."""
    base = {"max_steps": 3, "dropout": 0.0, "learning_rate": 1e-2, "max_grad_norm": 0.1, "dtype": "float64"}
    big = ranks1.run(runs.train, str(tmp_path), family, base | {"per_device_train_batch_size": 8})[0]
    split = base | {"gradient_accumulation_steps": 2, "lp_size": 2}
    two = ranks2.run(runs.train, str(tmp_path), family, split | {"per_device_train_batch_size": 4})[0]
    four = ranks4.run(runs.train, str(tmp_path), family, split | {"per_device_train_batch_size": 2})[0]
    for parts in (two, four):
        assert parts["losses"] == pytest.approx(big["losses"], abs=1e-5)
        assert parts["norms"] == pytest.approx(big["norms"], rel=1e-4)


def test_local_item_counts(ranks2: RankPool, ranks4: RankPool, tmp_path) -> None:
    settings = {"average_tokens_across_devices": False, "gradient_accumulation_steps": 2}
    flat = ranks2.run(runs.train, str(tmp_path), "llama", settings)[0]
    grid = ranks4.run(runs.train, str(tmp_path), "llama", settings | {"lp_size": 2})[0]
    assert grid["losses"] == pytest.approx(flat["losses"], abs=1e-6)
    assert grid["weights"] == flat["weights"]


def test_logs_tell_what_the_solver_did(ranks2: RankPool, tmp_path) -> None:
    settings = {"lp_size": 2, "strategy": "mgrit", "coarsening": 2, "forward_iterations": 0, "backward_iterations": 1}
    for entry in ranks2.run(runs.train, str(tmp_path), "llama", settings)[0]["logs"]:
        assert entry["lp_forward_mode"] == "exact"
        assert entry["lp_backward_mode"] == "mgrit"
        assert entry["lp_backward_residual"] > 0
        assert entry["lp_seconds"] > entry["lp_waited"] >= 0
        assert "lp_forward_residual" not in entry


def test_the_worst_stack_is_logged() -> None:
    def swept(*residuals: float) -> SweepReport:
        return SweepReport("mgrit" if residuals else "exact", len(residuals), residuals)

    encoder = {"forward": swept(), "backward": swept(8.0, 4.0, 1.0)}
    decoder = {"forward": swept(6.0), "backward": swept()}
    numbers, modes = solver_log(StepReport({"encoder": encoder, "decoder": decoder}, 1.0, 0.25))
    assert modes == {"lp_forward_mode": "mgrit", "lp_backward_mode": "mgrit"}
    assert numbers == {
        "lp_seconds": 1.0,
        "lp_waited": 0.25,
        "lp_forward_residual": 6.0,
        "lp_backward_residual": 1.0,
        "lp_backward_factor": 0.5,
    }


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"gradient_accumulation_steps": 2}),
        ("gpt2", {"bf16": True, "micro_batches": 2}),
        ("bert_classifier", {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 2}),
        ("gpt2", {"label_smoothing_factor": 0.1, "micro_batches": 2}),
        ("bart", {"strategy": "mgrit", "coarsening": 2, "coarse_operator": "identity"}),
    ],
)
def test_spread_ends_train_as_those_of_the_last_rank(family: str, settings: dict, ranks2: RankPool, tmp_path) -> None:
    settings = {"lp_size": 2, "max_steps": 6, "max_grad_norm": 0.5, "dropout": 0.0, "optim": "sgd"} | settings
    settings |= {"learning_rate": 0.1}
    whole = ranks2.run(runs.train, str(tmp_path), family, settings)
    spread = ranks2.run(runs.train, str(tmp_path), family, settings | {"ends": "spread"})
    tolerance = 2e-3 if "bf16" in settings else 1e-5
    assert spread[0]["losses"] == spread[1]["losses"] == pytest.approx(whole[0]["losses"], rel=tolerance)
    assert spread[0]["norms"] == pytest.approx(whole[0]["norms"], rel=20 * tolerance)
    assert spread[0]["largest"] == pytest.approx(whole[0]["largest"], rel=10 * tolerance, abs=tolerance)
    assert spread[0]["copies"] == spread[1]["copies"] is not None
    assert spread[0]["weights"] != whole[0]["weights"], "the test spreads nothing"
    assert len(set(spread[0]["losses"])) == 6


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_spread_ends_on_a_mesh(smoothing: float, ranks2: RankPool, ranks4: RankPool, tmp_path) -> None:
    settings = {"max_steps": 4, "gradient_accumulation_steps": 2, "dropout": 0.0, "optim": "sgd", "learning_rate": 0.1}
    settings |= {"label_smoothing_factor": smoothing}
    flat = ranks2.run(runs.train, str(tmp_path), "llama", settings)[0]
    grid = ranks4.run(runs.train, str(tmp_path), "llama", settings | {"lp_size": 2, "ends": "spread"})
    assert grid[0]["losses"] == pytest.approx(flat["losses"], abs=1e-5)
    assert grid[0]["norms"] == pytest.approx(flat["norms"], rel=1e-4)
    assert len({rank["copies"] for rank in grid} - {None}) == 1


def test_spread_ends_evaluate_whole_batches(ranks2: RankPool, tmp_path) -> None:
    whole, spread = (
        ranks2.run(evaluating.evaluate, str(tmp_path), "bert_classifier", {"lp_size": 2, "ends": ends}, 7)[0]
        for ends in ("first_last", "spread")
    )
    assert spread["eval_loss"] == whole["eval_loss"]
    assert (spread["predictions"] == whole["predictions"]).all()
