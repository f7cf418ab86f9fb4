"""Losses of all kinds: in micro-batches on any mesh as in the stock Trainer, or refused on all ranks."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional

from hf_layerpar import LayerParallelConfig, convert_to_ode, parallelize
from hf_layerpar.errors import ConfigurationError, UnsupportedModelError
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


# ---- losses given to train_step
def batch_of(family: str) -> dict[str, Tensor]:
    return hf.default_data_collator([Uneven(family, 8)[i] for i in range(5)])


def without_labels(batch: Any) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name != "labels"}


def in_place(model: Any, batch: Any) -> Tensor:
    """Changes the logits that it was given, as some heads do."""
    logits = model(**without_labels(batch)).logits
    logits[..., 0] = -5.0
    logits /= 2
    return functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


def self_taught(model: Any, batch: Any) -> Tensor:
    """One forward's output is the other one's target, and no gradient says so."""
    wanted = model(**without_labels(batch)).logits.detach().argmax(-1)
    masked = batch["input_ids"].clone()
    masked[:, ::2] = 4
    logits = model(input_ids=masked).logits
    return functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())


def no_label(model: Any, batch: Any) -> Tensor:
    return model(**batch | {"labels": torch.full_like(batch["labels"], -100)}).loss


def of_kind(model: Any, kind: str, batch: Any) -> Tensor:
    logits = model(**without_labels(batch)).logits
    if kind == "squares":
        return functional.mse_loss(logits, torch.zeros_like(logits))
    return functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


def sampled(model: Any, batch: Any) -> Tensor:
    """The second forward's input is made of the first one's output (scheduled sampling)."""
    ids = model(**without_labels(batch)).logits.argmax(-1)
    return model(**batch | {"input_ids": ids}).loss


def popping(model: Any, batch: Any) -> Tensor:
    """Takes things out of the batch; a column is a list."""
    labels, names = batch.pop("labels"), batch.pop("names")
    assert names == [str(int(row[0])) for row in batch["input_ids"]]
    return functional.cross_entropy(model(**batch).logits.flatten(0, 1), labels.flatten())


TAKEN: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "in place": ("gpt2", in_place),
    "values alone": ("llama", self_taught),
    "no label": ("bert", no_label),
    "popping": ("bert", popping),
    "one of two": ("llama", lambda model, batch: of_kind(model, "squares", batch)),
    "the other one": ("llama", lambda model, batch: of_kind(model, "labels", batch)),
}


def deviations(names: list[str], settings: dict[str, Any]) -> dict[str, Any]:
    """How far loss and gradients of this rank are from the stock model's; one handle takes all losses of a family."""
    found: dict[str, Any] = {}
    handles: dict[str, Any] = {}
    for name in names:
        family, loss = TAKEN[name]
        stock, batch = build(family), hf.BatchEncoding(batch_of(family))
        if name == "popping":
            batch["names"] = [str(int(row[0])) for row in batch["input_ids"]]
        expected = loss(stock, hf.BatchEncoding(dict(batch)))
        expected.backward()
        if family not in handles:
            model = convert_to_ode(build(family))
            handles[family] = model, parallelize(model, LayerParallelConfig(**settings))
        model, handle = handles[family]
        model.zero_grad()
        value = handle.train_step(batch, partial(loss, model))
        grads = {n: p.grad for n, p in stock.named_parameters() if p.grad is not None}
        errors = [float((p.grad - grads[n]).norm()) for n, p in model.named_parameters() if p.grad is not None]
        found[name] = abs(float(value) - float(expected.detach())), max(errors)
    return found


@pytest.mark.parametrize("settings", [CUT, {}, {"ends": "spread"}], ids=["cut", "whole", "spread"])
def test_losses_given_to_a_step(settings: dict, ranks1: RankPool, ranks2: RankPool) -> None:
    for pool in (ranks1, ranks2):
        for rank in pool.run(deviations, list(TAKEN), settings):
            loss, gradient = rank.pop("no label")  # as torch's mean of nothing
            assert math.isnan(loss)
            assert gradient == 0
            for name, (loss, gradient) in rank.items():
                assert loss < 1e-12, name
                assert gradient < 1e-12, name


