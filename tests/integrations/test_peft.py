# SPDX-License-Identifier: Apache-2.0
"""Adapters: they add what they add to a float layer, can be fused, and can be removed exactly."""

from __future__ import annotations

import copy
from functools import cache

import diffusers
import pytest
import tiny
import torch
from conftest import hasty
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.loaders.peft import PeftAdapterMixin
from torch import nn

import dtq
from dtq.errors import InputError
from dtq.pipelines.tracing import dummy_inputs

peft = pytest.importorskip("peft")

ROUNDED = {"transform": "smooth-hadamard", "solver": "rtn"}
RECIPES = {
    "w4a8": ROUNDED,
    "w4a8-hq": {"finetune": "none", **ROUNDED},  # has a low-rank branch already
    "w4a16": {},
}
LORA = {"sd3", "flux", "wan"}  # classes with load_lora_adapter in diffusers
PIPELINES = {
    "flux": (diffusers.FluxPipeline, ("text_encoder_2", "tokenizer_2")),
    "sd3": (
        diffusers.StableDiffusion3Pipeline,
        ("text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"),
    ),
    "wan": (diffusers.WanPipeline, ()),
}


@cache
def _quantized(name: str, recipe: str) -> nn.Module:
    chosen = hasty(recipe, **RECIPES[recipe])
    return dtq.quantize(tiny.TRANSFORMERS[name](), chosen, progress=False)


def quantized(name: str, recipe: str = "w4a8") -> nn.Module:
    return copy.deepcopy(_quantized(name, recipe))


def linears(model: nn.Module) -> dict[str, dtq.QuantLinear]:
    return {
        name.removesuffix(".base_layer"): m
        for name, m in model.named_modules()
        if isinstance(m, dtq.QuantLinear)
    }


def adapter(model: nn.Module, rank: int = 4, seed: int = 0, prefix: str = "transformer."):
    """The state dict of a LoRA on every quantized linear, large enough to see."""
    g = torch.Generator().manual_seed(seed)
    state = {}
    for name, layer in linears(model).items():
        down = torch.randn(rank, layer.in_features, generator=g) / layer.in_features**0.5
        state[f"{prefix}{name}.lora_A.weight"] = down
        state[f"{prefix}{name}.lora_B.weight"] = torch.randn(layer.out_features, rank, generator=g)
    return state


def run(model: nn.Module, seed: int = 1) -> torch.Tensor:
    with torch.no_grad():
        return model(**dummy_inputs(model, 2, 500.0, seed), return_dict=False)[0]


def pipeline(name: str, model: nn.Module):
    kind, more = PIPELINES[name]
    none = dict.fromkeys(("vae", "text_encoder", "tokenizer", *more))
    return kind(transformer=model, scheduler=FlowMatchEulerDiscreteScheduler(), **none)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", PIPELINES)
def test_adapters_of_a_pipeline_can_be_weighted_disabled_and_removed(name, recipe):
    pipe = pipeline(name, quantized(name, recipe))
    model = pipe.transformer
    plain = run(model)
    one, two = adapter(model, seed=1), adapter(model, rank=2, seed=2)
    pipe.load_lora_weights(one, adapter_name="one")
    with_one = run(model)
    pipe.load_lora_weights(two, adapter_name="two")
    pipe.set_adapters(["one", "two"], [0.5, 0.25])
    both = run(model)
    assert not torch.allclose(with_one, plain, atol=1e-3)
    assert not torch.allclose(both, with_one, atol=1e-3)
    pipe.set_adapters(["one", "two"], [0.0, 0.0])
    assert torch.equal(run(model), plain)
    pipe.disable_lora()
    assert torch.equal(run(model), plain)
    pipe.enable_lora()
    pipe.set_adapters("one")
    assert torch.equal(run(model), with_one)
    pipe.delete_adapters("two")
    assert torch.equal(run(model), with_one)
    pipe.unload_lora_weights()
    assert torch.equal(run(model), plain)
    assert linears(model).keys() == linears(_quantized(name, recipe)).keys()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", tiny.TRANSFORMERS)
