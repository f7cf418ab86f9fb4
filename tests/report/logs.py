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
    places = {20: (0, CHEAP, 0.3, ""), 40: (1, RICH, 0.5, "bias to noise 0.6 > 0.5"), 60: (1, RICH, 0.5, "")}
    places[80] = (2, EXACT, 0.8, "convergence factor 1.2 > 1")
    for step, (setting, name, share, reason) in places.items():
        entries.append(
            {
                "step": step,
                "epoch": 0.1,
                "lp_check_rho_forward": step / 60,
                "lp_check_rho_backward": step / 100,
                "lp_check_cosine": 1 - step / 1000,
                "lp_check_norm_ratio": 1.0,
                "lp_check_bias_to_noise": step / 100,
                "lp_check_setting": float(setting),
                "lp_check_share": share,
                "lp_check_name": name,
                "lp_check_lipschitz": [1.0 + 0.01 * step * layer for layer in range(4)],
            }
            | ({"lp_check_reason": reason} if reason else {})
        )
    entries.append({"step": 100, "train_loss": 4.0, "train_runtime": 3.0, "total_flos": 1.0})
    return entries


def write_run(folder: Path, log: list[dict[str, Any]], step: int = 100) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": log}))
    return folder
