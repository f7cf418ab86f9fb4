"""What a solver hands to the model's loop before any layer is evaluated: tuples as the layers return them, and values
that the loop must not use yet."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_layerpar import LayerParallelConfig, parallelize
from hf_layerpar.errors import UnsupportedModelError
from hf_layerpar.ode.convert import convert_to_ode, ode_view
from hf_layerpar.ode.families import FAMILIES, Joint
from tests import zoo
from tests.multiproc import run_ranks
from tests.ode.helpers import SerialSolver, assert_same, training_step, use_solver, without_cache
from tests.ode.test_convert import ToyModel, refused

EXACT_MGRIT = {"strategy": "mgrit", "coarsening": 2, "forward_iterations": 2, "backward_iterations": 2}
"""With two intervals of two layers, two iterations are exact."""


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


# ---- models whose layers share something, or are one
def small(name: str) -> tuple[Any, Any]:
    """(model in float64, batch): all layers of the first stack have something to do with each other."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"d_model": 16, "vocab_size": 32, "pad_token_id": 0, "decoder_start_token_id": 0}
    ids = torch.randint(3, 32, (2, 12))
    if name.startswith("longt5"):
        more = {"encoder_attention_type": name[7:], "local_radius": 3, "global_block_size": 4, "dropout_rate": 0.0}
        config = hf.LongT5Config(**sizes, d_kv=8, d_ff=16, num_heads=2, num_layers=4, num_decoder_layers=4, **more)
        return hf.LongT5ForConditionalGeneration(config).double(), {"input_ids": ids, "labels": ids[:, :8].contiguous()}
    if name == "pegasus_x":
        heads = {
            f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in (("attention_heads", 2), ("layers", 4))
        }
        more = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_global_tokens": 3, "block_size": 4, "dropout": 0.0}
        model = hf.PegasusXForConditionalGeneration(hf.PegasusXConfig(**sizes, **heads, **more))
        return model.double(), {"input_ids": ids, "labels": ids[:, :8].contiguous()}
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16}
    if name == "albert":
        config = hf.AlbertConfig(vocab_size=32, embedding_size=8, num_hidden_groups=2, **sizes)
        return hf.AlbertForMaskedLM(config).double(), {"input_ids": ids, "labels": ids}
    convolutions = {"conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_conv_pos_embeddings": 4}
    more = convolutions | {"num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8, "layerdrop": 0.0}
    model = hf.WavLMForSequenceClassification(hf.WavLMConfig(vocab_size=32, **sizes, **more))  # type: ignore[arg-type]
    return model.double(), {"input_values": torch.randn(2, 800).double(), "labels": torch.tensor([0, 1])}


def against_stock(name: str, **settings: Any) -> tuple[float, set[str], set[str]]:
    """(error of loss and gradients in a step of exact iterations, names of this rank's gradients, of stock's)."""
    stock, batch = small(name)
    expected = stock.eval()(**batch, **without_cache(stock)).loss
    expected.backward()
    grads = {n: p.grad for n, p in stock.named_parameters() if p.grad is not None}
    norm = sum(float(g.square().sum()) for g in grads.values()) ** 0.5
    model = convert_to_ode(small(name)[0].eval())
    loss = parallelize(model, LayerParallelConfig(**(EXACT_MGRIT | settings))).train_step(batch)
    mine = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    errors = [float((g - grads[n]).norm()) / norm for n, g in mine.items()]
    return max(abs(float(loss) - float(expected.detach())), *errors), {*mine}, {*grads}


@pytest.mark.parametrize("name", ["longt5-local", "longt5-transient-global", "pegasus_x", "wavlm"])
def test_what_the_first_layer_makes_for_all_and_states_of_two_tensors(name: str) -> None:
    found = run_ranks(against_stock, 2, name)
    assert all(error < 1e-8 for error, _, _ in found)  # norms in float32
    assert found[0][1] | found[1][1] == found[0][2]
    assert found[0][1] != found[0][2]


def test_one_layer_that_is_called_again_and_again() -> None:
    error, mine, theirs = against_stock("albert")
    assert error < 1e-12
    assert mine == theirs
    model, batch = small("albert")
    ours = convert_to_ode(copy.deepcopy(model), step_size=0.5, num_steps=4)
    (stack,) = ode_view(ours).stacks
    assert [stack.layers.index(layer) for layer in stack.layers] == [0, 0, 2, 2]
    x = model.albert.encoder.embedding_hidden_mapping_in(model.albert.embeddings(batch["input_ids"]))
    for group in (0, 0, 1, 1):
        x = x + 0.5 * (model.albert.encoder.albert_layer_groups[group](x) - x)
    torch.testing.assert_close(ours.eval()(input_ids=batch["input_ids"]).logits, model.eval().predictions(x))
    with refused(UnsupportedModelError, "again and again", "num_hidden_layers"):
        convert_to_ode(copy.deepcopy(model), step_size=0.5)
    with refused(UnsupportedModelError, "one layer again and again", "buffers"):
        convert_to_ode(copy.deepcopy(model), step_size=0.5, num_steps=2, buffers=(1, 1))


def shared_layers_on_ranks() -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        parallelize(convert_to_ode(small("albert")[0].requires_grad_()), split=[1, 3])
    return str(caught.value)


def test_one_layer_can_not_be_trained_on_two_ranks() -> None:
    for text in run_ranks(shared_layers_on_ranks, 2):
        assert "shares the trained tensor albert.encoder.albert_layer_groups.0" in text
        assert "lp_size=1" in text


def test_a_head_that_asks_for_hidden_states_to_drop_them() -> None:
    stock, batch = small("wavlm")
    ours = convert_to_ode(copy.deepcopy(stock))
    solver = use_solver(ours, SerialSolver())
    assert_same(training_step(ours, batch, False), training_step(stock, batch, False))
    assert solver.runs == [4]
    asked = ours(**batch, output_hidden_states=True)
    assert len(asked.hidden_states) == 5
    assert solver.runs == [4]  # asked of themselves, they are made layer by layer


# ---- modules that are no transformers models
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
