"""Arguments: where they are read from, and what is refused."""

from __future__ import annotations

import dataclasses
import math
import shlex
from pathlib import Path

import pytest
import torch
import transformers as hf
from accelerate import Accelerator, ParallelismConfig

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
    args = parse("--use_cpu")
    assert args.layer_parallel_config == LayerParallelConfig()
    args.micro_batches = 2  # unlike those of a LayerParallelConfig
    with pytest.raises(dataclasses.FrozenInstanceError):
        args.layer_parallel_config.micro_batches = 3


def test_the_order_of_stocks_arguments_is_kept() -> None:
    def positional(kind: type) -> list[str]:
        return [f.name for f in dataclasses.fields(kind) if f.init and not f.kw_only]

    ours, stock = positional(LayerParallelTrainingArguments), positional(hf.Seq2SeqTrainingArguments)
    assert ours[: len(stock)] == stock


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
    assert [parse("--use_cpu", *words).split for words in ((), ("--split", "v"))] == [None, "v"]
    assert parse("--use_cpu", "--strategy", "mgrit", "--split", "interleaved").split == "interleaved"


def test_yaml(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    words = "output_dir: out\nuse_cpu: true\nlp_size: 1\nsplit: interleaved\nstrategy: mgrit\ncoarsening: [3, 2]\n"
    file.write_text(words)
    parser = hf.HfArgumentParser(LayerParallelTrainingArguments)  # type: ignore[arg-type]
    (args,) = parser.parse_yaml_file(str(file))
    assert args.layer_parallel_config == LayerParallelConfig(strategy="mgrit", coarsening=(3, 2))
    assert args.split == "interleaved"


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
        ({"split": "dealt"}, "split='dealt' is unknown; use one of interleaved, v"),
        ({"split": [2, 2]}, r"split=\[2, 2\] is unknown; use one of interleaved, v"),
        ({"split": "v", "strategy": "mgrit"}, "split='v' with strategy='mgrit': .*; use split='interleaved', leave"),
        ({"split": "interleaved", "controller": "adaptive"}, "strategy='pipeline': .* use strategy='mgrit', whose"),
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
    ("settings", "held"),
    [
        ({}, [[0, 1, 2], [3, 4, 5]]),
        ({"split": "interleaved"}, [[0, 1, 3, 4], [2, 5]]),
        ({"split": "v"}, [[0, 1, 5], [2, 3, 4]]),
        ({"split": "interleaved", "strategy": "mgrit", "coarsening": 3}, [[0, 2, 4], [1, 3, 5]]),
    ],
    ids=["blocks", "two blocks", "v", "dealt out"],
)
@pytest.mark.parametrize("given", ["model", "path"])
def test_layers_are_where_the_split_says(
    given: str, settings: dict, held: list[list[int]], ranks2: RankPool, tmp_path: Path
) -> None:
    if given == "path":
        runs.build("llama", layers=6).save_pretrained(tmp_path)
    checkpoint = str(tmp_path) if given == "path" else None
    assert ranks2.run(scenarios.layers_held, checkpoint, settings | {"lp_size": 2}) == held


def test_splits_that_do_not_fit(ranks3: RankPool, tmp_path: Path) -> None:
    dealt = {"lp_size": 3, "split": "interleaved", "strategy": "mgrit", "coarsening": 2}
    refused = [
        ({"lp_size": 3, "split": "v"}, "stack model.layers: split='v' makes 6 blocks of 4 layers on 3 lp ranks; use"),
        (dealt | {"layers": 3}, "stack model.layers: split='interleaved' leaves lp ranks [2] of 3 without a layer: 3 "),
    ]
    for settings, message in refused:
        assert all(message in said for said in ranks3.run(scenarios.construction_error, settings))
    assert ranks3.run(scenarios.construction_error, dealt) == ["no error"] * 3
    spread = runs.trainer(str(tmp_path), "llama", {}).model
    again = {"split": "interleaved", "strategy": "mgrit", "coarsening": 2}
    with pytest.raises(ConfigurationError, match="spread with split=None already, but split='interleaved'; give a mod"):
        LayerParallelTrainer(spread, runs.arguments(str(tmp_path), **again))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"optim": "galore_adamw", "optim_target_modules": ["o_proj"]}, "optim="),
        ({"optim": "apollo_adamw"}, "optim="),
        ({"optim": "lomo"}, "optim="),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"enable_jit_checkpoint": True}, "enable_jit_checkpoint"),
    ],
)
def test_refused_arguments(settings: dict, name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=rf"{name}.* is not supported with layer-parallel training: .{{20,}}"):
        LayerParallelTrainer(runs.build("llama"), runs.arguments(str(tmp_path), **settings))


