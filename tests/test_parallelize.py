"""HuggingFace models of several anatomies on lp ranks, each against a deep-copied stock model."""

import copy
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers as hf
from accelerate import Accelerator
from peft import LoraConfig, PromptTuningConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_layerpar import LayerParallelConfig, convert_to_ode, gradient_agreement, layer_parallel, parallelize
from hf_layerpar.errors import CheckpointError, ConfigurationError, RankMismatchError, UnsupportedModelError
from tests import zoo
from tests.multiproc import free_port, run_ranks
from tests.zoo import build

EXACT = LayerParallelConfig()
CASES = {  # one family of each anatomy: post-LN, pre-LN with cache and rotary, shared biases, two stacks, tables
    "bert": EXACT,
    "llama": LayerParallelConfig(micro_batches=2),
    "t5": EXACT,
    "bart": LayerParallelConfig(strategy="mgrit", coarsening=2, forward_iterations=2, backward_iterations=2),
    "deberta_v2": LayerParallelConfig(micro_batches=2),
    "vit": LayerParallelConfig(strategy="mgrit", coarsening=2, forward_iterations=2, backward_iterations=2),
    "gemma3": EXACT,
}


def double(name):
    model, inputs = build(name)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    return model.double(), inputs


def against_stock(name, config, split=None):
    """The largest relative gradient error against stock, the parameter names this rank has, and a full state dict's."""
    model, inputs = double(name)
    stock = copy.deepcopy(model).eval()
    ours = convert_to_ode(model).eval()
    handle = parallelize(ours, config, split=split)
    scale = math.sqrt(sum(float(p.double().pow(2).sum()) for p in stock.parameters()))
    loss = ours(**inputs).loss
    loss.backward()
    expected = stock(**inputs).loss
    expected.backward()
    grads = dict(stock.named_parameters())
    norm = math.sqrt(sum(float(p.grad.pow(2).sum()) for p in grads.values() if p.grad is not None))
    error = max(float((p.grad - grads[n].grad).norm()) / norm for n, p in ours.named_parameters() if p.grad is not None)
    assert float(handle.clip_grad_norm_(norm / 3)) == pytest.approx(norm, rel=1e-6)
    torch.nn.utils.clip_grad_norm_(stock.parameters(), norm / 3)
    for n, p in ours.named_parameters():
        assert p.grad is None or float((p.grad - grads[n].grad).norm()) / norm < 1e-6, n
    assert float(handle.clip_grad_norm_(norm)) == pytest.approx(norm / 3, rel=1e-5)  # small enough: stays as it is
    assert float(handle.grad_norm()) == pytest.approx(norm / 3, rel=1e-5)
    full = handle.state_dict()
    if handle.lp_rank == 0:
        assert list(full) == list(stock.state_dict())
        assert all(torch.equal(full[n], t) for n, t in stock.state_dict().items())
        handle_state = {n: t * 2 for n, t in full.items()}
    else:
        assert full == {}
        handle_state = {n: t * 2 for n, t in stock.state_dict().items()}
    handle.load_state_dict(handle_state)
    doubled = math.sqrt(sum(float(p.double().pow(2).sum()) for p in stock.parameters())) / scale
    assert doubled == 1.0  # the stock model is another object
    for n, p in ours.named_parameters():
        assert torch.equal(p, 2 * grads[n])
    loss_error = abs(float((loss - expected).detach())) / abs(float(expected.detach()))
    copies = sorted(n for p in handle.ends if handle.lp_rank in p.holders[1:] for n in p.names)
    return loss_error, error, sorted(n for n, _ in ours.named_parameters()), handle.owner_of, copies


@pytest.mark.parametrize("name", zoo.in_every_version(CASES, "t5"))
def test_exact_gradients_on_two_ranks(name):
    results = run_ranks(against_stock, 2, name, CASES[name])
    owner_of = results[0][3]
    everything = {n for _, _, names, *_ in results for n in names}
    assert everything == {n for n, _ in build(name)[0].named_parameters()}
    for rank, (loss_error, error, names, owners, copies) in enumerate(results):
        assert loss_error < 1e-12
        assert error < 1e-12
        assert owners == owner_of
        assert all(owner_of[n] == rank or n in copies for n in names)  # own layers and ends, nothing else
        assert any(owner_of[n] == rank for n in names)
        assert len(names) < len(everything)


