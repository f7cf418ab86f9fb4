"""What a solver hands to the model's loop before any layer is evaluated: tuples as the layers return them, and values
that the loop must not use yet."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from hf_layerpar import LayerParallelConfig, parallelize
from hf_layerpar.errors import UnsupportedModelError
from hf_layerpar.ode.convert import convert_to_ode
from tests import zoo
from tests.multiproc import run_ranks
from tests.ode.helpers import EXACT_MGRIT, SerialSolver, assert_same, refused, training_step, use_solver, without_cache
from tests.ode.test_loops import ToyModel


# ---- families
@pytest.mark.parametrize("name", zoo.TUPLES)
def test_a_solver_gives_what_stock_gives(name: str) -> None:
    stock, inputs = zoo.build(name)
    ours = convert_to_ode(copy.deepcopy(stock))
    for train in (False, True):
        assert_same(training_step(ours, inputs, train), training_step(stock, inputs, train))
    solver = use_solver(ours, SerialSolver())
    for train in (False, True):
        assert_same(training_step(ours, inputs, train), training_step(stock, inputs, train, **without_cache(stock)))
    assert solver.runs == [4] * 2
    assert_same(training_step(copy.deepcopy(ours), inputs, False), training_step(ours, inputs, False))


def doubled(name: str) -> tuple[Any, dict[str, Tensor]]:
    model, batch = zoo.build(name)
    batch = {k: torch.cat([v, v.flip(0)]) for k, v in batch.items()}
    if name == "longformer":  # stock's gradients of padded rows are no numbers in float64
        batch["attention_mask"].fill_(1)
    return model.eval().double(), batch


def errors_against_stock(name: str) -> list[tuple[float, float, int]]:
    """Per setting the errors of loss and gradients of this rank, and the number of its gradients."""
    stock, batch = doubled(name)
    expected = stock(**batch, **without_cache(stock)).loss
    expected.backward()
    grads = {n: p.grad for n, p in stock.named_parameters() if p.grad is not None}
    norm = sum(float(g.square().sum()) for g in grads.values()) ** 0.5
    found = []
    for settings in ({"micro_batches": 2}, EXACT_MGRIT):
        model = convert_to_ode(doubled(name)[0])
        handle = parallelize(model, LayerParallelConfig(**settings))
        loss = handle.train_step(batch)
        mine = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        error = max(float((g - grads[n]).norm()) for n, g in mine.items()) / norm
        found.append((abs(float(loss) - float(expected.detach())), error, len(mine)))
    return found


@pytest.mark.parametrize("name", zoo.TUPLES)
def test_on_two_ranks_gradients_are_those_of_stock(name: str) -> None:
    for rank in run_ranks(errors_against_stock, 2, name):
        for loss_error, gradient_error, count in rank:
            assert loss_error < 2e-6  # some heads compute it in float32
            assert gradient_error < 1e-8  # and Bamba its norms
            assert count > 0


# ---- loops
class Pair(nn.Module):
    """Returns its state and a tensor of its own, the argument that it was given, and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, given: Any = None) -> tuple:
        return self.linear(x), self.linear(x) * 2, given, "constant"


class Shrinking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)[:, ::2]


class Narrowing(nn.Module):
    """A stage whose number of features depends on its place."""

    widths = iter((8, 8, 4))

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, next(self.widths))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Apart(Shrinking):
    def forward(self, x: Tensor) -> Any:
        return {self.linear(x)}


class Named(Shrinking):
    def forward(self, x: Tensor) -> Any:
        return {"state": self.linear(x), "more": x * 2}


class Loop(ToyModel):
    """A `ToyModel` whose `call` gets what the layer before returned."""

    def forward(self, x: Tensor) -> Any:
        output: Any = (x, None, None)
        for layer in self.layers:
            output = self.call(layer, output)
        return output


def toy(layer_class: Any, call: Any, model_class: Any = Loop) -> tuple[Any, SerialSolver]:
    model = model_class(layer_class, 3, call)
    model.config.num_hidden_layers = 3
    ours = convert_to_ode(model)
    return ours, use_solver(ours, SerialSolver())