def test_an_adapter_adds_what_it_adds_to_the_float_layer(name, recipe):
    model = quantized(name, recipe)
    before = linears(model)
    if recipe != "w4a16":  # the test is about layers with an input transform
        assert any(m.problem.hadamard_block > 1 or m.spec.pre_quant for m in before.values())
    state = adapter(model, prefix="")
    if name in LORA:
        model.load_lora_adapter(state, prefix=None, adapter_name="one")
    else:
        config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=list(before))
        peft.inject_adapter_in_model(config, model, "one")
        peft.set_peft_model_state_dict(model, state, "one")
    for layer_name, layer in before.items():
        x = torch.randn(5, layer.in_features)
        down, up = (state[f"{layer_name}.lora_{c}.weight"] for c in "AB")
        added = model.get_submodule(layer_name)(x) - layer(x)
        torch.testing.assert_close(added, x @ down.T @ up.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", tiny.TRANSFORMERS)
def test_peft_alone_does_the_same(name):
    model = quantized(name)
    plain = run(model)
    names = list(linears(model))
    config = peft.LoraConfig(r=4, target_modules=names, init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    on = run(model)
    assert not torch.allclose(on, plain, atol=1e-3)
    with wrapped.disable_adapter():
        assert torch.equal(run(model), plain)
    merged = copy.deepcopy(wrapped).merge_and_unload()
    torch.testing.assert_close(run(merged), on, rtol=0.05, atol=0.02 * float(on.std()))
    assert all(type(m) is dtq.QuantLinear for m in linears(merged).values())
    assert torch.equal(run(wrapped.unload()), plain)
    peft.inject_adapter_in_model(config, model)
    assert isinstance(model.get_submodule(names[0]), peft.tuners.lora.Linear)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", PIPELINES)
def test_fusing_widens_the_branch_and_unfusing_restores_every_bit(name, recipe, safe):
    pipe = pipeline(name, quantized(name, recipe))
    model = pipe.transformer
    plain = run(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ranks = {n: m.spec.rank for n, m in linears(model).items()}
    pipe.load_lora_weights(adapter(model, rank=4, seed=1), adapter_name="one")
    pipe.load_lora_weights(adapter(model, rank=2, seed=2), adapter_name="two")
    pipe.set_adapters(["one", "two"], [0.5, 0.25])
    on = run(model)
    pipe.fuse_lora(adapter_names=["one", "two"], safe_fusing=safe)
    fused = run(model)
    assert {n: m.spec.rank - 6 for n, m in linears(model).items()} == ranks
    # the factors are rounded to bfloat16, the packed weight does not change
    assert (fused - on).norm() < 0.02 * (on - plain).norm()
    pipe.unfuse_lora()
    assert torch.equal(run(model), on)
    pipe.disable_lora()
    assert torch.equal(run(model), plain)
    pipe.unload_lora_weights()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], before[k]) for k in before)


def biased(model: nn.Module, seed: int, size: float = 1.0) -> dict[str, torch.Tensor]:
    """As :func:`adapter`, with a bias for every linear."""
    g = torch.Generator().manual_seed(seed)
    state = adapter(model, seed=seed, prefix="")
    for name, layer in linears(model).items():
        state[f"{name}.lora_B.bias"] = size * torch.randn(layer.out_features, generator=g)
    return state


def load(model: nn.Module, state: dict[str, torch.Tensor], name: str) -> None:
    """Add an adapter with biases to any class of model."""
    config = peft.LoraConfig(r=4, lora_alpha=2, target_modules=[*linears(model)], lora_bias=True)
    peft.inject_adapter_in_model(config, model, name)
    peft.set_peft_model_state_dict(model, state, name)


