# SPDX-License-Identifier: Apache-2.0
"""LoRA files of every family and layout: a quantized model gets the factors that a float one gets."""

from __future__ import annotations

import copy

import diffusers
import pytest
import torch
import zoo
from adapter_files import (
    ACE_STEP,
    FAMILIES,
    FLUX,
    FLUX2,
    HUNYUAN,
    IDEOGRAM4,
    KREA2,
    QWEN,
    SAME,
    UNUSABLE,
    WAN,
    Z_IMAGE,
    changes,
    linears,
    original,
    pair,
    pipeline,
    pipelines,
    quantized,
)
from torch import Tensor, nn

import dtq
from dtq.errors import InputError
from dtq.integrations.adapter_file import read_adapter
from dtq.integrations.adapter_names import find_layers

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_loads_lora_on_quantized_layers(name):
    """The layout of diffusers, with ranks that differ by layer."""
    model = quantized(zoo.model(name))
    before, plain = {k: v.clone() for k, v in model.state_dict().items()}, zoo.output(model, name)
    targets = {n: m for n, m in linears(model).items() if "norm" not in n.rpartition(".")[2]}
    g = torch.Generator().manual_seed(0)
    state, wanted = {}, {}
    for number, (layer_name, layer) in enumerate(targets.items()):
        down, up = pair(layer.out_features, layer.in_features, 2 + number % 2, g)
        state[f"transformer.{layer_name}.lora_A.weight"] = down * 0.1
        state[f"transformer.{layer_name}.lora_B.weight"] = up
        wanted[layer_name] = up @ (down * 0.1)
    pipe = pipeline(model)
    pipe.load_lora_weights(state, adapter_name="one")
    on = zoo.output(model, name)
    assert not torch.allclose(on, plain, atol=1e-4)
    for layer_name, change in wanted.items():
        adapted = model.get_submodule(layer_name)
        x = torch.randn(3, adapted.in_features, generator=g)
        added = adapted(x) - adapted.get_base_layer()(x)
        torch.testing.assert_close(added, x @ change.T, rtol=1e-3, atol=1e-3)
    pipe.unload_lora_weights()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert torch.equal(zoo.output(model, name), plain)


def test_which_families_cannot_be_tested():
    assert {*UNUSABLE} < {*pipelines()}
    assert len(FAMILIES) >= 30


KOHYA, DOTTED, PEFT = (
    ("lora_down", "lora_up", True),
    ("lora_A", "lora_B", False),
    ("lora_A", "lora_B", True),
)
LAYOUTS = [
    ("FluxTransformer2DModel", "lora_unet_", KOHYA, FLUX),
    ("Flux2Transformer2DModel", "lora_unet_", KOHYA, FLUX2),
    ("Flux2Transformer2DModel", "diffusion_model.", DOTTED, FLUX2),
    ("WanTransformer3DModel", "diffusion_model.", DOTTED, WAN),
    ("WanTransformer3DModel", "lora_unet_", KOHYA, WAN),
    ("WanVACETransformer3DModel", "diffusion_model.", DOTTED, WAN),
    ("QwenImageTransformer2DModel", "lora_unet_", KOHYA, QWEN),
    ("QwenImageTransformer2DModel", "diffusion_model.", PEFT, QWEN),
    ("ZImageTransformer2DModel", "diffusion_model.", KOHYA, Z_IMAGE),
    ("ZImageTransformer2DModel", "lora_unet_", KOHYA, Z_IMAGE),
    ("Krea2Transformer2DModel", "diffusion_model.", DOTTED, KREA2),
    ("Krea2Transformer2DModel", "base_model.model.", DOTTED, KREA2),
    ("Ideogram4Transformer2DModel", "diffusion_model.", KOHYA, IDEOGRAM4),
    ("Ideogram4Transformer2DModel", "diffusion_model.", PEFT, IDEOGRAM4),
    ("HunyuanVideoTransformer3DModel", "", DOTTED, HUNYUAN),
    ("AceStepTransformer1DModel", "base_model.model.", DOTTED, ACE_STEP),
    *[(name, "diffusion_model.", DOTTED, {n: [n] for n in names}) for name, names in SAME.items()],
]
"""Class, what is before the names, suffixes and whether there is an alpha, original names."""