def test_what_stands_behind_the_state() -> None:
    x, seen = torch.randn(2, 5, 8), []
    thing = object()

    def call(layer: Any, output: Any) -> Any:
        found = layer(output[0], thing)
        seen.append(found[2:])
        return found

    ours, solver = toy(Pair, call)
    state = x
    for layer in ours.layers:
        state = layer.linear(state)
    output = ours(x)
    assert solver.runs == [3]
    assert torch.equal(output[0], state)
    assert seen == [(thing, "constant")] * 3


def test_facts_of_a_state_may_be_asked_for_between_layers() -> None:
    def call(layer: Any, output: Any) -> Any:
        x = output[0]
        assert (x.shape, x.size(1), x.ndim, x.dtype, x.device.type) == ((2, 5, 8), 5, 3, torch.float32, "cpu")
        assert x.is_floating_point()
        return layer(x.to(x.dtype).contiguous().to(x.device))

    ours, solver = toy(Pair, call)
    assert ours(torch.randn(2, 5, 8))[0].isfinite().all()
    assert solver.runs == [3]


BETWEEN = {
    "changed": lambda layer, output: layer(output[0] + 1),
    "read": lambda layer, output: layer(output[0], output[0].mean()),
    "in place": lambda layer, output: layer(output[0].add_(1)),
    "masked": lambda layer, output: layer(output[0] * torch.ones(2, 5, 1)),
    "cast": lambda layer, output: layer(output[0].double().float()),
}


@pytest.mark.parametrize("how", BETWEEN)
def test_a_state_that_is_used_between_layers(how: str) -> None:
    ours, _ = toy(Pair, BETWEEN[how])
    with refused(UnsupportedModelError, "reads or changes the state between layers 0 and 1 of layers", "stacks="):
        ours(torch.randn(2, 5, 8))
    use_solver(ours, None)
    assert ours(torch.randn(2, 5, 8))[0].isfinite().all()  # in line it is a model like any other


HANDED_ON = {
    "as it is": lambda layer, output: layer(output[0], output[1]),
    "computed with": lambda layer, output: layer(output[0], None if output[1] is None else output[1] + 1),
}


@pytest.mark.parametrize("how", HANDED_ON)
def test_a_tensor_that_one_layer_makes_for_the_next(how: str) -> None:
    ours, _ = toy(Pair, HANDED_ON[how])
    with refused(UnsupportedModelError, r"uses item 1 of what layers.0 \(Pair\) returns", "stacks="):
        ours(torch.randn(2, 5, 8))


def test_layers_that_are_no_steps() -> None:
    ours, _ = toy(Shrinking, lambda layer, x: layer(x), ToyModel)
    with refused(UnsupportedModelError, r"layers.0 \(Shrinking\) makes a state of shape \(2, 3, 8\) of .*\(2, 5, 8\)"):
        ours(torch.randn(2, 5, 8))
    ours, _ = toy(Narrowing, lambda layer, x: layer(x), ToyModel)
    with refused(UnsupportedModelError, r"layers.2 \(Narrowing\) makes a state of shape \(2, 5, 4\) of .*\(2, 5, 8\)"):
        ours(torch.randn(2, 5, 8))
    ours, _ = toy(Apart, lambda layer, x: layer(x).pop(), ToyModel)
    with refused(UnsupportedModelError, r"layers.0 \(Apart\) returns a set"):
        ours(torch.randn(2, 5, 8))


def test_a_state_that_is_the_first_of_a_dict() -> None:
    x = torch.randn(2, 5, 8)
    ours, solver = toy(Named, lambda layer, x: layer(x)["state"], ToyModel)
    state = x
    for layer in ours.layers:
        state = layer.linear(state)
    assert torch.equal(ours(x), state)
    assert solver.runs == [3]
    ours, _ = toy(Named, lambda layer, x: layer(x)["more"] + 1, ToyModel)
    with refused(UnsupportedModelError, "uses item more of what layers.0"):
        ours(x)


# ---- per-layer values that are asked for: router logits
def mixture(**changes: Any) -> tuple[Any, zoo.Inputs]:
    torch.manual_seed(0)
    config = hf.MixtralConfig(
        **(zoo._LLAMA | {"num_hidden_layers": 4, "num_local_experts": 4, "attention_dropout": 0.0} | changes)
    )
    return hf.MixtralForCausalLM(config), zoo.text()


