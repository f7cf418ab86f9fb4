"""Steps whose layers are replayed, against the same steps that run them; graphs are stood in for on the CPU."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from hf_layerpar import LayerParallelConfig, convert_to_ode, parallelize
from hf_layerpar.errors import ConfigurationError
from hf_layerpar.run import captured
from tests import zoo
from tests.run.ops import OpRecorder

MGRIT = {"strategy": "mgrit", "coarsening": 2}
SETTINGS = [
    {},
    {"micro_batches": 2},
    {"increment_penalty": 0.5},
    MGRIT | {"coarse_operator": "aggregate"},
    MGRIT
    | {"coarse_operator": "aggregate", "forward_iterations": 0, "backward_iterations": 2, "acceleration": "krylov"},
    MGRIT | {"coarse_operator": "identity", "stacked": True},
    MGRIT | {"coarse_operator": "rediscretize", "micro_batches": 2, "increment_penalty": 0.1},
]


class Counted(OpRecorder):
    """Counts graphs, and their replays."""

    def __init__(self) -> None:
        self.made = self.replays = 0

    def record(self, work):
        graph, replay = super().record(work), None
        self.made += 1

        def counted() -> None:
            self.replays += 1
            replay()

        replay, graph.replay = graph.replay, counted
        return graph


@pytest.fixture
def recorder(monkeypatch) -> Counted:
    found = Counted()
    monkeypatch.setattr(captured, "recorder_of", lambda device: found)
    return found


def pair(family: str, settings: dict, **more):
    """The same model twice: with graphs and without."""
    model, batch = zoo.build(family, **more)
    models = [convert_to_ode(copy.deepcopy(model).eval()) for _ in range(2)]
    handles = [
        parallelize(m, LayerParallelConfig(**settings, cuda_graphs=on))
        for m, on in zip(models, (True, False), strict=True)
    ]
    return models, handles, batch


def assert_same_steps(models, handles, batches, between=lambda model, optimizer: optimizer.zero_grad()) -> None:
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in models]
    for batch in batches:
        losses = [float(h.train_step(batch)) for h in handles]
        assert losses[0] == losses[1]
        for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            assert p.grad is None or torch.equal(p.grad, q.grad), name
        reports = [h.report() for h in handles]
        assert reports[0].sweeps == reports[1].sweeps
        assert reports[0].penalty == reports[1].penalty
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.step()
            between(model, optimizer)


def others(batch: dict, count: int) -> list[dict]:
    """Batches like this one, with other tokens."""
    found = []
    for i in range(count):
        ids = batch["input_ids"].roll(i, 0) if "input_ids" in batch else None
        found.append(batch if ids is None else batch | {"input_ids": ids})
    return found


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_replays_equal_runs(family, settings, recorder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        models, handles, batch = pair(family, settings)
        assert_same_steps(models, handles, others(batch, 5))
    micro_batches = settings.get("micro_batches", 1)  # the backward of one and the forward of the next may be one
    assert recorder.made in (1 + micro_batches, 2 * micro_batches)
    assert recorder.replays == recorder.made * (1 + 5 - 2)


def keep(model, optimizer):
    """Gradients of several steps are added up."""


def zero(model, optimizer):
    optimizer.zero_grad(set_to_none=False)


def clip(model, optimizer):
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)  # in place
    for p in list(model.parameters())[::2]:
        p.grad = None


@pytest.mark.parametrize("between", [keep, zero, clip], ids=lambda f: f.__name__)
def test_gradients_that_are_there_are_added_to(between, recorder):
    models, handles, batch = pair("gpt2", {})
    assert_same_steps(models, handles, others(batch, 6), between)
    assert recorder.replays > 6


def test_gradients_that_somebody_holds_are_not_written_over(recorder):
    models, handles, batch = pair("gpt2", {})
    held = []
    for given in others(batch, 5):
        for model, handle in zip(models, handles, strict=True):
            model.zero_grad()
            handle.train_step(given)
            held.append([p.grad for p in model.parameters() if p.grad is not None])
    for mine, its in zip(held[::2], held[1::2], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, its, strict=True))
    assert recorder.replays > 4


def test_each_kind_of_batch_has_its_graphs(recorder):
    """Sizes, and whether there is a mask (transformers leaves out one that hides nothing)."""
    models, handles, batch = pair("llama", {})
    ids = batch["input_ids"]
    whole = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    hidden = whole | {"attention_mask": torch.ones_like(ids).tril(diagonal=3)}
    short = {name: t[:, :-2] for name, t in whole.items()}
    last = {name: t[:1] for name, t in whole.items()}
    assert_same_steps(models, handles, [whole, hidden, short, last] * 4)
    assert recorder.made == 2 * 4


def test_moved_parameters_are_captured_again(recorder):
    models, handles, batch = pair("gpt2", {})
    assert_same_steps(models, handles, [batch] * 3)
    assert recorder.made == 2
    for model in models:
        model.double()
    assert_same_steps(models, handles, [batch] * 3)
    assert recorder.made == 4


def test_many_kinds_forget_the_oldest(recorder, monkeypatch):
    monkeypatch.setattr(captured, "_MOST_CAPTURED", 1)
    models, handles, batch = pair("gpt2", {})
    short = {name: t[:, :-2] for name, t in batch.items()}
    assert_same_steps(models, handles, [batch, short] * 3)
    assert recorder.made == 2 * 4


def test_a_kind_that_never_comes_again_is_told(recorder, monkeypatch):
    monkeypatch.setattr(captured, "_MOST_KINDS", 2)
    models, handles, batch = pair("gpt2", {})
    with pytest.warns(UserWarning, match="launched one by one: 2 steps of other kinds"):
        assert_same_steps(models, handles, [{name: t[:, : 4 + i] for name, t in batch.items()} for i in range(4)])
    assert recorder.made == 0


@pytest.mark.parametrize(
    ("family", "change", "reason"),
    [
        ("gpt2", "dropout", "draw random numbers"),
        ("t5", None, "require grad"),
        ("gpt2", "gradient hook", "waits for gradients"),
        ("gpt2", "hook", "forward hooks"),
    ],
)
def test_what_cannot_be_captured_runs_as_usual(family, change, reason, recorder):
    more = {"resid_pdrop": 0.1} if change == "dropout" else {}
    models, handles, batch = pair(family, {}, **more)
    for model in models:
        if change == "dropout":
            model.train()
        elif change == "gradient hook":
            model.transformer.h[1].mlp.c_fc.weight.register_hook(lambda g: g)
        elif change == "hook":
            model.transformer.h[1].mlp.register_forward_hook(lambda *_: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(4):
            losses = []
            for model, handle in zip(models, handles, strict=True):
                torch.manual_seed(i)
                model.zero_grad()
                losses.append(float(handle.train_step(batch)))
            assert losses[0] == losses[1]
    (said,) = [str(w.message) for w in caught if "launched one by one" in str(w.message)]
    assert reason in said


def test_a_capture_that_fails_costs_nothing(recorder, monkeypatch):
    def fail(work):
        try:
            work()
            raise RuntimeError("operation not permitted when stream is capturing")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(recorder, "record", fail)
    models, handles, batch = pair("gpt2", {})
    with pytest.warns(UserWarning, match="launched one by one: operation not permitted"):
        assert_same_steps(models, handles, others(batch, 4))


def test_the_cpu_has_no_graphs():
    model, batch = zoo.build("gpt2")
    handle = parallelize(convert_to_ode(model), LayerParallelConfig(cuda_graphs=True))
    with pytest.raises(ConfigurationError, match="cuda_graphs=True with a model on 'cpu'"):
        handle.train_step(batch)
