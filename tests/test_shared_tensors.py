"""Tensors that layers share, on lp ranks: right where one rank has them all or none trains them, refused elsewhere."""

import math

import pytest
import torch
import transformers as hf
from peft import AdaLoraConfig, VeraConfig, get_peft_model

from hf_layerpar import LayerParallelConfig, convert_to_ode, parallelize
from hf_layerpar.errors import UnsupportedModelError
from tests.multiproc import run_ranks
from tests.test_parallelize import EXACT, double


def gpt_sharing(what):
    """A GPT-2 of four layers (two a rank), some of which have a norm or a weight in common."""
    model, _ = double("gpt2")
    layers = model.transformer.h
    if "norms" in what:
        one, other = {"norms of two ranks": (0, 3), "norms of one rank": (0, 1)}[what]
        layers[other].ln_1 = layers[one].ln_1
    elif "last norm" in what:
        layers[0 if "other rank" in what else 3].ln_1 = model.transformer.ln_f
    else:
        layers[3].mlp.c_fc.weight = layers[0].mlp.c_fc.weight
    scattered(model.parameters())
    return model


def scattered(parameters):
    """Moved from values, such as ones, that stand for nothing."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in parameters:
            p.add_(0.1 * torch.randn_like(p))


def sharing(what, frozen):
    """The largest relative gradient error against stock, or why it is refused."""
    _, inputs = double("gpt2")
    model, stock = gpt_sharing(what).eval(), gpt_sharing(what).eval()
    for m in (model, stock) if frozen else ():
        tied = [(n, p) for n, p in m.named_parameters(remove_duplicate=False)]
        for name, p in tied:
            p.requires_grad_(sum(q is p for _, q in tied) == 1 or "wte" in name)
    stock(**inputs).loss.backward()
    try:
        handle = parallelize(convert_to_ode(model), EXACT)
    except UnsupportedModelError as error:
        return str(error)
    return compared(handle, model, stock, inputs)


def compared(handle, model, stock, inputs):
    loss = handle.train_step(inputs, lambda part: model(**part).loss)
    expected = stock(**inputs).loss
    wanted = {n: p.grad for n, p in stock.named_parameters() if p.grad is not None}
    norm = math.sqrt(sum(float(g.double().pow(2).sum()) for g in wanted.values()))
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    full = handle.state_dict()
    assert all(torch.equal(full[n], t) for n, t in (stock.state_dict() if full else {}).items())
    assert float(handle.grad_norm()) == pytest.approx(norm, rel=1e-6)
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-6)
    return max(float((g - wanted[n]).norm()) / norm for n, g in found.items())


@pytest.mark.parametrize(
    ("what", "trained"),
    [
        ("norms of two ranks", "layer 3 of transformer.h (lp rank 1) shares the trained tensor transformer.h."),
        (
            "a weight of two ranks",
            "tensor transformer.h.0.mlp.c_fc.weight with a layer of lp rank 0",
        ),
        ("the last norm on the other rank", "transformer.h.0.ln_1.weight with what lp ranks (0, 1) have outside"),
        ("the last norm on its rank", None),
        ("norms of one rank", None),
    ],
)
def test_tensors_that_layers_share(what, trained):
    assert max(run_ranks(sharing, 2, what, True)) < 1e-12
    assert max(run_ranks(sharing, 3, what, True)) < 1e-12
    found = run_ranks(sharing, 2, what, False)
    if trained is None:
        assert max(found) < 1e-12
    else:
        assert found[0] == found[1]
        assert trained in found[0]
        assert "freeze it, give each layer its own, or use lp_size=1" in found[0]


def adapted(kind):
    """VeRA has its projections in common for all layers, AdaLoRA's loss has all its weights in it."""
    settings: dict = {"r": 4, "target_modules": ["q_proj", "o_proj"]}
    configs = {"vera": VeraConfig, "adalora": AdaLoraConfig}
    settings |= {"total_step": 10, "init_r": 4, "task_type": "CAUSAL_LM"} if kind == "adalora" else {}
    base, inputs = double("llama")
    torch.manual_seed(0)
    model = get_peft_model(base, configs[kind](**settings)).double().eval()
    scattered([p for n, p in model.named_parameters() if "lora_" in n or "lambda" in n])
    return model, inputs


def adapters(kind):
    (model, inputs), (stock, _) = adapted(kind), adapted(kind)
    stock(**inputs).loss.backward()
    try:
        return compared(parallelize(convert_to_ode(model), EXACT), model, stock, inputs)
    except UnsupportedModelError as error:
        return str(error)


def test_adapters_that_layers_share():
    for world in (1, 2, 3):
        assert max(run_ranks(adapters, world, "vera")) < 1e-12
    for text in run_ranks(adapters, 2, "adalora"):
        assert "a regulariser of the weights, as AdaLoRA's" in text
        assert "use lp_size=1, or LoRA" in text


def zamba(blocks):
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99, "n_mamba_heads": 4}
    sizes |= {"mamba_d_state": 8, "mamba_ngroups": 1, "mamba_headdim": 16, "mamba_expand": 2, "chunk_size": 4}
    torch.manual_seed(0)
    config = hf.Zamba2Config(
        num_hidden_layers=len(blocks),
        layers_block_type=["hybrid" if b == "h" else "mamba" for b in blocks],
        num_mem_blocks=1,
        num_key_value_heads=4,
        adapter_rank=4,
        use_mamba_kernels=False,
        attention_dropout=0.0,
        **sizes,
    )
    return hf.Zamba2ForCausalLM(config).double().eval()


def repeated(blocks, settings):
    _, inputs = double("llama")
    model, stock = zamba(blocks), zamba(blocks)
    stock(**inputs, use_cache=False).loss.backward()
    try:
        return compared(parallelize(convert_to_ode(model), LayerParallelConfig(**settings)), model, stock, inputs)
    except UnsupportedModelError as error:
        return str(error)


@pytest.mark.parametrize("settings", [{}, {"micro_batches": 2, "schedule": "zb_h1"}])
def test_a_block_that_several_layers_repeat(settings):
    """Zamba2's: right where one rank has all of these layers, refused where several have."""
    assert max(run_ranks(repeated, 1, "mhmh", settings)) < 1e-10
    assert max(run_ranks(repeated, 2, "mmhh", settings)) < 1e-10
    for text in run_ranks(repeated, 2, "mhmh", settings):
        assert "shares the trained tensor model.layers.1.shared_transformer" in text