def file_of(model: nn.Module, prefix: str, suffixes, names) -> tuple[dict[str, Tensor], dict]:
    """A LoRA in a layout, and the change of each weight of the model."""
    g = torch.Generator().manual_seed(0)
    down_name, up_name, has_alpha = suffixes
    state, wanted = {}, {}
    for source, targets in names.items():
        layers = [model.get_submodule(t) for t in targets]
        rows = [layer.out_features for layer in layers]
        down, up = pair(sum(rows), layers[0].in_features, 4, g)
        stem = original(source, prefix)
        state[f"{stem}.{down_name}.weight"], state[f"{stem}.{up_name}.weight"] = down, up
        if has_alpha:
            state[f"{stem}.alpha"] = torch.tensor(2.0)
        for target, part in zip(targets, up.split(rows), strict=True):
            wanted[target] = part @ down * (0.5 if has_alpha else 1)
    return state, wanted


def assert_changes(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, change in wanted.items():
        torch.testing.assert_close(got[name], change, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "prefix", "suffixes", "names"), LAYOUTS)
def test_layouts_that_diffusers_converts(name, prefix, suffixes, names):
    model = quantized(zoo.model(name))
    state, wanted = file_of(model, prefix, suffixes, names)
    pipeline(model).load_lora_weights(copy.copy(state))
    assert_changes(changes(model), wanted)
    assert all(isinstance(model.get_submodule(n).get_base_layer(), dtq.QuantLinear) for n in wanted)


@pytest.mark.parametrize(("name", "prefix", "suffixes", "names"), LAYOUTS)
def test_dtq_finds_the_same_layers(name, prefix, suffixes, names):
    model = quantized(zoo.model(name))
    state, wanted = file_of(model, prefix, suffixes, names)
    loaded = dtq.load_adapter(pipeline(model), state)
    assert sorted(loaded) == sorted(wanted)
    assert_changes(changes(model), wanted)


