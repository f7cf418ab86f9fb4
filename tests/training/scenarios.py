"""Runs that need more than settings: odd collators, deaths, adapters; executed on every rank of a pool."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch.utils.data import IterableDataset

from hf_layerpar.checkpoint.trainer_state import StateWriting
from hf_layerpar.errors import CheckpointError, ConfigurationError
from hf_layerpar.ode.convert import convert_to_ode
from hf_layerpar.training.trainer import LayerParallelTrainer
from tests import zoo
from tests.training.runs import Samples, arguments, build, digest, outcome, train, trainer, wait_for_all


def noisy_collator(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Random masking from all three streams, and padding that depends on them."""
    batch = hf.default_data_collator(items)
    mask = (torch.rand(batch["input_ids"].shape) < 0.3) | torch.from_numpy(np.random.rand(1, 12) < 0.1)
    batch["input_ids"] = batch["input_ids"].masked_fill(mask, random.randrange(5, zoo.VOCAB))
    return batch


class NoisySamples(Samples):
    """Samples with augmentation drawn in `__getitem__`."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = super().__getitem__(index)
        ids = sample["input_ids"]
        return sample | {"input_ids": ids.masked_fill(torch.rand(ids.shape) < 0.2, 7)}


def rank_collator(items: list[dict[str, Any]]) -> dict[str, Any]:
    """A collator that behaves differently on every process, and moves the random streams by different amounts."""
    batch = hf.default_data_collator(items)
    rank = int(os.environ["RANK"])
    torch.rand(rank + 1)
    keep = torch.rand(batch["input_ids"].shape, generator=torch.Generator().manual_seed(rank)) > 0.3
    batch["input_ids"] = batch["input_ids"].masked_fill(~keep, 5)[:, : 12 - rank]
    for name in ("attention_mask", "labels"):
        batch[name] = batch[name][:, : 12 - rank]
    return batch


def train_noisy(output_dir: str, settings: dict[str, Any], resume: Any = None, length: int = 64) -> dict[str, Any]:
    return train(
        output_dir,
        "llama",
        settings,
        resume,
        train_dataset=NoisySamples("llama", length),
        data_collator=noisy_collator,
    )


def train_with_rank_collator(output_dir: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Also evaluates."""
    run = trainer(output_dir, "llama", settings, data_collator=rank_collator, eval_dataset=Samples("llama", 10, 1000))
    run.train()
    loss = run.evaluate()["eval_loss"]
    return {"eval_loss": loss, "stream": int(torch.randint(2**31, ()))} | outcome(run)


def train_converted(
    output_dir: str, family: str, settings: dict[str, Any], conversion: dict[str, Any], resume: Any = None
) -> dict[str, Any]:
    """A run on a model with a step size of its own; without one, converted by the trainer."""
    model = build(family)
    model = convert_to_ode(model, **conversion) if conversion else model
    run = LayerParallelTrainer(model, arguments(output_dir, **settings), train_dataset=Samples(family, 64))
    run.remove_callback(hf.PrinterCallback)
    run.train(resume_from_checkpoint=resume)
    return outcome(run)


def train_frozen(output_dir: str, family: str, settings: dict[str, Any], part: str) -> dict[str, Any]:
    """part: of the model, "encoder" or "input_embeddings"."""
    model = build(family)
    getattr(model, f"get_{part}")().requires_grad_(False)
    run = LayerParallelTrainer(model, arguments(output_dir, **settings), train_dataset=Samples(family, 64))
    run.remove_callback(hf.PrinterCallback)
    run.train()
    return outcome(run)


def resume_with_a_tensor_lost(checkpoint: str, settings: dict[str, Any]) -> str:
    """The error of resuming a ViT from a checkpoint that lacks its last norm."""
    run = trainer(checkpoint, "vit", settings)
    file = os.path.join(checkpoint, "model.safetensors")
    kept = {k: v for k, v in load_file(file).items() if "layernorm" not in k or "encoder" in k}
    wait_for_all(run)
    if run.args.should_save:
        save_file(kept, file, metadata={"format": "pt"})
    wait_for_all(run)
    try:
        run.train(resume_from_checkpoint=checkpoint)
    except CheckpointError as error:
        return str(error)
    return "no error"