def lora_layers(model: nn.Module):
    return [m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", tiny.TRANSFORMERS)
def test_adapters_with_biases_are_fused_and_unfusing_restores_every_bit(name, dtype, tmp_path):
    model = quantized(name).to(dtype)
    plain, before = run(model), {k: v.clone() for k, v in model.state_dict().items()}
    load(model, biased(model, 1), "one")
    load(model, biased(model, 2), "two")
    for layer in lora_layers(model):
        layer.set_adapter(["one", "two"])
    on = run(model)
    for layer in lora_layers(model):
        layer.merge(safe_merge=True)
    fused = run(model)
    assert (fused - on).norm() < (0.02 if dtype == torch.float32 else 0.1) * (on - plain).norm()
    twin = copy.deepcopy(model)
    for layer in lora_layers(model):
        layer.unmerge()
    assert torch.equal(run(model), on)
    after = {k.replace(".base_layer", ""): v for k, v in model.state_dict().items()}
    assert all(torch.equal(after[k], v) for k, v in before.items())
    for layer_name in linears(twin):
        twin.set_submodule(layer_name, twin.get_submodule(layer_name).get_base_layer())
    assert torch.equal(run(twin), fused)
    twin.save_pretrained(tmp_path)
    loaded = type(twin).from_pretrained(tmp_path)
    for layer_name, layer in linears(twin).items():
        assert torch.equal(loaded.get_submodule(layer_name).bias, layer.bias)


def test_a_cast_between_fusing_and_unfusing_casts_the_bias():
    model = quantized("wan")
    biases = {n: m.bias.clone() for n, m in linears(model).items()}
    load(model, biased(model, 1), "one")
    for layer in lora_layers(model):
        layer.merge()
    model.bfloat16()
    for layer in lora_layers(model):
        layer.unmerge()
    for name, layer in linears(model).items():
        assert torch.equal(layer.bias, biases[name].bfloat16())


def test_biases_that_cannot_be_fused_are_refused():
    model = quantized("flux")
    names = [*linears(model)]
    linears(model)[names[-1]].bias = None
    load(model, biased(model, 1), "one")
    on = run(model)
    *_, last = lora_layers(model)
    for layer in lora_layers(model):
        if layer.get_base_layer().bias is None:
            with pytest.raises(InputError, match="a bias for a linear that has none"):
                layer.merge()
            assert not layer.merged
    assert torch.equal(run(model), on)
    last.lora_B["one"].bias.data[0] = float("nan")
    if last.get_base_layer().bias is not None:
        with pytest.raises(InputError, match="not finite"):
            last.merge(safe_merge=True)


@pytest.mark.parametrize("name", ["flux", "wan"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_fused_model_saves_and_loads_like_any_other(name, recipe, tmp_path):
    pipe = pipeline(name, quantized(name, recipe))
    model = pipe.transformer
    pipe.load_lora_weights(adapter(model))
    pipe.fuse_lora()
    with pytest.raises(InputError, match="unload_lora_weights"):
        model.save_pretrained(tmp_path / "refused")
    fused = run(model)
    pipe.unload_lora_weights()
    assert torch.equal(run(model), fused)
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin), fused)
    twin.save_pretrained(tmp_path / "m")
    again = type(model).from_pretrained(tmp_path / "m")
    assert torch.equal(run(again), fused)
    assert run(again.to(torch.device("cpu"))).isfinite().all()
    rows = again.config.quantization_config.layers
    assert all(rows[n]["rank"] == m.spec.rank for n, m in linears(again).items())
    # the models do not share their entries in config.json
    pipe.load_lora_weights(adapter(model, rank=2, seed=3), adapter_name="more")
    pipe.fuse_lora()
    assert torch.equal(run(again), fused)
    assert not torch.equal(run(model), fused)
    assert twin.config.quantization_config.layers == rows


def test_a_fused_model_can_be_offloaded():
    model = quantized("flux", "w4a8-hq")
    model.load_lora_adapter(adapter(model))
    model.fuse_lora()
    want = run(model)
    model.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    assert torch.equal(run(model), want)


def test_a_dequantized_model_keeps_its_adapters():
    model = quantized("flux")
    model.load_lora_adapter(adapter(model))
    on = run(model)
    model.dequantize()
    assert not linears(model)
    close = run(model)
    assert (close - on).norm() < 0.1 * on.norm()
    model.fuse_lora()
    torch.testing.assert_close(run(model), close, rtol=1e-3, atol=1e-3)
    model.unfuse_lora()
    torch.testing.assert_close(run(model), close, rtol=1e-3, atol=1e-3)


def test_an_adapter_can_be_trained_on_top():
    model = quantized("flux")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_out.0"]))
    model.train()
    learning = [p for p in model.parameters() if p.requires_grad]
    assert learning
    assert all(p.dtype == torch.float32 for p in learning)
    model(**dummy_inputs(model, 2, 500.0, 1))[0].square().mean().backward()
    assert any(p.grad.abs().sum() > 0 for p in learning if p.grad is not None)


def test_adapters_that_are_not_finite_are_not_fused():
    model = quantized("flux")
    state = {k: v * float("nan") for k, v in adapter(model).items()}
    model.load_lora_adapter(state)
    with pytest.raises(InputError, match="not finite"):
        model.fuse_lora(safe_fusing=True)


def test_convolutions_and_offloaded_layers_are_refused():
    spec = next(iter(linears(_quantized("flux", "w4a16")).values())).spec
    layer = dtq.QuantLinear.in_place_of(nn.Conv2d(64, 64, 1), spec)
    model = nn.ModuleDict({"pointwise": layer})
    with pytest.raises(InputError, match="quantized convolutions take no"):
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["pointwise"]), model)
    away = dtq.QuantLinear(64, 64, True, spec, device="meta")
    with pytest.raises(InputError, match="before offloading"):
        away.add_rank(torch.ones(2, 64), torch.ones(64, 2))


