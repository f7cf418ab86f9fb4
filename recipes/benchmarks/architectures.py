"""Which architectures of transformers convert, and do they compute what stock computes? A sweep over the Auto classes.

    python recipes/benchmarks/architectures.py [--ranks 2 --working] [--tasks "causal LM" "masked LM"] [--only bloom]

Of every architecture a small random model is built, in float64 where stock can, without dropout; the loss is a weighted
mean of what its head returns. Gradients of `train_step` on 1 or more ranks are compared with stock's. Each architecture
runs in processes of its own, with a limit of time. Of hierarchical image models, whose states change their shape from
stage to stage, one stage's list is chosen (`CHOSEN`).

Outcomes: equal to the bit; equal (up to rounding); wrong; refused (by an error of hf_layerpar, which is noted); failed
(any other error); and for those that stock could not run here, not built. Written to
recipes/benchmarks/results/architectures.json, for each number of ranks, in place of what was known of the same
architectures.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import multiprocessing as mp
import os
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from multiprocessing import connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that a checkout runs without being installed

import torch
import torch.distributed as dist
import transformers as hf
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers.models.auto import modeling_auto

from hf_layerpar import convert_to_ode, ode_view, parallelize
from hf_layerpar.errors import LayerParallelError
from recipes.benchmarks.launch import RESULTS
from recipes.results import print_table, versions, write_json

TASKS = {
    "causal LM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked LM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "image classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "image-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "CTC": "MODEL_FOR_CTC_MAPPING_NAMES",
    "audio classification": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "object detection": "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES",
    "segmentation": "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES",
}
"""Of image-text models the text path: images need each one's own processor."""

OUTCOMES = ("equal to the bit", "equal", "wrong", "refused", "failed", "not built")
MOST_PARAMETERS = 60_000_000

# ---- small configs: the first rule whose pattern is a key's name gives its value
SIZES: dict[str, int] = {"layers": 4, "hidden": 32, "heads": 4, "kv": 2, "head": 8, "vocab": 128}
RULES: list[tuple[str, Any]] = [
    (r"vocab_size(_per_layer_input)?|(src|tgt|text|char|type)_vocab_size|n_vocab", "vocab"),
    (
        r"(num|n)_(hidden_)?layers?|(num_)?(encoder|decoder)_layers|num_(encoder|decoder)_(hidden_)?layers|depth",
        "layers",
    ),
    (r"num_(key_value|kv)_heads|num_kv_heads|n_head_kv|n_kv_heads|multi_query_group_num", "kv"),
    (
        r"((num|n|encoder|decoder)_)?(attention_|attn_)?heads?|(num_)?(encoder|decoder)_attention_heads|attention_heads",
        "heads",
    ),
    (r"qk_rope_head_dim|qk_nope_head_dim|v_head_dim|head_dim|d_kv|d_head|rotary_dim|head_size|global_head_dim", "head"),
    (r"(q|kv)_lora_rank|index_head_dim", 16),
    (
        r"hidden_size|d_model|n_embd|dim|embed_dim|embedding_size|emb_dim|word_embed_proj_dim|attention_hidden_size",
        "hidden",
    ),
    (r"hidden_dim|(encoder_|decoder_|moe_|shared_expert_|expert_)?(intermediate_size|ffn_dim|ffn_hidden_size)", 64),
    (r"d_ff|n_inner|d_inner|ffn_hidden_size|dense_intermediate_size|shared_intermediate_size|mlp_dim", 64),
    (r"(num|n)_(local_|routed_)?experts|moe_num_experts|num_local_experts", 4),
    (r"num_experts_per_tok|top_k|moe_top_?k|moe_k|num_selected_experts|experts_top_k", 2),
    (r"n_group|topk_group|n_shared_experts|num_expert_groups", 1),
    (r"max_position_embeddings|n_positions|n_ctx|max_(seq_len|sequence_length|target_positions)|seq_length", 64),
    (r".*layerdrop", 0.0),
    (r"decoder_start_token_id|pad_token_id", 0),
    (r"bos_token_id", 1),
    (r"eos_token_id", 2),
    (r"image_size", 32),
    (r"patch_size", 8),
    (r"max_source_positions", 20),
]
TRIES: tuple[dict[str, Any], ...] = (
    {},
    {"without": "head"},
    {"without": 32},
    {"kv": 4},
    {"kv": 4, "hidden": 64, "head": 16},
    {"lists": True},
    {"nones": True},
    {"nones": True, "lists": True, "kv": 4},
    {"layers": 2},
    {"only": ("layers", "vocab")},
)
"""Changes of `SIZES`, tried until stock can build and run the model: all rules, all but one, or some only; lists with
an entry for each layer cut; sizes that are None by default set too."""

