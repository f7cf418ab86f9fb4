"""The sides of the speed comparison on a whole model: a GPT-2 with embedding, head and loss around the same stack.

Every side computes the same function: the converted model with split form and h = 1/N, whose folded weights the stock
model runs.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

from hf_layerpar.config import LayerParallelConfig
from hf_layerpar.ode.convert import convert_to_ode
from hf_layerpar.ode.fold import BRANCH_OUTPUTS, folded_state_dict
from hf_layerpar.sharding import parallelize
from recipes.benchmarks.sides import Entry, Place, Side, only_first, our_configs, pipelining_step
from recipes.benchmarks.stack import BATCH, DIM, FEED_FORWARD, HEADS, TOKENS

VOCABULARY = 2048
# untied, so that the first and the last pipeline stage share no weight
ENDS = {"vocabulary": VOCABULARY, "positions": TOKENS, "tied": False}


def model_sides(num_layers: int) -> tuple[list[Entry], dict[str, Tensor]]:
    """All sides with ends, the stock model first, and the exact gradients by parameter name."""
    place = Place.here()
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=num_layers,
        n_embd=DIM,
        n_head=HEADS,
        n_inner=FEED_FORWARD,
        n_positions=TOKENS,
        vocab_size=VOCABULARY,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    h = 1 / num_layers
    converted = convert_to_ode(GPT2LMHeadModel(config), step_size=h, num_steps=num_layers, form="split")
    ids = torch.randint(0, VOCABULARY, (BATCH, TOKENS))
    batch = {"input_ids": ids, "labels": ids}
    stock = GPT2LMHeadModel(config)
    stock.load_state_dict(folded_state_dict(converted))

    converted(**batch).loss.backward()
    exact = {name: p.grad.clone() for name, p in converted.named_parameters() if p.grad is not None}
    converted.zero_grad()
    # the stock model's projections are W' = h W, so dL/dW = h dL/dW'
    folded = tuple(f".{path}.{kind}" for path in BRANCH_OUTPUTS["GPT2Block"] for kind in ("weight", "bias"))
    scale = {name: h for name in exact if name.endswith(folded)}

    entries = [
        Entry(
            f"stock, {t} thread{'s' * (t > 1)}",
            {"method": "stock", "threads": t},
            partial(stock_side, place, stock, batch, scale, threads=t),
        )
        for t in (1, 2)
    ]
    if place.size > 1:
        entries.append(Entry("ddp", {"method": "ddp"}, partial(_ddp, place, stock, ids, scale)))
        for schedule, m in (("gpipe", 1), ("gpipe", 4), ("1f1b", 4)):
            settings = {"method": schedule, "micro_batches": m}
            entries.append(
                Entry(f"{schedule} M={m}", settings, partial(_pipelining, place, converted, ids, schedule, m))
            )
    for name, settings in our_configs(place.size, with_ends=True):
        make = partial(our_side, place, converted, batch, settings)
        entries.append(Entry(name, settings.to_dict() | {"method": "ours", "ownership": "contiguous"}, make))
    return entries, exact


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
    """A rank's share of the model: its layers, and the embedding before the first or the head behind the last."""

    def __init__(self, model: GPT2LMHeadModel, place: Place) -> None:
        super().__init__()
        body = model.transformer
        layers = place.layers(len(body.h))
        self.layers = nn.ModuleList(body.h[n] for n in layers)
        self.embedding = nn.ModuleList([body.wte, body.wpe] if place.rank == 0 else [])
        self.head = nn.Sequential(*([body.ln_f, model.lm_head] if place.rank == place.size - 1 else []))

    def forward(self, x: Tensor) -> Tensor:
        if self.embedding:
            tokens, positions = self.embedding
            x = tokens(x) + positions(torch.arange(x.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def _pipelining(place: Place, converted: GPT2LMHeadModel, ids: Tensor, schedule: str, micro_batches: int) -> Side:
    model = copy.deepcopy(converted)
    stage = _Stage(model, place)

    def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    step = pipelining_step(place, stage, schedule, micro_batches, next_token_loss, ids, ids)
    own = {id(p) for p in stage.parameters()}
    answers = {name: p for name, p in model.named_parameters() if id(p) in own}
    return Side(step, list(stage.parameters()), answers)


def our_side(place: Place, converted: nn.Module, batch: dict[str, Tensor], config: LayerParallelConfig) -> Side:
    """A copy of the converted model, its layers on all ranks."""
    model: Any = copy.deepcopy(converted)
    handle = parallelize(model, config)

    def step() -> None:
        model(**batch).loss.backward()

    # the ends are replicated: rank 0 answers for them
    answers = {n: p for n, p in model.named_parameters() if n in handle.owner_of or place.rank == 0}
    return Side(step, list(model.parameters()), answers)