NOT_CONVERTED = [
    # families without a converter, and layouts that theirs does not take
    ("SD3Transformer2DModel", "diffusion_model.", PEFT, ["transformer_blocks.0.attn.to_q"]),
    ("SD3Transformer2DModel", "lora_unet_", KOHYA, ["transformer_blocks.0.attn.to_out.0"]),
    ("AuraFlowTransformer2DModel", "lora_transformer_", KOHYA, ["joint_transformer_blocks.0.attn.to_q"]),
    ("SanaTransformer2DModel", "transformer.", KOHYA, ["transformer_blocks.0.attn1.to_q"]),
    ("MochiTransformer3DModel", "diffusion_model.", KOHYA, ["transformer_blocks.0.attn1.to_q"]),
    ("CogView4Transformer2DModel", "lycoris_", KOHYA, ["transformer_blocks.0.attn1.to_q"]),
    ("WanTransformer3DModel", "lora_unet_", KOHYA, ["blocks.0.attn1.to_q"]),
    ("LTXVideoTransformer3DModel", "diffusion_model.", KOHYA, ["transformer_blocks.0.attn1.to_q"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "prefix", "suffixes", "names"), NOT_CONVERTED)
def test_names_of_the_model_need_no_converter(name, prefix, suffixes, names):
    model = quantized(zoo.model(name))
    g = torch.Generator().manual_seed(0)
    down_name, up_name, _ = suffixes
    state, wanted = {}, {}
    for target in names:
        layer = model.get_submodule(target)
        down, up = pair(layer.out_features, layer.in_features, 4, g)
        stem = prefix + (target if prefix.endswith(".") else target.replace(".", "_"))
        state |= {
            f"{stem}.{down_name}.weight": down,
            f"{stem}.{up_name}.weight": up,
            f"{stem}.alpha": torch.tensor(1.0),
        }
        wanted[target] = up @ down / 4
    dtq.load_adapter(pipeline(model), state)
    assert_changes(changes(model), wanted)
    again = quantized(zoo.model(name))
    dtq.load_adapter(again, state)  # a bare model is enough
    assert_changes(changes(again), wanted)


SDXL = {
    "lora_unet_input_blocks_4_1_proj_in": "down_blocks.1.attentions.0.proj_in",
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q":
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_out_0":
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0",
    "lora_unet_output_blocks_0_1_transformer_blocks_0_ff_net_0_proj":
        "up_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj",
}  # fmt: skip
"""Names of the original U-Net in files of kohya, and those of diffusers."""


@pytest.mark.parametrize("kind", ["LoRA", "LoHa"])
@pytest.mark.parametrize("naming", ["original", "lora_unet_", "unet."])
def test_layouts_of_a_unet(naming, kind):
    torch.manual_seed(0)
    unet = quantized(
        diffusers.UNet2DConditionModel(
            sample_size=8, block_out_channels=(32, 64), cross_attention_dim=32,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=8,
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
        )
    )  # fmt: skip
    parts = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    pipe = diffusers.StableDiffusionXLPipeline(
        **dict.fromkeys(parts), unet=unet, scheduler=diffusers.EulerDiscreteScheduler()
    )
    g = torch.Generator().manual_seed(0)
    state, wanted = {}, {}
    for source, target in SDXL.items():
        stem = {"original": source, "unet.": f"unet.{target}"}.get(
            naming, f"lora_unet_{target.replace('.', '_')}"
        )
        layer = unet.get_submodule(target)
        down, up = pair(layer.out_features, layer.in_features, 2, g)
        state[f"{stem}.alpha"] = torch.tensor(1.0)
        if kind == "LoRA":
            state[f"{stem}.lora_down.weight"], state[f"{stem}.lora_up.weight"] = down, up
            wanted[target] = up @ down / 2
        else:
            state[f"{stem}.hada_w1_a"], state[f"{stem}.hada_w1_b"] = up, down
            state[f"{stem}.hada_w2_a"], state[f"{stem}.hada_w2_b"] = up, down
            wanted[target] = (up @ down) ** 2 / 2
    assert sorted(dtq.load_adapter(pipe, state)) == sorted(wanted)
    assert_changes(changes(unet), wanted)


def test_the_error_of_a_converter_that_wants_all_layers_of_a_block():
    model = quantized(zoo.model("WanTransformer3DModel"))
    names = {"blocks.0.self_attn.q": WAN["blocks.0.self_attn.q"]}
    state, _ = file_of(model, "lora_unet_", KOHYA, names)
    with pytest.raises(InputError, match=r"WanPipeline: KeyError: .*self_attn") as caught:
        dtq.load_adapter(pipeline(model), state)
    assert isinstance(caught.value.__cause__, KeyError)


def wide(kind: type, **config) -> nn.Module:
    """A model as wide as the real one, whose numbers some converters contain, without values."""
    with torch.device("meta"):
        return kind(**config)


def rows_of(model: nn.Module, sources: dict[str, tuple[int, int]], kind: type):
    """Which rows of each layer of a file are those of which layer of the model."""
    state = {}
    for name, (rows, columns) in sources.items():
        state[f"{name}.hada_w1_a"] = state[f"{name}.hada_w2_a"] = torch.ones(rows, 1)
        state[f"{name}.hada_w1_b"] = state[f"{name}.hada_w2_b"] = torch.ones(1, columns)
    found = find_layers(model, read_adapter(state), kind)
    return {n: (p.source, int(p.rows[0]), len(p.rows)) for n, p in found.items()}


def test_fused_layers_of_flux_at_their_real_width():
    model = wide(diffusers.FluxTransformer2DModel, num_layers=1, num_single_layers=1)
    got = rows_of(
        model,
        {
            "diffusion_model.single_blocks.0.linear1": (7 * 3072, 3072),
            "diffusion_model.double_blocks.0.txt_attn.qkv": (3 * 3072, 3072),
        },
        diffusers.FluxPipeline,
    )
    one, two = (
        "diffusion_model.single_blocks.0.linear1",
        "diffusion_model.double_blocks.0.txt_attn.qkv",
    )
    assert got == {
        "single_transformer_blocks.0.attn.to_q": (one, 0, 3072),
        "single_transformer_blocks.0.attn.to_k": (one, 3072, 3072),
        "single_transformer_blocks.0.attn.to_v": (one, 6144, 3072),
        "single_transformer_blocks.0.proj_mlp": (one, 9216, 4 * 3072),
        "transformer_blocks.0.attn.add_q_proj": (two, 0, 3072),
        "transformer_blocks.0.attn.add_k_proj": (two, 3072, 3072),
        "transformer_blocks.0.attn.add_v_proj": (two, 6144, 3072),
    }


def test_the_halves_of_the_last_modulation_are_swapped():
    """The original has shift before scale, diffusers scale before shift."""
    model = wide(diffusers.FluxTransformer2DModel, num_layers=1, num_single_layers=1)
    name = "lora_unet_final_layer_adaLN_modulation_1"
    state = {
        f"{name}.lora_down.weight": torch.ones(1, 3072),
        f"{name}.lora_up.weight": torch.ones(6144, 1),
    }
    found = find_layers(model, read_adapter(state), diffusers.FluxPipeline)
    want = torch.arange(6144).roll(3072)
    assert torch.equal(found["norm_out.linear"].rows, want)
