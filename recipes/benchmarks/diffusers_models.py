"""Transformers of diffusers, which are no models of transformers': do they train on one and two ranks as stock does?

    pip install diffusers
    python recipes/benchmarks/diffusers_models.py

Of each a small random model is built in float64, without dropout, and trained to make noise of noise. The gradients of
the first `train_step` are compared with stock's, and so are the weights after some steps of AdamW. Written to
recipes/benchmarks/results/diffusers_models.json.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.metadata
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that a checkout runs without being installed

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from hf_layerpar import LayerParallelConfig, convert_to_ode, parallelize
from recipes.benchmarks.launch import RESULTS, found_by_rank
from recipes.results import print_table, versions, write_json

ROWS, STEPS = 4, 5
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 5}
CHANNELS = {"in_channels": 4, "out_channels": 4, "sample_size": 8}
MODELS: dict[str, dict[str, Any]] = {
    "PixArtTransformer2DModel": HEADS | CHANNELS | {"cross_attention_dim": 16, "caption_channels": 16},
    "SanaTransformer2DModel": HEADS
    | CHANNELS
    | {"num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16}
    | {"caption_channels": 16, "patch_size": 1},
    "SD3Transformer2DModel": HEADS
    | CHANNELS
    | {"joint_attention_dim": 16, "caption_projection_dim": 16, "pooled_projection_dim": 16},
    "WanTransformer3DModel": HEADS
    | {"attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 32, "ffn_dim": 32},
    "FluxTransformer2DModel": HEADS
    | {"num_single_layers": 4, "in_channels": 4, "joint_attention_dim": 16, "pooled_projection_dim": 16}
    | {"axes_dims_rope": (2, 2, 4)},
}


def inputs_of(name: str) -> dict[str, Any]:
    """A batch of `ROWS` noisy images (or films) of 8 x 8 with 7 tokens of text."""
    draw = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(ROWS, *shape, generator=draw, dtype=torch.float64)

    text, time = noise(7, 16), torch.arange(1, ROWS + 1)
    if name.startswith("Flux"):
        places = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(7, 3)}
        places["img_ids"][:, 1], places["img_ids"][:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
        packed = {"hidden_states": noise(16, 4), "encoder_hidden_states": text, "pooled_projections": noise(16)}
        return packed | {"timestep": time / 10} | places
    found = {"hidden_states": noise(4, 2, 8, 8) if name.startswith("Wan") else noise(4, 8, 8)}
    found |= {"encoder_hidden_states": text, "timestep": time}
    if name.startswith("SD3"):
        found["pooled_projections"] = noise(16)
    if name.startswith("PixArt"):
        found["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    return found


def loss_of(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The mean squared error of what the model makes of noise, against other noise."""
    sample = model(**{name: value for name, value in batch.items() if name != "target"}).sample
    return functional.mse_loss(sample, batch["target"])


def stock_steps(model: nn.Module, batch: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The gradients of the first step, and the weights after all."""
    optimizer, first = torch.optim.AdamW(model.parameters(), lr=1e-3), {}
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        if step == 0:
            first = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
    return first, {n: p.detach() for n, p in model.named_parameters()}


def compare(name: str, micro_batches: int) -> dict[str, Any]:
    """What this rank holds against stock: relative errors of the first gradient and of the trained weights."""
    torch.manual_seed(0)
    model = getattr(importlib.import_module("diffusers"), name)(**MODELS[name]).double()
    batch = inputs_of(name)
    with torch.no_grad():
        batch["target"] = torch.randn_like(model(**batch).sample)
    gradients, weights = stock_steps(copy.deepcopy(model), batch)
    convert_to_ode(model)
    handle = parallelize(model, LayerParallelConfig(micro_batches=micro_batches))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    errors = {}
    for step in range(STEPS):
        optimizer.zero_grad()
        handle.train_step(batch, lambda part: loss_of(model, part))
        if step == 0:
            mine = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            errors["gradient"] = relative_error(mine, gradients)
        optimizer.step()
    errors["weights"] = relative_error(dict(model.named_parameters()), weights)
    return errors | {"parameters": sorted(mine), "of": sorted(gradients)}


def relative_error(found: dict[str, Any], expected: dict[str, Tensor]) -> float:
    squares = sum(float((found[n].detach() - expected[n]).square().sum()) for n in found)
    return (squares / sum(float(tensor.square().sum()) for tensor in expected.values())) ** 0.5


def run_rank(folder: Path) -> None:
    """What each started process does."""
    torch.set_num_threads(1)
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    rank = dist.get_rank() if dist.is_initialized() else 0
    found = {}
    for name in MODELS:
        for count in (1,) if name.startswith("Flux") else (1, 2):  # Flux's places have no row for each image
            found[f"{name}, {count} micro-batch{'es' if count > 1 else ''}"] = compare(name, count)
    write_json(folder / f"{rank}.json", found)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "diffusers_models.json")
    parser.add_argument("--rank_folder", type=Path, help=argparse.SUPPRESS)  # given to the ranks this script starts
    options = parser.parse_args()
    if options.rank_folder is not None:
        run_rank(options.rank_folder)
        return
    rows: dict[str, dict[str, float]] = {}
    for ranks in (1, 2):
        found = found_by_rank(ranks, Path(__file__), [])
        for name in found[0]:
            of_ranks = [of_rank[name] for of_rank in found]
            lost = set(of_ranks[0]["of"]) - {n for of_rank in of_ranks for n in of_rank["parameters"]}
            if lost:
                raise RuntimeError(f"{name} on {ranks} ranks made no gradient of {sorted(lost)[:4]}")
            worst = {key: max(of_rank[key] for of_rank in of_ranks) for key in ("gradient", "weights")}
            rows[f"{name}, {ranks} rank{'s' if ranks > 1 else ''}"] = worst
    known = {"diffusers": importlib.metadata.version("diffusers")}
    write_json(options.output, {"steps": STEPS, "rows": rows, "versions": versions() | known})
    print_table([(name, f"gradient {e['gradient']:.1e}, weights {e['weights']:.1e}") for name, e in rows.items()])


if __name__ == "__main__":
    main()
