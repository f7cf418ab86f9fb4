"""10,000 random settings, of right and wrong types and sizes, raise only the package's own errors; random valid ones on
1 to 3 ranks train as the serial model."""

from __future__ import annotations

import copy
import dataclasses
import decimal
import fractions
import math
import random
import shlex
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from hf_layerpar import LayerParallelConfig, convert_to_ode, parallelize
from hf_layerpar.cli import main
from hf_layerpar.config import OdeSettings, shown
from hf_layerpar.errors import LayerParallelError
from hf_layerpar.ode.convert import ode_view
from hf_layerpar.plan.operators import OPERATORS
from hf_layerpar.plan.ownership import contiguous_owner
from hf_layerpar.plan.schedules import SCHEDULES
from hf_layerpar.plan.step import check_config
from hf_layerpar.training.arguments import LayerParallelTrainingArguments
from tests.multiproc import run_ranks

SEED = 14
COUNTS = {"solver": 5300, "ode": 700, "convert": 400, "split": 2000, "parallelize": 200, "plan": 700, "arguments": 700}


class Odd:
    """Has no repr."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


WRONG: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 3, -3, 2.0, 0.5, -0.5, 1e-300, 1e308, math.nan, math.inf, -math.inf),
    *(10**9, 10**9 + 1, 10**18, -(10**18), 10**400, 10**5000, 1j, decimal.Decimal(2), fractions.Fraction(1, 2)),
    *("", "x", "4", "nan", "mgrit", "euler", "interleaved", "v", b"", b"22", "\n" * 300, "9" * 10**5),
    *([], ["a"], [2], [2, 2], [2.0, 2], [True, 3], [[2]], [2] * 100, (), (0, 0), (1, 2), (1, 2, 3), (-1, 0), {}),
    *({"a": 1}, set(), {2}, range(2), slice(1), object(), Odd(), int, len, LayerParallelConfig(), OdeSettings()),
    *(np.int64(3), np.float32(0.5), np.bool_(True), np.array([2, 2]), np.array(2), torch.tensor(2), torch.ones(2)),
]

SOLVER: dict[str, list[Any]] = {
    "strategy": ["pipeline", "mgrit"],
    "micro_batches": [1, 2, 5],
    "schedule": [*SCHEDULES, "other"],
    "ends": ["first_last", "spread"],
    "coarse_operator": [*OPERATORS, "other"],
    "coarsening": [2, 4, (2, 2), [3], [2, 3]],
    "relaxation": ["F", "FCF"],
    "forward_iterations": [0, 1, 2, 1000],
    "backward_iterations": [0, 1, 2],
    "acceleration": ["none", "krylov"],
    "increment_penalty": [0, 0.0, 0.1, 1],
    "stacked": [False, True],
    "cuda_graphs": [False, True],
}
ODE: dict[str, list[Any]] = {
    "step_size": [1, 1.0, 0.5, 0.25],
    "form": ["euler", "split"],
    "interpolation": ["constant", "linear"],
    "buffers": [(0, 0), (1, 0), [1, 1], [0, 2, 1], (0, 1, 0)],
}
ARGUMENTS = SOLVER | {
    "lp_size": [1, 1, 1, 2],
    "split": [None, "interleaved", "v"],
    "tp_size": [1, 1, 1, 2],
    "async_save": [False, True],
    "controller": ["off", "paper", "raise", "adaptive"],
    "check_every": [1, 500],
    "check_gradient": [False, True],
    "check_layers": [False, True],
    "controller_bound": [0.3, 1],
    "controller_ranks": [None, 4],
    "per_device_train_batch_size": [1, 2, 8],
}


def drawn(rng: random.Random, fields: dict[str, list[Any]], wrong: float = 0.15) -> dict[str, Any]:
    """Some of the fields, now and then with a wrong value."""
    names = rng.sample(list(fields), rng.randint(1, len(fields)))
    return {name: rng.choice(WRONG if rng.random() < wrong else fields[name]) for name in names}


def refusals(kind: str, fn: Callable[[random.Random], Any], fields: dict[str, list[Any]] | None = None) -> None:
    """Calls `fn` so many times. It may raise the package's own errors, in a short line, and sometimes must not."""
    rng = random.Random(f"{SEED} {kind}")
    accepted = refused = 0
    for number in range(COUNTS[kind]):
        state = rng.getstate()
        try:
            fn(rng)
            accepted += 1
            continue
        except LayerParallelError as error:
            said = str(error)
        except Exception as error:
            rng.setstate(state)
            given = shown(drawn(rng, fields) if fields else "see the seed")
            raise AssertionError(f"{kind} {number}: {given} raised {type(error).__name__}: {error}") from error
        refused += 1
        assert "\n" not in said, f"{kind} {number}: {said}"
        assert 20 < len(said) < 2000, f"{kind} {number}: {said}"
    assert min(accepted, refused) > COUNTS[kind] // 50, (kind, accepted, refused)


