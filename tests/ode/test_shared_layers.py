"""Models whose layers share something or are one: what the first makes for all, states of two tensors, repetition."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf

from hf_layerpar import LayerParallelConfig, parallelize
from hf_layerpar.errors import UnsupportedModelError
from hf_layerpar.ode.convert import convert_to_ode, ode_view
from tests.multiproc import run_ranks
from tests.ode.helpers import EXACT_MGRIT, SerialSolver, assert_same, refused, training_step, use_solver, without_cache


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
