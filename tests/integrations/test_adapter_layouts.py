# SPDX-License-Identifier: Apache-2.0
"""LoRA files of every family and layout: a quantized model gets the factors that a float one gets."""

from __future__ import annotations

import copy
import inspect
import typing
from functools import cache

import diffusers
import pytest
import torch
import zoo
from diffusers.loaders.lora_base import LoraBaseMixin
from torch import Tensor, nn

import dtq
from dtq.formats import FORMATS
from dtq.integrations.adapter_file import read_adapter
from dtq.integrations.adapter_names import find_layers
from dtq.nn.swap import finalize
from dtq.plan.layers import LayerSpec

peft = pytest.importorskip("peft")

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
        if isinstance(linear, nn.Linear) and linear.in_features % 8 == 0:
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

KOHYA, DOTTED, PEFT = ("lora_down", "lora_up", True), ("lora_A", "lora_B", False), ("lora_A", "lora_B", True)
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


def original(name: str, prefix: str) -> str:
    """The name of a layer in a file; kohya writes underscores."""
    return prefix + (name.replace(".", "_") if prefix == "lora_unet_" else name)


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


def changes(model: nn.Module) -> dict[str, Tensor]:
    """The change of every weight that has an adapter."""
    return {
        n: sum(m.get_delta_weight(adapter) for adapter in m.active_adapters)
        for n, m in model.named_modules()
        if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)
    }


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
    one, two = "diffusion_model.single_blocks.0.linear1", "diffusion_model.double_blocks.0.txt_attn.qkv"
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
    state = {f"{name}.lora_down.weight": torch.ones(1, 3072), f"{name}.lora_up.weight": torch.ones(6144, 1)}
    found = find_layers(model, read_adapter(state), diffusers.FluxPipeline)
    want = torch.arange(6144).roll(3072)
    assert torch.equal(found["norm_out.linear"].rows, want)
