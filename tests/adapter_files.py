# SPDX-License-Identifier: Apache-2.0
"""Tiny quantized models of every family with LoRA in diffusers, and the names in files for them."""

from __future__ import annotations

import inspect
import typing
from functools import cache

import diffusers
import torch
import zoo
from diffusers.loaders.lora_base import LoraBaseMixin
from torch import Tensor, nn

import dtq
from dtq.formats import FORMATS
from dtq.nn.swap import finalize
from dtq.plan.layers import LayerSpec

UNUSABLE = {
    "CosmosTransformer3DModel": "its pipeline asks for the package cosmos_guardrail",
    "PRXTransformer2DModel": "the LoRA loader of its pipeline asks for a U-Net",
    "QwenImage21Transformer2DModel": "its pipeline cannot be made without a tokenizer",
    "RFD4ProteinaTransformer": "its pipeline cannot be made without its other models",
}


@cache
def pipelines() -> dict[str, type]:
    """Name of a transformer class to a pipeline of diffusers that loads LoRA for it."""
    found: dict[str, type] = {}
    for name in sorted(dir(diffusers), key=len):  # the plainest pipeline of a family
        kind = getattr(diffusers, name) if name.endswith("Pipeline") else None
        if not (inspect.isclass(kind) and issubclass(kind, LoraBaseMixin)):
            continue
        hint = inspect.signature(kind.__init__).parameters.get("transformer")
        if hint is None:
            continue
        hinted = typing.get_type_hints(kind.__init__)["transformer"]
        for each in typing.get_args(hinted) or (hinted,):
            if each.__name__ in zoo.names():
                found.setdefault(each.__name__, kind)
    return dict(sorted(found.items()))


FAMILIES = [name for name in pipelines() if name not in UNUSABLE]


def pipeline(model: nn.Module):
    """A pipeline of the model and nothing else."""
    kind = pipelines()[type(model).__name__]
    parameters = [*inspect.signature(kind.__init__).parameters.values()][1:]
    args = {p.name: None for p in parameters if p.default is inspect.Parameter.empty}
    if "scheduler" in args:
        args["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler()
    return kind(**{**args, "transformer": model})


def quantized(model: nn.Module, device: str | None = None) -> nn.Module:
    """int8 weights for every linear that is as large as a quantized one; norms and so on stay."""
    for name, linear in [*model.named_modules()]:
        if isinstance(linear, nn.Linear) and linear.in_features % 2 == 0:
            spec = LayerSpec("int8-row", "none")
            layer = dtq.QuantLinear.in_place_of(linear, spec, device=device)
            if device is None:
                fmt, w = FORMATS["int8-row"], linear.weight.detach().float()
                layer.fill(fmt.pack(w, fmt.compute_qparams(w)))
                layer.bias = linear.bias
            model.set_submodule(name, layer)
    finalize(model, (), None)
    return model.eval()


def linears(model: nn.Module) -> dict[str, dtq.QuantLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, dtq.QuantLinear)}


