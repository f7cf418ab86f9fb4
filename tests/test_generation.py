"""`generate` on lp ranks gives the tokens of the serial model, bit for bit the same scores, and no rank hangs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers as hf
from peft import LoraConfig, get_peft_model
from transformers.cache_utils import EncoderDecoderCache

from hf_layerpar import LayerParallelConfig, convert_to_ode, ode_view, parallelize
from hf_layerpar.errors import ConfigurationError, RankMismatchError, UnsupportedModelError
from tests import zoo
from tests.multiproc import run_ranks

MGRIT = LayerParallelConfig(strategy="mgrit", coarsening=2)
HOW: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy, no cache": {"use_cache": False},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 1.5},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 2, "do_sample": True, "use_cache": False},
    "a lookup that takes cached tokens back": {"prompt_lookup_num_tokens": 2},
}


def options(inputs: zoo.Inputs, how: dict[str, Any]) -> dict[str, Any]:
    fixed = {"do_sample": False, "min_new_tokens": 5, "max_new_tokens": 7}
    return zoo.without_labels(inputs) | fixed | how


def generated(name: str, conversion: dict[str, Any], hows: list[str]) -> dict[str, Any]:
    """What a model on lp ranks generates, and what the same one does in one process."""
    torch.manual_seed(0)
    serial, inputs = zoo.build(name)
    if conversion:
        serial = convert_to_ode(serial, **conversion)
    serial.eval()
    model = convert_to_ode(copy.deepcopy(serial)) if not conversion else copy.deepcopy(serial)
    parallelize(model, MGRIT)
    rank, found = dist.get_rank() if dist.is_initialized() else 0, {}
    one = {key: value[:1] for key, value in inputs.items()}
    for case in hows:
        how = HOW[case] | {"return_dict_in_generate": True, "output_logits": True}
        for batch in (inputs, one) if case in ("greedy", "beams") else (one,) if "lookup" in case else (inputs,):
            torch.manual_seed(7)
            expected = serial.generate(**options(batch, how))
            torch.manual_seed(7 + rank)  # lp rank 0's stream counts
            ours = model.generate(**options(batch, how))
            assert expected.logits is not None
            assert ours.logits is not None
            found[case, len(next(iter(batch.values())))] = {
                "tokens": ours.sequences.tolist(),
                "same": torch.equal(ours.sequences, expected.sequences),
                "same bits": all(torch.equal(a, b) for a, b in zip(ours.logits, expected.logits, strict=True)),
                "stream": torch.get_rng_state().sum().item(),
            }
    return found


FAMILIES = ["gpt2", "llama", "gemma3", "marian", "bart", "t5", "whisper"]


@pytest.mark.parametrize(
    ("world", "name"),
    [
        *((1, "gpt2"), (1, "bart"), *((2, name) for name in FAMILIES if name != "llama"), (3, "gemma3"), (3, "marian")),
        *((3, "t5"), pytest.param(2, "llama", marks=pytest.mark.compat)),
    ],
)
def test_tokens_and_scores_are_those_of_the_serial_model(world: int, name: str) -> None:
    hows = [how for how in HOW if "lookup" not in how or name in ("gpt2", "llama")]
    ranks = run_ranks(generated, world, name, {}, hows)
    for found in ranks:
        assert found == ranks[0]
        for case, result in found.items():
            assert result["same"], case
            assert result["same bits"], case


@pytest.mark.parametrize(
    ("name", "conversion"),
    [
        ("llama", {"step_size": 0.5, "form": "euler"}),
        ("gpt2", {"step_size": 0.5, "num_steps": 5, "buffers": (1, 0), "interpolation": "linear"}),
        ("marian", {"step_size": 0.5}),
    ],
)
def test_other_step_sizes(name: str, conversion: dict[str, Any]) -> None:
    for found in run_ranks(generated, 3, name, conversion, ["greedy", "beams"]):
        assert all(result["same"] and result["same bits"] for result in found.values())


def stop_and_cache(name: str) -> dict[str, Any]:
    """Rows that end early; which keys each rank keeps."""
    model, inputs = zoo.build(name)
    model = convert_to_ode(model.eval())
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    free = options(inputs, {"min_new_tokens": None, "return_dict_in_generate": True})
    eos = int(model.generate(**free).sequences[0, -4])  # the first row then ends early
    free |= {"eos_token_id": eos}
    expected = model.generate(**free)
    parallelize(model, LayerParallelConfig(micro_batches=2))  # of which a cache knows nothing
    ours = model.generate(**free)
    cache = ours.past_key_values
    cross = None
    if isinstance(cache, EncoderDecoderCache):
        cross = [layer.keys[0].numel() > 1 for layer in cache.cross_attention_cache.layers]
        cache = cache.self_attention_cache
    decoder = ode_view(model).stacks[-1]
    return {
        "same": torch.equal(ours.sequences, expected.sequences),
        "ended": eos in ours.sequences[0, -7:-1],
        "lengths": {layer.get_seq_length() for layer in cache.layers},
        "length": ours.sequences.shape[1] - 1,
        "numbers a token": [layer.keys[0, :, 0].numel() for layer in cache.layers],
        "cross": cross,
        "own": [index not in decoder.foreign for index in range(4)],
    }


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_early_end_and_a_cache_of_the_own_layers(name: str) -> None:
    ranks = run_ranks(stop_and_cache, 3, name)
    for found in ranks:
        assert found["same"]
        assert found["ended"]
        assert found["lengths"] == {found["length"]}
        assert all((numbers > 1) == own for numbers, own in zip(found["numbers a token"], found["own"], strict=True))
        assert found["cross"] in (None, found["own"])
    assert [sum(owns) for owns in zip(*(found["own"] for found in ranks), strict=True)] == [1] * 4


def other_ways() -> dict[str, bool]:
    """Adapters, inference mode, copies, another model's guesses, and caches that the caller keeps."""
    adapters = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=False)
    serial, inputs = zoo.build("llama")
    serial = convert_to_ode(get_peft_model(serial, adapters).eval())
    model = copy.deepcopy(serial)
    parallelize(model)
    twin, assistant = copy.deepcopy(model), zoo.build("llama", layers=1)[0].eval()
    free = options(inputs, {})
    one = {name: value[:1] for name, value in free.items() if isinstance(value, torch.Tensor)}
    one |= {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    found = {"adapters": torch.equal(model.generate(**free), serial.generate(**free))}
    with torch.inference_mode():
        found["inference mode"] = torch.equal(model.generate(**free), serial.generate(**free))
    found["copy"] = torch.equal(twin.generate(**free), serial.generate(**free))
    guessed = [m.generate(**one, assistant_model=assistant).sequences for m in (model, serial)]
    found["guesses"] = torch.equal(*guessed)

    def further(m: Any) -> list[torch.Tensor]:
        begun = m.generate(**one)
        ids = torch.cat([begun.sequences, inputs["input_ids"][:1, :3]], 1)
        begun = m.generate(ids, past_key_values=begun.past_key_values, max_new_tokens=4, do_sample=False)
        with torch.no_grad():
            cache = m(ids, use_cache=True).past_key_values
            return [begun, m(begun[:, -3:], past_key_values=cache).logits]

    found["kept caches"] = all(map(torch.equal, further(model), further(serial)))
    return found


def test_other_ways_to_generate() -> None:
    for found in run_ranks(other_ways, 2):
        assert len(found) == 5
        assert all(found.values()), found


def refusals() -> dict[str, str]:
    model, inputs = zoo.build("llama")
    model = convert_to_ode(model.eval())
    parallelize(model)
    rank, free = dist.get_rank(), options(inputs, {})
    criteria = hf.StoppingCriteriaList([hf.MaxTimeCriteria(60.0)])
    ids = inputs["input_ids"].clone()
    ids[0, 3] += rank
    wrong = {
        "time": lambda: model.generate(**free, max_time=60.0),
        "criterion": lambda: model.generate(**free, stopping_criteria=criteria),
        "static": lambda: model.generate(**free, cache_implementation="static"),
        "inputs": lambda: model.generate(**free | {"input_ids": ids}),
        "settings": lambda: model.generate(**free | {"max_new_tokens": 8 + rank}),
        "gradients": lambda: model(**inputs, use_cache=True),
        "hidden": lambda: model.generate(**free, output_hidden_states=True, return_dict_in_generate=True),
    }
    found = {}
    for name, call in wrong.items():
        try:
            call()
        except (ConfigurationError, RankMismatchError, UnsupportedModelError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    tokens = model.generate(**free)  # nothing is left behind
    return found | {"after": str(tokens.tolist())}


def test_refusals_on_all_ranks() -> None:
    first, second = run_ranks(refusals, 2)
    assert first == second
    assert first.keys() == {"time", "criterion", "static", "inputs", "settings", "gradients", "hidden", "after"}
    assert "max_new_tokens" in first["time"] == first["criterion"]
    assert "cache_implementation='static'" in first["static"]
    assert first["inputs"].startswith("RankMismatchError")
    assert "input_ids" in first["inputs"]
    assert "max_new_tokens" in first["settings"]
    assert "a KV cache with gradients" in first["gradients"]
    assert "output_hidden_states" in first["hidden"]


def unlike_kernels() -> list[list[int]]:
    """Ranks whose heads differ much more than kernels do."""
    model, inputs = zoo.build("gpt2")
    model = convert_to_ode(model.eval())
    parallelize(model)
    free = options(inputs, {"do_sample": True})
    torch.manual_seed(7)
    expected = model.generate(**free)
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * (1 + dist.get_rank()))
    torch.manual_seed(7)
    ours = model.generate(**free)
    assert torch.equal(ours, expected)
    return ours.tolist()


def test_all_ranks_choose_by_the_scores_of_the_first() -> None:
    first, second = run_ranks(unlike_kernels, 2)
    assert first == second
