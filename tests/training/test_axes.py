"""The dp, lp and tp axes together: parameters in pieces (fsdp), averaging beside the backward, matrices in parts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch.distributed.tensor import DTensor

from hf_layerpar.errors import ConfigurationError, UnsupportedModelError
from tests.multiproc import RankPool
from tests.training import runs
from tests.training.runs import Samples


def bytes_of(tensors: Iterable[Any]) -> int:
    """Of all memory behind tensors, pieces or whole."""
    held = [t.to_local() if isinstance(t, DTensor) else t for t in tensors if isinstance(t, torch.Tensor)]
    return sum({m.data_ptr(): m.nbytes() for m in (t.detach().untyped_storage() for t in held)}.values())


class Held(hf.TrainerCallback):
    """The bytes of parameters, gradients and optimizer states on this rank, when gradients are there."""

    def __init__(self) -> None:
        self.bytes: list[int] = []

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        parameters = list(given["model"].parameters())
        states = [t for entry in given["optimizer"].optimizer.state.values() for t in entry.values()]
        grads = [p.grad for p in parameters]
        self.bytes.append(bytes_of([*parameters, *grads, *states]))


def train(
    output_dir: str, family: str, settings: dict[str, Any], environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    held = Held()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (environment or {}).items():
            patch.setenv(name, value)
        run = runs.trainer(output_dir, family, settings, callbacks=[held])
        run.train()
    return runs.outcome(run) | {"bytes": held.bytes[-1]}


def assert_alike(some: dict[str, Any], others: dict[str, Any], tolerance: float = 1e-5) -> None:
    assert some["losses"] == pytest.approx(others["losses"], abs=tolerance)
    assert some["norms"] == pytest.approx(others["norms"], rel=tolerance)
    assert some["largest"] == pytest.approx(others["largest"], abs=tolerance)
    assert len(set(some["losses"])) == len(some["losses"]) > 2, "the run doesn't train"


LAUNCHED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}


@pytest.mark.parametrize(
    ("family", "settings", "fsdp", "environment"),
    [
        ("llama", {"gradient_accumulation_steps": 2, "micro_batches": 2}, {"fsdp": True}, {}),
        ("gpt2", {"strategy": "mgrit", "coarsening": 2, "increment_penalty": 0.1}, {}, LAUNCHED),
    ],
)
def test_pieces_train_as_wholes(
    family: str, settings: dict, fsdp: dict, environment: dict, ranks4: RankPool, tmp_path: Path
) -> None:
    settings = settings | {"lp_size": 2, "max_steps": 4, "max_grad_norm": 0.3, "dropout": 0.0}
    wholes = ranks4.run(train, str(tmp_path), family, settings)
    pieces = ranks4.run(train, str(tmp_path), family, settings | fsdp, environment)
    assert_alike(pieces[0], wholes[0])
    assert all(p["bytes"] <= 0.55 * w["bytes"] for p, w in zip(pieces, wholes, strict=True))
    assert len({p["copies"] for p in pieces} - {None}) == (family == "gpt2")  # tied embeddings, on two lp ranks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"bf16": True, "gradient_accumulation_steps": 2}),
        ("llama", {"dtype": "bfloat16"}),
        ("llama", {"fp16": True, "gradient_accumulation_steps": 2}),
        ("llama", {"activation_checkpointing": True}),
        ("llama", {"torch_compile": True, "torch_compile_backend": "aot_eager"}),
        ("llama", {"strategy": "mgrit", "coarsening": 2, "controller": "raise", "check_gradient": True}),
        ("llama", {"ends": "spread", "micro_batches": 2}),
        ("llama", {"schedule": "zb_h1", "micro_batches": 4}),
        ("t5", {"micro_batches": 2}),
        ("vit", {}),
        ("bert_classifier", {"optim": "sgd", "optim_args": "momentum=0.9"}),
    ],
)
def test_pieces_under_all_settings(family: str, settings: dict, ranks4: RankPool, tmp_path: Path) -> None:
    settings = settings | {"lp_size": 2, "max_steps": 4, "dropout": 0.0}
    wholes = ranks4.run(train, str(tmp_path), family, settings)
    pieces = ranks4.run(train, str(tmp_path), family, settings | {"fsdp": True})
    assert_alike(pieces[0], wholes[0])
    assert all(p["bytes"] <= 0.55 * w["bytes"] for p, w in zip(pieces, wholes, strict=True))


def test_pieces_are_saved_and_read_as_wholes(ranks4: RankPool, tmp_path: Path) -> None:
    """Also between runs with fsdp and without; evaluation goes on with whole parameters."""
    settings = {"lp_size": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    settings["max_grad_norm"] = 0  # a norm of pieces rounds in another order
    ends = {
        name: ranks4.run(runs.train, str(tmp_path / name), "llama", settings | fsdp)[0]
        for name, fsdp in (("wholes", {}), ("pieces", {"fsdp": True}))
    }
    assert ends["pieces"]["weights"] == ends["wholes"]["weights"]
    for written, read in (("pieces", {"fsdp": True}), ("pieces", {}), ("wholes", {"fsdp": True})):
        checkpoint = str(tmp_path / written / "checkpoint-2")
        again = settings | read | {"save_strategy": "no", "eval_strategy": "steps", "eval_steps": 3}
        more = {"eval_dataset": Samples("llama", 5, 1000)}
        ended = ranks4.run(resume, str(tmp_path / "again"), again, checkpoint, more)[0]
        assert ended["weights"] == ends["wholes"]["weights"]


def resume(output_dir: str, settings: dict[str, Any], checkpoint: str, more: dict[str, Any]) -> dict[str, Any]:
    return runs.train(output_dir, "llama", settings, checkpoint, **more)


@pytest.mark.parametrize(("family", "axes"), [("llama", {"lp_size": 2}), ("qwen3", {"lp_size": 1, "fsdp": True})])
def test_parts_of_matrices_train_as_wholes(
    family: str, axes: dict, ranks2: RankPool, ranks4: RankPool, tmp_path: Path
) -> None:
    """tp x lp against lp, and dp x tp with fsdp against dp."""
    settings = {"max_steps": 4, "max_grad_norm": 0.3, "dropout": 0.0, "gradient_accumulation_steps": 2}
    wholes = ranks2.run(train, str(tmp_path), family, settings | axes | {"fsdp": False})
    parts = ranks4.run(train, str(tmp_path), family, settings | axes | {"tp_size": 2})
    assert_alike(parts[0], wholes[0])
    share = 0.35 if "fsdp" in axes else 0.65  # embeddings, head and norms are whole on every tp rank
    assert all(p["bytes"] <= share * w["bytes"] for p, w in zip(parts[::2], wholes, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"lp_size": 2}, {"lp_size": 1, "fsdp": True}], ids=["lp", "fsdp"])
def test_parts_of_matrices_are_saved_and_read_as_wholes(
    axes: dict, ranks2: RankPool, ranks4: RankPool, tmp_path: Path
) -> None:
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "dropout": 0.0}
    whole, parts = (ranks2, axes | {"fsdp": False}), (ranks4, axes | {"tp_size": 2})
    for name, (ranks, there) in (("whole", whole), ("parts", parts)):
        ranks.run(runs.train, str(tmp_path / name), "llama", settings | there)
    expected = ranks2.run(runs.train, str(tmp_path / "end"), "llama", settings | whole[1])[0]
    for written, (ranks, here) in (("whole", parts), ("parts", parts), ("parts", whole)):
        checkpoint = str(tmp_path / written / "checkpoint-2")
        ended = ranks.run(resume, str(tmp_path / "again"), settings | here | {"save_strategy": "no"}, checkpoint, {})
        assert_alike(ended[0], expected)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("gpt2", {}, "GPT2LMHeadModel has no tp_plan for its layers"),
        ("llama", {"torch_compile": True}, "torch_compile with tp_size is not supported"),
        ("llama", {"optim": "adafactor"}, "optim=.* with fsdp or tp_size is not supported"),
        ("llama", {"tp_size": 4}, "tp_size=4 does not divide num_key_value_heads=2"),
    ],
)
def test_what_is_not_split(family: str, settings: dict, message: str, ranks4: RankPool, tmp_path: Path) -> None:
    ended = ranks4.run(refusal, str(tmp_path), family, {"tp_size": 2} | settings)
    assert all(re.search(message, said) for said in ended)


def refusal(output_dir: str, family: str, settings: dict[str, Any]) -> str:
    try:
        runs.trainer(output_dir, family, settings)
    except ConfigurationError as error:
        return str(error)
    return "no error"


def state_files(output_dir: str) -> list[str]:
    """What accelerate's own files come to after a run in pieces."""
    run = runs.trainer(output_dir, "llama", {"fsdp": True, "max_steps": 1})
    run.train()
    said = []
    for write in (lambda: run.accelerator.save_model(run.model, output_dir), lambda: run.accelerator.save_state("x")):
        with pytest.raises(UnsupportedModelError) as refused:
            write()
        said.append(str(refused.value))
    return said


def test_files_of_one_ranks_pieces_are_refused(ranks2: RankPool, tmp_path: Path) -> None:
    for said in ranks2.run(state_files, str(tmp_path)):
        assert [text.split()[0] for text in said] == ["save_model", "save_state"]
        assert all("(or with fsdp)" in text for text in said)
