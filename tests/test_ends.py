"""Sliced ends on lp ranks against the same model with replicated ends: loss and every gradient."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional

from hf_layerpar import LayerParallelConfig, convert_to_ode, gradient_agreement, parallelize
from hf_layerpar.errors import ConfigurationError, RankMismatchError, UnsupportedModelError
from tests import zoo
from tests.multiproc import run_ranks

INEXACT = {"strategy": "mgrit", "coarsening": 2, "coarse_operator": "identity"}
SLICED = LayerParallelConfig(sliced_ends=True)


def rows(name, batch):
    """A batch of a family in float64. Odd rows are padded where the family has a mask; row 0 has few labels."""
    inputs = {}
    for key, value in zoo.build(name)[1].items():
        value = value.repeat(batch, *(1 for _ in value.shape[1:]))[:batch].clone()
        if value.is_floating_point():
            value = torch.randn(value.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        elif key != "attention_mask" and value.ndim == 2:
            ids = torch.randint(5, zoo.VOCAB, value.shape, generator=torch.Generator().manual_seed(2))
            value = ids.masked_fill(value == -100, -100)
        inputs[key] = value
    if inputs["labels"].ndim == 2:
        inputs["labels"][0, 2:] = -100
    return inputs


def made(model, config=SLICED):
    model = convert_to_ode(model.double()).eval()
    return model, parallelize(model, config)


def gradients(model, inputs, steps=1):
    """(loss, gradients by name) after `steps` backwards."""
    model.zero_grad()
    for _ in range(steps):
        loss = model(**inputs).loss
        loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def difference(grads, expected):
    """The largest error of one gradient, relative to the norm of all; the same parameters must have none."""
    assert set(grads) == set(expected)
    norm = math.sqrt(sum(float(g.pow(2).sum()) for g in expected.values()))
    return max(float((grads[n] - g).norm()) / norm for n, g in expected.items())


def compare(model, inputs, settings=None, steps=1):
    """(loss, loss error, gradient error, rows of the logits) of sliced ends against replicated ones."""
    settings = settings or {}
    model, handle = made(model, LayerParallelConfig(**settings))
    expected_loss, expected = gradients(model, inputs, steps)
    handle.config = LayerParallelConfig(sliced_ends=True, **settings)
    loss, found = gradients(model, inputs, steps)
    logits = model(**inputs)[1]
    return loss, abs(loss - expected_loss), difference(found, expected), len(logits)


def check(results, batch, *, sliced=True):
    assert len({loss for loss, *_ in results}) == 1
    for _, loss_error, gradient_error, _ in results:
        assert loss_error < 2e-6  # heads compute theirs in float32
        assert gradient_error < 2e-9  # so do Gemma's norms
    found = [n for *_, n in results]
    assert sum(found) == batch if sliced else found == [batch] * len(results)


def compare_family(name, settings, batches, changes):
    found = []
    for batch in batches:
        torch.manual_seed(0)
        found.append(compare(zoo.build(name, **changes)[0], rows(name, batch), settings))
    return found


@pytest.mark.parametrize(
    ("name", "settings", "changes"),
    [
        ("bert", {}, {}),
        ("bert", {"micro_batches": 2}, {"tie_word_embeddings": False}),
        ("gpt2", {}, {}),
        ("gpt2", {"strategy": "serial"}, {"tie_word_embeddings": False}),
        ("llama", INEXACT | {"micro_batches": 2}, {}),
        ("gemma3", {}, {}),
        ("vit", INEXACT, {}),
        ("bart", {"micro_batches": 2}, {}),
        ("marian", {}, {}),
        ("t5", INEXACT, {}),
        ("whisper", {}, {}),
        ("modernbert", {}, {}),
    ],
)
def test_families_on_two_and_three_ranks(name, settings, changes):
    for world, batches in ((2, (4, 3, 2)), (3, (4,))):
        for batch, results in zip(
            batches, zip(*run_ranks(compare_family, world, name, settings, batches, changes), strict=True), strict=True
        ):
            check(results, batch)


def test_tables_with_as_many_rows_as_a_slice_give_replicated_ends():
    four, three, two = zip(*run_ranks(compare_family, 2, "deberta_v2", {}, (4, 3, 2), {}), strict=True)
    check(four, 4)
    check(three, 3)
    check(two, 2, sliced=False)


def losses_of_heads():
    """Each kind of loss that a head can have, by name; slices of two and three rows."""
    text = rows("bert", 5)
    words = {k: v for k, v in text.items() if k != "labels"}
    generator = torch.Generator().manual_seed(3)
    sequence = hf.BertForSequenceClassification
    few = text["labels"].clamp(max=2)
    cases = {
        "single label": (sequence, {"num_labels": 3}, {"labels": torch.tensor([0, 2, 1, 1, 0])}),
        "regression": (sequence, {"num_labels": 1}, {"labels": torch.randn(5, generator=generator).double()}),
        "regression of many": (
            sequence,
            {"num_labels": 3, "problem_type": "regression"},
            {"labels": torch.randn(5, 3, generator=generator).double()},
        ),
        "multi-label": (sequence, {"num_labels": 3}, {"labels": torch.randint(0, 2, (5, 3)).double()}),
        "tokens": (hf.BertForTokenClassification, {"num_labels": 3}, {"labels": few}),
        "answers": (
            hf.BertForQuestionAnswering,
            {},
            # the second answer ends outside of the text and is ignored
            {"start_positions": torch.tensor([1, 2, 3, 4, 5]), "end_positions": torch.tensor([3, 40, 5, 6, 7])},
        ),
        "two losses": (
            hf.BertForPreTraining,
            {},
            {"labels": text["labels"], "next_sentence_label": torch.tensor([0, 1, -100, 0, 1])},
        ),
    }
    found = {}
    for name, (head, values, labels) in cases.items():
        torch.manual_seed(0)
        config = zoo.config("bert", **values)
        found[name] = compare(head(config), words | labels)
    counted = rows("llama", 5) | {"num_items_in_batch": torch.tensor(37)}
    found["given count"] = compare(zoo.build("llama")[0], counted)
    found["given count, other head"] = compare(zoo.build("bert")[0], text | {"num_items_in_batch": 37})
    positions = torch.arange(12).repeat(5, 1) + torch.arange(5)[:, None]
    found["positions by row"] = compare(zoo.build("llama")[0], rows("llama", 5) | {"position_ids": positions})
    found["tuple"] = compare_tuples(text)
    return found


def compare_tuples(inputs):
    model, handle = made(zoo.build("bert")[0], LayerParallelConfig())
    expected = model(**inputs, return_dict=False)
    handle.config = SLICED
    loss, logits = model(**inputs, return_dict=False)
    loss_error = abs(float((loss - expected[0]).detach()))
    start = 5 * dist.get_rank() // dist.get_world_size()
    error = float((logits - expected[1][start : start + len(logits)]).detach().norm() / expected[1].detach().norm())
    return float(loss.detach()), loss_error, error, len(logits)


def test_losses_of_heads():
    results = run_ranks(losses_of_heads, 2)
    for name in results[0]:
        check([found[name] for found in results], 5)


def without_valid_labels():
    model, _ = made(zoo.build("llama")[0])
    inputs = rows("llama", 4)
    inputs["labels"][:] = -100
    return math.isnan(float(model(**inputs).loss.detach()))


def test_no_valid_label_anywhere_is_no_number_as_in_torch():
    assert all(run_ranks(without_valid_labels, 2))


def in_a_loop():
    """What a training loop does beside the plain step."""
    found = {}
    inputs = rows("bert", 5)
    found["accumulated"] = compare(zoo.build("bert")[0], inputs, steps=3)
    adapters = LoraConfig(r=2, target_modules=["query", "word_embeddings", "decoder"], init_lora_weights=False)
    torch.manual_seed(0)
    found["adapters"] = compare(get_peft_model(zoo.build("bert", tie_word_embeddings=False)[0], adapters), inputs)

    model, handle = made(zoo.build("bert")[0], LayerParallelConfig(sliced_ends=True, **INEXACT))
    sliced = gradient_agreement(model, inputs)
    handle.config = LayerParallelConfig(**INEXACT)
    replicated = gradient_agreement(model, inputs)
    found["agreement"] = max(abs(sliced[name] - replicated[name]) for name in sliced)
    found["cosine"] = sliced["cosine"]

    # a sliced and a replicated forward in one backward
    handle.config = SLICED
    alone, small = gradients(model, inputs)[1], {k: v[:1] for k, v in inputs.items()}
    expected = {n: g + alone[n] for n, g in gradients(model, small)[1].items()}
    model.zero_grad()
    (model(**inputs).loss + model(**small).loss).backward()
    found["mixed"] = difference({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, expected)

    # a copy is sliced by itself
    twin = copy.deepcopy(model)
    found["copy"] = difference(gradients(twin, inputs)[1], alone)

    model.bert.embeddings.requires_grad_(False)
    frozen = gradients(model, inputs)[1]
    found["frozen"] = difference(frozen, {n: g for n, g in alone.items() if not n.startswith("bert.embeddings")})
    model.requires_grad_(False)
    states = model.bert.embeddings.word_embeddings(inputs.pop("input_ids"))
    leaves = [states.clone().requires_grad_() for _ in range(2)]
    for leaf, config in zip(leaves, (LayerParallelConfig(), SLICED), strict=True):
        handle.config = config
        model(inputs_embeds=leaf, **inputs).loss.backward()
    found["input"] = float((leaves[0].grad - leaves[1].grad).norm() / leaves[0].grad.norm())
    return found


def test_in_a_loop():
    results = run_ranks(in_a_loop, 2)
    for name in ("accumulated", "adapters"):
        check([found[name] for found in results], 5)
    for found in results:
        assert 0 < found["cosine"] < 1 - 1e-6
        assert found["agreement"] < 1e-6
        for name in ("mixed", "copy", "frozen", "input"):
            assert found[name] < 1e-9, name


def in_bfloat16():
    model, handle = made(zoo.build("llama")[0], LayerParallelConfig())
    model.float()
    inputs = rows("llama", 4)
    expected = gradients(model, inputs)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = gradients(model, inputs)[1]
        handle.config = SLICED
        found = gradients(model, inputs)[1]
    model.bfloat16()  # states and masks travel in it
    own = gradients(model, inputs)[1]
    return [difference({n: g.float() for n, g in grads.items()}, expected) for grads in (narrow, found, own)]


def test_bfloat16():
    for narrow, found, own in run_ranks(in_bfloat16, 2):
        assert 1e-4 < narrow < 0.05
        assert found < 1.5 * narrow
        assert own < 0.1


def with_dropout():
    """Losses of three training steps, the main stream after them, and the error against a step with the same masks."""
    torch.manual_seed(7)
    model, _ = made(zoo.build("bert", attention="eager")[0])
    model.train()
    inputs = rows("bert", 5)
    losses = [float(model(**inputs).loss.detach()) for _ in range(3)]
    after = int(torch.randint(2**31, ()))
    torch.manual_seed(8)
    before = torch.get_rng_state()
    first = gradients(model, inputs)
    torch.set_rng_state(before)
    again = gradients(model, inputs)
    masks = []
    model.bert.embeddings.dropout.register_forward_hook(lambda module, args, y: masks.append(y.detach() == 0))
    model(**{k: v[:1].repeat(4, 1) for k, v in inputs.items()})
    return losses, after, first[0] == again[0] and difference(first[1], again[1]) == 0, masks[0][0].numpy()


def test_dropout_draws_on_every_rank_and_keeps_the_streams_in_step():
    one, two = run_ranks(with_dropout, 2)
    assert one[:2] == two[:2]
    assert len(set(one[0])) == 3
    assert one[2]
    assert two[2]
    assert (one[3] != two[3]).any(), "the slices have the same masks"


def without_slices():
    """Forwards that compute replicated ends: (rows of the logits by case, evaluation loss as replicated)."""
    model, handle = made(zoo.build("bert")[0])
    inputs = rows("bert", 3)
    found = {
        "too few rows": len(model(**{k: v[: dist.get_world_size() - 1] for k, v in inputs.items()}).logits),
        "no labels": len(model(**zoo.without_labels(inputs)).logits),
        "exact": 0,
    }
    with handle.exact():
        found["exact"] = len(model(**inputs).logits)
    with torch.no_grad():
        found["no gradient"] = len(model(**inputs).logits)
    handle.config = LayerParallelConfig()
    found["switched off"] = len(model(**inputs).logits)
    return found


def test_which_forwards_are_sliced():
    for found in run_ranks(without_slices, 3):
        assert found == {"too few rows": 2, "no labels": 3, "exact": 1, "no gradient": 3, "switched off": 3}


def refused():
    """Messages of what can't be sliced, and the rows after them."""
    model, _ = made(zoo.build("bert")[0])
    inputs = rows("bert", 4)
    rank = dist.get_rank()
    messages = {}

    def attempt(name, run):
        try:
            run()
        except (ConfigurationError, UnsupportedModelError, RankMismatchError) as error:
            messages[name] = f"{type(error).__name__}: {error}"

    attempt("odd input", lambda: model(**inputs | {"token_type_ids": torch.zeros(3, 12, dtype=torch.int64)}))
    attempt("list", lambda: model(**inputs | {"labels": inputs["labels"].tolist()}))
    other = inputs if rank else zoo.without_labels(inputs)
    attempt("labels on one rank", lambda: model(**other))
    attempt("other rows", lambda: model(**{k: v[: 3 + rank] for k, v in inputs.items()}))
    model.cls.add_module("norm", nn.BatchNorm1d(4).train())
    attempt("batch norm", lambda: model(**inputs))
    del model.cls.norm
    stock = functional.cross_entropy
    functional.cross_entropy = lambda x, y, **_: -x.log_softmax(-1).gather(1, y.clamp(min=0)[:, None]).mean()
    attempt("loss of its own", lambda: model(**inputs))
    functional.cross_entropy = stock
    torch.manual_seed(0)
    return messages, len(model(**inputs).logits)


def test_refusals_on_all_ranks():
    for messages, after in run_ranks(refused, 2):
        assert "ConfigurationError: sliced_ends=True can't cut token_type_ids of shape (3, 12)" in messages["odd input"]
        assert "ConfigurationError: sliced_ends=True can't cut labels, a list" in messages["list"]
        assert messages["labels on one rank"].startswith("RankMismatchError")
        assert messages["other rows"].startswith("RankMismatchError")
        assert "BatchNorm1d" in messages["batch norm"]
        assert messages["loss of its own"].startswith("UnsupportedModelError: the loss of the whole batch")
        assert after == 2
