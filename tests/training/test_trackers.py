"""What trackers (W&B, trackio, TensorBoard) are given: numbers, and settings that can be written."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import TrainerCallback

from hf_layerpar.errors import ConfigurationError
from tests.multiproc import RankPool
from tests.training import runs

SETTINGS: dict[str, Any] = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 2}
MGRIT = {"strategy": "mgrit", "coarsening": 2, "increment_penalty": 0.1}
WATCHED = MGRIT | {"controller": "adaptive", "check_every": 1, "check_layers": True}


class Tracker(TrainerCallback):
    """As those of transformers: the settings once, and every log on one process."""

    def __init__(self) -> None:
        self.settings, self.logs = "", []

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        if state.is_world_process_zero:
            self.settings = args.to_json_string() + json.dumps(args.to_dict()) + model.config.to_json_string()

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if state.is_world_process_zero:
            self.logs.append(dict(logs))


def tracked(output_dir: str, settings: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    tracker = Tracker()
    more = {"eval_dataset": runs.Samples("bert_classifier", 6), "callbacks": [tracker]}
    runs.trainer(output_dir, "bert_classifier", SETTINGS | {"lp_size": 2} | settings, **more).train()
    return tracker.settings, tracker.logs


@pytest.mark.parametrize("settings", [{}, WATCHED])
def test_trackers_are_given_numbers(settings: dict[str, Any], ranks2: RankPool, tmp_path) -> None:
    (told, logs), (elsewhere, none) = ranks2.run(tracked, str(tmp_path), settings)
    assert (elsewhere, none) == ("", [])
    assert '"lp_size": 2' in told
    assert not [(name, value) for log in logs for name, value in log.items() if type(value) not in (int, float)]
    names = {name for log in logs for name in log}
    assert {"loss", "eval_loss", "train_loss", "lp_seconds", "lp_waited"} <= names
    if settings:
        assert {"lp_forward_residual", "lp_penalty", "lp_check_cosine", "lp_check_share"} <= names


def refused(output_dir: str, tracker: str, variable: str, value: str, settings: dict[str, Any]) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(variable, value)
        try:
            runs.arguments(output_dir, report_to=tracker, **settings)
        except ConfigurationError as error:
            return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("tracker", "variable", "value"),
    [("wandb", "WANDB_LOG_MODEL", "end"), ("dvclive", "HF_DVCLIVE_LOG_MODEL", "True")],
)
def test_a_tracker_that_saves_on_one_process_is_refused(
    tracker: str, variable: str, value: str, ranks2: RankPool, tmp_path
) -> None:
    """It would wait there for processes that have gone on, with a part of the model."""
    for said in ranks2.run(refused, str(tmp_path), tracker, variable, value, {"lp_size": 2}):
        assert said.startswith(f"{variable}={value} with lp_size=2 and tp_size=1: {tracker} saves")
    assert ranks2.run(refused, str(tmp_path), tracker, variable, value, {}) == ["no error"] * 2
    assert ranks2.run(refused, str(tmp_path), tracker, variable, "false", {"lp_size": 2}) == ["no error"] * 2