OF_TYPE: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "reformer": {"is_decoder": True, "num_hashes": 1, "axial_pos_embds": False},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
    "xmod": {"default_language": "en_XX"},
}

CHOSEN: dict[str, str] = {
    "swin": "encoder.layers.2.blocks",
    "swinv2": "encoder.layers.2.blocks",
    "donut-swin": "encoder.layers.2.blocks",
    "convnext": "encoder.stages.2.layers",
    "convnextv2": "encoder.stages.2.layers",
    "cvt": "encoder.stages.2.layers",
    "focalnet": "encoder.stages.2.layers",
    "poolformer": "encoder.block.2",
    "pvt": "encoder.block.2",
    "pvt_v2": "encoder.layers.2.blocks",
    "mobilevit": "encoder.layer.3.transformer.layer",
    "mobilevitv2": "encoder.layer.3.transformer.layer",
}
"""What `convert_to_ode` is given as `stacks`."""


def small_config(config_class: Any, changes: dict[str, Any]) -> Any:
    default = config_class()
    sizes, values = SIZES | changes, dict(OF_TYPE.get(config_class.model_type, {}))
    depth = getattr(default, "num_hidden_layers", None)
    for key, value in vars(default).items():
        if isinstance(value, hf.PreTrainedConfig):
            values[key] = small_config(type(value), changes)
        elif isinstance(value, int | float | None) and not isinstance(value, bool):
            rule = next((rule for pattern, rule in RULES if re.fullmatch(pattern, key)), None)
            left_out = value is None and not ("nones" in changes and rule in ("head", "kv", 64))
            if rule is None or (left_out and rule != 0) or rule == changes.get("without") or key in values:
                continue
            if "only" in changes and rule not in changes["only"] and rule != 0:
                continue
            values[key] = sizes[rule] if isinstance(rule, str) else rule
        if key == "image_size" and isinstance(value, list | tuple) and changes.get("without") != 32:
            values[key] = type(value)([32] * len(value))
        if isinstance(value, list) and len(value) == depth and "lists" in changes:
            values[key] = value[: sizes["layers"]]
        if key.endswith("_token_id") and isinstance(value, int) and value >= SIZES["vocab"] and key not in values:
            values[key] = 3 + len(key) % 20  # of images and the like: none is in the inputs
    return config_class(**values)


def inputs_of(model: Any, task: str) -> dict[str, Any]:
    config, takes = model.config, inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(30, 120, (2, 12), generator=generator)

    def configured(*names: str, default: int) -> int:
        configs = [config, *(v for v in vars(config).values() if isinstance(v, hf.PreTrainedConfig))]
        found = next((v for c in configs for n in names if (v := getattr(c, n, None)) is not None), default)
        return found if isinstance(found, int) else max(found)

    name = model.main_input_name
    given: dict[str, Any] = {"input_ids": ids}
    if "LM" in task or task in ("seq2seq", "image-text"):
        name = "input_ids"
    elif name == "pixel_values":
        size = configured("image_size", default=64)
        pixels = torch.randn(2, configured("num_channels", default=3), size, size, generator=generator)
        given = {name: pixels}
    elif name == "input_features":
        mel = configured(
            "num_mel_bins", "feature_size", "input_feat_per_channel", "feature_projection_input_dim", default=80
        )
        frames = 2 * configured("max_source_positions", default=20)
        wide = torch.randn(2, mel, frames, generator=generator)
        given = {name: wide if "max_source_positions" in vars(config) else wide.transpose(1, 2)}
    else:
        given = {name: torch.randn(2, configured("max_length", default=4000), generator=generator)}
    if name == "input_ids" and "attention_mask" in takes:
        given["attention_mask"] = torch.ones_like(ids)
    if "decoder_input_ids" in takes and getattr(config, "is_encoder_decoder", False):
        given["decoder_input_ids"] = ids[:, :8]
    if "use_cache" in takes:
        given["use_cache"] = False
    return given