def test_uneven_splits_and_more_ranks_than_divide_the_layers():
    dealt = LayerParallelConfig(strategy="mgrit", coarsening=2, forward_iterations=2, backward_iterations=2)
    for world, config, split in ((2, EXACT, (1, 3)), (3, EXACT, None), (2, dealt, "interleaved")):
        for loss_error, error, *_ in run_ranks(against_stock, world, "bert", config, split):
            assert loss_error < 1e-12
            assert error < 1e-12


def features_on_two_ranks():
    """One model, several things a loop does with it."""
    rank = dist.get_rank()
    model, inputs = double("bert")
    with torch.no_grad():  # ranks that start from different weights end up with those of rank 0
        for p in model.parameters():
            p.mul_(1 + rank)
    model = convert_to_ode(model)
    handle = parallelize(model, LayerParallelConfig(strategy="mgrit", coarsening=2, coarse_operator="identity"))
    found = {}
    params = [p for p in model.parameters() if p.requires_grad]

    def stepped():
        torch.manual_seed(5)
        model.train().zero_grad()
        loss = handle.train_step(inputs)
        return [float(loss), *(p.grad.numpy() for p in params if p.grad is not None)]

    inexact = stepped()
    found["mgrit report"] = handle.report()
    with handle.exact():
        exact = stepped()
        found["exact report"] = handle.report()
        found["agreement inside exact"] = gradient_agreement(model, inputs)["cosine"]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    found["agreement"] = gradient_agreement(model, inputs)
    found["stream kept"] = torch.equal(before, torch.get_rng_state())
    found["loss"] = (inexact[0], exact[0])
    model.gradient_checkpointing_enable()
    recomputed = stepped()
    model.gradient_checkpointing_disable()
    found["recomputed equal"] = all((a == b).all() for a, b in zip(inexact[1:], recomputed[1:], strict=True))
    handle.config = EXACT
    found["switched equal"] = all((a == b).all() for a, b in zip(exact[1:], stepped()[1:], strict=True))
    found["same weights"] = sorted(float(p.value.detach().sum()) for p in handle.ends if len(p.holders) == 2)
    found["errors"] = []
    for wrong in (
        lambda: model.eval()(**inputs, output_hidden_states=True),
        lambda: handle.load_state_dict({}),
        lambda: setattr(handle, "config", LayerParallelConfig(strategy="mgrit", coarsening=(2, 2, 2))),
        lambda: parallelize(model, EXACT),
    ):
        try:
            wrong()
        except (UnsupportedModelError, CheckpointError, ConfigurationError) as error:
            found["errors"].append(f"{type(error).__name__}: {error}")
    found["after errors"] = float(model(**inputs).loss.detach())
    return found


def test_features_on_two_ranks():
    first, second = run_ranks(features_on_two_ranks, 2)
    for name in ("agreement", "loss", "same weights", "after errors"):
        assert first[name] == second[name], name
    for found in (first, second):
        report = next(iter(found["mgrit report"].sweeps.values()))
        assert report["forward"].mode == report["backward"].mode == "mgrit"
        assert report["forward"].residuals[0] > 0
        exact = next(iter(found["exact report"].sweeps.values()))
        assert exact["forward"].mode == exact["backward"].mode == "exact"
        assert exact["forward"].residuals == ()
        assert 0 < found["agreement"]["cosine"] < 1 - 1e-6
        assert found["agreement inside exact"] == pytest.approx(1, abs=1e-12)
        assert found["agreement"]["loss"] == found["loss"][0] != found["loss"][1] == found["agreement"]["loss_exact"]
        assert found["stream kept"]
        assert found["recomputed equal"]
        assert found["switched equal"]
        hidden, missing, too_deep, twice = found["errors"]
        assert "output_hidden_states" in hidden
        assert "missing" in missing
        assert "coarsening=(2, 2, 2) is too deep" in too_deep
        assert "parallelized already" in twice
    assert first["same weights"]
    one, two = (f["mgrit report"].sweeps["bert.encoder.layer"]["forward"].residuals for f in (first, second))
    assert one == pytest.approx(two)


