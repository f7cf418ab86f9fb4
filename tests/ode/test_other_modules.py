"""Modules that are no transformers models: one of two streams, as diffusers has them, and what they can't do."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_layerpar import LayerParallelConfig, parallelize
from hf_layerpar.errors import UnsupportedModelError
from hf_layerpar.ode.convert import convert_to_ode, ode_view
from hf_layerpar.ode.families import FAMILIES, Joint
from tests.multiproc import run_ranks
from tests.ode.helpers import EXACT_MGRIT, refused
from tests.ode.test_tuples import Shrinking


class TwoStreams(nn.Module):
    """As SD3's: text and picture look at each other, and the last layer drops the text."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.picture, self.text, self.last = nn.Linear(8, 8), nn.Linear(8, 8), last

    def forward(self, x: Tensor, text: Tensor, time: Tensor) -> tuple[Tensor | None, Tensor]:
        seen = self.text(text) * time
        return None if self.last else text + seen.tanh(), x + self.picture(x).tanh() + seen.mean(1, keepdim=True)


class Denoiser(nn.Module):
    """As a diffusers model: a config that isn't transformers', a `save_pretrained`, checkpointing in its loop."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config, self.gradient_checkpointing = {"num_layers": 4}, False
        self.into, self.out = nn.Linear(3, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))
        self.blocks = nn.ModuleList([TwoStreams(i == 3) for i in range(4)])

    def forward(self, x: Tensor, text: Tensor, time: Tensor) -> Tensor:
        x = self.into(x)
        for block in self.blocks:
            given = {"x": x, "text": text, "time": time}
            if self.gradient_checkpointing and torch.is_grad_enabled():
                text, x = checkpoint(block, *given.values(), use_reentrant=False)
            else:
                text, x = block(**given)
        return self.out(x)

    def save_pretrained(self, folder: Any, **options: Any) -> None:
        torch.save(self.state_dict(), f"{folder}/weights.pt")


def denoising(**settings: Any) -> tuple[Any, Any, dict[str, Tensor], Any]:
    """(stock, ours, batch, handle), of float64."""
    stock, ours = Denoiser().double(), Denoiser().double()
    generator = torch.Generator().manual_seed(1)
    batch = {key: torch.randn(2, n, k, generator=generator).double() for key, n, k in SHAPES}
    FAMILIES["TwoStreams"] = Joint(("x", "text"), (1, 0))
    try:
        convert_to_ode(ours)
    finally:
        del FAMILIES["TwoStreams"]
    return stock, ours, batch, parallelize(ours, LayerParallelConfig(**settings))


SHAPES = (("x", 5, 3), ("text", 4, 8), ("time", 1, 1))


def loss_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    output = model(**batch)
    return nn.functional.mse_loss(output, torch.ones_like(output))


def denoise(folder: str, checkpoints: bool, **settings: Any) -> float:
    """Trains a step and saves; returns the error of loss and gradients."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its inputs are its own
        stock, ours, batch, handle = denoising(**settings)
    expected = loss_of(stock, batch)
    expected.backward()
    ours.train().gradient_checkpointing = checkpoints
    loss = handle.train_step(batch, lambda batch: loss_of(ours, batch))
    assert all(layer.gradient_checkpointing == checkpoints for layer in ours.blocks)
    theirs = {name: p.grad for name, p in stock.named_parameters()}
    mine = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert mine
    ours.save_pretrained(folder)
    with refused(UnsupportedModelError, "push_to_hub of a Denoiser", "save_pretrained"):
        ours.push_to_hub("a/b")
    return max(
        abs(float((loss - expected).detach())), *(float((g - theirs[name]).abs().max()) for name, g in mine.items())
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_model_of_two_streams_that_is_no_transformers_model(ranks: int, tmp_path: Any) -> None:
    for checkpoints, settings in ((False, {"micro_batches": 2}), (True, EXACT_MGRIT)):
        run = partial(denoise, str(tmp_path), checkpoints, **settings)
        assert max(run_ranks(run, ranks) if ranks > 1 else [run()]) < 1e-12
        saved = torch.load(tmp_path / "weights.pt")
        expected = Denoiser().double().state_dict()
        assert saved.keys() == expected.keys()
        assert all(torch.equal(saved[name], expected[name]) for name in expected)


def test_what_other_modules_can_not_do() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*(Shrinking() for _ in range(4)))

    (stack,) = ode_view(convert_to_ode(Plain())).stacks
    assert (stack.path, len(stack.layers)) == ("layers", 4)
    with refused(UnsupportedModelError, "Plain is no transformers model", "'layers': 4"):
        convert_to_ode(Plain(), step_size=0.5)
    with refused(UnsupportedModelError, "step_size=0.5 of a Plain", "no place for a step size"):
        convert_to_ode(Plain(), step_size=0.5, num_steps=4)