def train_for_the_best(output_dir: str, settings: dict[str, Any]) -> dict[str, Any]:
    hashes: list[str | None] = []

    class Remember(hf.TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            full = run.layer_parallel.state_dict()
            hashes.append(digest(full) if full else None)

    run = trainer(output_dir, "llama", settings, eval_dataset=Samples("llama", 7, 1000), callbacks=[Remember()])
    run.train()
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    return outcome(run) | {
        "best": run.state.best_model_checkpoint,
        "best_metric": run.state.best_metric,
        "eval_losses": losses,
        "weights_at_evaluations": hashes,
        "eval_loss_after": run.evaluate()["eval_loss"],
    }


def train_from_model_init(output_dir: str, settings: dict[str, Any]) -> dict[str, Any]:
    run = LayerParallelTrainer(
        args=arguments(output_dir, **settings),
        train_dataset=Samples("llama", 64),
        model_init=lambda: build("llama", 0.0),
    )
    run.remove_callback(hf.PrinterCallback)
    run.train()
    first = outcome(run)
    run.train()
    return first | {"weights_of_second_call": outcome(run)["weights"]}


def train_and_die(output_dir: str, settings: dict[str, Any], step: int, point: str) -> None:
    """Kills world rank 0 while it writes the checkpoint of `step`: after the weights, or between the two renames."""
    owner, name = {"weights": (LayerParallelTrainer, "_state_writing"), "renames": (Path, "rename")}[point]
    original = getattr(owner, name)

    def killed(*args: Any, **kwargs: Any) -> Any:
        if point == "renames":
            result = original(*args)
            if str(args[1]).endswith(".replaced"):
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        if f"checkpoint-{step}." in str(args[1]) and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, killed)
    train(output_dir, "llama", settings)


def train_with_a_failing_rank(output_dir: str, settings: dict[str, Any]) -> str:
    """The last rank's disk is full from the second checkpoint on; returns the error."""
    original = StateWriting.write
    calls = []

    def failing(self: StateWriting) -> None:
        calls.append(self)
        if len(calls) == 2 and os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
            raise OSError("No space left on device")
        original(self)

    StateWriting.write = failing  # type: ignore[method-assign]
    try:
        train(output_dir, "llama", settings)
    except CheckpointError as error:
        return str(error)
    finally:
        StateWriting.write = original  # type: ignore[method-assign]
    return "no error"


def construction_error(settings: dict[str, Any]) -> str:
    try:
        trainer("unused", "llama", settings)
    except ConfigurationError as error:
        return str(error)
    return "no error"


def too_many_ranks() -> str:
    model = zoo.build("llama")[0]
    del model.model.layers[2:]
    try:
        LayerParallelTrainer(model, arguments("unused", lp_size=3), train_dataset=Samples("llama", 8))
    except ConfigurationError as error:
        return str(error)
    return "no error"


def layers_held(given: str | None, settings: dict[str, Any]) -> list[int]:
    """By this rank, of a Llama of 6 layers, or of the checkpoint of that name."""
    model = build("llama", layers=6) if given is None else given
    run = LayerParallelTrainer(model, arguments("unused", **settings), train_dataset=Samples("llama", 8))
    (stack,) = run.layer_parallel.stacks
    return [i for i in range(len(stack.layers)) if i not in stack.foreign]