@pytest.fixture(scope="module")
def tiny() -> hf.PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 7, "n_embd": 4, "n_head": 1, "n_positions": 8, "n_layer": 4}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, bos_token_id=1, eos_token_id=1))


def test_there_are_ten_thousand() -> None:
    assert sum(COUNTS.values()) == 10_000
    assert {f.name for f in dataclasses.fields(LayerParallelConfig)} == set(SOLVER)
    own = {f.name for f in dataclasses.fields(LayerParallelTrainingArguments)}
    own -= {f.name for f in dataclasses.fields(hf.Seq2SeqTrainingArguments)}
    assert own <= set(ARGUMENTS)


def test_solver_settings() -> None:
    def build(rng: random.Random) -> None:
        config = LayerParallelConfig(**drawn(rng, SOLVER))
        assert LayerParallelConfig.from_dict(config.to_dict()) == config
        assert hash(config) == hash(dataclasses.replace(config))
        check_config(config, rng.choice([1, 2]))

    refusals("solver", build, SOLVER)


def test_ode_settings() -> None:
    def build(rng: random.Random) -> None:
        settings = OdeSettings(**drawn(rng, ODE | {"folded": [False, True]}))
        assert OdeSettings.from_dict(settings.to_dict()) == settings
        if rng.random() < 0.3:
            OdeSettings.from_dict(rng.choice([*WRONG, {"step_size": 0.5}, {"buffers": [1, 1]}]))

    refusals("ode", build)


def test_conversions(tiny: hf.PreTrainedModel) -> None:
    fields = ODE | {"num_steps": [1, 2, 4, 8], "form": ["auto", "euler", "split"]}
    converted = convert_to_ode(copy.deepcopy(tiny), step_size=0.5)
    again = copy.deepcopy(tiny)
    again.config = copy.deepcopy(converted.config)

    def convert(rng: random.Random) -> None:
        values = drawn(rng, fields)
        model = rng.choice([tiny, again])
        ode_view(convert_to_ode(copy.deepcopy(model), **values))

    refusals("convert", convert, fields)


def test_splits() -> None:
    def split(rng: random.Random) -> None:
        layers, ranks = rng.randint(1, 9), rng.randint(1, 4)
        cuts = sorted(rng.choices(range(layers + 1), k=ranks - 1))
        fitting = [b - a for a, b in zip([0, *cuts], [*cuts, layers], strict=True)]
        given = rng.choice([fitting, fitting, tuple(fitting), [2] * ranks, *rng.choices(WRONG, k=2)])
        owner = contiguous_owner(layers, ranks, boundaries=range(layers), split=given)
        assert sorted(set(owner)) == list(range(ranks))

    refusals("split", split)


def test_parallelizing(tiny: hf.PreTrainedModel) -> None:
    def place(rng: random.Random) -> None:
        model = convert_to_ode(copy.deepcopy(tiny)) if rng.random() < 0.9 else rng.choice(WRONG)
        config = LayerParallelConfig(strategy=rng.choice(["pipeline", "mgrit"]), coarsening=2)
        config = rng.choice([config, config, None, *rng.choices(WRONG, k=1)])
        split = rng.choice([None, [4], (4,), "interleaved", *rng.choices(WRONG, k=2)])
        parallelize(model, config, rng.choice([None, None, None, rng.choice(WRONG)]), split=split)

    refusals("parallelize", place)


PLAN: dict[str, list[str]] = {
    "--layers": ["1", "4", "12", "13"],
    "--ranks": ["1", "2", "3", "4"],
    "--strategy": ["pipeline", "mgrit", "mgrit"],
    "--schedule": list(SCHEDULES),
    "--ends": ["first_last", "spread"],
    "--coarsening": ["2", "3 2", "2 2", "4"],
    "--relaxation": ["F", "FCF"],
    "--forward-iterations": ["0", "1", "2"],
    "--backward-iterations": ["0", "1", "2"],
    "--coarse-operator": list(OPERATORS),
    "--micro-batches": ["1", "2", "3"],
    "--buffers": ["0 0", "1 0", "1 1", "1 6 9 1"],
    "--acceleration": ["none", "krylov"],
    "--increment-penalty": ["0", "0.5"],
    "--stacked": [""],
    "--split": ["6 6", "4 4 4", "12"],
    "--interleaved": [""],
    "--cost": ["tail=3", "latency=1", "step=0", "bandwidth=2", "fixed_share=0.5", "state_bytes=8", "combine=1e-3"],
    "--tasks": [""],
}
TEXTS = ["0", "-1", "-4", "99 99", "1e3", "2.5", "nan", "inf", "1e308", "10^18", "x", "''", "--", "x=1", "step=x"]
TEXTS += [
    "step=nan",
    "step=inf",
    "tail=1e308",
    "bandwidth=0",
    "bandwidth=1e-300",
    "=1",
    "step=-1",
    "1 2 3",
    "２",
    "\u0661",
]
TEXTS += [str(10**18), "9" * 5000, "\udcff", "step=1=2", "None", "[1]"]


