"""The split form: the step size h scales every residual branch inside a layer, and folds into stock weights.

A pre-LN layer is x += branch(norm(x)) for two or three branches, each ending in a linear projection (Gemma: a norm).
`install_scaling` multiplies those outputs by h at run time, which leaves the parameters and their gradients those of
the original layer. `folded_state_dict` multiplies the projections' weights and biases instead: the same function
without any code of ours, so stock transformers runs it. `unfold_` is its inverse.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_layerpar.compat.torch import children_of, forward_pre_hooks
from hf_layerpar.errors import CheckpointError, UnsupportedModelError

_LLAMA = ("self_attn.o_proj", "mlp.down_proj")
_GEMMA = ("post_attention_layernorm", "post_feedforward_layernorm")  # sandwich: the post norms feed the residual
_VIT = ("attention.o_proj", "mlp.fc2")
_OPT = ("self_attn.out_proj", "encoder_attn.out_proj", "fc2")

BRANCH_OUTPUTS: dict[str, tuple[str, ...]] = {
    "GPT2Block": ("attn.c_proj", "crossattention.c_proj", "mlp.c_proj"),
    "GPTNeoXLayer": ("attention.dense", "mlp.dense_4h_to_h"),
    "LlamaDecoderLayer": _LLAMA,
    "Qwen2DecoderLayer": _LLAMA,
    "Qwen3DecoderLayer": _LLAMA,
    "MistralDecoderLayer": _LLAMA,
    "Gemma2DecoderLayer": _GEMMA,
    "Gemma3DecoderLayer": _GEMMA,
    "ViTLayer": _VIT,
    "DeiTLayer": _VIT,
    "OPTDecoderLayer": _OPT,
    "WhisperEncoderLayer": _OPT,
    "WhisperDecoderLayer": _OPT,
    "M2M100EncoderLayer": _OPT,
    "M2M100DecoderLayer": _OPT,
    "ModernBertEncoderLayer": ("attn.Wo", "mlp.Wo"),
    "RobertaPreLayerNormLayer": ("attention.output.dense", "crossattention.output.dense", "output.dense"),
    "T5Block": (
        "layer.0.SelfAttention.o",
        "layer.1.EncDecAttention.o",
        "layer.1.DenseReluDense.wo",
        "layer.2.DenseReluDense.wo",
    ),
}
"""Layer class -> the submodules whose outputs are added to the residual stream (some only with cross attention)."""

_OFFSET_NORMS = {"Gemma2RMSNorm", "Gemma3RMSNorm"}
"""Norms that multiply by 1 + weight: h is folded as weight -> h (1 + weight) - 1."""


def has_split_form(layer: nn.Module) -> bool:
    """Whether the layer is known to be pre-LN, so that h can scale its branches."""
    # OPT-350m normalises after the addition, like BERT
    return type(layer).__name__ in BRANCH_OUTPUTS and getattr(layer, "do_layer_norm_before", True)


def install_scaling(layer: nn.Module, step_size: float) -> None:
    """From now on every branch output of `layer` is multiplied by `step_size`; nothing is done for 1.

    Raises UnsupportedModelError for a layer without a split form.
    """
    if not has_split_form(layer):
        raise UnsupportedModelError(
            f"{type(layer).__name__} has no split form (it is not a known pre-LN layer); use form='euler'. "
            f"Known layers: {', '.join(BRANCH_OUTPUTS)}"
        )
    if step_size == 1:
        return
    names = {name for name, _ in layer.named_modules()}
    scaling = BranchScaling([b for b in BRANCH_OUTPUTS[type(layer).__name__] if b in names], step_size)
    scaling.attach(layer)
    layer.register_forward_pre_hook(scaling)


class BranchScaling:
    """The run-time scaling of one layer, kept among the layer's forward pre-hooks; follows deepcopy and pickle.

    PEFT replaces a projection by a wrapper around it and puts it back when adapters are merged. The scale belongs to
    whatever sits in the layer under the branch's name, so it is looked up again at every call.
    """

    def __init__(self, branches: list[str], step_size: float) -> None:
        self.branches = branches
        self.step_size = step_size
        self._scale = _Scale(step_size)
        self._hooked: dict[str, tuple[nn.Module, RemovableHandle]] = {}

    def attach(self, layer: nn.Module) -> None:
        for branch in self.branches:
            module: Any = layer
            for name in branch.split("."):  # as get_submodule does, at a fraction of its time
                module = children_of(module)[name]
            hooked = self._hooked.get(branch)
            if hooked is None or hooked[0] is not module:
                if hooked is not None:
                    hooked[1].remove()
                self._hooked[branch] = (module, module.register_forward_hook(self._scale))

    def __call__(self, layer: nn.Module, args: Any) -> None:
        self.attach(layer)


class _Scale:
    def __init__(self, step_size: float) -> None:
        self.step_size = step_size

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * self.step_size


def can_fold(model: nn.Module, state_dict: Mapping[str, Tensor]) -> bool:
    """Whether `folded_state_dict` is exact up to one rounding of each weight.

    False for quantized and offloaded (meta) weights, and for Gemma's norms in half precision: they store weight but
    multiply by 1 + weight, and h (1 + weight) - 1 lies near -1, where bfloat16 is too coarse (3 % at h = 1/16).
    """
    if getattr(model, "hf_quantizer", None) is not None:
        return False
    weights = [(state_dict[key], module) for key, module, _ in scaled_parameters(model) if key in state_dict]
    return all(
        weight.is_floating_point()
        and not weight.is_meta
        and (weight.dtype in (torch.float32, torch.float64) or not _is_offset_norm(module))
        for weight, module in weights
    )


def folded_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """`state_dict` (default: the model's own) with every scaled branch's step size multiplied into its weights.

    The given tensors aren't modified; those that need no scaling are handed on as they are. The keys are those of
    `model.state_dict()`, also when the model itself lacks parameters that `state_dict` has.
    Raises CheckpointError when a scaled weight isn't in `state_dict`, or holds no floating-point data.
    """
    folded = dict(model.state_dict() if state_dict is None else state_dict)
    for key, module, h in scaled_parameters(model):
        weight = folded.get(key)
        if weight is None:
            if key.endswith(".bias"):
                continue  # a projection without bias
            raise CheckpointError(
                f"{key!r} is to be multiplied by the step size {h}, but the state dict has no such key; pass the full "
                "state dict of the converted model, and merge PEFT adapters before saving"
            )
        if weight.is_meta or not weight.is_floating_point():
            raise CheckpointError(
                f"the step size {h} can't be folded into {key!r} of dtype {weight.dtype} on device {weight.device}; "
                "fold before quantizing, on a device that holds the weights"
            )
        folded[key] = fold(weight, module, h)
    return folded


def fold(weight: Tensor, module: nn.Module, h: float) -> Tensor:
    """A tensor of a scaled branch's last module, multiplied by the branch's step size."""
    return _offset_fold(weight, h) if _is_offset_norm(module) else weight * h


def unfold(weight: Tensor, module: nn.Module, h: float) -> Tensor:
    """The inverse of `fold`: bit-exact for h a power of two (Gemma's norms, and other h: up to one rounding)."""
    return _offset_fold(weight, 1 / h) if _is_offset_norm(module) else weight / h


@torch.no_grad()
def unfold_(model: nn.Module) -> None:
    """Divide the scaled branches' weights by their step size, in place: the model was built from folded weights.

    To be called after `install_scaling`, whose step sizes it uses.
    """
    for key, module, h in scaled_parameters(model):
        weight = getattr(module, key.rpartition(".")[2], None)
        if weight is not None:
            weight.copy_(unfold(weight, module, h))


def scaled_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, float]]:
    """(name in the model, owning module, step size) of the weight and bias of every scaled branch."""
    for path, layer in model.named_modules():
        for scaling in forward_pre_hooks(layer):
            if isinstance(scaling, BranchScaling):
                for branch in scaling.branches:
                    for name in ("weight", "bias"):
                        yield (
                            ".".join(filter(None, (path, branch, name))),
                            layer.get_submodule(branch),
                            scaling.step_size,
                        )


def _is_offset_norm(module: nn.Module) -> bool:
    return type(module).__name__ in _OFFSET_NORMS


def _offset_fold(weight: Tensor, h: float) -> Tensor:
    # in double: h (1 + w) - 1 cancels
    return ((1 + weight.double()) * h - 1).to(weight.dtype)
