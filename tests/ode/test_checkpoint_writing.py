"""Writing a converted model's checkpoint: arguments of save_pretrained, layers of other ranks, kills at any moment."""

from __future__ import annotations

import copy
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor

from hf_layerpar.errors import CheckpointError, ConfigurationError
from hf_layerpar.loading import from_pretrained
from hf_layerpar.ode.convert import ode_view
from tests.ode.test_checkpoint import converted, distance, files, logits

# Arguments of stock save_pretrained


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    model, _ = converted("bert")
    model.save_pretrained(tmp_path / "x", is_main_process=False)
    assert files(tmp_path) == set()


def test_a_given_state_dict_is_saved(tmp_path: Path) -> None:
    model, inputs = converted("gpt2", step_size=0.5, form="split")
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    model.save_pretrained(tmp_path, state_dict=other.state_dict())
    assert torch.equal(logits(from_pretrained(tmp_path), inputs), logits(other, inputs))


def test_a_variant_lies_beside_the_plain_weights(tmp_path: Path) -> None:
    model, inputs = converted("gpt2", step_size=0.5, form="split")
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, variant="copy", max_shard_size="20KB")
    model.save_pretrained(tmp_path, variant="copy")
    weights = {"model.safetensors", "model.copy.safetensors"}
    assert files(tmp_path) == weights | {"config.json", "generation_config.json"}
    assert torch.equal(logits(from_pretrained(tmp_path, variant="copy"), inputs), logits(model, inputs))


def test_a_file_or_a_distributed_checkpoint_is_refused(tmp_path: Path) -> None:
    model, _ = converted("bert")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(ConfigurationError, match="distributed_checkpoint=True"):
        model.save_pretrained(tmp_path / "x", distributed_checkpoint=True)
    assert files(tmp_path) == {"file"}


def test_adapters_are_written_as_stock_writes_them(tmp_path: Path) -> None:
    model, inputs = converted("gpt2", step_size=0.5, form="split")
    model.save_pretrained(tmp_path)
    base = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    model.add_adapter(peft.LoraConfig(target_modules=["c_proj"], init_lora_weights=False, fan_in_fan_out=True))
    model.save_pretrained(tmp_path)
    assert files(tmp_path) >= {"adapter_config.json", "adapter_model.safetensors"}
    assert all((tmp_path / name).read_bytes() == content for name, content in base.items())
    plain = tmp_path / "base"
    plain.mkdir()
    for name in base:
        shutil.copy(tmp_path / name, plain)
    loaded = from_pretrained(plain)
    loaded.load_adapter(str(tmp_path))
    assert distance(logits(loaded, inputs), logits(model, inputs)) < 1e-6


# Layers held by other ranks


def drop_layers(model: Any, keep: int) -> dict[str, Tensor]:
    """Leave the first `keep` layers of every stack; returns the full state dict as gathered, no storage shared."""
    full = {key: value.clone() for key, value in model.state_dict().items()}
    for stack in ode_view(model).stacks:
        stack.foreign = frozenset(range(keep, len(stack.layers)))
        for layer in stack.layers[keep:]:
            for module in layer.modules():
                for name in module._parameters:
                    module._parameters[name] = None
    return full


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("vit", {}),
        ("gpt2", {"step_size": 0.5, "form": "split"}),
        ("gemma3", {"step_size": 0.5, "form": "split"}),
        ("bart", {"step_size": 0.5, "form": "euler"}),
    ],
)
@pytest.mark.parametrize("max_shard_size", ["50GB", "20KB"])
def test_a_model_that_lacks_layers_saves_a_given_state_dict(
    name: str, settings: dict, max_shard_size: str, tmp_path: Path
) -> None:
    model, _ = converted(name, **settings)
    model.save_pretrained(tmp_path / "whole", max_shard_size=max_shard_size)
    full = drop_layers(model, keep=1)
    for incomplete in (None, model.state_dict()):
        with pytest.raises(
            CheckpointError, match=r"\.1 is not among .*state_dict=layer_parallel\(model\)\.state_dict\("
        ):
            model.save_pretrained(tmp_path / "x", state_dict=incomplete)
    model.save_pretrained(tmp_path / "x", state_dict={})  # what the ranks other than lp rank 0 have
    assert not (tmp_path / "x").exists()
    model.save_pretrained(tmp_path / "x", state_dict=full, max_shard_size=max_shard_size)
    assert files(tmp_path / "x") == files(tmp_path / "whole")
    for file in files(tmp_path / "x"):
        assert (tmp_path / "x" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file


# Atomicity


def test_files_of_an_earlier_save_do_not_survive(tmp_path: Path) -> None:
    model, inputs = converted("gpt2", step_size=0.5, form="euler")
    (tmp_path / "optimizer.pt").write_text("not ours")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(files(tmp_path)) > 6
    assert torch.equal(logits(from_pretrained(tmp_path), inputs), logits(model, inputs))
    model, inputs = converted("gpt2", step_size=0.5, form="split")
    model.save_pretrained(tmp_path)
    ours = {"config.json", "generation_config.json", "model.safetensors"}
    assert files(tmp_path) == ours | {"optimizer.pt"}
    assert torch.equal(logits(from_pretrained(tmp_path), inputs), logits(model, inputs))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert "model.safetensors" not in files(tmp_path)
    assert torch.equal(logits(from_pretrained(tmp_path), inputs), logits(model, inputs))


def test_a_save_that_raises_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = converted("gpt2")
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path / "x")

    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", full_disk)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_proj.weight.zero_()
    for target in ("x", "y"):
        with pytest.raises(OSError, match="no space left"):
            model.save_pretrained(tmp_path / target)
    assert files(tmp_path) == {"x"}
    assert torch.equal(logits(from_pretrained(tmp_path / "x"), inputs), expected)