def different_settings():
    try:
        parallelize(convert_to_ode(build("bert")[0]), LayerParallelConfig(micro_batches=1 + dist.get_rank()))
    except RankMismatchError as error:
        return str(error)
    return None


def test_different_settings_are_refused_on_all_ranks():
    for message in run_ranks(different_settings, 2):
        assert message is not None
        assert "disagree on {'settings.micro_batches': [1, 2]} (by rank)" in message


# ---- what would part the ranks
def wrapped_and_such():
    told = {}
    model, inputs = double("bert")
    model = convert_to_ode(model).eval()
    handle = parallelize(model, EXACT)

    def attempt(name, act):
        try:
            act()
        except (UnsupportedModelError, ConfigurationError, RankMismatchError) as error:
            told[name] = f"{type(error).__name__}: {error}"

    attempt("ddp", lambda: DistributedDataParallel(model))
    around = nn.Module()
    around.inner = model
    around.forward = lambda **batch: model(**batch)
    attempt("an own module in ddp", lambda: DistributedDataParallel(around, init_sync=False)(**inputs))
    trainer = hf.Trainer(model, hf.TrainingArguments("unused", use_cpu=True, report_to=[]), train_dataset=[inputs])
    attempt("stock", trainer.train)
    handle.train_step(inputs)
    attempt("lbfgs", lambda: torch.optim.LBFGS(model.parameters()).step(lambda: handle.train_step(inputs)))
    torch.optim.LBFGS([torch.nn.Parameter(torch.zeros(1))]).step(lambda: 0.0)  # of something else
    attempt("new rows", lambda: model.resize_token_embeddings(200))
    attempt("an adapter", lambda: model.bert.add_adapter(LoraConfig(target_modules=["query"])))
    lora = LoraConfig(target_modules=["query"])
    prompt = PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=2)
    attempt("get_peft_model", lambda: get_peft_model(model, lora))
    attempt("an adapter of prompts", lambda: get_peft_model(model, prompt))
    attempt("an injected adapter", lambda: inject_adapter_in_model(lora, model))
    get_peft_model(build("bert")[0], lora)  # of something else
    accelerator = Accelerator(cpu=True)
    attempt("prepare", lambda: accelerator.prepare(model))
    accelerator._models.clear()  # it keeps what it failed to wrap
    attempt("save_model", lambda: accelerator.save_model(model, "unused"))
    accelerator.prepare(torch.optim.AdamW(model.parameters()))
    attempt("save_state", lambda: accelerator.save_state("unused"))
    attempt("load_state", lambda: accelerator.load_state("unused"))
    attempt("a setting", lambda: handle.using(None).__enter__())  # type: ignore[arg-type]
    attempt("a scale", lambda: handle.train_step(inputs, scale=math.nan if handle.lp_rank else 1.0))
    assert math.isfinite(float(handle.train_step(inputs)))
    return told


@pytest.mark.compat
def test_what_would_copy_or_part_the_layers_is_refused():
    for told in run_ranks(wrapped_and_such, 2):
        for name in ("ddp", "an own module in ddp", "stock"):
            assert "UnsupportedModelError: DistributedDataParallel" in told[name], name
            assert "Use LayerParallelTrainer" in told[name]
        assert "ConfigurationError: LBFGS of a model on several lp ranks" in told["lbfgs"]
        assert "Call resize_token_embeddings before parallelize" in told["new rows"]
        assert "Call add_adapter before parallelize" in told["an adapter"]
        for name in ("get_peft_model", "an adapter of prompts", "an injected adapter"):
            assert "Call get_peft_model before parallelize" in told[name], name
        assert "UnsupportedModelError: DistributedDataParallel" in told["prepare"]
        for name in ("save_model", "save_state", "load_state"):
            assert f"{name} of accelerate with a model on several lp ranks" in told[name], name
        assert "config=None must be a LayerParallelConfig" in told["a setting"]
        assert "scale" in told["a scale"]


