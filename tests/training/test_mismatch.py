"""Processes that were told other things, or are about to do other things: all are told which, and none waits."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers as hf

from hf_layerpar.errors import RankMismatchError
from hf_layerpar.ode.convert import convert_to_ode
from hf_layerpar.run.transport import timeout_of
from hf_layerpar.training.trainer import LayerParallelTrainer
from tests.multiproc import RankPool
from tests.training.runs import Samples, arguments, build, trainer

SETTINGS = {
    "learning_rate": (1e-3, 2e-3),
    "weight_decay": (0.0, 0.1),
    "max_grad_norm": (1.0, 0.5),
    "optim": ("adamw_torch", "sgd"),
    "lr_scheduler_type": ("linear", "cosine"),
    "warmup_steps": (0, 10),
    "bf16": (False, True),
    "max_steps": (3, 4),
    "save_steps": (5, 6),
    "logging_steps": (1, 2),
    "gradient_accumulation_steps": (1, 2),
    "lp_size": (2, 1),
    "split": (None, "interleaved"),
    "micro_batches": (1, 2),
    "seed": (1, 2),
}


def said(act: Any) -> str:
    try:
        act()
    except RankMismatchError as error:
        return str(error)
    return "nothing"


def never() -> Any:
    raise AssertionError("a model is made before the settings were compared")


def other_settings(output_dir: str) -> dict[str, str]:
    rank = dist.get_rank()
    mine = {name: values[rank] for name, values in SETTINGS.items()}

    def start(**settings: Any) -> None:
        LayerParallelTrainer(args=arguments(output_dir, **({"lp_size": 2} | settings)), model_init=never)

    return {name: said(lambda n=name: start(**{n: mine[n]})) for name in SETTINGS}


def test_other_settings(ranks2: RankPool, tmp_path) -> None:
    for told in ranks2.run(other_settings, str(tmp_path)):
        for name, (a, b) in SETTINGS.items():
            assert f"the 2 processes disagree on {{'{name}': [{a!r}, {b!r}]}} (by rank)" in told[name]
            assert "give all processes the same arguments, data and model" in told[name]


def test_a_process_s_own_settings_may_differ(ranks2: RankPool, tmp_path) -> None:
    assert ranks2.run(own_settings, str(tmp_path)) == ["nothing"] * 2


def own_settings(output_dir: str) -> str:
    rank = dist.get_rank()
    own = {"disable_tqdm": rank > 0, "log_level": ("error", "info")[rank], "run_name": f"of {rank}"}
    return said(lambda: trainer(output_dir, "llama", {"lp_size": 2} | own))


def other_models(output_dir: str, lp_size: int) -> dict[str, str]:
    rank = dist.get_rank()

    def of(model: Any) -> str:
        return said(lambda: LayerParallelTrainer(model, arguments(output_dir, lp_size=lp_size)))

    frozen, dropping, numbers = build("gpt2"), build("gpt2"), build("gpt2", layers=4 + 4 * rank)
    for p in frozen.get_submodule("transformer.h.1").parameters():
        p.requires_grad_(rank == 0)
    dropping.config.attn_pdrop = 0.1 + 0.1 * rank
    return {
        "frozen": of(frozen),
        "config": of(dropping),
        "layers": of(numbers),
        "step size": of(convert_to_ode(build("gpt2"), step_size=(1.0, 0.5)[rank], num_steps=4)),
        "form": of(convert_to_ode(build("gpt2"), step_size=0.5, num_steps=4, form=("split", "euler")[rank])),
        "not converted": of(convert_to_ode(build("gpt2"), step_size=0.5, num_steps=4) if rank else build("gpt2")),
    }


@pytest.mark.parametrize("lp_size", [2, 1])
def test_other_models(lp_size: int, ranks2: RankPool, tmp_path) -> None:
    for told in ranks2.run(other_models, str(tmp_path), lp_size):
        trained = "'tensors.transformer.h.1.ln_1.weight': ['[32] torch.float32 trained', '[32] torch.float32']"
        assert trained in told["frozen"]
        assert " and 4 more" in told["frozen"]
        assert len(told["frozen"]) < 1500
        assert "{'config.attn_pdrop': [0.1, 0.2]}" in told["config"]
        assert "'config.n_layer': [4, 8]" in told["layers"]
        assert len(told["layers"]) < 1500
        assert "'conversion.step_size': [1.0, 0.5]" in told["step size"]
        assert "'conversion.form': ['split', 'euler']" in told["form"]
        assert "'conversion.step_size': [1.0, 0.5]" in told["not converted"]


class Unlike(LayerParallelTrainer):
    """An optimizer that depends on the rank."""

    what = ""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        rank, parameters = dist.get_rank(), [p for p in self.model.parameters() if p.requires_grad]
        if self.what == "class" and rank:
            self.optimizer = torch.optim.SGD(parameters, lr=1e-3)
        elif self.what == "defaults":
            self.optimizer = torch.optim.AdamW(parameters, lr=1e-3 * (1 + rank))
        elif self.what == "group":  # of the parameters that both have
            self.optimizer = torch.optim.AdamW([{"params": parameters, "lr": 1e-3 * (1 + rank)}], lr=1.0)
        elif self.what == "layers":  # which they may
            self.optimizer = torch.optim.AdamW([{"params": p, "lr": 1e-3 / p.numel()} for p in parameters], lr=1.0)
        elif self.what == "error" and rank:
            raise OSError("no such optimizer")
        else:
            self.optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        return self.optimizer


class Ragged(LayerParallelTrainer):
    """Reads its batches by itself, of which rank 1 has fewer."""

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        return list(loader)[: 4 - dist.get_rank()]


def other_runs(output_dir: str) -> dict[str, str]:
    rank = dist.get_rank()
    settings = {"lp_size": 2, "max_steps": 2}

    def start(kind: Any = LayerParallelTrainer, rows: int = 16, **more: Any) -> Any:
        run = kind(build("gpt2"), arguments(output_dir, **settings), train_dataset=Samples("gpt2", rows), **more)
        run.remove_callback(hf.PrinterCallback)
        return run

    found = {
        "rows": said(start(rows=16 + 4 * rank).train),
        "rows to evaluate": said(start(eval_dataset={"a": Samples("gpt2", 4 + rank)}).train),
        "resume": said(lambda: start().train(resume_from_checkpoint=f"{output_dir}/{rank}")),
        "batches": said(start(Ragged).train),
    }
    for what in ("class", "defaults", "group", "layers", "error"):
        run = start(Unlike)
        run.what = what
        found[what] = said(run.train)
    changed = start()
    changed.args.learning_rate *= 1 + rank  # after the trainer was made
    return found | {"changed": said(changed.train), "nothing": said(start().train)}


def test_other_runs(ranks2: RankPool, tmp_path) -> None:
    expected = {
        "rows": "{'rows': [16, 20]}",
        "rows to evaluate": "{'rows to evaluate.a': [4, 5]}",
        "resume": "{'resume_from_checkpoint': ['",
        "batches": "{'batches': [4, 3]}",
        "class": "'optimizer': ['AdamW', 'SGD']",
        "defaults": '"optimizer\'s defaults.lr": [0.001, 0.002]',
        "group": "'optimizer group of transformer.wte.weight.lr': [0.001, 0.002]",
        "layers": "nothing",
        "error": "'error': [None, 'OSError: no such optimizer']",
        "changed": "{'learning_rate': [0.001, 0.002]}",
        "nothing": "nothing",
    }
    for told in ranks2.run(other_runs, str(tmp_path)):
        for name, text in expected.items():
            assert text in told[name], name


class Stops(hf.TrainerCallback):
    """Rank 1 asks for everything after step 2, and logs a loss of its own."""

    def __init__(self, run: Any) -> None:
        self.run = run
        self.evaluated = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if dist.get_rank() and state.global_step == 2:
            self.run.log({"loss": 7.0})
            control.should_log = control.should_evaluate = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.evaluated += 1
        if dist.get_rank():
            control.should_training_stop = True


def asked_by_one(output_dir: str, lp_size: int) -> tuple[int, int, list[int]]:
    settings = {"lp_size": lp_size, "max_steps": 6, "logging_steps": 100}
    run = trainer(output_dir, "gpt2", settings, eval_dataset=Samples("gpt2", 4))
    asks = Stops(run)
    run.add_callback(asks)
    run.train()
    solved = [entry["step"] for entry in run.state.log_history if "lp_seconds" in entry]
    return run.state.global_step, asks.evaluated, solved


@pytest.mark.parametrize("lp_size", [2, 1])
def test_what_one_process_asks_for_all_do(lp_size: int, ranks2: RankPool, tmp_path) -> None:
    assert ranks2.run(asked_by_one, str(tmp_path), lp_size) == [(2, 1, [2])] * 2


class Alone(hf.TrainerCallback):
    """Rank 1 does something alone that all must do together."""

    def __init__(self, act: Any) -> None:
        self.act = act

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if dist.get_rank():
            self.act()


class Broken(Samples):
    """Rank 1 can't read its seventh sample."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        if dist.get_rank() and index == 7:
            raise OSError("no such sample")
        return super().__getitem__(index)