def test_plan_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(f"{SEED} plan")
    ended: dict[int, int] = {}
    for _ in range(COUNTS["plan"]):
        names = ["--layers", "--ranks", *rng.sample(list(PLAN)[2:], rng.randint(0, 6))]
        words = []
        for name in names:
            words += [name, *shlex.split(rng.choice(TEXTS if rng.random() < 0.06 else PLAN[name]))]
        if rng.random() < 0.02:
            words += ["--choose", rng.choice(["exact", "any"])]
        try:
            code = main(["plan", *words])
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr()
        ended[code] = ended.get(code, 0) + 1
        assert code in (0, 2), words
        assert said.err.count("\n") == (code == 2), (words, said.err)
        assert len(said.err) < 2200
        assert not any(name in said.err for name in ("Error:", "Traceback")), (words, said.err)
        assert code or "nan" not in said.out, words
    assert min(ended[0], ended[2]) > 100


def test_training_arguments(tmp_path) -> None:
    base = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": [], "disable_tqdm": True}

    def build(rng: random.Random) -> None:
        values = drawn(rng, ARGUMENTS, wrong=0.05)
        args = LayerParallelTrainingArguments(**base, **values)
        assert args.layer_parallel_config.micro_batches == values.get("micro_batches", 1)

    refusals("arguments", build)


# ---- valid ones train as the serial model
LAYERS, ROWS = 6, 5


def valid(rng: random.Random, num_ranks: int) -> tuple[dict[str, Any], Any]:
    """(settings, split) whose gradient is exact: a pipeline, or enough iterations for its intervals."""
    two_blocks = ["interleaved_1f1b", "zb_v"]
    values: dict[str, Any] = {
        "micro_batches": rng.randint(1, 6),
        "ends": rng.choice(["first_last", "spread"]),
        "strategy": rng.choice(["pipeline", "mgrit"]),
        "schedule": rng.choice(["list", "gpipe", "1f1b", "zb_h1", *two_blocks]),
    }
    cuts = sorted(rng.sample(range(1, LAYERS), num_ranks - 1))
    split = [b - a for a, b in zip([0, *cuts], [*cuts, LAYERS], strict=True)]
    if values["strategy"] == "mgrit":
        coarsening = rng.choice([2, 3, 4, (2, 2), (3, 2)])
        values |= {
            "coarsening": coarsening,
            "coarse_operator": rng.choice(list(OPERATORS)),
            "relaxation": rng.choice(["F", "FCF"]),
            "forward_iterations": rng.choice([0, 3, 4]),
            "backward_iterations": rng.choice([0, 3, 4]),
        }
        return values, rng.choice([None, split, *(["interleaved"] if coarsening == 3 else [])])
    return values, None if values["schedule"] in two_blocks else rng.choice([None, split, "interleaved", "v"])


def deviations(seed: str, count: int) -> list[tuple[float, float, str]]:
    """Under random settings on every rank: how far gradients, and norm and loss, are from the serial model's."""
    rng = random.Random(seed)
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": LAYERS}
    config = hf.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=8)
    stock = hf.LlamaForCausalLM(config).double()
    ids = torch.randint(11, (ROWS, 6))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    serial = copy.deepcopy(stock)
    expected = serial(**batch, use_cache=False).loss
    expected.backward()
    expected = expected.detach()
    grads = {name: p.grad for name, p in serial.named_parameters()}
    whole = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    found = []
    for _ in range(count):
        values, split = valid(rng, world)
        model = convert_to_ode(copy.deepcopy(stock))
        handle = parallelize(model, LayerParallelConfig(**values), split=split)
        loss = float(handle.train_step(batch))
        apart = [float((p.grad - grads[n]).norm()) for n, p in model.named_parameters() if p.grad is not None]
        norm = abs(float(handle.grad_norm()) / whole - 1)  # no rank lacks any; it is a float32
        found.append((max(apart) / whole, max(norm, abs(loss - float(expected))), f"{values}, split={split}"))
    return found


def check_equal(world: int, count: int) -> None:
    for found in run_ranks(deviations, world, f"{SEED} {world}", count, timeout=600.0):
        for gradients, totals, settings in found:
            assert gradients < 1e-12, settings
            assert totals < 2e-6, settings  # the loss of causal heads is float32 inside


@pytest.mark.parametrize("world", [1, 2, 3])
def test_valid_settings_equal_serial(world: int) -> None:
    check_equal(world, 6)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3])
def test_500_valid_settings_equal_serial(world: int) -> None:
    check_equal(world, {1: 100, 2: 200, 3: 200}[world])
