"""A made-up log history, as a Trainer with a controller leaves it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CHEAP, RICH, EXACT = "mgrit identity 1/1 c=8", "mgrit aggregate 1/1 c=4", "pipeline"


def history(offset: float = 0.0) -> list[dict[str, Any]]:
    """100 steps: cheap until 40, rich until 80, then exact; the loss falls from 5 + offset."""
    entries: list[dict[str, Any]] = []
    for step in range(10, 101, 10):
        loss = 5.0 + offset - 0.02 * step
        entries.append({"step": step, "loss": loss, "epoch": 0.1, "lp_forward_mode": "mgrit", "lp_forward_factor": 0.3})
        if step % 50 == 0:
            entries.append({"step": step, "eval_loss": loss + 0.1, "eval_runtime": 1.0})
    # step: what it measures first and that one's bias, the settings from there on, their share, why
    places = {20: (CHEAP, 0.2, 0, CHEAP, 0.3, ""), 40: (CHEAP, 0.6, 1, RICH, 0.5, "bias 0.6 > 0.5")}
    places |= {60: (RICH, 0.3, 1, RICH, 0.5, ""), 80: (RICH, 0.4, 2, EXACT, 0.8, "convergence factor 1.2 > 1")}
    for step, (measured, bias, setting, name, share, reason) in places.items():
        reading = {
            "rho_forward": step / 60,
            "rho_backward": step / 100,
            "cosine": 1 - step / 1000,
            "norm_ratio": 1.0,
            "bias_to_noise": step / 100,
            "bias": bias,
        }
        readings = [{"name": measured, "setting": (CHEAP, RICH).index(measured), **reading}]
        if step == 40:
            readings.append({"name": RICH, "setting": 1, "bias": 0.1})
        entries.append(
            {f"lp_check_{key}": value for key, value in reading.items()}
            | {
                "step": step,
                "epoch": 0.1,
                "lp_check_bound": 0.5,
                "lp_check_readings": readings,
                "lp_check_setting": float(setting),
                "lp_check_share": share,
                "lp_check_name": name,
                "lp_check_lipschitz": [1.0 + 0.01 * step * layer for layer in range(4)],
            }
            | ({"lp_check_reason": reason} if reason else {})
        )
    entries.append({"step": 100, "train_loss": 4.0, "train_runtime": 3.0, "total_flos": 1.0})
    return entries


def older(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As it was before checks named what they measured."""
    new = ("lp_check_readings", "lp_check_bound", "lp_check_bias")
    return [{key: value for key, value in entry.items() if key not in new} for entry in log]


def write_run(folder: Path, log: list[dict[str, Any]], step: int = 100) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": log}))
    return folder
