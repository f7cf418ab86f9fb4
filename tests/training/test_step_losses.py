"""Losses given to `train_step`, those of heads, modules of one's own: whole or in parts, as plain torch has them."""

from __future__ import annotations

import copy
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
from tests import zoo
from tests.multiproc import RankPool
from tests.training.runs import digest
from tests.training.test_loss_kinds import CUT, LENGTH, Uneven, build


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
