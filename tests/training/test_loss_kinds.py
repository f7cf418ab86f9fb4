"""Losses of all kinds: in micro-batches on any mesh as in the stock Trainer, or refused on all ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from torch.nn import functional

from hf_layerpar.errors import ConfigurationError
from hf_layerpar.training.trainer import LayerParallelTrainer
from tests import zoo
from tests.multiproc import RankPool
from tests.training.runs import Samples, arguments, digest

LENGTH = 6
CUT = {"micro_batches": 2, "schedule": "list"}


# ---- data and models
class Uneven(Samples):
    """Short samples; language models have another number of labels in every one."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = super().__getitem__(index)
        sample = {k: v[:LENGTH] if isinstance(v, Tensor) else v for k, v in sample.items()}
        if self.family == "bert_classifier":
            return sample | {"labels": index % 3}
        sample["labels"] = sample["input_ids"].clone()
        sample["labels"][: index % 5] = -100
        return sample


BERT = ("hidden_dropout_prob", "attention_probs_dropout_prob")
DROPOUT = {
    "llama": ("attention_dropout",),
    "gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    "bert": BERT,
    "bert_classifier": BERT,
}


def build(family: str, dropout: float = 0.0, seed: int = 0) -> hf.PreTrainedModel:
    """Three layers, in float64: what is compared differs in the order of sums alone."""
    changes = dict.fromkeys(DROPOUT[family], dropout)
    torch.manual_seed(seed)
    if family == "bert_classifier":
        return hf.BertForSequenceClassification(zoo.config("bert", 3, num_labels=3, **changes)).double()
    return zoo.build(family, layers=3, seed=seed, **changes)[0].double()


# ---- losses, for the stock Trainer and ours
class Plain:
    """The model's own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # pyright: ignore
        self.set_up()

    def set_up(self) -> None: ...


class Weighted(Plain):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        weight = torch.tensor([0.02, 0.3, 0.1], dtype=torch.float64)
        loss = functional.cross_entropy(outputs.logits, labels, weight=weight)
        return (loss, outputs) if return_outputs else loss


class Distilled(Plain):
    def set_up(self) -> None:
        with torch.random.fork_rng():  # stock draws the order of its data from the main stream
            self.teacher = build("llama", seed=5).requires_grad_(False).eval()

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        outputs = model(**inputs)
        wanted = self.teacher(**{k: v for k, v in inputs.items() if k != "labels"}).logits
        kl = functional.kl_div(
            functional.log_softmax(outputs.logits / 2, dim=-1),
            functional.softmax(wanted / 2, dim=-1),
            reduction="batchmean",
        )
        return 0.7 * outputs.loss + 0.3 * 4 * kl


class Consistent(Plain):
    """R-Drop. The second forward has tokens masked, or without dropout both were the same."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        masked = inputs["input_ids"].clone()
        masked[:, 1::2] = 4
        one, two = model(**inputs), model(**inputs | {"input_ids": masked})
        p, q = (functional.log_softmax(o.logits, dim=-1) for o in (one, two))
        kl = functional.kl_div(p, q, reduction="batchmean", log_target=True)
        kl = kl + functional.kl_div(q, p, reduction="batchmean", log_target=True)
        return (one.loss + two.loss) / 2 + 0.25 * kl


