"""`save_pretrained` by the ranks that share a model: one ordinary checkpoint, of which each writes what it owns."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers as hf
from safetensors.torch import load_file
from torch import nn

from hf_layerpar.checkpoint.pieces import Pieces, write_tensors
from hf_layerpar.errors import CheckpointError, RankMismatchError
from hf_layerpar.ode.convert import convert_to_ode
from hf_layerpar.sharding import parallelize
from tests import zoo
from tests.multiproc import run_ranks
from tests.problems import assert_same

SMALL = "40KB"


def mixtral() -> hf.PreTrainedModel:
    """Its experts are one tensor in memory, and several in a checkpoint."""
    torch.manual_seed(0)
    sizes = {"vocab_size": zoo.VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2}
    config = hf.MixtralConfig(**sizes, **heads)
    return hf.MixtralForCausalLM(config)


def built(name: str, conversion: dict[str, Any]) -> Any:
    return convert_to_ode(mixtral() if name == "mixtral" else zoo.build(name)[0], **conversion)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, each of which is in one file."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        assert not found.keys() & tensors.keys(), path.name
        found |= tensors
    return found


# ---- as stock writes it
def save(folder: str, name: str, conversion: dict[str, Any]) -> None:
    hf.utils.logging.disable_progress_bar()
    model = built(name, conversion)
    handle = parallelize(model)
    model.save_pretrained(f"{folder}/pieces", max_shard_size=SMALL)
    model.save_pretrained(f"{folder}/small")
    model.save_pretrained(f"{folder}/own format", max_shard_size=SMALL, save_original_format=False, variant="own")
    model.save_pretrained(f"{folder}/given", state_dict=handle.state_dict())


@pytest.mark.parametrize(
    ("name", "conversion"),
    [
        ("llama", {}),
        ("gpt2", {}),  # tied
        ("vit", {}),  # renamed
        ("mixtral", {}),  # taken apart
        ("marian", {}),  # with tensors that are not saved
        ("gemma2", {"step_size": 1 / 3, "num_steps": 4}),  # folded
        ("bert", {"step_size": 1 / 2, "num_steps": 4}),  # with custom code
    ],
)
def test_pieces_are_what_stock_writes(name: str, conversion: dict[str, Any], tmp_path: Path) -> None:
    run_ranks(save, 2, str(tmp_path), name, conversion)
    model = built(name, conversion)
    model.save_pretrained(tmp_path / "stock")
    one_file = sorted(os.listdir(tmp_path / "stock"))
    assert "model.safetensors" in one_file
    for folder in ("small", "given"):
        assert sorted(os.listdir(tmp_path / folder)) == one_file
        for file in one_file:
            assert (tmp_path / folder / file).read_bytes() == (tmp_path / "stock" / file).read_bytes(), file
    assert_same(stored(tmp_path / "pieces"), load_file(tmp_path / "stock" / "model.safetensors"))
    beside = set(one_file) - {"model.safetensors"}
    for file in beside:
        assert (tmp_path / "pieces" / file).read_bytes() == (tmp_path / "stock" / file).read_bytes(), file
    index = json.loads((tmp_path / "pieces" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert sorted(os.listdir(tmp_path / "pieces")) == sorted({*files, *beside, "model.safetensors.index.json"})
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    sizes = {file: sum(t.nbytes for t in load_file(tmp_path / "pieces" / file).values()) for file in files}
    assert all(size <= 40_000 or len(load_file(tmp_path / "pieces" / f)) == 1 for f, size in sizes.items())
    assert index["metadata"]["total_size"] == sum(sizes.values())
    if not conversion:
        for folder, variant in (("pieces", None), ("own format", "own")):
            loaded, info = type(model).from_pretrained(tmp_path / folder, variant=variant, output_loading_info=True)
            assert not any(info.values())
            assert_same(loaded.state_dict(), model.state_dict())


def test_files_are_written_as_safetensors_writes_them(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5).to(torch.bfloat16),
        "number": torch.tensor(7),
        "empty": torch.zeros(0, 4, dtype=torch.float64),
        "turned": torch.randn(4, 6).t(),
        "flags": torch.tensor([True, False, True]),
        "b": torch.randn(2, 2, 2).to(torch.float8_e4m3fn),
    }
    layout = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    write_tensors(tmp_path / "x.safetensors", layout, iter(tensors.values()))
    found = load_file(tmp_path / "x.safetensors")
    assert found["b"].dtype is torch.float8_e4m3fn
    assert torch.equal(found.pop("b").float(), tensors.pop("b").float())
    assert_same(found, tensors)


def test_what_needs_several_layers_at_once_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def stacked(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"all": torch.cat([t.flatten() for t in tensors.values()])}

    model = convert_to_ode(zoo.build("llama")[0])
    layout = {name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()}
    monkeypatch.setattr("hf_layerpar.checkpoint.pieces.revert_weight_conversion", stacked)
    with pytest.raises(CheckpointError, match=r"puts tensors of several layers .*save_original_format=False"):
        Pieces(model, layout, {}, {}, 2, max_shard_size="5GB")
    Pieces(model, layout, {}, {}, 2, max_shard_size="5GB", original_format=False)


# ---- who writes, and where
def save_in_two_groups(folder: str) -> None:
    """Two copies of the model: the one that has the main process is written, as with accelerate."""
    hf.utils.logging.disable_progress_bar()
    rank = dist.get_rank()
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    model = built("llama", {})
    parallelize(model, group=groups[rank // 2])
    model.save_pretrained(folder, is_main_process=rank == 0, max_shard_size=SMALL)
    if rank > 1:  # whoever isn't asked to write doesn't wait for anybody
        assert not list(Path(folder).parent.glob("other*"))


def test_the_copy_with_the_main_process_is_written(tmp_path: Path) -> None:
    run_ranks(save_in_two_groups, 4, str(tmp_path / "x"))
    assert_same(hf.LlamaForCausalLM.from_pretrained(tmp_path / "x").state_dict(), built("llama", {}).state_dict())


def errors(folder: str) -> list[str]:
    hf.utils.logging.disable_progress_bar()
    rank, said = dist.get_rank(), []
    model = built("llama", {})
    parallelize(model)
    (Path(folder) / f"file {rank}").write_text("")
    is_dir = Path.is_dir

    def unseen(path: Path, *args: Any, **kwargs: Any) -> bool:
        return not (rank == 1 and ".saving-" in path.name) and is_dir(path, *args, **kwargs)

    def saved(name: str, **options: Any) -> None:
        try:
            model.save_pretrained(f"{folder}/{name}", **{"max_shard_size": SMALL} | options)
        except (CheckpointError, RankMismatchError) as error:
            said.append(str(error))

    saved("file 0")
    saved(f"of {rank}")
    Path.is_dir = unseen  # type: ignore[method-assign, assignment]
    saved("x")
    Path.is_dir = is_dir  # type: ignore[method-assign]
    model.save_pretrained(f"{folder}/y")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    saved("y")  # in pieces, over one file
    if rank == 1:
        model.model.layers[-1].self_attn.q_proj.weight = nn.Parameter(torch.zeros(1, 2))
    saved("z")
    return said


def test_errors_are_told_to_all_ranks(tmp_path: Path) -> None:
    said, others = run_ranks(errors, 2, str(tmp_path))
    assert len(said) == 4
    assert said[:3] == others[:3]
    for text, part in zip(said, ("is a file", "'of 0', '", "does not see", "(1, 2)"), strict=True):
        assert part in text.replace(f"{tmp_path}/", "")
    assert {path.name for path in tmp_path.iterdir()} == {"file 0", "file 1", "y"}
    assert "model.safetensors" not in os.listdir(tmp_path / "y")
    loaded = hf.LlamaForCausalLM.from_pretrained(tmp_path / "y").state_dict()
    assert_same(loaded, {name: 2 * tensor for name, tensor in built("llama", {}).state_dict().items()})
