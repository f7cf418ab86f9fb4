"""Losses of parts of a batch put together, against torch's loss of all rows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import create_block_mask

from hf_layerpar import LayerParallelConfig, convert_to_ode, parallelize
from hf_layerpar.errors import ConfigurationError, UnsupportedModelError
from hf_layerpar.ode.losses import Counting, Whole, factors
from hf_layerpar.ode.rehearsal import Rehearsed, batch_rows, check_parts, cut_rows, loss_and_metrics
from tests.multiproc import run_ranks

ROWS = 7
GENERATOR = torch.Generator().manual_seed(0)
LOGITS, SCORES, PROBABLE = (torch.randn(ROWS, 5, generator=GENERATOR).double() for _ in range(3))
PROBABLE = PROBABLE.softmax(-1)
WEIGHT = torch.rand(5, generator=GENERATOR).double()
LABELS = torch.tensor([-100, -100, -100, 0, 3, -100, 4])  # none in the first part of two or three
PICKED = functional.one_hot(torch.arange(ROWS) % 5, 5).double()

Loss = Callable[[Tensor, slice], Tensor]

ADDING_UP: dict[str, Loss] = {
    "mean": lambda x, r: functional.cross_entropy(x, LABELS[r]),
    "weighted": lambda x, r: functional.cross_entropy(x, LABELS[r], WEIGHT),
    "smoothed": lambda x, r: functional.cross_entropy(x, LABELS[r], WEIGHT, label_smoothing=0.1),
    "probabilities": lambda x, r: functional.cross_entropy(x, PROBABLE[r]),
    "other index": lambda x, r: functional.cross_entropy(x, LABELS[r].clamp(min=0), ignore_index=0),
    "nll": lambda x, r: functional.nll_loss(x.log_softmax(-1), LABELS[r]),
    "kl mean": lambda x, r: functional.kl_div(x.log_softmax(-1), PROBABLE[r]),
    "kl batch mean": lambda x, r: nn.KLDivLoss(reduction="batchmean")(x.log_softmax(-1), PROBABLE[r]),
    "mse": lambda x, r: functional.mse_loss(x, SCORES[r]),
    "l1": lambda x, r: functional.l1_loss(x, SCORES[r]),
    "smooth l1": lambda x, r: functional.smooth_l1_loss(x, SCORES[r], beta=0.5),
    "huber": lambda x, r: functional.huber_loss(x, SCORES[r], delta=0.5),
    "bce": lambda x, r: nn.BCEWithLogitsLoss(WEIGHT, pos_weight=WEIGHT)(x, PROBABLE[r]),
    "sum": lambda x, r: functional.cross_entropy(x, LABELS[r], reduction="sum") / 11,
    "combination": lambda x, r: 0.5 * functional.cross_entropy(x, LABELS[r]) - functional.l1_loss(x, SCORES[r]) / 3,
    "in place": lambda x, r: functional.cross_entropy(x, LABELS[r]).mul_(3).float().double(),
    "two from zero": lambda x, r: sum(functional.mse_loss(x * n, SCORES[r]) for n in (1, 2)),  # type: ignore[return-value]
}

NOT_OF_TERMS: dict[str, Loss] = {
    "nothing": lambda x, r: x.sum(),
    "norm of a state": lambda x, r: functional.cross_entropy(x, LABELS[r]) + 0.01 * x.square().mean(),
    "constant": lambda x, r: functional.cross_entropy(x, LABELS[r]) + 1,
    "square": lambda x, r: functional.mse_loss(x, SCORES[r]) ** 2,
    "root": lambda x, r: functional.mse_loss(x, SCORES[r]).sqrt(),
    "learned factor": lambda x, r: functional.mse_loss(x, SCORES[r]) * x[0, 0],
    "quotient": lambda x, r: 1 / functional.mse_loss(x, SCORES[r]),
    "weighted mse": lambda x, r: functional.mse_loss(x, SCORES[r], weight=SCORES[r].abs()),
    "own mean": lambda x, r: functional.cross_entropy(x, LABELS[r], reduction="none").mean(),
    "old spelling": lambda x, r: functional.mse_loss(x, SCORES[r], size_average=False),
}

NOT_ADDING_UP: dict[str, Loss] = {
    "own rows": lambda x, r: functional.cross_entropy(x, LABELS[r], reduction="sum") / len(x),
    "own labels": lambda x, r: functional.cross_entropy(x, LABELS[r], reduction="sum") / (LABELS[r] >= 0).sum().add(1),
    "factor": lambda x, r: functional.mse_loss(x, SCORES[r]) * (1 + r.start),
    "other function": lambda x, r: (functional.mse_loss if r.start else functional.l1_loss)(x, SCORES[r]),
    "one more": lambda x, r: (
        functional.mse_loss(x, SCORES[r]) * 1 + (functional.mse_loss(x, SCORES[r]) if r.start else 0)
    ),
    "rows with rows": lambda x, r: functional.cross_entropy(x @ x.T, torch.arange(len(x))),
    "labels of all rows": lambda x, r: functional.cross_entropy(x, LABELS),
}


def bounds(parts: int) -> list[slice]:
    return [slice(a, b) for a, b in pairwise(ROWS * i // parts for i in range(parts + 1))]


def rehearsed(loss_of: Loss, rows: slice) -> Rehearsed:
    """What `rehearse` finds of a loss, without a model around it."""
    with Counting() as counting:
        made_of = factors(loss_of(LOGITS[rows].clone().requires_grad_(), rows), counting)
    terms = None if made_of is None else tuple(counting.terms)
    return Rehearsed((0,), ((),), ((), (0,)), (frozenset(), frozenset()), (), terms, tuple(made_of or ()), None, ())


def check(loss_of: Loss, parts: int) -> Rehearsed:
    whole = rehearsed(loss_of, slice(0, ROWS))
    check_parts(whole, [rehearsed(loss_of, rows) for rows in bounds(parts)], f"micro_batches={parts}")
    return whole


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss")  # of kl_div
@pytest.mark.parametrize("parts", [2, 3, 7])
@pytest.mark.parametrize("name", ADDING_UP)
def test_losses_of_parts_add_up(name: str, parts: int) -> None:
    loss_of = ADDING_UP[name]
    whole = LOGITS.clone().requires_grad_()
    expected = loss_of(whole, slice(0, ROWS))
    expected.backward()
    terms = check(loss_of, parts).terms
    assert terms is not None
    mine, total = LOGITS.clone().requires_grad_(), 0.0
    for rows in bounds(parts):
        with Whole(terms):
            loss = loss_of(mine[rows], rows)
        assert loss.dtype == expected.dtype
        loss.backward()
        total += float(loss.detach())
    assert total == pytest.approx(float(expected.detach()), rel=1e-6 if name == "in place" else 1e-12)
    torch.testing.assert_close(mine.grad, whole.grad, rtol=1e-6 if name == "in place" else 1e-12, atol=1e-15)


@pytest.mark.filterwarnings("ignore:size_average and reduce args")
@pytest.mark.parametrize("name", NOT_OF_TERMS)
def test_losses_that_are_no_sum_of_known_terms_are_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^micro_batches=2 cuts the batch.*sum of multiples of means or sums"):
        check(NOT_OF_TERMS[name], 2)


@pytest.mark.parametrize("name", NOT_ADDING_UP)
def test_losses_whose_parts_do_not_add_up_are_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^micro_batches=2 cuts the batch, but .*use micro_batches=1"):
        check(NOT_ADDING_UP[name], 2)


def test_a_batch_without_a_valid_label_has_no_number() -> None:
    """As in torch, and its parts neither."""

    def loss_of(x: Tensor, rows: slice) -> Tensor:
        return functional.cross_entropy(x, torch.full_like(LABELS, -100)[rows])

    terms = rehearsed(loss_of, slice(0, ROWS)).terms
    assert terms is not None
    with Whole(terms):
        part = loss_of(LOGITS[:3], slice(0, 3))
    assert part.isnan() == loss_of(LOGITS, slice(0, ROWS)).isnan()


def test_a_part_that_computes_another_loss_is_refused_in_the_step() -> None:
    terms = rehearsed(ADDING_UP["mse"], slice(0, ROWS)).terms
    assert terms is not None
    with (
        pytest.raises(UnsupportedModelError, match="calls l1_loss where that of the whole batch did not"),
        Whole(terms),
    ):
        functional.l1_loss(LOGITS, SCORES)
    with Whole(terms):
        functional.mse_loss(LOGITS, SCORES)
        with pytest.raises(UnsupportedModelError, match="calls mse_loss where"):
            functional.mse_loss(LOGITS, SCORES)


def test_counting_computes_nothing() -> None:
    """Neither linear maps nor losses, whatever is done to the logits between them."""
    head = nn.Linear(5, 10**7, device="meta")
    x = LOGITS.float().requires_grad_()
    with Counting() as counting:
        logits = head(x)
        logits = logits.double().contiguous()
        logits /= 2.0
        logits[:, 0] = -1e9
        loss = functional.cross_entropy(logits.view(-1, 10**7), torch.arange(ROWS))
    assert logits.shape == (ROWS, 10**7)
    assert logits.untyped_storage().nbytes() < 100
    assert [(t.function, t.count) for t in counting.terms] == [("cross_entropy", 7.0)]
    assert factors(loss, counting) == [1.0]


def test_losses_that_go_backward_by_themselves_are_refused() -> None:
    x = LOGITS.clone().requires_grad_()
    with Counting():
        loss = functional.cross_entropy(functional.linear(x, torch.ones(3, 5).double()), LABELS.clamp(0, 2))
        with pytest.raises(UnsupportedModelError, match="goes backward by itself"):
            torch.autograd.grad(loss, x)


def test_one_row_that_would_be_compared_with_all_rows_is_refused() -> None:
    """Shapes that torch spreads over each other, unlike a target that is one for all rows."""
    with pytest.raises(ConfigurationError, match=r"compares the logits of a part with targets of the whole batch"):
        check(lambda x, r: functional.mse_loss(x, SCORES), ROWS)
    assert check(lambda x, r: functional.mse_loss(x, SCORES[:1]), ROWS).terms is not None


# ---- what a loss function returns, and rows
def test_what_a_loss_function_may_return() -> None:
    loss = torch.ones(())
    assert loss_and_metrics(loss) == (loss, {})
    assert loss_and_metrics((loss, {"accuracy": 0.5})) == (loss, {"accuracy": 0.5})
    for output in (None, torch.ones(1), (loss, loss), {"loss": loss}):
        with pytest.raises(ConfigurationError, match="the loss of a training step must be a scalar"):
            loss_and_metrics(output)


def test_cutting_rows() -> None:
    batch = {"ids": torch.arange(10).view(5, 2), "shared": torch.ones(1, 3), "number": 2, "more": [torch.arange(5)]}
    assert batch_rows(batch) == 5
    assert batch_rows({"shared": torch.ones(1, 3)} | batch, "ids") == 5
    assert cut_rows(batch, 5, 1) == [batch]
    parts = cut_rows(batch, 5, 3)
    assert [len(part["ids"]) for part in parts] == [1, 2, 2]
    assert torch.equal(torch.cat([part["ids"] for part in parts]), batch["ids"])
    assert torch.equal(torch.cat([part["more"][0] for part in parts]), batch["more"][0])
    assert all(part["shared"] is batch["shared"] and part["number"] == 2 for part in parts)
    with pytest.raises(ConfigurationError, match=r"5 rows can't be cut into 2 parts.*\(4, 2\).*use micro_batches=1"):
        cut_rows(batch | {"other": torch.ones(4, 2)}, 5, 2)


def test_cutting_what_has_its_rows_elsewhere() -> None:
    """Also where a first dimension happens to be the number of rows."""
    positions = torch.arange(3 * 3 * 4).view(3, 3, 4)  # kinds, rows, tokens
    batch = {"input_ids": torch.zeros(3, 4), "position_ids": positions, "cache_position": torch.arange(3)}
    for i, part in enumerate(cut_rows(((), batch), 3, 3)):
        assert torch.equal(part[1]["position_ids"], positions[:, i : i + 1])
        assert part[1]["cache_position"] is batch["cache_position"]
    two = {"position_ids": torch.zeros(2, 4), "cache_position": torch.arange(4)}
    assert [len(part["position_ids"]) for part in cut_rows(two, 2, 2)] == [1, 1]
    for name in ("image_grid_thw", "cu_seq_lens_q"):
        with pytest.raises(ConfigurationError, match=rf"it holds {name}, a table .*use micro_batches=1"):
            cut_rows({"input_ids": torch.zeros(2, 4), name: torch.ones(2, 3)}, 2, 2)
    mask = create_block_mask(lambda b, h, q, k: q >= k, 2, None, 128, 128, device="cpu")
    with pytest.raises(ConfigurationError, match=r"it holds a BlockMask.*use micro_batches=1"):
        cut_rows({"input_ids": torch.zeros(2, 4), "attention_mask": mask}, 2, 2)


class Biased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """bias: [H, T, T], for H = 2 parts of the state."""
        parts = self.mix(x).unflatten(-1, (2, 4)).transpose(1, 2)  # [B, H, T, 4]
        return x + ((parts @ parts.mT + bias).softmax(-1) @ parts).transpose(1, 2).flatten(2)


class BiasedModel(hf.PreTrainedModel):
    """Its front makes a bias of each head, of which there are as many as rows in the batch."""

    config_class = hf.PreTrainedConfig

    def __init__(self) -> None:
        super().__init__(hf.PreTrainedConfig(num_hidden_layers=4))
        torch.manual_seed(0)
        self.slopes = nn.Parameter(torch.randn(2))
        self.layers = nn.ModuleList([Biased() for _ in range(4)])

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        bias = self.slopes[:, None, None] * torch.arange(input_ids.shape[1], dtype=input_ids.dtype)[:, None]
        x = input_ids
        for layer in self.layers:
            x = layer(x, bias.expand(-1, -1, input_ids.shape[1]))
        return {"loss": functional.mse_loss(x, labels), "logits": x}


def losses_on_ranks() -> list[Any]:
    """Errors for a bias of as many heads as rows, in micro-batches; and what is said of losses that look beyond."""
    model, batch = BiasedModel().double(), {"input_ids": SCORES[:2, :3, None] * LOGITS[0, 0].expand(2, 3, 8)}
    batch["labels"] = batch["input_ids"].flip(1).contiguous()
    stock = copy.deepcopy(model)
    expected = stock(**batch)["loss"]
    expected.backward()
    handle = parallelize(convert_to_ode(model), LayerParallelConfig(micro_batches=2))
    loss = handle.train_step(batch)
    grads = {n: p.grad for n, p in stock.named_parameters()}
    errors = [float((p.grad - grads[n]).abs().max()) for n, p in model.named_parameters() if p.grad is not None]
    said, kept = [], batch["labels"]
    for settings in ({"micro_batches": 2}, {"ends": "spread"}):
        ours = convert_to_ode(BiasedModel().double())
        whole = parallelize(ours, LayerParallelConfig(**settings))
        for compare in (functional.mse_loss, lambda x, y: functional.l1_loss(x, y) + (x - y).mean()):
            try:
                whole.train_step(batch, lambda b, ours=ours, compare=compare: compare(ours(**b)["logits"], kept))
            except ConfigurationError as error:
                said.append(str(error))
    return [abs(float(loss) - float(expected.detach())), max(errors), said]


def test_a_bias_with_as_many_heads_as_rows_and_losses_that_look_beyond_their_part() -> None:
    for world in (1, 2):
        for loss_error, error, said in run_ranks(losses_on_ranks, world):
            assert loss_error < 1e-12
            assert error < 1e-12
            assert len(said) == (4 if world == 2 else 2)
            for i, text in enumerate(said):
                assert ("micro_batches=2", "ends='spread'")[i // 2] in text
                assert "cuts the batch" in text
