"""Arguments: where they are read from, and what is refused."""

from __future__ import annotations

import dataclasses
import math
import shlex
from pathlib import Path

import pytest
import torch
import transformers as hf

from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.errors import ConfigurationError, UnsupportedModelError
from hf_layerpar.training.arguments import LayerParallelTrainingArguments
from hf_layerpar.training.trainer import LayerParallelTrainer
from tests.multiproc import RankPool
from tests.training import runs, scenarios


def parse(*words: str) -> LayerParallelTrainingArguments:
    parser = hf.HfArgumentParser(LayerParallelTrainingArguments)  # type: ignore[arg-type]
    return parser.parse_args_into_dataclasses(list(words))[0]


def test_every_setting_is_an_argument_with_the_same_default() -> None:
    fields = {f.name for f in dataclasses.fields(LayerParallelTrainingArguments)}
    assert {f.name for f in dataclasses.fields(LayerParallelConfig)} <= fields
    assert parse("--use_cpu").layer_parallel_config == LayerParallelConfig()


def test_command_line() -> None:
    words = (
        "--use_cpu --strategy mgrit --coarsening 4 2 --relaxation FCF --forward_iterations 2 --backward_iterations 0 "
        "--coarse_operator identity --micro_batches 2 --schedule zb_h1 --ends spread"
    )
    assert parse(*shlex.split(words)).layer_parallel_config == LayerParallelConfig(
        strategy="mgrit",
        coarsening=(4, 2),
        relaxation="FCF",
        forward_iterations=2,
        backward_iterations=0,
        coarse_operator="identity",
        micro_batches=2,
        schedule="zb_h1",
        ends="spread",
    )
    assert parse("--use_cpu", "--coarsening", "8").layer_parallel_config.coarsening == 8


def test_yaml(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("output_dir: out\nuse_cpu: true\nlp_size: 1\nstrategy: mgrit\ncoarsening: [3, 2]\n")
    parser = hf.HfArgumentParser(LayerParallelTrainingArguments)  # type: ignore[arg-type]
    (args,) = parser.parse_yaml_file(str(file))
    assert args.layer_parallel_config == LayerParallelConfig(strategy="mgrit", coarsening=(3, 2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "gpipe"}, "strategy='gpipe'"),
        ({"strategy": "serial"}, "strategy='serial'"),
        ({"schedule": "2f2b"}, "schedule='2f2b'"),
        ({"ends": "all"}, "ends='all'"),
        ({"coarse_operator": "mean", "strategy": "mgrit"}, "coarse_operator='mean'"),
        ({"coarsening": [4, 1]}, "coarsening=1"),
        ({"lp_size": 2}, "1 processes can't be split into groups of lp_size=2; use lp_size in \\[1\\] or start 2"),
        ({"lp_size": 0}, "lp_size=0 must be"),
        ({"lp_size": "2"}, "lp_size='2' must be an integer"),
        ({"lp_size": 2.0, "stacked": True, "strategy": "mgrit"}, "lp_size=2.0 must be an integer"),
        ({"coarsening": "ab"}, "coarsening='ab' must be an integer"),
        ({"coarsening": [[2, 3]]}, r"coarsening=\[2, 3\] must be an integer"),
        ({"stacked": "x"}, "stacked='x' must be True or False"),
        ({"micro_batches": 10**18}, "micro_batches=10{18} must be at most 1000000000"),
        ({"controller": ["paper"]}, r"controller=\['paper'\] is unknown; use one of off"),
        ({"check_every": math.nan}, "check_every=nan must be an integer"),
        ({"check_every": "5"}, "check_every='5' must be an integer"),
        ({"check_gradient": "no"}, "check_gradient='no' must be True or False"),
        ({"check_layers": 1}, "check_layers=1 must be True or False"),
        ({"controller_bound": math.nan}, "controller_bound=nan must be positive and finite"),
        ({"controller_bound": math.inf}, "controller_bound=inf must be positive and finite"),
        ({"controller_bound": "x"}, "controller_bound='x' must be positive and finite"),
        ({"controller_ranks": 2.5}, "controller_ranks=2.5 must be an integer of at least 1, or None for lp_size"),
        ({"controller": "adaptive", "per_device_train_batch_size": "x"}, "at least 2, not 'x'"),
    ],
)
def test_values_are_checked(settings: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=message):
        runs.arguments(str(tmp_path), **settings)


def test_lp_size_that_does_not_divide_the_world(ranks3: RankPool, ranks4: RankPool) -> None:
    for pool, lp_size, remedy in ((ranks3, 2, "use lp_size in [1, 3] or start 2 or 4"), (ranks4, 3, "start 3 or 6")):
        messages = pool.run(scenarios.construction_error, {"lp_size": lp_size})
        assert all(f"{pool.world} processes can't be split into groups of lp_size={lp_size}" in m for m in messages)
        assert all(remedy in m for m in messages)


def test_more_lp_ranks_than_layers(ranks3: RankPool) -> None:
    assert all("lp_size=3 is more than the 2 layers" in m for m in ranks3.run(scenarios.too_many_ranks))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"optim": "galore_adamw", "optim_target_modules": ["o_proj"]}, "optim="),
        ({"optim": "apollo_adamw"}, "optim="),
        ({"optim": "lomo"}, "optim="),
        ({"torch_compile": True}, "torch_compile"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"enable_jit_checkpoint": True}, "enable_jit_checkpoint"),
        ({"fp16": True}, "fp16"),
    ],
)
def test_refused_arguments(settings: dict, name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=rf"{name}.* is not supported with layer-parallel training: .{{20,}}"):
        LayerParallelTrainer(runs.build("llama"), runs.arguments(str(tmp_path), **settings))


def test_refused_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    args = runs.arguments(str(tmp_path))
    surroundings = {
        "deepspeed_plugin": object(),
        "parallelism_config": object(),
        "_n_gpu": 2,
        "mixed_precision": "fp16",
    }
    for name, value in surroundings.items():
        with monkeypatch.context() as patch:
            patch.setattr(args, name, value)
            with pytest.raises(ConfigurationError, match="is not supported"):
                LayerParallelTrainer(runs.build("llama"), args)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigurationError, match="FSDP is not supported"):
        LayerParallelTrainer(runs.build("llama"), args)


def test_refused_between_ranks(ranks2: RankPool) -> None:
    refused = [
        ({"save_on_each_node": True}, "save_on_each_node"),
        ({"train_sampling_strategy": "batch_rebalance"}, "batch_rebalance"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches"),
    ]
    for settings, name in refused:
        assert all(name in m for m in ranks2.run(scenarios.construction_error, settings | {"lp_size": 2}))
    assert all("optimizer_cls_and_kwargs" in m for m in ranks2.run(scenarios.own_optimizer_error))


def test_plain_arguments_and_unknown_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="needs LayerParallelTrainingArguments"):
        LayerParallelTrainer(runs.build("llama"), hf.TrainingArguments(str(tmp_path), use_cpu=True))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError):
        LayerParallelTrainer(torch.nn.Linear(2, 2), runs.arguments(str(tmp_path)))