def pair(rows: int, columns: int, rank: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(rank, columns, generator=g), torch.randn(rows, rank, generator=g)


JOINT = {
    "double_blocks.0.img_attn.qkv": [f"transformer_blocks.0.attn.to_{c}" for c in "qkv"],
    "double_blocks.0.txt_attn.qkv": [f"transformer_blocks.0.attn.add_{c}_proj" for c in "qkv"],
    "double_blocks.0.img_attn.proj": ["transformer_blocks.0.attn.to_out.0"],
    "double_blocks.0.txt_attn.proj": ["transformer_blocks.0.attn.to_add_out"],
}
FLUX = {
    **JOINT,
    "double_blocks.0.img_mlp.0": ["transformer_blocks.0.ff.net.0.proj"],
    "double_blocks.0.txt_mlp.2": ["transformer_blocks.0.ff_context.net.2"],
    "single_blocks.0.linear2": ["single_transformer_blocks.0.proj_out"],
    "single_blocks.0.modulation.lin": ["single_transformer_blocks.0.norm.linear"],
}
FLUX2 = {
    **JOINT,
    "double_blocks.0.img_mlp.0": ["transformer_blocks.0.ff.linear_in"],
    "double_blocks.0.txt_mlp.2": ["transformer_blocks.0.ff_context.linear_out"],
    "single_blocks.0.linear1": ["single_transformer_blocks.0.attn.to_qkv_mlp_proj"],
    "single_blocks.0.linear2": ["single_transformer_blocks.0.attn.to_out"],
}
WAN = {
    f"blocks.{i}.{source}": [f"blocks.{i}.{target}"]  # the converter for kohya needs all of them
    for i in (0, 1)
    for source, target in {
        **{f"self_attn.{c}": f"attn1.to_{c}" for c in "qkv"},
        **{f"cross_attn.{c}": f"attn2.to_{c}" for c in "qkv"},
        "self_attn.o": "attn1.to_out.0",
        "cross_attn.o": "attn2.to_out.0",
        "ffn.0": "ffn.net.0.proj",
        "ffn.2": "ffn.net.2",
    }.items()
}
QWEN = {
    name: [name]
    for name in (
        "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.add_k_proj",
        "transformer_blocks.0.attn.to_add_out", "transformer_blocks.0.img_mlp.net.2",
    )
}  # fmt: skip
Z_IMAGE = {
    "layers.0.attention.to_q": ["layers.0.attention.to_q"],
    "layers.0.attention.out": ["layers.0.attention.to_out.0"],
    "layers.0.feed_forward.w1": ["layers.0.feed_forward.w1"],
}
KREA2 = {
    **{f"blocks.0.attn.w{c}": [f"transformer_blocks.0.attn.to_{c}"] for c in "qkv"},
    "blocks.0.attn.wo": ["transformer_blocks.0.attn.to_out.0"],
    "blocks.0.mlp.gate": ["transformer_blocks.0.ff.gate"],
    "blocks.0.mlp.down": ["transformer_blocks.0.ff.down"],
}
IDEOGRAM4 = {
    "layers.0.attention.qkv": [f"layers.0.attention.to_{c}" for c in "qkv"],
    "layers.0.attention.o": ["layers.0.attention.to_out.0"],
    "layers.0.feed_forward.w2": ["layers.0.feed_forward.w2"],
}
HUNYUAN = {
    "double_blocks.0.img_attn_qkv": [f"transformer_blocks.0.attn.to_{c}" for c in "qkv"],
    "double_blocks.0.txt_attn_proj": ["transformer_blocks.0.attn.to_add_out"],
}
ACE_STEP = {
    **{f"layers.0.self_attn.{c}_proj": [f"layers.0.self_attn.to_{c}"] for c in "qkv"},
    "layers.0.cross_attn.o_proj": ["layers.0.cross_attn.to_out.0"],
}
SAME = {
    "LTXVideoTransformer3DModel": ["transformer_blocks.0.attn1.to_q", "transformer_blocks.0.ff.net.2"],
    "LTX2VideoTransformer3DModel": ["transformer_blocks.0.attn1.to_q", "transformer_blocks.0.ff.net.2"],
    "HiDreamImageTransformer2DModel": ["double_stream_blocks.0.block.attn1.to_q"],
}  # fmt: skip


def original(name: str, prefix: str) -> str:
    """The name of a layer in a file; kohya writes underscores."""
    return prefix + (name.replace(".", "_") if prefix == "lora_unet_" else name)


def changes(model: nn.Module) -> dict[str, Tensor]:
    """The change of every weight that has an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        n: sum(m.get_delta_weight(adapter) for adapter in m.active_adapters)
        for n, m in model.named_modules()
        if isinstance(m, BaseTunerLayer)
    }


def relative(a: Tensor, b: Tensor) -> float:
    """Relative error in the 2-norm."""
    return float((a - b).norm() / b.norm())