def norm_of_bf16():
    model, inputs = build("gpt2")
    handle = parallelize(convert_to_ode(model.bfloat16()))
    handle.train_step(inputs)
    squares = sum(float(p.grad.double().pow(2).sum()) for p in model.parameters())
    return float(handle.grad_norm()), math.sqrt(squares)


def test_gradient_norms_of_half_precision_are_not_rounded_to_it():
    found, expected = run_ranks(norm_of_bf16, 1)[0]
    assert found == pytest.approx(expected, rel=1e-6)


_LOOP = """
import os
import sys
from pathlib import Path

import torch
from hf_layerpar import LayerParallelConfig, convert_to_ode, parallelize
from tests.zoo import build

model, batch = build("gpt2")
loader = [batch] * 2
model = convert_to_ode(model)
handle = parallelize(model, LayerParallelConfig(micro_batches=2))
optimizer = torch.optim.AdamW(model.parameters())
torch.manual_seed(0)
for batch in loader:
    loss = handle.train_step(batch)
    handle.clip_grad_norm_(1.0)
    optimizer.step()
    optimizer.zero_grad()
layers = sum(p.numel() for p in model.transformer.h.parameters())
Path(sys.argv[1], os.environ["RANK"]).write_text(f"lp size {handle.lp_size} layers {layers}")
"""


def test_a_loop_under_a_launcher_finds_all_processes(tmp_path):
    script = tmp_path / "loop.py"
    script.write_text(_LOOP)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--master_port", str(free_port()), str(script), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    layers = sum(p.numel() for p in build("gpt2")[0].transformer.h.parameters())
    assert [(tmp_path / rank).read_text() for rank in "01"] == [f"lp size 2 layers {layers // 2}"] * 2


def test_processes_that_can_not_find_each_other(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigurationError, match=r"WORLD_SIZE=2 says .* without RANK, MASTER_ADDR, MASTER_PORT"):
        parallelize(convert_to_ode(build("bert")[0]))


def test_one_process_draws_masks_of_its_own_and_matches_plain_training_without_dropout():
    model, inputs = double("gpt2")
    stock = copy.deepcopy(model).eval()
    ours = convert_to_ode(model).eval()
    parallelize(ours)
    ours(**inputs).loss.backward()
    stock(**inputs, use_cache=False).loss.backward()
    for (name, p), q in zip(ours.named_parameters(), stock.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


def test_deepcopy_of_a_parallelized_model_is_independent():
    model, inputs = build("llama")
    model = convert_to_ode(model).eval()
    handle = parallelize(model, LayerParallelConfig(strategy="mgrit", coarsening=2))
    twin = copy.deepcopy(model)
    layer_parallel(twin).config = EXACT
    assert handle.config.strategy == "mgrit"
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert float(model(**inputs).loss.detach()) != float(twin(**inputs).loss.detach())


def test_not_converted_and_not_parallelized():
    model = build("bert")[0]
    with pytest.raises(UnsupportedModelError, match="convert_to_ode"):
        parallelize(model)
    with pytest.raises(UnsupportedModelError, match="call parallelize"):
        layer_parallel(convert_to_ode(model))
    with pytest.raises(ConfigurationError, match=r"max_norm=0 must be positive"):
        parallelize(convert_to_ode(build("llama")[0])).clip_grad_norm_(0)
    with pytest.raises(ConfigurationError, match=r"encoder\.layer: coarsening=\(2, 2, 2\)"):
        parallelize(model, LayerParallelConfig(strategy="mgrit", coarsening=(2, 2, 2)))
    with pytest.raises(ConfigurationError, match=r"split='v' with strategy='mgrit'"):
        parallelize(model, LayerParallelConfig(strategy="mgrit", coarsening=2), split="v")
    with pytest.raises(ConfigurationError, match=r"coarse_operator='magic' is unknown"):
        parallelize(model, LayerParallelConfig(strategy="mgrit", coarse_operator="magic"))
    with pytest.raises(ConfigurationError, match=r"schedule='2f2b' is unknown"):
        parallelize(model, LayerParallelConfig(schedule="2f2b"))