def own_optimizer_error() -> str:
    model = build("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    try:
        LayerParallelTrainer(
            model, arguments("unused", lp_size=2), train_dataset=Samples("llama", 8), optimizers=(optimizer, None)
        )
    except ConfigurationError as error:
        return str(error)
    return "no error"


def train_adapters(output_dir: str, settings: dict[str, Any], resume: Any = None) -> dict[str, Any]:
    """LoRA on a Llama, with its B matrices not zero."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    torch.manual_seed(0)
    model = get_peft_model(build("llama"), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    run = LayerParallelTrainer(model, arguments(output_dir, **settings), train_dataset=Samples("llama", 64))
    run.remove_callback(hf.PrinterCallback)
    run.train(resume_from_checkpoint=resume)
    return outcome(run)


class Stream(IterableDataset):
    """Samples without indices or length."""

    def __init__(self, length: int) -> None:
        self.samples = Samples("bert_classifier", length)

    def __iter__(self) -> Any:
        return (self.samples[i] for i in range(self.samples.length))


def train_on_streams(output_dir: str, settings: dict[str, Any]) -> dict[str, Any]:
    run = trainer(output_dir, "bert_classifier", settings | {"max_steps": 6}, train_dataset=Stream(40))
    run.train()
    return {"labels": run.predict(Stream(13)).label_ids.tolist(), "weights": outcome(run)["weights"]}


def second_trainer(output_dir: str) -> tuple[str, str]:
    """(strategy of the model after a second trainer took it over, error of a third one with another lp size)."""
    first = trainer(output_dir, "llama", {"lp_size": 2})
    first.train()
    more = {"train_dataset": Samples("llama", 64)}
    second = LayerParallelTrainer(first.model, arguments(output_dir, lp_size=2, strategy="mgrit", coarsening=2), **more)
    second.train()
    try:
        LayerParallelTrainer(first.model, arguments(output_dir, lp_size=1), **more)
    except ConfigurationError as error:
        return first.layer_parallel.config.strategy, str(error)
    return first.layer_parallel.config.strategy, "no error"


class Death(hf.TrainerCallback):
    """Kills a rank when a step begins."""

    def __init__(self, rank: int, step: int) -> None:
        self.rank, self.step = rank, step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.process_index == self.rank and state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class DiesInStep(LayerParallelTrainer):
    """lp rank 1 dies in step 2, when it has the loss and the others wait for its adjoint."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        if self.mesh.lp_rank == 1 and self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss


def train_until_a_rank_dies(directory: str, settings: dict[str, Any], when: str) -> None:
    if when == "between steps":
        trainer(directory, "llama", settings, callbacks=[Death(1, 2)]).train()
    else:
        DiesInStep(build("llama"), arguments(directory, **settings), train_dataset=Samples("llama", 64)).train()


class _Swing(hf.TrainerCallback):
    """After step `wild` the layers turn steep, after step `calm` they are what they were."""

    def __init__(self, wild: int, calm: int, factor: float = 64.0) -> None:
        self.factors = {wild: factor, calm: 1 / factor}  # a power of two: there and back changes no bit

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        factor = self.factors.get(state.global_step)
        if factor is not None:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if ".h." in name and parameter.dim() == 2:
                        parameter.mul_(factor)


def train_swinging(
    output_dir: str, settings: dict[str, Any], wild: int, calm: int, resume: str | None = None
) -> dict[str, Any]:
    """A GPT-2 of 1 + 16 + 1 layers, h = 1/4, that turns unfriendly to MGRIT and friendly again."""
    torch.manual_seed(0)
    config = zoo.build("gpt2")[0].config
    config.n_layer = 18
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.1
    model = convert_to_ode(hf.GPT2LMHeadModel(config), step_size=1 / 4, num_steps=16, buffers=(1, 1))
    run = LayerParallelTrainer(
        model,
        arguments(output_dir, **settings),
        train_dataset=Samples("gpt2", 64),
        callbacks=[_Swing(wild, calm)],
    )
    run.remove_callback(hf.PrinterCallback)
    run.train(resume_from_checkpoint=resume)
    log = run.state.log_history
    watch = run._watch
    return outcome(run) | {
        "checks": [dict(entry) for entry in log if "lp_check_setting" in entry],
        "modes": [(entry["lp_forward_mode"], entry["lp_backward_mode"]) for entry in log if "loss" in entry],
        "settings": run.layer_parallel.config.to_dict(),
        "shares": [] if watch is None else list(watch.shares.values()),
    }
