"""Losses of slices put together on several ranks, against torch's loss of all rows."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from hf_layerpar.errors import RankMismatchError, UnsupportedModelError
from hf_layerpar.run.communicator import GroupCommunicator
from hf_layerpar.run.loss_terms import LossTerms
from tests.multiproc import run_ranks


def losses_of_slices():
    """Errors of losses put together on this rank's rows of 7, one of them without a valid label on rank 0."""
    generator = torch.Generator().manual_seed(0)
    logits, scores = torch.randn(7, 5, generator=generator), torch.randn(7, 5, generator=generator)
    labels = torch.tensor([-100, -100, -100, 0, 3, -100, 4])
    weight = torch.rand(5, generator=generator)
    probable = torch.rand(7, 5, generator=generator)
    cases = {
        "weighted": lambda x, r: functional.cross_entropy(x, labels[r], weight),
        "smoothed": lambda x, r: functional.cross_entropy(x, labels[r], weight, label_smoothing=0.1),
        "probabilities": lambda x, r: functional.cross_entropy(x, probable[r]),
        "other index": lambda x, r: functional.cross_entropy(x, labels[r].clamp(min=0), ignore_index=0),
        "mse": lambda x, r: functional.mse_loss(x, scores[r]),
        "smooth l1": lambda x, r: functional.smooth_l1_loss(x, scores[r], beta=0.5),
        "bce": lambda x, r: nn.BCEWithLogitsLoss(weight, pos_weight=weight)(x, probable[r]),
        "combination": lambda x, r: 0.5 * functional.cross_entropy(x, labels[r]) - functional.l1_loss(x, scores[r]) / 3,
        "in place": lambda x, r: functional.cross_entropy(x, labels[r]).mul_(3).double(),
        "sum": lambda x, r: functional.cross_entropy(x, labels[r], reduction="sum") / 11,
    }
    communicator = GroupCommunicator(dist.group.WORLD)
    size, rank = communicator.size, communicator.rank
    own = slice(7 * rank // size, 7 * (rank + 1) // size)
    errors = {}
    for name, loss_of in cases.items():
        whole = logits.clone().requires_grad_()
        expected = loss_of(whole, slice(None))
        expected.backward()
        mine = logits.clone().requires_grad_()
        with LossTerms() as terms:
            loss = loss_of(mine[own], own)
        loss = terms.whole(loss, communicator, sums_are_divided=True)
        loss.backward()
        gradient_error = (mine.grad[own] - whole.grad[own]).norm() / whole.grad.norm()
        errors[name] = (
            loss.dtype == expected.dtype,
            abs(float(loss.detach()) - float(expected.detach())),
            float(gradient_error),
        )
    refused = {
        "nothing": lambda x: x.sum(),
        "norm of a state": lambda x: functional.cross_entropy(x, labels[own]) + 0.01 * x.square().mean(),
        "constant": lambda x: functional.cross_entropy(x, labels[own]) + 1,
        "square": lambda x: functional.mse_loss(x, scores[own]) ** 2,
        "root": lambda x: functional.mse_loss(x, scores[own]).sqrt(),
        "learned factor": lambda x: functional.mse_loss(x, scores[own]) * x[0, 0],
        "quotient": lambda x: 1 / functional.mse_loss(x, scores[own]),
        "weighted mse": lambda x: functional.mse_loss(x, scores[own], weight=scores[own].abs()),
        "own mean": lambda x: functional.cross_entropy(x, labels[own], reduction="none").mean(),
        "unknown divisor": lambda x: functional.cross_entropy(x, labels[own], reduction="sum") / len(x),
    }
    messages = {}
    for name, loss_of in refused.items():
        with LossTerms() as terms:
            loss = loss_of(logits.clone().requires_grad_()[own])
        try:
            terms.whole(loss, communicator, sums_are_divided=False)
        except UnsupportedModelError as error:
            messages[name] = str(error)
    try:  # a factor that depends on the slice
        with LossTerms() as terms:
            loss = functional.mse_loss(logits.clone().requires_grad_()[own], scores[own]) * (1 + rank)
        terms.whole(loss, communicator, sums_are_divided=False)
    except RankMismatchError as error:
        messages["factor"] = str(error)
    return errors, messages, [*refused, "factor"]


@pytest.mark.parametrize("world", [2, 3])
def test_losses_of_slices(world):
    for errors, messages, refused in run_ranks(losses_of_slices, world):
        for name, (same_dtype, loss_error, gradient_error) in errors.items():
            assert same_dtype, name
            assert loss_error < 2e-6, name
            assert gradient_error < 1e-6, name
        assert list(messages) == refused
        assert all("sliced_ends=False" in message for name, message in messages.items() if name != "factor")