def heads() -> dict[str, tuple[type, dict[str, Any], dict[str, Tensor]]]:
    """(class, values of its config, labels of five rows) by the loss that it computes."""
    ids, random = zoo.tokens(5, LENGTH), torch.Generator().manual_seed(3)
    sequence = hf.BertForSequenceClassification
    three, regression = {"num_labels": 3}, {"num_labels": 3, "problem_type": "regression"}
    few = (ids % 3).where(ids % 5 > 0, -100)
    return {
        "single label": (sequence, three, {"labels": torch.tensor([0, 2, 1, 1, 0])}),
        "regression": (sequence, {"num_labels": 1}, {"labels": torch.randn(5, generator=random).double()}),
        "regression of many": (sequence, regression, {"labels": torch.randn(5, 3, generator=random).double()}),
        "multi-label": (sequence, three, {"labels": torch.randint(0, 2, (5, 3), generator=random).double()}),
        "tokens": (hf.BertForTokenClassification, three, {"labels": few}),
        "answers": (  # the second one ends outside of the text and is ignored
            hf.BertForQuestionAnswering,
            {},
            {"start_positions": torch.tensor([1, 2, 3, 4, 5]), "end_positions": torch.tensor([3, 40, 5, 4, 5])},
        ),
        "two losses": (
            hf.BertForPreTraining,
            {},
            {"labels": ids.where(few >= 0, -100), "next_sentence_label": torch.tensor([0, 1, -100, 0, 1])},
        ),
    }


def deviations_of_heads(settings: dict[str, Any]) -> dict[str, tuple[float, float]]:
    found = {}
    for name, (head, values, labels) in heads().items():
        torch.manual_seed(0)
        stock = head(zoo.config("bert", 3, **values)).double().eval()
        model = copy.deepcopy(stock)
        batch = {"input_ids": zoo.tokens(5, LENGTH)} | labels
        expected = stock(**batch).loss
        expected.backward()
        grads = {n: p.grad for n, p in stock.named_parameters() if p.grad is not None}
        loss = parallelize(convert_to_ode(model), LayerParallelConfig(**settings)).train_step(batch)
        errors = [float((p.grad - grads[n]).norm()) for n, p in model.named_parameters() if p.grad is not None]
        found[name] = abs(float(loss) - float(expected.detach())), max(errors)
    return found


@pytest.mark.parametrize("settings", [CUT, CUT | {"ends": "spread"}], ids=["cut", "spread"])
def test_losses_of_heads(settings: dict, ranks2: RankPool) -> None:
    for rank in ranks2.run(deviations_of_heads, settings):
        for name, (loss, gradient) in rank.items():
            assert loss < 1e-12, name
            assert gradient < 1e-12, name