def loss_of(output: Any) -> Tensor:
    tensors = [output["logits"]] if "logits" in output and isinstance(output["logits"], Tensor) else tree_leaves(output)
    head = next(t for t in tensors if isinstance(t, Tensor) and t.is_floating_point() and t.ndim > 1)
    weights = torch.linspace(-1, 1, head.numel(), dtype=head.dtype).view(head.shape)
    return (head * weights).mean() + head.square().mean()


# ---- one architecture
def build(config_class: Any, model_class: Any, task: str) -> tuple[Any, dict[str, Any], float, dict[str, Tensor]]:
    """(model, inputs, stock's loss, stock's gradients) of the first try that stock can run."""
    error: Exception | None = None
    for changes in TRIES:
        for dtype in (torch.float64, torch.float32):
            try:
                config = small_config(config_class, changes)
                with torch.device("meta"):
                    size = sum(p.numel() for p in model_class(copy.deepcopy(config)).parameters())
                if size > MOST_PARAMETERS:
                    raise ValueError(f"{size} parameters")
                torch.manual_seed(0)
                model = model_class(config).to(dtype).eval()
                inputs = inputs_of(model, task)
                inputs = {
                    k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()
                }
                found = [stock_gradients(model, inputs) for _ in range(2)]
                same = all(torch.equal(found[0][1][n], g) for n, g in found[1][1].items())
                if not same or not found[0][1] or not all(g.isfinite().all() for g in found[0][1].values()):
                    raise ValueError("stock's gradients are not finite, or differ from call to call")
                return model, inputs, *found[0]
            except Exception as raised:
                error = raised
    assert error is not None
    raise error


