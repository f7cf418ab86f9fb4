"""The sides of the speed comparison on a whole model: a GPT-2 with embedding, head and loss around the same stack.

Every side computes the same function: the converted model with split form and h = 1/N, whose folded weights the stock
model runs.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

from hf_layerpar.ode.convert import convert_to_ode
from hf_layerpar.ode.fold import BRANCH_OUTPUTS, folded_state_dict
from hf_layerpar.plan.simulate import simulate
from hf_layerpar.sharding import parallelize
from recipes.benchmarks.prediction import Prices, model_prices
from recipes.benchmarks.sides import (
    MICRO_BATCHES,
    Entry,
    Place,
    Setting,
    Side,
    Table,
    lone_settings,
    mgrit_settings,
    only_first,
    picked_settings,
)
from recipes.benchmarks.stack import BATCH, DIM, FEED_FORWARD, HEADS, TOKENS
from recipes.benchmarks.torch_pipelines import pipelining, variants

VOCABULARY = 2048
# untied, so that the first and the last pipeline stage share no weight
ENDS = {"vocabulary": VOCABULARY, "positions": TOKENS, "tied": False}


@dataclasses.dataclass(frozen=True)
class Networks:
    """One function three times: the converted model, the stock one with folded weights, and its exact gradients.

    scale: of the stock model's gradients, see `Side`.
    """

    converted: GPT2LMHeadModel
    stock: GPT2LMHeadModel
    batch: dict[str, Tensor]
    exact: dict[str, Tensor]
    scale: dict[str, float]


def make_networks(num_layers: int, vocabulary: int = VOCABULARY) -> Networks:
    """The same on every rank."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=num_layers,
        n_embd=DIM,
        n_head=HEADS,
        n_inner=FEED_FORWARD,
        n_positions=TOKENS,
        vocab_size=vocabulary,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    h = 1 / num_layers
    converted: Any = convert_to_ode(GPT2LMHeadModel(config), step_size=h, num_steps=num_layers, form="split")
    ids = torch.randint(0, vocabulary, (BATCH, TOKENS))
    batch = {"input_ids": ids, "labels": ids}
    stock = GPT2LMHeadModel(config)
    stock.load_state_dict(folded_state_dict(converted))

    converted(**batch).loss.backward()
    exact = {name: p.grad.clone() for name, p in converted.named_parameters() if p.grad is not None}
    converted.zero_grad()
    # the stock model's projections are W' = h W, so dL/dW = h dL/dW'
    folded = tuple(f".{path}.{kind}" for path in BRANCH_OUTPUTS["GPT2Block"] for kind in ("weight", "bias"))
    return Networks(converted, stock, batch, exact, {name: h for name in exact if name.endswith(folded)})


def model_sides(num_layers: int, cost_seconds: float = 4.0) -> Table:
    """All sides with ends, the stock model first. Collective. cost_seconds: how long to measure costs, roughly."""
    place, made = Place.here(), make_networks(num_layers)
    converted, batch = made.converted, made.batch
    entries = [
        Entry(
            f"stock, {t} thread{'s' * (t > 1)}",
            {"method": "stock", "threads": t},
            partial(stock_side, place, made.stock, batch, made.scale, threads=t),
        )
        for t in (1, 2)
    ]
    prices, settings = None, lone_settings()
    if place.size > 1:
        entries.append(Entry("ddp", {"method": "ddp"}, partial(_ddp, place, made.stock, batch["labels"], made.scale)))
        for schedule, m in variants(MICRO_BATCHES):
            facts = {"method": schedule, "micro_batches": m}
            make = partial(_pipelining, place, converted, batch["labels"], schedule, m)
            entries.append(Entry(f"{schedule} M={m}", facts, make))
        prices = model_prices(copy.deepcopy(converted), batch, seconds=cost_seconds)
        settings = [*picked_settings(num_layers, place.size, prices), *mgrit_settings(with_ends=True)]
    entries += [Entry(s.name, s.facts, partial(our_side, converted, batch, s, prices)) for s in settings]
    return Table(entries, made.exact, prices)


def stock_side(
    place: Place, model: nn.Module, batch: dict[str, Tensor], scale: Mapping[str, float] | None = None, threads: int = 1
) -> Side:
    """The model itself on rank 0. scale: as in `Side`."""

    def step() -> None:
        model(**batch).loss.backward()

    answers = dict(model.named_parameters()) if place.rank == 0 else {}
    return Side(only_first(place, step), list(model.parameters()), answers, threads, scale or {})


def _ddp(place: Place, stock: nn.Module, ids: Tensor, scale: dict[str, float]) -> Side:
    own = copy.deepcopy(stock)
    model = nn.parallel.DistributedDataParallel(own)
    rows = ids[place.rows]

    def step() -> None:
        model(input_ids=rows, labels=rows).loss.backward()

    answers = dict(own.named_parameters()) if place.rank == 0 else {}
    return Side(step, list(own.parameters()), answers, scale=scale)


class _Stage(nn.Module):
    """Some layers of the model, and the embedding before the first or the head behind the last of all."""

    def __init__(self, model: GPT2LMHeadModel, layers: range) -> None:
        super().__init__()
        body = model.transformer
        self.layers = nn.ModuleList(body.h[n] for n in layers)
        self.embedding = nn.ModuleList([body.wte, body.wpe] if layers.start == 0 else [])
        self.head = nn.Sequential(*([body.ln_f, model.lm_head] if layers.stop == len(body.h) else []))

    def forward(self, x: Tensor) -> Tensor:
        if self.embedding:
            tokens, positions = self.embedding
            x = tokens(x) + positions(torch.arange(x.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def _pipelining(place: Place, converted: GPT2LMHeadModel, ids: Tensor, schedule: str, micro_batches: int) -> Side:
    model = copy.deepcopy(converted)

    def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    made = pipelining(
        schedule,
        micro_batches,
        place.rank,
        place.size,
        len(model.transformer.h),
        partial(_Stage, model),
        next_token_loss,
        ids,
        ids,
    )
    own = {id(p) for p in made.modules.parameters()}
    answers = {name: p for name, p in model.named_parameters() if id(p) in own}
    return Side(made.step, list(made.modules.parameters()), answers)


def our_side(converted: nn.Module, batch: dict[str, Tensor], setting: Setting, prices: Prices | None = None) -> Side:
    """A copy of the converted model, its layers on all ranks. prices: to predict a step by."""
    model: Any = copy.deepcopy(converted)
    handle = parallelize(model, setting.config, split=setting.split)

    def step() -> None:
        handle.train_step(batch)

    def predict() -> float:
        assert prices is not None
        assert handle.stepper.last is not None
        config, (_, plan, _) = setting.config, handle.stepper.last
        return simulate(plan, prices.of(config).cut(config.micro_batches)).makespan

    # of what several ranks hold one answers
    answers = {n: p for n, p in model.named_parameters() if handle.owner_of[n] == handle.lp_rank}
    return Side(step, list(model.parameters()), answers, predict=None if prices is None else predict)