def test_refused_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    args = runs.arguments(str(tmp_path))
    surroundings = {
        "deepspeed_plugin": object(),
        "_n_gpu": 2,
        "mixed_precision": "fp8",
    }
    for name, value in surroundings.items():
        with monkeypatch.context() as patch:
            patch.setattr(args, name, value)
            with pytest.raises(ConfigurationError, match="is not supported"):
                LayerParallelTrainer(runs.build("llama"), args)


def said_by_launcher(settings: dict, environment: dict[str, str]) -> tuple[bool, int] | str:
    """(shards_data, tp_size) of arguments in an environment, or why there are none."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            args = runs.arguments("unused", **settings)
        except ConfigurationError as error:
            return str(error)
    return args.shards_data, args.tp_size


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
AXES = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}


def test_what_launchers_say_of_the_axes(ranks4: RankPool) -> None:
    understood: list[tuple[dict, dict, tuple[bool, int]]] = [
        ({"lp_size": 2}, {}, (False, 1)),
        ({"lp_size": 2, "fsdp": "full_shard"}, {}, (True, 1)),
        ({"lp_size": 2}, FSDP, (True, 1)),
        ({"lp_size": 2, "parallelism_config": ParallelismConfig(dp_shard_size=2)}, {}, (True, 1)),
        ({"lp_size": 1, "parallelism_config": ParallelismConfig(dp_shard_size=2, tp_size=2)}, {}, (True, 2)),
        ({"lp_size": 2}, AXES | {"PARALLELISM_CONFIG_TP_SIZE": "2"}, (False, 2)),
        ({"lp_size": 2}, AXES | {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2"}, (False, 1)),
    ]
    refused: list[tuple[dict, dict, str]] = [
        ({"lp_size": 4, "fsdp": True}, {}, "one dp rank has nobody to share parameters with"),
        ({"lp_size": 2, "tp_size": 4}, {}, "lp_size=2 times tp_size=4; use lp_size in [1] or start 8"),
        ({"lp_size": 2, "fsdp": True, "fsdp_config": {"cpu_offload": True}}, {}, "cpu_offload=True is not supported"),
        ({"lp_size": 2}, FSDP | {"FSDP_VERSION": "1"}, "--fsdp_version 2"),
        ({"lp_size": 2}, AXES | {"PARALLELISM_CONFIG_CP_SIZE": "2"}, "cp_size=2 is not supported"),
        ({"lp_size": 2, "parallelism_config": ParallelismConfig(dp_shard_size=4)}, {}, "2 dp ranks remain"),
        ({"tp_size": 4, "parallelism_config": ParallelismConfig(tp_size=2)}, {}, "tp_size=4, but tp_size=2 in the"),
    ]
    for settings, environment, expected in understood:
        assert ranks4.run(said_by_launcher, settings, environment) == [expected] * 4
    for settings, environment, message in refused:
        for said in ranks4.run(said_by_launcher, settings, environment):
            assert message in str(said)


@pytest.mark.parametrize("first", [True, False])
def test_trainers_of_trl_are_refused_in_either_order(first: bool, tmp_path: Path) -> None:
    sft = type("SFTTrainer", (hf.Trainer,), {"__module__": "trl.trainer.sft_trainer"})
    kind = type("Mine", (sft, LayerParallelTrainer) if first else (LayerParallelTrainer, sft), {})
    with pytest.raises(ConfigurationError, match=r"Mine derives from TRL's SFTTrainer.*use LayerParallelTrainer"):
        kind(runs.build("llama"), runs.arguments(str(tmp_path)))


def test_accelerate_does_not_wrap_the_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever the Trainer asks for, the model comes to `prepare_model` as if for evaluation, and isn't moved."""
    asked = []
    stock = Accelerator.prepare_model

    def noting(self, model, device_placement=None, evaluation_mode=False):
        asked.append((device_placement, evaluation_mode))
        return stock(self, model, device_placement=device_placement, evaluation_mode=evaluation_mode)

    monkeypatch.setattr(Accelerator, "prepare_model", noting)
    run = runs.trainer(str(tmp_path), "llama", {})
    assert run.accelerator.prepare(run.model) is run.model
    run.accelerator.prepare(torch.nn.Linear(2, 2))
    assert asked == [(False, True), (None, False)]


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