def stock_gradients(model: Any, inputs: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(1)
    loss = loss_of(model(**inputs))
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def examine(config_class: Any, model_class: Any, task: str) -> dict[str, Any]:
    try:
        model, inputs, expected, grads = build(config_class, model_class, task)
    except Exception as error:
        return {"outcome": "not built", "error": f"{type(error).__name__}: {error}"[:300]}
    model.zero_grad(set_to_none=True)
    try:
        chosen = CHOSEN.get(config_class.model_type)
        convert_to_ode(model, stacks=chosen and [chosen])
        stacks = [
            f"{stack.path} ({len(stack.layers)} {type(stack.layers[0]).__name__})" for stack in ode_view(model).stacks
        ]
        handle = parallelize(model)
        torch.manual_seed(1)
        loss = float(handle.train_step(inputs, lambda batch: loss_of(model(**batch))))
    except LayerParallelError as error:
        return {"outcome": "refused", "error": f"{type(error).__name__}: {error}"[:600]}
    except Exception as error:
        where = "".join(traceback.format_exception(error)[-3:])
        return {"outcome": "failed", "error": f"{type(error).__name__}: {error}"[:300], "where": where[-900:]}
    mine = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    missing = {n for n, g in grads.items() if n not in mine and g.any()}
    extra = sum(float(g.double().square().sum()) for n, g in mine.items() if n not in grads)
    squares = sum(float((mine[n] - g).double().square().sum()) for n, g in grads.items() if n in mine)
    norm = sum(float(g.double().square().sum()) for g in grads.values())
    is_double = next(iter(grads.values())).dtype == torch.float64
    error = ((squares + extra) / norm) ** 0.5 if norm else float("inf")
    loss_error = abs(loss - expected) / max(abs(expected), 1e-12)
    bits = loss == expected and all(torch.equal(mine[n], g) for n, g in grads.items() if n in mine)
    # norms and rotary tables are in float32 in some models
    close = max(error, loss_error) < (1e-6 if is_double else 1e-4)
    outcome = "equal to the bit" if bits and not extra else "equal" if close else "wrong"
    return {"outcome": outcome, "gradient_error": error, "loss_error": loss_error, "stacks": stacks, "missing": missing}


def _rank(rank: int, ranks: int, store: str, pipe: Any, names: tuple[str, str], task: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    hf.logging.set_verbosity_error()
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # of a process of its own
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    model_class = getattr(hf, names[1], None)
    if model_class is None:
        pipe.send({"outcome": "not built", "error": f"transformers has no {names[1]}"})
        return
    pipe.send(examine(hf.CONFIG_MAPPING[names[0]], model_class, task))
    if ranks > 1:
        dist.destroy_process_group()


def on_ranks(ranks: int, names: tuple[str, str], task: str, limit: float) -> dict[str, Any]:
    """The worst outcome of any rank; together they must have all of stock's gradients."""
    context = mp.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(ranks):
            mine, theirs = context.Pipe()
            process = context.Process(
                target=_rank, args=(rank, ranks, f"{folder}/store", theirs, names, task), daemon=True
            )
            process.start()
            theirs.close()
            pipes.append(mine)
            processes.append(process)
        found: list[dict[str, Any]] = []
        deadline, waiting = time.monotonic() + limit, list(pipes)
        while waiting and (ready := connection.wait(waiting, max(0.0, deadline - time.monotonic()))):
            for pipe in ready:
                waiting.remove(pipe)  # type: ignore[arg-type]
                try:
                    found.append(pipe.recv())  # type: ignore[union-attr]
                except EOFError:
                    found.append({"outcome": "failed", "error": "the process died"})
        if waiting:
            found.append({"outcome": "failed", "error": f"no result within {limit:.0f} s"})
        for process in processes:
            process.kill()
            process.join()
    worst = max(found, key=lambda f: OUTCOMES.index(f["outcome"]) if f["outcome"] != "not built" else 9)
    lost = set.intersection(*(f.pop("missing", set()) for f in found))
    if worst["outcome"] in OUTCOMES[:2] and lost:
        worst |= {"outcome": "wrong", "error": f"no gradient of {sorted(lost)[:4]}"}
    return worst


def architectures(tasks: list[str], only: list[str]) -> Iterator[tuple[str, str, str]]:
    """(task, model type, class name)."""
    for task in tasks:
        for model_type, names in getattr(modeling_auto, TASKS[task]).items():
            if not only or model_type in only:
                yield task, model_type, names if isinstance(names, str) else names[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), metavar="TASK")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="MODEL_TYPE", help="these alone; others stay in the file"
    )
    parser.add_argument(
        "--working", action="store_true", help="those alone that equal stock in one process, as the file says"
    )
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for an architecture")
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / "architectures.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    working = {(r["task"], r["model_type"]) for r in before.get("1", []) if r["outcome"] in OUTCOMES[:2]}
    rows = []
    for task, model_type, name in architectures(args.tasks, args.only):
        if args.working and (task, model_type) not in working:
            continue
        found = on_ranks(args.ranks, (model_type, name), task, args.limit)
        rows.append({"task": task, "model_type": model_type, "class": name} | found)
        print(f"{task:22}{model_type:28}{found['outcome']:18}{found.get('error', '')[:200]}", flush=True)
        if args.only and "where" in found:
            print(found["where"])
    counts = {task: Counter(row["outcome"] for row in rows if row["task"] == task) for task in args.tasks}
    print_table([(task, ", ".join(f"{count[o]} {o}" for o in OUTCOMES if count[o])) for task, count in counts.items()])
    done = {(row["task"], row["model_type"]) for row in rows}
    kept = [row for row in before.get(str(args.ranks), []) if (row["task"], row["model_type"]) not in done]
    # of runs of a part of them, one after the other, all are noted
    earlier = before.get("runs", {}).get(str(args.ranks), []) if kept else []
    run = {"command": [Path(sys.argv[0]).name, *sys.argv[1:]], "architectures": len(rows), "versions": versions()}
    runs = before.get("runs", {}) | {str(args.ranks): [*earlier, run]}
    write_json(path, before | {str(args.ranks): kept + rows, "runs": runs})


if __name__ == "__main__":
    main()
