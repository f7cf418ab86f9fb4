"""Pushes to a test endpoint, run on ranks whose environment names it; results are plain data."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import torch.distributed as dist
import transformers as hf

from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.errors import PeerLostError
from hf_layerpar.ode.convert import convert_to_ode
from hf_layerpar.sharding import parallelize
from hf_layerpar.training.trainer import LayerParallelTrainer
from tests import zoo
from tests.training import runs

hf.utils.logging.disable_progress_bar()
huggingface_hub.utils.disable_progress_bars()


def converted(family: str, seed: int = 0, **settings: Any) -> Any:
    return convert_to_ode(zoo.build(family, seed=seed)[0], **settings).eval()


def remember(model: Any, inputs: zoo.Inputs, file: Path) -> None:
    """Keeps inputs and logits for the process that loads the model again."""
    with torch.no_grad():
        torch.save((inputs, model(**inputs).logits), file)


def push_serial(
    folder: Path, repo_id: str, family: str, settings: dict[str, Any], seed: int = 0, **options: Any
) -> str | None:
    if dist.get_rank() != 0:
        return None
    model = converted(family, seed, **settings)
    model.add_model_tags("mine")
    remember(model, zoo.without_labels(zoo.build(family)[1]), folder / f"{repo_id.replace('/', '--')}.pt")
    return str(model.push_to_hub(repo_id, **options))


def push_alone(repo_id: str) -> None:
    converted("llama", seed=6).push_to_hub(repo_id)


def save_and_push(folder: Path, family: str, spread: bool, **options: Any) -> None:
    model = converted(family, step_size=0.5)
    if spread:
        parallelize(model)
    if spread or dist.get_rank() == 0:
        model.save_pretrained(folder, push_to_hub=True, **options)


def push_parallel(folder: Path, repo_id: str, family: str, settings: dict[str, Any], **options: Any) -> str | None:
    model = converted(family, **settings)
    if dist.get_rank() == 0:
        remember(model, zoo.without_labels(zoo.build(family)[1]), folder / f"{repo_id.replace('/', '--')}.pt")
    parallelize(model, LayerParallelConfig(strategy="mgrit", coarsening=2))
    commit = model.push_to_hub(repo_id, **options)
    return None if commit is None else str(commit)


def failing_push(repo_id: str, seed: int, **options: Any) -> tuple[str, str]:
    """How a push of a parallelized model ended on this rank; all ranks can still talk afterwards.

    seed: of the weights, another one in each test, since the Hub asks for no content that it has.
    """
    huggingface_hub.lfs.http_backoff = functools.partial(huggingface_hub.utils.http_backoff, max_retries=0)
    model = converted("llama", seed=seed)
    parallelize(model)
    try:
        ended = "pushed", str(model.push_to_hub(repo_id, **options))
    except PeerLostError:
        raise
    except Exception as error:
        ended = type(error).__name__, str(error)
    dist.barrier()
    return ended


def trainer(output_dir: Path, settings: dict[str, Any], ode: dict[str, Any]) -> LayerParallelTrainer:
    model = convert_to_ode(runs.build("bert_classifier"), **ode)
    samples = runs.Samples("bert_classifier", 64)
    arguments = runs.arguments(str(output_dir), push_to_hub=True, **settings)
    run = LayerParallelTrainer(model, arguments, train_dataset=samples, eval_dataset=runs.Samples("bert_classifier", 6))
    run.remove_callback(hf.PrinterCallback)
    return run


def train_and_push(output_dir: Path, settings: dict[str, Any], ode: dict[str, Any], file: Path) -> dict[str, Any]:
    run = trainer(output_dir, settings, ode)
    run.train()
    run.evaluate()
    commit = run.push_to_hub(dataset="owner/sentences", tags=["tiny"], language="en")
    inputs = {"input_ids": zoo.tokens(2, 12)}
    run.model.eval()  # type: ignore[union-attr]
    with torch.no_grad():
        logits = run.model(**inputs).logits  # type: ignore[misc]
    if run.is_world_process_zero():
        torch.save((inputs, logits), file)
    return {"commit": commit if commit is None else str(commit), "evaluation": run.state.log_history[-1]["eval_loss"]}


def resume(output_dir: Path, checkpoint: Path, settings: dict[str, Any], ode: dict[str, Any]) -> int:
    run = trainer(output_dir, settings, ode)
    run.train(resume_from_checkpoint=str(checkpoint))
    return run.state.global_step


def failing_trainer(output_dir: Path, settings: dict[str, Any]) -> list[tuple[str, str]]:
    """How a push by a new trainer ended, and how making the repository did with a token that isn't known."""
    ended = []
    for more in ({}, {"hub_token": "hf_wrong", "hub_model_id": "tester/forbidden"}):
        try:
            run = trainer(output_dir, settings | more, {})
            ended.append(("pushed", str(run.push_to_hub())))
        except Exception as error:
            ended.append((type(error).__name__, str(error)))
        dist.barrier()
    return ended


def train_through_refusals(output_dir: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Training whose background pushes fail: the step it reached, and the errors that were logged."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    listener = Listener(logging.ERROR)
    ours = logging.getLogger("hf_layerpar")
    ours.addHandler(listener)
    try:
        run = trainer(output_dir, settings, {})
        run.train()
    finally:
        ours.removeHandler(listener)
    return {"step": run.state.global_step, "said": said}