def test_control_adapters_widen_kept_layers_only():
    pipe = pipeline("flux", quantized("flux"))
    model, inner = pipe.transformer, next(iter(linears(pipe.transformer)))

    def twice_as_wide(name: str) -> dict[str, torch.Tensor]:
        layer = model.get_submodule(name)
        return {
            f"transformer.{name}.lora_A.weight": torch.randn(4, 2 * layer.in_features),
            f"transformer.{name}.lora_B.weight": torch.randn(layer.out_features, 4),
        }

    plain = run(model)
    with pytest.raises(InputError, match="widens a linear"):
        pipe.load_lora_weights(twice_as_wide(inner))
    assert torch.equal(run(model), plain)
    pipe.load_lora_weights(twice_as_wide("x_embedder"))
    assert model.config.in_channels == 32
    assert run(model).isfinite().all()
    pipe.unload_lora_weights(reset_to_overwritten_params=True)
    assert torch.equal(run(model), plain)


def test_which_classes_diffusers_gives_adapters():
    """When this fails, another class can take part in the tests above."""
    kinds = {name: isinstance(make(), PeftAdapterMixin) for name, make in tiny.TRANSFORMERS.items()}
    assert {name for name, has in kinds.items() if has} == LORA


ADAPTERS = {
    "oft": lambda t: peft.OFTConfig(r=0, oft_block_size=32, target_modules=t),
    "boft": lambda t: peft.BOFTConfig(boft_block_size=4, target_modules=t),
    "ia3": lambda t: peft.IA3Config(target_modules=t, feedforward_modules=[]),
    "bdlora": lambda t: peft.LoraConfig(
        target_modules=t, use_bdlora=peft.tuners.lora.BdLoraConfig(target_modules_bd_a=t, nblocks=2)
    ),
    "vera": lambda t: peft.VeraConfig(target_modules=t),
    "hra": lambda t: peft.HRAConfig(target_modules=t),
    "fourier": lambda t: peft.FourierFTConfig(n_frequency=10, target_modules=t),
    "miss": lambda t: peft.MissConfig(target_modules=t),
    "adalora": lambda t: peft.AdaLoraConfig(total_step=10, target_modules=t),
    "pissa": lambda t: peft.LoraConfig(init_lora_weights="pissa", target_modules=t),
    "olora": lambda t: peft.LoraConfig(init_lora_weights="olora", target_modules=t),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_that_need_the_float_weight_are_refused(kind):
    model = quantized("sd3")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    names = [n for n in linears(model) if n.endswith("attn.to_q")]
    with pytest.raises(InputError, match=r"quantized linears take LoRA, DoRA|float weight"):
        peft.get_peft_model(model, ADAPTERS[kind](names))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_any_adapter_works_on_unquantized_layers():
    model = quantized("sd3")
    name = "context_embedder"
    assert name not in linears(model)
    adapted = peft.get_peft_model(model, ADAPTERS["ia3"]([name]))
    assert torch.isfinite(run(adapted.base_model.model)).all()
    float_model = tiny.sd3()
    peft.get_peft_model(float_model, ADAPTERS["hra"](["to_q"]))
    assert torch.isfinite(run(float_model)).all()


@pytest.mark.parametrize("kind", ["flux", "sd3"])
def test_control_nets_are_not_made_of_codes(kind):
    net = {"flux": diffusers.FluxControlNetModel, "sd3": diffusers.SD3ControlNetModel}[kind]
    with pytest.raises(InputError, match="copies float weights, and this transformer is quantized"):
        net.from_transformer(quantized(kind))


def test_control_nets_can_be_made_from_float_models():
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 32}
    net = diffusers.FluxControlNetModel.from_transformer(
        tiny.flux(), **sizes, num_attention_heads=4
    )
    want = tiny.flux().transformer_blocks[0].attn.to_q.weight
    assert torch.equal(net.transformer_blocks[0].attn.to_q.weight, want)
    model = quantized("flux")
    model.dequantize()
    diffusers.FluxControlNetModel.from_transformer(model, **sizes, num_attention_heads=4)