def refusals() -> dict[str, str]:
    """Errors by loss; the handle goes on afterwards."""
    model = convert_to_ode(build("llama"))
    handle = parallelize(model, LayerParallelConfig())
    batch, found = batch_of("llama"), {}
    outer = nn.Linear(zoo.VOCAB, 3).double()

    def without_gradient(b: Any) -> Tensor:
        with torch.no_grad():
            wanted = model(**without_labels(b)).logits.softmax(-1)
        return model(**b).loss + functional.mse_loss(model(**without_labels(b)).logits, wanted)

    def unused(b: Any) -> Tensor:
        model(**b)
        return model(**b).loss

    def own_backward(b: Any) -> Tensor:
        loss = model(**b).loss
        torch.autograd.grad(loss, model.lm_head.weight, retain_graph=True)
        return loss

    losses = {
        "head outside": lambda b: outer(model(**without_labels(b)).logits).square().mean(),
        "sampled": lambda b: sampled(model, b),
        "without gradient": without_gradient,
        "unused": unused,
        "own backward": own_backward,
        "no scalar": lambda b: model(**b).logits,
    }
    for name, loss in losses.items():
        try:
            handle.train_step(batch, loss)
        except (ConfigurationError, UnsupportedModelError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    found["after"] = str(float(handle.train_step(batch)))
    return found


def test_refused_losses(ranks1: RankPool, ranks2: RankPool) -> None:
    (one,), two = ranks1.run(refusals), ranks2.run(refusals)
    assert "head outside" not in one
    assert "sampled" not in one
    for found in two:
        assert found["after"] == one["after"]
        assert "outside of the model that was given to parallelize" in found["head outside"]
        assert "no lp rank has all of" in found["sampled"]
    for found in (one, *two):
        assert "calls the model without gradients" in found["without gradient"]
        assert "doesn't use what comes of it" in found["unused"]
        assert "goes backward by itself" in found["own backward"]
        assert "must be a scalar" in found["no scalar"]
        kinds = {name: text.partition(":")[0] for name, text in found.items() if name != "after"}
        assert kinds.pop("no scalar") == "ConfigurationError"
        assert set(kinds.values()) == {"UnsupportedModelError"}


# ---- modules of one's own
class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = hf.BertModel(zoo.config("bert", 3), add_pooling_layer=False)
        self.head = nn.Linear(32, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.backbone(input_ids, attention_mask).last_hidden_state)


class OddTagger(Tagger):
    """Takes its inputs by names that no small input guesses."""

    def forward(self, words: Tensor, mask: Tensor) -> Tensor:  # pyright: ignore
        return super().forward(words, mask)


def tag(kind: type[Tagger], settings: dict[str, Any] | None) -> dict[str, Any]:
    """Five steps of a loop of one's own; without settings those of plain torch."""
    torch.manual_seed(0)
    model = kind().double().eval()
    ids = zoo.tokens(5, LENGTH)
    batch = {"ids": ids, "mask": torch.ones_like(ids), "tags": (ids % 3).where(ids % 5 > 0, -100)}

    def loss(b: Any) -> Any:
        logits = model(b["ids"], b["mask"]).flatten(0, 1)
        hits = (logits.argmax(-1) == b["tags"].flatten()).sum()
        return functional.cross_entropy(logits, b["tags"].flatten()), {"hits": hits}

    def plain_step() -> Any:
        value, metrics = loss(batch)
        value.backward()
        return value.detach(), metrics

    step, handle = plain_step, None
    if settings is not None:
        handle = parallelize(convert_to_ode(model), LayerParallelConfig(**settings))  # pyright: ignore
        step = partial(handle.train_step, batch, loss)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    found: dict[str, Any] = {"losses": [], "hits": []}
    for _ in range(5):
        value, metrics = step()
        optimizer.step()
        optimizer.zero_grad()
        found["losses"].append(float(value))
        found["hits"].append(float(metrics["hits"]))
    full = model.state_dict() if handle is None else handle.state_dict()
    return found | {"weights": digest(full) if full else None}


@pytest.mark.parametrize("kind", [Tagger, OddTagger])
@pytest.mark.parametrize("settings", [{}, CUT], ids=["whole", "cut"])
def test_a_module_of_ones_own(kind: type[Tagger], settings: dict, ranks1: RankPool, ranks2: RankPool) -> None:
    stock = tag(kind, None)
    one, two = ranks1.run(tag, kind, settings)[0], ranks2.run(tag, kind, settings)
    assert two[0] == one
    assert two[1] == one | {"weights": None}
    assert one["losses"] == pytest.approx(stock["losses"], abs=1e-12)
    assert one["hits"] == stock["hits"]
    assert len(set(stock["losses"])) == 5


class Judge(Tagger):
    """Also returns a loss and what is no matter of rows."""

    def __init__(self, reduction: str) -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Any = None) -> Any:  # pyright: ignore
        logits = super().forward(input_ids, attention_mask)
        if labels is None:
            return {"logits": logits}
        loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction=self.reduction)
        output = {"loss": loss if self.reduction == "mean" else loss.sum() / len(labels), "logits": logits}
        return output | {"table": logits.mean(0)} if self.reduction == "none" else output


def judged(reduction: str, settings: dict[str, Any]) -> tuple[float, ...]:
    """How far each value of an evaluation in parts is from that of a plain one."""
    torch.manual_seed(0)
    stock = Judge(reduction).double().eval()
    torch.manual_seed(0)
    model = convert_to_ode(Judge(reduction).double().eval())  # pyright: ignore
    parallelize(model, LayerParallelConfig(**settings))
    ids = zoo.tokens(5, LENGTH)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": (ids % 3).where(ids % 5 > 0, -100)}
    with torch.no_grad():
        expected, found = stock(**batch), model(**batch)
    return tuple(float((found[name] - value).norm()) for name, value in expected.items())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_evaluation_in_micro_batches(reduction: str, ranks2: RankPool) -> None:
    """A mean of uneven parts is put together; what divides by a part's rows, or comes of nobody knows what, is not."""
    for rank in ranks2.run(judged, reduction, CUT):
        assert max(rank) < 1e-12
