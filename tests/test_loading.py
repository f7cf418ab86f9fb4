"""Models of which each rank reads its own layers, against the stock model loaded whole and then parallelized."""

import re
import shutil
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers as hf
from peft import LoraConfig, get_peft_model

from hf_layerpar import (
    LayerParallelConfig,
    LayerParallelError,
    convert_to_ode,
    from_pretrained,
    layer_parallel,
    parallelize,
)
from hf_layerpar.errors import UnsupportedModelError
from hf_layerpar.ode.reading import PartReader
from tests import zoo
from tests.multiproc import run_ranks

EXACT = LayerParallelConfig()


def saved(folder, name, layers=4, convert=None, new_head=None, **changes):
    """A checkpoint. convert: the settings of a converted model. new_head: the class that it is for, whose head it
    lacks."""
    model, _ = zoo.build(name, layers, **changes)
    if convert is not None:
        model = convert_to_ode(model, **convert)
    if new_head is not None:
        model.config.architectures = [new_head]
        model = model.base_model
        model.config.architectures = [new_head]
    model.save_pretrained(folder, max_shard_size="60KB")
    if new_head is not None:
        model.config.architectures = [new_head]
        model.config.save_pretrained(folder)
    return str(folder)


# name: (arguments of `saved`, arguments of from_pretrained, split)
CASES = {
    "plain": ({"name": "llama", "layers": 5}, {}, None),
    "tied": ({"name": "llama", "tie_word_embeddings": True}, {}, None),
    "two stacks, a shared module": ({"name": "t5", "layers": 3}, {"dtype": torch.float64}, None),
    "two stacks": ({"name": "bart", "layers": 3}, {}, None),
    "renamed weights": ({"name": "vit"}, {}, "interleaved"),
    "refined": ({"name": "llama", "layers": 3}, {"step_size": 1 / 4}, None),
    "refined, linear": ({"name": "bert", "layers": 3}, {"step_size": 1 / 2, "interpolation": "linear"}, None),
    "folded": ({"name": "gpt2", "convert": {"step_size": 1 / 2, "num_steps": 4}}, {}, None),
    "euler": ({"name": "bert", "convert": {"step_size": 1 / 2, "num_steps": 3}}, {"dtype": "bfloat16"}, None),
    "a dtype of their own": ({"name": "t5", "layers": 2}, {"dtype": torch.float16}, None),
}
ON_THREE = ("plain", "two stacks", "refined, linear")