def things_done_alone(output_dir: str) -> dict[str, str]:
    found = {}
    for name in ("evaluate", "save", "read"):
        run = trainer(output_dir, "gpt2", {"lp_size": 2, "max_steps": 9}, eval_dataset=Samples("gpt2", 4))
        if name == "read":
            run.train_dataset = Broken("gpt2", 8)
        else:
            run.add_callback(Alone(run.evaluate if name == "evaluate" else run.save_model))
        found[name] = said(run.train)
    return found


def test_things_done_alone(ranks2: RankPool, tmp_path) -> None:
    for told in ranks2.run(things_done_alone, str(tmp_path)):
        assert "'about to': ['go on after a step', 'Evaluation']" in told["evaluate"]
        assert "'about to': ['go on after a step', 'save the model']" in told["save"]
        assert "'error': [None, 'OSError: no such sample']" in told["read"]


class Measured(LayerParallelTrainer):
    """Returns metrics beside the loss."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        output = model(**inputs)
        if return_outputs:
            return output.loss, output
        return output.loss, {"twice": 2 * output.loss.detach(), "rows": len(inputs["input_ids"])}


def measured(output_dir: str, lp_size: int) -> list[dict[str, float]]:
    settings = {"lp_size": lp_size, "max_steps": 4, "logging_steps": 2, "micro_batches": 2, "report_to": []}
    settings |= {"gradient_accumulation_steps": 2}
    run = Measured(build("gpt2", 0.0), arguments(output_dir, **settings), train_dataset=Samples("gpt2", 64))
    run.remove_callback(hf.PrinterCallback)
    run.train()
    return [entry for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("lp_size", [2, 1])
def test_metrics_beside_the_loss_are_logged(lp_size: int, ranks2: RankPool, tmp_path) -> None:
    for logs in ranks2.run(measured, str(tmp_path), lp_size):
        assert len(logs) == 2
        for entry in logs:
            assert entry["rows"] == 4
            assert entry["twice"] == pytest.approx(2 * entry["loss"], rel=1e-4)


# ---- groups
def groups(output_dir: str) -> tuple[int, set[timedelta | None]]:
    """How many more a second trainer makes, and how patient they are."""
    for lp_size in (1, 2):
        trainer(output_dir, "bert", {"lp_size": lp_size})
    made = dist.distributed_c10d._world.pg_map
    before = len(made)
    for lp_size in (1, 2):
        trainer(output_dir, "bert", {"lp_size": lp_size})
    return len(made) - before, {timeout_of(group) for group in made}


def test_groups_are_made_once(ranks4: RankPool, tmp_path) -> None:
    assert ranks4.run(groups, str(tmp_path)) == [(0, {timedelta(seconds=60)})] * 4


def wait_for_a_hung_rank(output_dir: str, lp_size: int, seconds: int) -> None:
    class Hangs(hf.TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if dist.get_rank() == 3:
                time.sleep(60)

    dist.destroy_process_group()
    run = trainer(output_dir, "llama", {"lp_size": lp_size, "ddp_timeout": seconds}, callbacks=[Hangs()])
    groups = dist.distributed_c10d._world.pg_map
    assert {timeout_of(group) for group in groups} == {timedelta(seconds=seconds)}
    run.train()


def test_a_hung_rank_is_waited_for_as_long_as_ddp_timeout_says(tmp_path) -> None:
    pool = RankPool(4)
    began, ended = time.monotonic(), {}
    for rank, (_, value) in pool._reports(wait_for_a_hung_rank, (str(tmp_path), 2, 3), 90.0):
        ended[rank] = value
        if len(ended) == 3:
            break
    took = time.monotonic() - began
    pool.close()
    assert sorted(ended) == [0, 1, 2]
    assert all("PeerLostError" in text for text in ended.values())
    assert took < 45


def test_many_processes_are_told_by_value() -> None:
    from hf_layerpar.run.transport import _by_rank

    assert _by_rank([1] * 3) == "[1, 1, 1]"
    assert _by_rank([1] * 40 + [2]) == "1 of [0, 1, 2, 3, 4, 5, 6, 7, ...]; 2 of [40]"
