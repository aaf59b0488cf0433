# SPDX-License-Identifier: Apache-2.0
"""Every transformer and U-Net class of diffusers, tiny and random: scan, plan, quantize, save, load, run."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import diffusers
import pytest
import torch
import zoo
from builders import collected
from torch import nn

import dtq
from dtq.models import FAMILIES, Scan, find_family
from dtq.nn import QuantLinear
from dtq.pipelines.contents import denoiser_classes
from dtq.pipelines.loading import LoadedModel
from dtq.pipelines.recorded_calls import first_tensor
from dtq.pipelines.tracing import dummy_inputs, scan_model
from dtq.recipe import Recipe

# each class with one format of 8-bit tokens, and with one of the others in turn: what a class needs does not
# depend on the format, and every format meets dozens of classes
ROUND_TRIPS = [
    (recipe, name)
    for i, name in enumerate(zoo.names())
    for recipe in ("w4a8", ("w4a16", "nvfp4")[i % 2])
]
# relative squared error of the output; random weights of width 16 to 64 have larger errors than real ones
BARS = {"w4a8": 0.02, "w4a16": 0.2, "nvfp4": 0.2}
# thirty ResNets in a row: 8-bit weights alone have an error of 2e-4, and 4 bits 16^2 times that
DEEP = {"Kandinsky3UNet": 2.0}
QUICK = {"calibration": {"samples": 2, "batch_size": 1, "steps": 4, "num_timestep_bins": 2}}
# solvers and searches of transforms read statistics and weights, no class; what reads the class stays, such
# as the comparison of the whole model with a candidate of w4a8
ROUNDED = {"solver": "rtn", "transform": "none"}
# U-Nets are so deep that rounding to nearest adds up
COMPENSATED = {"solver": {"gptq": {"clip": False}}, "transform": "smooth"}


@pytest.mark.parametrize(("recipe", "name"), ROUND_TRIPS)
def test_round_trip(name, recipe, tmp_path):
    model = zoo.model(name)
    with torch.no_grad():
        want = first_tensor(model(**zoo.inputs(name))).double()
    calls = [zoo.inputs(name, seed) for seed in range(2)]
    hasty = COMPENSATED if recipe == "w4a8" and "UNet" in name else ROUNDED
    dtq.quantize(model, recipe, inputs=calls, progress=False, **QUICK, **hasty)
    assert any(isinstance(m, QuantLinear) for m in model.modules())
    with torch.no_grad():
        got = first_tensor(model(**zoo.inputs(name)))
    error = float((got.double() - want).square().sum() / want.square().sum())
    assert error < BARS[recipe] * DEEP.get(name, 1.0)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    loaded = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        again = first_tensor(loaded(**zoo.inputs(name)))
    assert torch.equal(got, again)


def test_the_zoo_is_complete():
    assert set(zoo.names()) == set(zoo.classes())


ROLES = {
    "AuraFlowTransformer2DModel": {
        "joint_transformer_blocks.0.ff.linear_2": "ffn.up",
        "joint_transformer_blocks.0.ff.out_projection": "ffn.down",
        "joint_transformer_blocks.0.attn.add_k_proj": "attn.k",
    },
    "ChromaTransformer2DModel": {"distilled_guidance_layer.layers.0.linear_1": "embed"},
    "FluxTransformer2DModel": {
        "single_transformer_blocks.0.proj_out": "ffn.down",
        "single_transformer_blocks.0.proj_mlp": "ffn.up",
        "single_transformer_blocks.0.norm.linear": "adaln",
        "norm_out.linear": "head",
    },
    "Flux2Transformer2DModel": {"single_transformer_blocks.0.attn.to_qkv_mlp_proj": "attn.qkv"},
    "HiDreamImageTransformer2DModel": {
        "double_stream_blocks.0.block.ff_i.experts.0.w1": "ffn.up",
        "double_stream_blocks.0.block.ff_i.shared_experts.w2": "ffn.down",
        "double_stream_blocks.0.block.attn1.to_q_t": "attn.q",
        "caption_projection.0.linear": "embed",
    },
    "Kandinsky5Transformer3DModel": {
        "visual_transformer_blocks.0.cross_attention.to_key": "xattn.k",
        "visual_transformer_blocks.0.self_attention.out_layer": "attn.out",
        "visual_transformer_blocks.0.feed_forward.in_layer": "ffn.up",
    },
    "NucleusMoEImageTransformer2DModel": {
        "transformer_blocks.0.encoder_proj": "embed",
        "transformer_blocks.0.attn.add_k_proj": "xattn.k",
        "transformer_blocks.0.attn.to_q": "attn.q",
    },
    "PixArtTransformer2DModel": {
        "transformer_blocks.0.attn2.to_k": "xattn.k",
        "transformer_blocks.0.attn1.to_k": "attn.k",
        "adaln_single.linear": "embed",
    },
    "PRXTransformer2DModel": {
        "blocks.0.attention.img_qkv_proj": "attn.qkv",
        "blocks.0.attention.txt_kv_proj": "xattn.kv",
        "blocks.0.up_proj": "ffn.up",
    },
    "SanaTransformer2DModel": {
        "transformer_blocks.0.ff.conv_inverted": "ffn.up",
        "transformer_blocks.0.ff.conv_point": "ffn.down",
        "patch_embed.proj": "embed",
    },
    "T5FilmDecoder": {
        "decoders.0.layer.2.DenseReluDense.wo": "ffn.down",
        "decoders.0.layer.0.FiLMLayer.scale_bias": "adaln",
        "decoders.0.layer.1.attention.to_k": "xattn.k",
    },
    "Kandinsky3UNet": {
        "down_blocks.1.attentions.0.feed_forward.0": "ffn.up",
        "down_blocks.1.attentions.0.feed_forward.2": "ffn.down",
        "down_blocks.0.resnets_in.0.resnet_blocks.0.group_norm.context_mlp.1": "adaln",
        "down_blocks.0.resnets_in.0.resnet_blocks.0.projection": "proj",
    },
    "UNet2DConditionModel": {
        "down_blocks.0.attentions.0.proj_in": "proj",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k": "attn.k",
        "mid_block.attentions.0.transformer_blocks.1.attn2.to_k": "xattn.k",
        "mid_block.attentions.0.transformer_blocks.1.ff.net.0.proj": "ffn.up",
        "mid_block.attentions.0.proj_out": "proj",
        "mid_block.resnets.0.time_emb_proj": "adaln",
        "up_blocks.0.resnets.0.conv_shortcut": "proj",
        "add_embedding.linear_1": "embed",
    },
    "UNetMotionModel": {  # passes their input as a keyword
        "down_blocks.0.motion_modules.0.proj_in": "proj",
        "mid_block.motion_modules.0.proj_out": "proj",
    },
    "WanAnimate2Transformer3DModel": {
        "blocks.0.ffn.0": "ffn.up",
        "blocks.0.ffn.2": "ffn.down",
        "blocks.0.cross_attn.add_k_proj": "xattn.k",
    },
}


def scanned(name: str, model=None):
    return scan_model(model or zoo.model(name), lambda model: model(**zoo.inputs(name)))


@pytest.mark.parametrize("name", ROLES)
def test_roles_come_from_names_and_structure(name):
    roles = {linear.name: linear.role for linear in scanned(name).linears()}
    assert {key: roles.get(key) for key in ROLES[name]} == ROLES[name]


def test_transformer_blocks_of_a_unet_that_read_the_same_text_are_apart():
    groups = scanned("UNet2DConditionModel").input_groups
    middle = "mid_block.attentions.0.transformer_blocks"
    keys = [g for g in groups if any(x.name.startswith(middle) for x in g.linears)]
    names = [[x.name for x in g.linears] for g in keys if g.linears[0].role == "xattn.k"]
    assert names == [[f"{middle}.{i}.attn2.to_k", f"{middle}.{i}.attn2.to_v"] for i in range(2)]


def test_what_cannot_be_quantized_is_named():
    assert scanned("SanaTransformer2DModel").unsupported == {
        "transformer_blocks.0.ff.conv_depth.weight": "convolution with a 3x3 kernel"
    }


def test_experts_that_no_token_chose_are_quantized_too():
    name = "HiDreamImageTransformer2DModel"
    model = zoo.model(name)
    idle = "double_stream_blocks.0.block.ff_i.experts.0"
    for module in model.modules():
        if type(module).__name__ == "MoEGate":  # never chooses the first expert
            module.register_forward_hook(lambda gate, x, out: (out[0].clamp(min=1), *out[1:]))
    scan = scanned(name, model)
    assert f"{idle}.w1" not in scan.rows  # not called
    roles = {linear.name: linear.role for linear in scan.linears()}
    assert roles[f"{idle}.w1"] == "ffn.up"
    assert roles[f"{idle}.w2"] == "ffn.down"
    dtq.quantize(model, "w4a8", inputs=[zoo.inputs(name)], progress=False, **QUICK)
    assert isinstance(model.get_submodule(f"{idle}.w1"), QuantLinear)
    with torch.no_grad():
        assert first_tensor(model(**zoo.inputs(name))).isfinite().all()


def test_idle_experts_get_statistics_of_siblings_in_other_memory_batches():
    name = "HiDreamImageTransformer2DModel"
    model = zoo.model(name)
    for module in model.modules():
        if type(module).__name__ == "MoEGate":
            module.register_forward_hook(lambda gate, x, out: (out[0].clamp(min=1), *out[1:]))
    recipe = Recipe.load("w4a8", **QUICK)
    loaded = LoadedModel(name, None, "transformer", model)
    inputs = [zoo.inputs(name, seed) for seed in range(2)]
    whole, cut = (
        collected(loaded, recipe, recipe.needs(), inputs=inputs, progress=False, memory=memory)
        for memory in (None, 1)  # in one run, and one run per input group
    )
    idle = "double_stream_blocks.0.block.ff_i.experts.0.w1"
    assert len(whole.inputs[idle].channels.amax())
    assert set(whole.inputs) == set(cut.inputs)
    for group, stats in whole.inputs.items():
        got = cut.inputs[group].tensors()
        assert all(torch.equal(t, got[key]) for key, t in stats.tensors().items())


def test_a_pointwise_convolution_dequantizes_to_itself():
    model = zoo.model("SanaTransformer2DModel")
    point = model.transformer_blocks[0].ff.conv_point
    want, before = point.weight.clone(), type(point)
    dtq.quantize(model, "w8a8", inputs=[zoo.inputs("SanaTransformer2DModel")], **QUICK)
    assert isinstance(model.transformer_blocks[0].ff.conv_point, QuantLinear)
    model.dequantize()
    again = model.transformer_blocks[0].ff.conv_point
    assert type(again) is before
    torch.testing.assert_close(again.weight, want, atol=0.02, rtol=0.02)


CLASSES = [name for family in FAMILIES for name in family.classes]
NO_FAMILY = {
    "Cosmos3OmniTransformer": "one packed sequence of text, video, sound and actions",
    "DreamLiteTransformer2DModel": "part of a U-Net, takes no timestep",
    "MiniMaxH3Transformer3DModel": "one packed sequence of text, video and sound",
    "MiniMaxMusic3RVQDepthDecoder": "predicts tokens, not noise",
    "RFD4ProteinaTransformer": "proteins: its features depend on the chain",
    "T5FilmDecoder": "needs the notes of its encoders; its pipeline is deprecated",
    "Transformer2DModel": "part of U-Nets; its arguments depend on the caller",
    "TransformerTemporalModel": "part of U-Nets; its arguments depend on the caller",
    "UVit2DModel": "predicts tokens, not noise",
    "WanAnimate2Transformer3DModel": "fills a cache in one call and reads it in the next",
}
NOT_ON_META = {
    "AnyFlowFARTransformer3DModel": "FlexAttention",
    "ErnieImageTransformer2DModel": "autocast",
    "GlmImageTransformer2DModel": "indexes by a mask",
    "HeliosTransformer3DModel": "autocast",
    "HiDreamImageTransformer2DModel": "sorts tokens by expert",
    "HunyuanImageTransformer2DModel": "indexes by a mask",
    "HunyuanVideo15Transformer3DModel": "reads whether an image is given",
    "HunyuanVideoFramepackTransformer3DModel": "cuts captions to their length",
    "Ideogram4Transformer2DModel": "autocast",
    "Kandinsky6SRTransformer3DModel": "FlexAttention",
    "Lumina2Transformer2DModel": "cuts captions to their length",
    "MochiTransformer3DModel": "autocast",
    "OmniGenTransformer2DModel": "reads the largest position",
    "QwenImage21Transformer2DModel": "repeats tokens by a mask",
    "UNetSpatioTemporalConditionModel": "makes a table on the CPU",
}


def grouped(scan: Scan) -> set[tuple[tuple[str, str], ...]]:
    """Name and role of the linears of each input group."""
    return {
        tuple((linear.name, linear.role) for linear in group.linears) for group in scan.input_groups
    }


def annotated(argument: str) -> set[str]:
    """Classes of models that the pipelines of diffusers take for an argument, by annotation."""
    found = set()
    for file in Path(diffusers.pipelines.__path__[0]).rglob("*.py"):
        classes = (x for x in ast.parse(file.read_text()).body if isinstance(x, ast.ClassDef))
        for node in (part for kind in classes for part in kind.body):
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                for each in (*node.args.args, *node.args.kwonlyargs):
                    if each.arg in argument.split() and each.annotation is not None:
                        found |= set(re.findall(r"\w+", ast.unparse(each.annotation)))
    kinds = {name: getattr(diffusers, name, None) for name in found}
    return {n for n, k in kinds.items() if isinstance(k, type) and issubclass(k, nn.Module)}


def test_every_denoiser_that_a_pipeline_names_is_found():
    takes = annotated("unet transformer transformer_2 decoder prior prior_prior super_res_first")
    assert {"UNet2DConditionModel", "StableCascadeUNet", "AudioLDM2UNet2DConditionModel"} <= takes
    others = takes - denoiser_classes()
    assert others == {"UniDiffuserModel"}  # of a pipeline that diffusers has given up


def test_every_diffusion_transformer_has_a_family():
    assert len(set(CLASSES)) == len(CLASSES)
    assert set(CLASSES) | set(NO_FAMILY) == set(zoo.classes())
    assert not set(CLASSES) & set(NO_FAMILY)


@pytest.mark.parametrize("name", CLASSES)
def test_dummy_inputs_give_the_same_scan_as_real_ones(name):
    model = zoo.model(name)
    with torch.no_grad():
        inputs = dummy_inputs(model, 2, 0.5 * find_family(model).largest_timestep, 0)
        assert first_tensor(model(**inputs)).isfinite().all()
    assert grouped(scan_model(model)) == grouped(scanned(name, model))


@pytest.mark.parametrize("name", CLASSES)
def test_a_model_without_weights_is_traced_or_a_warning_gives_the_reason(name, caplog):
    model = zoo.model(name)
    with torch.device("meta"):
        empty = type(model).from_config(model.config).eval()
    scan = scan_model(empty)
    assert scan.traced == (name not in NOT_ON_META)
    if scan.traced:
        assert grouped(scan) == grouped(scan_model(model))
        assert not caplog.records
    else:
        (line,) = [record.getMessage() for record in caplog.records]
        assert line.startswith(
            f"{name}: roles come from layer names alone, its forward needs weights ("
        )


def test_errors_of_a_forward_with_weights_are_not_hidden():
    def fails(model):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        scan_model(zoo.model("FluxTransformer2DModel"), fails)