def compared(folder, name, options, split):
    """What this rank read of a checkpoint, and whether all is as in a model that was loaded whole."""
    read = set()
    layers = PartReader.layers

    def noted(self, path, indices):
        read.update((path, index) for index in indices)
        return layers(self, path, indices)

    PartReader.layers = noted
    try:
        ours = from_pretrained(folder, layer_parallel=EXACT, split=split, **options)
    finally:
        PartReader.layers = layers
    whole = from_pretrained(folder, **options)
    stock = from_pretrained(folder, **options)
    theirs = parallelize(whole, EXACT, split=split)
    mine = layer_parallel(ours)
    assert mine.owner_of == theirs.owner_of
    assert [p.holders for p in mine.ends] == [p.holders for p in theirs.ends]
    assert mine._layout == theirs._layout
    for kind in ("named_parameters", "named_buffers"):
        pairs = list(zip(getattr(ours, kind)(), getattr(whole, kind)(), strict=True))
        assert pairs or kind == "named_buffers"
        for (n, a), (m, b) in pairs:
            assert (n, a.dtype, a.requires_grad) == (m, b.dtype, b.requires_grad)
            assert torch.equal(a, b), n
    assert len(list(ours.parameters())) < len(list(stock.parameters())) or mine.lp_size == 1
    full, expected = mine.state_dict(), theirs.state_dict()
    assert list(full) == list(expected)
    assert all(torch.equal(full[n], t) for n, t in stock.state_dict().items() if full)
    assert ours.config.to_dict() == whole.config.to_dict()
    if next(ours.parameters()).dtype in (torch.float32, torch.float64):
        inputs = zoo.build(name)[1]
        inputs = {k: v.to(next(ours.parameters()).dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        losses = [float(handle.train_step(inputs)) for handle in (mine, theirs)]
        expected = stock(**inputs).loss
        expected.backward()
        assert losses[0] == losses[1] == pytest.approx(float(expected.detach()), rel=1e-6)
        grads = dict(stock.named_parameters())
        for (n, a), b in zip(ours.named_parameters(), whole.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None) == (grads[n].grad is None), n
            if a.grad is not None:
                assert torch.equal(a.grad, b.grad), n
                torch.testing.assert_close(a.grad, grads[n].grad, rtol=1e-4, atol=1e-6)
    return read


def compared_all(folders, names):
    return {case: compared(folders[case], CASES[case][0]["name"], CASES[case][1], CASES[case][2]) for case in names}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {
        case: saved(tmp_path_factory.mktemp("checkpoint"), **arguments) for case, (arguments, _, _) in CASES.items()
    }


@pytest.mark.parametrize("world", [1, 2, 3])
def test_as_loaded_whole_and_then_parallelized(world, folders):
    names = ON_THREE if world != 2 else [case for case in CASES if case not in ("two stacks", "refined, linear")]
    read = [compared_all(folders, names)] if world == 1 else run_ranks(compared_all, world, folders, names)
    for case in names:
        stacks = {path for of_rank in read for path, _ in of_rank[case]}
        for path in stacks:
            of_ranks = [[i for p, i in sorted(found[case]) if p == path] for found in read]
            depth = 1 + max(map(max, of_ranks))
            assert sorted({i for found in of_ranks for i in found}) == list(range(depth))
            at_most = {"refined": 2, "refined, linear": 1 + -(-depth // world)}.get(case, -(-depth // world))
            assert max(map(len, of_ranks)) <= max(at_most, -(-depth // world)), (case, of_ranks)


# ---- what the checkpoint lacks
def new_values(folder):
    """Checksums of a model with a new head, and of a model without a checkpoint, as lp rank 0 has them together."""
    found = []
    for what in (folder, zoo.config("llama", 3, architectures=["LlamaForCausalLM"])):
        torch.manual_seed(5)
        before = torch.get_rng_state()
        model, info = from_pretrained(what, layer_parallel=EXACT, output_loading_info=True)
        assert torch.equal(torch.get_rng_state(), before)
        full = layer_parallel(model).state_dict()
        found.append(({name: t.detach().clone().numpy() for name, t in full.items()}, sorted(info["missing_keys"])))
    return found


def test_new_weights_are_the_same_at_every_lp_size(tmp_path):
    folder = saved(tmp_path, "bert", new_head="BertForSequenceClassification")
    (head, missing), (new, _) = new_values(folder)
    assert missing == [f"{name}.{key}" for name in ("bert.pooler.dense", "classifier") for key in ("bias", "weight")]
    stored = hf.BertModel.from_pretrained(folder).state_dict()
    assert all((head[f"bert.{name}"] == t.numpy()).all() for name, t in stored.items() if "pooler" not in name)
    assert 0.01 < head["classifier.weight"].std() < 0.04
    torch.manual_seed(5)
    whole = from_pretrained(zoo.config("llama", 3, architectures=["LlamaForCausalLM"])).state_dict()
    for name, tensor in whole.items():
        assert (new[name] == tensor.numpy()).all(), name
        assert tensor.ndim == 1 or 0.015 < float(tensor.std()) < 0.025, name
    assert len({float(t.sum()) for t in whole.values() if t.ndim == 2}) == sum(t.ndim == 2 for t in whole.values())
    for world in (2, 3):
        for rank, found in enumerate(run_ranks(new_values, world, folder)):
            for (expected, _), (values, _) in zip(((head, 0), (new, 0)), found, strict=True):
                assert rank or list(values) == list(expected)
                assert all((values[name] == expected[name]).all() for name in values)


def test_a_value_that_only_a_constructor_gives_is_refused():
    config = zoo.config("longformer", 2, architectures=["LongformerForMaskedLM"])
    with pytest.raises(UnsupportedModelError, match=r"'lm_head.bias'.* get values from its constructor alone"):
        from_pretrained(config, layer_parallel=EXACT)


# ---- what goes wrong
def refusals(folders):
    """What from_pretrained says on this rank: (arguments of rank 0, those of the others) -> message."""
    said = []
    for options in zip(*folders, strict=True):
        path, more = options[min(dist.get_rank(), 1)]
        try:
            if "seed" in more:
                torch.manual_seed(more.pop("seed"))
            from_pretrained(path, **({"layer_parallel": EXACT} | more))
        except LayerParallelError as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def test_refused_on_all_ranks(tmp_path):
    good = saved(tmp_path / "good", "llama")
    other, short, adapters = tmp_path / "other", tmp_path / "short", tmp_path / "adapters"
    model, _ = zoo.build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] += 1  # not outside the layers, and not the first bytes
    model.save_pretrained(other, max_shard_size="60KB")
    shutil.copytree(good, short)
    shard = sorted(short.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    get_peft_model(hf.LlamaForCausalLM.from_pretrained(good), LoraConfig(target_modules=["q_proj"])).save_pretrained(
        adapters
    )
    head = saved(tmp_path / "head", "bert", new_head="BertForSequenceClassification")
    nameless = zoo.config("llama", 2)
    unlike = tmp_path / "unlike"
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(7, 7))  # lp rank 1 reads it, alone
    model.save_pretrained(unlike)
    both = {
        "CheckpointError: .*nowhere": (str(tmp_path / "nowhere"), {}),
        "CheckpointError: .*is damaged or can't be read": (str(short), {}),
        "ConfigurationError: config is a BertConfig, and a LlamaForCausalLM is built": (
            good,
            {"config": hf.BertConfig()},
        ),
        "ConfigurationError: .*adapters of a PEFT model": (str(adapters), {}),
        "ConfigurationError: device_map='auto' must name one device": (good, {"device_map": "auto"}),
        "ConfigurationError: gguf_file='x' can't be used": (good, {"gguf_file": "x"}),
        "ConfigurationError: layer_parallel=True must be": (good, {"layer_parallel": True}),
        "CheckpointError: the LlamaConfig has architectures=None": (nameless, {}),
        r"ConfigurationError: .*split=\(1, 1\)": (good, {"split": (1, 1)}),
        "ConfigurationError: 4 inner layers of model.layers at step_size=0.3": (good, {"step_size": 0.3}),
        "RankMismatchError: .*'error'.*unlike": (str(unlike), {}),
        "ConfigurationError: .*say how layers are spread": (good, {"layer_parallel": None, "split": (2, 2)}),
    }
    apart = {
        "RankMismatchError: .*'checkpoint.*safetensors'": ((good, {}), (str(other), {})),
        r"RankMismatchError: .*'error': \[None, 'CheckpointError": ((good, {}), (str(short), {})),
        "RankMismatchError: .*'arguments.step_size'": ((good, {}), (good, {"step_size": 0.5})),
        "RankMismatchError: .*'torch.initial_seed": ((head, {"seed": 1}), (head, {"seed": 2})),
    }
    first = [*both.values(), *(a for a, _ in apart.values())]
    second = [*both.values(), *(b for _, b in apart.values())]
    for said in run_ranks(refusals, 2, (first, second)):
        for pattern, message in zip([*both, *apart], said, strict=True):
            assert re.match(pattern, message, re.DOTALL), (pattern, message)


# ---- in the trainer
def trained(folder, given, output):
    """Weights after three steps, of a model given by the path of its checkpoint, or loaded whole."""
    from hf_layerpar import LayerParallelTrainer
    from tests.training.runs import Samples, arguments

    made: dict[str, Any] = {"model": folder} if given == "path" else {"model_init": lambda: folder}
    if given == "model":
        made = {"model": hf.LlamaForCausalLM.from_pretrained(folder)}
    trainer = LayerParallelTrainer(
        args=arguments(output, lp_size=2, max_steps=3, per_device_train_batch_size=2),
        train_dataset=Samples("llama", 24),
        **made,
    )
    trainer.train()
    full = trainer.layer_parallel.state_dict()
    return {name: t.detach().clone().numpy() for name, t in full.items()}


@pytest.mark.parametrize(("world", "given"), [(2, "path"), (4, "path"), (2, "model_init")])
def test_the_trainer_takes_a_path(world, given, tmp_path):
    folder = saved(tmp_path / "checkpoint", "llama")
    found = run_ranks(trained, world, folder, given, str(tmp_path))
    expected = run_ranks(trained, world, folder, "model", str(tmp_path))
    for ours, theirs in zip(found, expected, strict=True):
        assert list(ours) == list(theirs)
        assert all((ours[name] == theirs[name]).all() for name in ours)
    assert found[0]


# ---- every family, one process
@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.NAMES + zoo.TUPLES)
def test_every_family(name, tmp_path):
    """Read in parts: of a checkpoint in every dtype, refined, and of a config."""
    model, _ = zoo.build(name, 2)
    model.save_pretrained(tmp_path)

    def check(ours, theirs):
        for kind in ("named_parameters", "named_buffers"):
            for (n, a), (m, b) in zip(getattr(ours, kind)(), getattr(theirs, kind)(), strict=True):
                assert (n, a.dtype, a.requires_grad) == (m, b.dtype, b.requires_grad)
                assert torch.equal(a, b), n
        assert str(getattr(ours, "generation_config", None)) == str(getattr(theirs, "generation_config", None))
        assert ours.training == theirs.training

    options: list[dict[str, Any]] = [{"dtype": dtype} for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    if name not in ("modernbert", "bamba", "longformer"):  # whose layers, or settings of them, differ by their place
        options.append({"step_size": 1 / 2, "interpolation": "linear"})
    for of_load in options:
        check(from_pretrained(tmp_path, layer_parallel=EXACT, **of_load), from_pretrained(tmp_path, **of_load))
    if name not in ("longformer", "nystromformer"):  # of which a part is left to the constructor
        check(from_pretrained(model.config, layer_parallel=EXACT), from_pretrained(model.config))