def summed(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    logits = outputs.logits[:, :-1].flatten(0, 1)
    loss = functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    return loss if num_items_in_batch is None else loss / num_items_in_batch


class OwnCount(Plain):
    """Divides a sum by the number of labels that it sees."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        labels = inputs.pop("labels")
        return summed(model(**inputs), labels, (labels[:, 1:] != -100).sum())


class Unreduced(Plain):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        labels = inputs.pop("labels")
        return functional.cross_entropy(model(**inputs).logits, labels, reduction="none").mean()


class Contrastive(Plain):
    """Each row against all others of the batch."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        inputs.pop("labels")
        rows = functional.normalize(model(**inputs).logits.mean(1), dim=-1)
        return functional.cross_entropy(5 * rows @ rows.roll(1, 0).T, torch.arange(len(rows)))


class Pairs(Plain):
    """The same with a loss that sees the pairs in one line."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        inputs.pop("labels")
        rows = functional.normalize(model(**inputs).logits.mean(1), dim=-1)
        wanted = torch.eye(len(rows), dtype=rows.dtype).flatten()
        return functional.binary_cross_entropy_with_logits((5 * rows @ rows.roll(1, 0).T).flatten(), wanted)


@dataclasses.dataclass(frozen=True)
class Kind:
    """uses_count: its loss is divided by num_items_in_batch (stock believes that of all models here)."""

    family: str
    uses_count: bool
    loss: type = Plain
    function: Callable[..., Tensor] | None = None
    settings: tuple[tuple[str, Any], ...] = ()


SMOOTHED = (("label_smoothing_factor", 0.1),)
KINDS = {
    "counted labels": Kind("llama", True),
    "classes": Kind("bert_classifier", False),
    "masked tokens": Kind("bert", False),
    "smoothed counted labels": Kind("llama", True, settings=SMOOTHED),
    "smoothed masked tokens": Kind("bert", True, settings=SMOOTHED),
    "loss function": Kind("llama", True, function=summed),
    "class weights": Kind("bert_classifier", False, Weighted),
    "distillation": Kind("llama", False, Distilled),
    "two forwards": Kind("bert_classifier", False, Consistent),
}
REFUSED = {
    "own count": (Kind("llama", False, OwnCount), "the losses of its parts don't add up"),
    "unreduced": (Kind("bert_classifier", False, Unreduced), "can't be put together from those of parts"),
    "contrastive": (Kind("llama", False, Contrastive), "compares rows of the batch"),
    "pairs": (Kind("llama", False, Pairs), "compares rows of the batch"),
}


def kind_of(name: str) -> Kind:
    return KINDS[name] if name in KINDS else REFUSED[name][0]


def losses(run: hf.Trainer) -> list[float]:
    run.remove_callback(hf.PrinterCallback)
    run.train()
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


BASE = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 1.0}


def train_stock(output_dir: str, name: str, settings: dict[str, Any]) -> list[float]:
    kind = kind_of(name)
    args = hf.TrainingArguments(
        output_dir,
        **BASE
        | {"logging_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 3}
        | dict(kind.settings)
        | settings,
    )
    stock = type("Stock", (kind.loss, hf.Trainer), {})
    samples = Uneven(kind.family, 32)
    run = stock(build(kind.family), args, train_dataset=samples, compute_loss_func=kind.function)
    if not kind.uses_count:
        run.model_accepts_loss_kwargs = False
    return losses(run)


def train(output_dir: str, name: str, settings: dict[str, Any], dropout: float = 0.0) -> dict[str, Any]:
    """Losses and the weights' hash (on lp rank 0), or the error."""
    kind = kind_of(name)
    args = arguments(output_dir, **BASE | dict(kind.settings) | settings)
    ours = type("Ours", (kind.loss, LayerParallelTrainer), {})
    samples = Uneven(kind.family, 32)
    run = ours(build(kind.family, dropout), args, train_dataset=samples, compute_loss_func=kind.function)
    try:
        found = losses(run)
    except ConfigurationError as error:
        return {"error": str(error)}
    full = run.layer_parallel.state_dict()
    return {"losses": found, "weights": digest(full) if full else None, "error": None}


ALIKE = ("smoothed counted labels", "masked tokens")
"""Others of the kinds are made of the same parts."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in ALIKE else n for n in KINDS])
@pytest.mark.parametrize("steps", [12, pytest.param(50, marks=pytest.mark.slow)])
def test_micro_batches_on_any_mesh_train_as_stock(
    name: str, steps: int, ranks1: RankPool, ranks2: RankPool, ranks3: RankPool, ranks4: RankPool, tmp_path
) -> None:
    four, two = ({"per_device_train_batch_size": rows, "max_steps": steps} for rows in (4, 2))
    stock = ranks1.run(train_stock, str(tmp_path), name, four)[0]
    assert len(set(stock)) == steps
    for pool in (ranks2, ranks3):
        ours = pool.run(train, str(tmp_path), name, four | CUT | {"lp_size": pool.world})
        assert ours[0]["losses"] == pytest.approx(stock, abs=1e-5), pool.world
    # two dp ranks are two accumulated batches
    accumulated = ranks1.run(train_stock, str(tmp_path), name, two | {"gradient_accumulation_steps": 2})[0]
    grid = ranks4.run(train, str(tmp_path), name, two | CUT | {"lp_size": 2})
    assert grid[0]["losses"] == pytest.approx(accumulated, abs=1e-5)


@pytest.mark.parametrize("name", ["counted labels", "masked tokens", "class weights"])
def test_accumulated_micro_batches_train_as_stock(name: str, ranks1: RankPool, ranks2: RankPool, tmp_path) -> None:
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 8}
    stock = ranks1.run(train_stock, str(tmp_path), name, settings)[0]
    ours = ranks2.run(train, str(tmp_path), name, settings | CUT | {"lp_size": 2})[0]
    assert ours["losses"] == pytest.approx(stock, abs=1e-5)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_two_forwards_with_dropout_are_the_same_at_every_lp_size(
    micro_batches: int, ranks1: RankPool, ranks2: RankPool, ranks3: RankPool, tmp_path
) -> None:
    settings = {"micro_batches": micro_batches, "max_steps": 5}
    one, *more = (
        pool.run(train, str(tmp_path), "two forwards", settings | {"lp_size": pool.world}, 0.2)[0]
        for pool in (ranks1, ranks2, ranks3)
    )
    for run in more:
        assert run["losses"] == pytest.approx(one["losses"], abs=1e-6)
        if micro_batches == 1:  # otherwise gradients of two passes and two micro-batches are added in any order
            assert run["weights"] == one["weights"]
    assert one["losses"] != ranks1.run(train, str(tmp_path), "two forwards", settings)[0]["losses"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_parts_cannot_add_up_to_is_refused_on_all_ranks(
    name: str, ranks1: RankPool, ranks2: RankPool, tmp_path
) -> None:
    settings = {"lp_size": 2, "max_steps": 10}
    for cut in (CUT, {"ends": "spread"}):
        for rank in ranks2.run(train, str(tmp_path), name, settings | cut):
            assert REFUSED[name][1] in rank["error"]
            assert "use micro_batches=1 and ends='first_last'" in rank["error"].replace("Use", "use")
    whole = ranks2.run(train, str(tmp_path), name, settings)[0]
    stock = ranks1.run(train_stock, str(tmp_path), name, {"max_steps": 10, "per_device_train_batch_size": 4})[0]
    assert whole["losses"] == pytest.approx(stock, abs=1e-5)