def test_router_logits_in_one_process() -> None:
    stock, batch = mixture(output_router_logits=True)
    expected = training_step(stock, batch, True, use_cache=False)
    ours = convert_to_ode(copy.deepcopy(stock))
    handle = parallelize(ours, LayerParallelConfig(**EXACT_MGRIT))
    with pytest.warns(UserWarning, match="layer by layer.*output_router_logits needs every layer's value.*auxiliary"):
        found = training_step(ours, batch, True)
    assert_same(found, expected)
    with refused(UnsupportedModelError, "output_router_logits", "auxiliary loss"):
        handle.train_step(batch)
    ours.config.output_router_logits = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert float(handle.train_step(batch)) == pytest.approx(float(ours(**batch).loss.detach()))


def router_logits_on_ranks() -> tuple[list[str], float]:
    ours, batch = mixture(output_router_logits=True)
    handle = parallelize(convert_to_ode(ours), LayerParallelConfig())
    said = []
    for call in (lambda: ours(**batch), lambda: handle.train_step(batch)):
        with pytest.raises(UnsupportedModelError) as caught:
            call()
        said.append(str(caught.value))
    ours.config.output_router_logits = False
    return said, float(handle.train_step(batch))


def test_router_logits_on_two_ranks() -> None:
    stock, batch = mixture()
    expected = float(stock(**batch).loss.detach())
    for said, loss in run_ranks(router_logits_on_ranks, 2):
        assert loss == pytest.approx(expected, rel=1e-6)
        for text in said:
            assert "output_router_logits needs every layer's value" in text
            assert "output_router_logits=False" in text
            assert "auxiliary loss" in text
            assert "use_cache" not in text


# ---- hooks
def hooked(model: Any, kind: str) -> list[Tensor]:
    """Hooks on layer 2 that change what the layer gets or gives, and note it."""
    seen: list[Tensor] = []
    layer = model.model.layers[2]

    def note(module: Any, args: Any, output: Any = None) -> Any:
        seen.append((args[0] if output is None else output).detach().clone())
        return (args[0] * 1.5, *args[1:]) if output is None else output * 1.5

    def note_gradient(module: Any, given: Any, of_output: Any) -> None:
        seen.append(of_output[0].detach().clone())

    if kind == "backward":
        layer.register_full_backward_hook(note_gradient)
    else:
        getattr(layer, {"before": "register_forward_pre_hook", "after": "register_forward_hook"}[kind])(note)
    return seen


@pytest.mark.parametrize("kind", ["before", "after", "backward"])
def test_hooks_see_and_change_what_they_do_in_stock(kind: str) -> None:
    stock, batch = zoo.build("llama")
    ours = convert_to_ode(copy.deepcopy(stock))
    use_solver(ours, SerialSolver())
    theirs, mine = hooked(stock, kind), hooked(ours, kind)
    assert_same(training_step(ours, batch, True), training_step(stock, batch, True, use_cache=False))
    assert len(mine) == len(theirs) == 1
    assert torch.equal(mine[0], theirs[0])


def test_the_last_call_of_a_hook_is_the_final_sweeps() -> None:
    stock, batch = doubled("llama")
    ours = convert_to_ode(copy.deepcopy(stock))
    handle = parallelize(ours, LayerParallelConfig(**EXACT_MGRIT))
    theirs, mine = [], []
    for model, seen in ((stock, theirs), (ours, mine)):
        model.model.layers[2].register_forward_hook(
            lambda module, args, output, seen=seen: seen.append(output.detach())
        )
    stock(**batch, use_cache=False)
    handle.train_step(batch)
    torch.testing.assert_close(mine[-1], theirs[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("first", ["compile", "convert"])
def test_compiled_layers(first: str) -> None:
    stock, batch = zoo.build("llama")
    ours = copy.deepcopy(stock).eval()
    if first == "convert":
        convert_to_ode(ours)
    for layer in ours.model.layers:
        layer.compile(backend="eager")
    if first == "compile":
        convert_to_ode(ours)
    solver = use_solver(ours, SerialSolver())
    torch.testing.assert_close(ours(**batch).loss, stock.eval()(**batch, use_cache=False).loss)
    assert solver.runs == [4]