def test_a_symbolic_link_to_a_directory_is_followed(tmp_path: Path) -> None:
    model, inputs = converted("gpt2")
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    model.save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert files(tmp_path / "disk") == {"config.json", "generation_config.json", "model.safetensors"}
    assert torch.equal(logits(from_pretrained(tmp_path / "link"), inputs), logits(model, inputs))


def killed_after(events: int, save: Callable[[], None]) -> bool:
    """Run `save` in a forked child that is killed at its `events`-th change to the file system; False if it finished.

    Half of the weights are on disk where the kill falls on the writing of a weight file.
    """
    child = os.fork()
    if child == 0:
        left = events

        def count() -> None:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        def audit(event: str, args: tuple) -> None:
            writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
            if writes or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir"):
                count()

        def halves(tensors: dict[str, Tensor], file: str, metadata: Any = None) -> None:
            whole = safetensors.torch.save(tensors, metadata)
            Path(file).write_bytes(whole[: len(whole) // 2])
            count()
            Path(file).write_bytes(whole)

        transformers.modeling_utils.safe_save_file = halves
        sys.addaudithook(audit)
        save()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


@pytest.mark.parametrize(
    ("old_form", "old_shard", "new_shard"),
    [
        ("euler", None, "50GB"),
        ("euler", "50GB", "50GB"),
        ("split", "50GB", "50GB"),
        ("euler", "50GB", "60KB"),
        ("euler", "60KB", "50GB"),
    ],
    ids=["fresh", "file over file", "training goes on", "shards over file", "file over shards"],
)
def test_a_kill_at_any_moment_leaves_no_mixture(
    old_form: Any, old_shard: str | None, new_shard: str, tmp_path: Path
) -> None:
    """After it there is the whole old checkpoint, the whole new one, or none; and the next save works."""
    old, inputs = converted("gpt2", step_size=0.5, form=old_form)
    new, _ = converted("gpt2", step_size=0.5, form="split")
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.mul_(0.9)
    wanted = {"old": logits(old, inputs), "new": logits(new, inputs)}
    outcomes = []
    for events in range(200):
        target = tmp_path / f"{events}"
        if old_shard is not None:
            old.save_pretrained(target, max_shard_size=old_shard)
        killed = killed_after(events, lambda target=target: new.save_pretrained(target, max_shard_size=new_shard))
        try:
            found = logits(from_pretrained(target), inputs)
        except (OSError, CheckpointError):
            outcomes.append("none")
        else:
            outcomes.append(next((name for name, value in wanted.items() if torch.equal(value, found)), "mixture"))
        if not killed:
            break
        new.save_pretrained(target, max_shard_size=new_shard)
        assert torch.equal(logits(from_pretrained(target), inputs), wanted["new"])
    assert "mixture" not in outcomes
    assert outcomes[0] == ("none" if old_shard is None else "old")
    assert outcomes[-1] == "new"
    assert len(outcomes) > 6
    if old_form == "split":  # only the weight file differs: it is replaced in one go
        assert "none" not in outcomes
