"""Parameter groups that differ between ranks come back by what is in them, also at another lp size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from hf_layerpar.checkpoint.trainer_state import _regrouped
from hf_layerpar.errors import CheckpointError
from hf_layerpar.training.trainer import LayerParallelTrainer
from tests.multiproc import RankPool
from tests.training.runs import Samples, arguments, build, outcome

SAVING = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "warmup_steps": 2}


class Grouped(LayerParallelTrainer):
    """One parameter group a layer, each with a learning rate of its own, and one for the rest."""

    kind, factor = "dropped", 1.0

    def create_optimizer(self, *args: Any) -> Any:
        if self.optimizer is None:
            layers = [list(layer.parameters()) for layer in self.model.model.layers]  # type: ignore[union-attr]
            of_layers = {id(p) for ps in layers for p in ps}
            rest = [p for p in self.model.parameters() if id(p) not in of_layers]  # type: ignore[union-attr]
            groups: list[dict[str, Any]] = [
                {"params": ps, "lr": self.factor * 1e-3 / 2**i, "weight_decay": 0.1 * i} for i, ps in enumerate(layers)
            ]
            groups.append({"params": rest, "lr": self.factor * 3e-3})
            if self.kind == "dropped":  # so that ranks have other groups in other numbers
                groups = [group for group in groups if group["params"]]
                names = {id(p): name for name, p in self.model.named_parameters()}  # type: ignore[union-attr]
                groups = [group | {"params": [(names[id(p)], p) for p in group["params"]]} for group in groups]
            if self.kind == "one":
                groups = [{"params": [p for group in groups for p in group["params"]], "lr": 1e-3}]
            if self.kind == "outside":
                groups.append({"params": [torch.nn.Parameter(torch.zeros(3))], "lr": 1e-3})
            self.optimizer = torch.optim.AdamW(groups)
        return self.optimizer


def train(directory: str, settings: dict, kind: str, resume: str | None = None, factor: float = 1.0) -> dict[str, Any]:
    """factor: of the learning rates, which those of the checkpoint must replace."""
    run = Grouped(build("llama"), arguments(directory, **settings), train_dataset=Samples("llama", 64))
    run.kind, run.factor = kind, factor
    run.remove_callback(hf.PrinterCallback)
    try:
        run.train(resume_from_checkpoint=resume)
    except CheckpointError as error:
        return {"error": str(error), "step": run.state.global_step}
    names = {id(p): name for name, p in run.model.named_parameters()}  # type: ignore[union-attr]
    rates = zip(run.optimizer.param_groups, run.lr_scheduler.base_lrs, strict=True)
    return outcome(run) | {
        "rates": {names[id(p)]: (group["initial_lr"], base) for group, base in rates for p in group["params"]}
    }


@pytest.mark.parametrize("kind", ["dropped", "empty"])
def test_one_group_a_layer(kind: str, ranks1: RankPool, ranks2: RankPool, ranks3: RankPool, tmp_path: Path) -> None:
    alone = ranks1.run(train, str(tmp_path / "alone"), SAVING, kind)[0]
    assert len({rate for rate, _ in alone["rates"].values()}) == 5
    two = ranks2.run(train, str(tmp_path / "two"), SAVING | {"lp_size": 2}, kind)[0]
    assert two["weights"] == alone["weights"]
    for written in ("alone", "two"):
        for pool in (ranks1, ranks2, ranks3):
            settings = SAVING | {"lp_size": pool.world, "save_strategy": "no"}
            checkpoint = str(tmp_path / written / "checkpoint-3")
            ended = pool.run(train, str(tmp_path / "again"), settings, kind, checkpoint, 10.0)
            assert ended[0]["weights"] == alone["weights"], f"{written}, {pool.world} ranks"
            for rank in ended:
                assert rank["rates"].items() <= alone["rates"].items()


def test_other_groups_are_refused_on_all_ranks(ranks2: RankPool, tmp_path: Path) -> None:
    settings = SAVING | {"lp_size": 2}
    for written, here, said in (("one", "dropped", "which are several here"), ("dropped", "one", "one group here")):
        ranks2.run(train, str(tmp_path / written), settings, written)
        checkpoint = str(tmp_path / written / "checkpoint-3")
        first, second = ranks2.run(train, str(tmp_path / "again"), settings, here, checkpoint)
        assert first["error"] == second["error"]
        assert said in first["error"]


def test_parameters_outside_the_model_are_refused_before_training(ranks2: RankPool, tmp_path: Path) -> None:
    for ended in ranks2.run(train, str(tmp_path), SAVING | {"lp_size": 2}, "outside"):
        assert "1 parameters that are not the model's" in ended["error"]
        assert ended["step"] == 0


def test_schedulers_inside_schedulers() -> None:
    def part(rates: list[float]) -> dict[str, Any]:
        inner = {"base_lrs": rates, "_last_lr": rates, "lr_lambdas": [None] * len(rates), "last_epoch": 3}
        return {"_schedulers": [inner, inner], "_milestones": [7, 8], "_last_lr": rates}

    first, second = part([1.0, 2.0]), part([3.0])
    found = _regrouped([(second, 0, 1), None, (first, 1, 2)], part([7.0, 8.0, 9.0]))
    assert found == part([3.0, 8.0, 2.0])
