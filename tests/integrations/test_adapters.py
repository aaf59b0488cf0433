# SPDX-License-Identifier: Apache-2.0
"""``dtq.load_adapter``: LoKr, LoHa and DoRA files, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
import zoo
from adapter_files import (
    FLUX2,
    IDEOGRAM4,
    linears,
    original,
    pipeline,
    quantized,
    relative,
)
from safetensors.torch import save_file
from torch import Tensor, nn

import dtq
from dtq.errors import InputError
from dtq.integrations.adapter_file import Factors, read_adapter

peft = pytest.importorskip("peft")

KINDS = ("LoHa", "LoKr", "LoKr of whole factors", "LoKr of four factors", "DoRA")


def factors(kind: str, n: int, k: int, w: Tensor, g: torch.Generator):
    """Tensors of a layer as in a file, and its new weight, from the definitions in the papers."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g) / 3

    tensors = {"alpha": torch.tensor(3.0)}
    if kind == "DoRA":
        tensors |= {"lora_down.weight": random(2, k), "lora_up.weight": random(n, 2)}
        tensors["dora_scale"] = (w.norm(dim=1) * (1 + random(n))).abs()[:, None]
        new = w + 1.5 * tensors["lora_up.weight"] @ tensors["lora_down.weight"]
        return tensors, tensors["dora_scale"] * new / new.norm(dim=1, keepdim=True)
    if kind == "LoHa":
        tensors |= {"hada_w1_a": random(n, 2), "hada_w1_b": random(2, k),
                    "hada_w2_a": random(n, 2), "hada_w2_b": random(2, k)}  # fmt: skip
        one, two = (tensors[f"hada_w{i}_a"] @ tensors[f"hada_w{i}_b"] for i in (1, 2))
        return tensors, w + 1.5 * one * two
    a, b = (4 if n % 4 == 0 else 2), 2
    w1, w2, scale = random(a, b), random(n // a, k // b), 1.0
    tensors |= {"lokr_w1": w1, "lokr_w2": w2}
    if kind != "LoKr of whole factors":
        up, down = random(n // a, 2), random(2, k // b)
        tensors |= {"lokr_w2_a": up, "lokr_w2_b": down}
        del tensors["lokr_w2"]
        w2, scale = up @ down, 1.5
    if kind == "LoKr of four factors":
        up, down = random(a, 1), random(1, b)
        tensors |= {"lokr_w1_a": up, "lokr_w1_b": down}
        del tensors["lokr_w1"]
        w1 = up @ down
    return tensors, w + scale * torch.kron(w1, w2)


def file_of(model: nn.Module, kind: str, names: dict[str, list[str]], prefix: str):
    """A file for layers of the original model, and the weights that the model shall have."""
    g = torch.Generator().manual_seed(0)
    state, wanted = {}, {}
    for source, targets in names.items():
        layers = [model.get_submodule(t) for t in targets]
        rows = [layer.out_features for layer in layers]
        w = torch.cat([layer.dequantize(torch.float32) for layer in layers])
        tensors, new = factors(kind, sum(rows), layers[0].in_features, w, g)
        state |= {f"{original(source, prefix)}.{suffix}": t for suffix, t in tensors.items()}
        wanted |= dict(zip(targets, new.split(rows), strict=True))
    return state, wanted


FILES = [
    ("Flux2Transformer2DModel", FLUX2, "lora_unet_"),
    ("Flux2Transformer2DModel", FLUX2, "diffusion_model."),
    ("Ideogram4Transformer2DModel", IDEOGRAM4, "diffusion_model."),
    (
        "SD3Transformer2DModel",
        {n: [n] for n in ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.ff.net.2")},
        "lycoris_",
    ),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "names", "prefix"), FILES)
def test_files_with_original_names_change_the_weights_as_defined(
    name, names, prefix, kind, tmp_path
):
    """q, k and v of a fused layer are parts of one LoHa, LoKr or DoRA."""
    model = quantized(zoo.model(name))
    if prefix == "lycoris_":  # this tool writes the names of the model with underscores
        flat = {n.replace(".", "_"): t for n, t in names.items()}
        state, wanted = file_of(model, kind, flat, prefix)
    else:
        state, wanted = file_of(model, kind, names, prefix)
    plain, bits = zoo.output(model, name), {k: v.clone() for k, v in model.state_dict().items()}
    save_file(state, tmp_path / "adapter.safetensors")
    pipe = pipeline(model)
    loaded = dtq.load_adapter(pipe, tmp_path / "adapter.safetensors", "one")
    assert sorted(loaded) == sorted(wanted)
    for layer_name, w in wanted.items():
        layer = model.get_submodule(layer_name)
        x = torch.randn(3, w.shape[1])
        want = x @ w.T
        if (bias := layer.get_base_layer().bias) is not None:
            want = want + bias
        assert relative(layer(x), want) < 1e-5
    on = zoo.output(model, name)
    assert relative(on, plain) > 1e-4
    pipe.disable_lora()
    assert torch.equal(zoo.output(model, name), plain)
    pipe.enable_lora()
    assert torch.equal(zoo.output(model, name), on)
    pipe.set_adapters("one", 0.0)
    if kind != "DoRA":  # its magnitudes stay
        assert relative(zoo.output(model, name), plain) < 1e-6
    pipe.unload_lora_weights()
    after = model.state_dict()
    assert after.keys() == bits.keys()
    assert all(torch.equal(after[k], v) for k, v in bits.items())
    assert torch.equal(zoo.output(model, name), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_a_float_model_takes_the_same_files(kind):
    name = "Flux2Transformer2DModel"
    model = quantized(zoo.model(name))
    state, _ = file_of(model, kind, FLUX2, "lora_unet_")
    twin = copy.deepcopy(model)
    for layer_name, layer in linears(model).items():
        twin.set_submodule(layer_name, layer.unquantized())
    for each in (model, twin):
        dtq.load_adapter(pipeline(each), state, weight=0.5)
    assert not linears(twin)
    assert relative(zoo.output(model, name), zoo.output(twin, name)) < 1e-5


def test_adapters_are_cast_to_the_dtype_of_the_model():
    model = quantized(zoo.model("SD3Transformer2DModel"))
    model.bfloat16()
    name = "transformer_blocks.0.attn.to_q"
    state, _ = file_of(model, "LoKr", {name: [name]}, "transformer.")
    dtq.load_adapter(model, state)
    layer = model.get_submodule(name)
    assert {p.dtype for n, p in layer.named_parameters() if "lokr" in n} == {torch.bfloat16}
    assert layer(torch.randn(3, layer.in_features, dtype=torch.bfloat16)).dtype == torch.bfloat16


def state_for(model: nn.Module, kind: str = "LoHa") -> dict[str, Tensor]:
    name = "transformer_blocks.0.attn.to_q"
    return file_of(model, kind, {name: [name]}, "transformer.")[0]


STEM = "transformer.transformer_blocks.0.attn.to_q"
WRONG = {
    "unknown suffix": (
        lambda s: s | {f"{STEM}.oft_blocks": torch.ones(2, 2)}, r"oft_blocks: not a tensor of",
    ),
    "incomplete": (
        lambda s: {k: v for k, v in s.items() if "w2_b" not in k}, "are no adapter dtq knows",
    ),
    "not finite": (
        lambda s: {k: v * float("nan") for k, v in s.items()}, "not finite",
    ),
    "ranks": (
        lambda s: s | {f"{STEM}.hada_w1_b": torch.ones(7, 128)}, "different ranks",
    ),
    "other shape": (
        lambda s: {k: torch.cat([v, v]) if k.endswith("_a") else v for k, v in s.items()},
        "for layers of other shapes",
    ),
    "other model": (
        lambda s: {k.replace("to_q", "to_z"): v for k, v in s.items()},
        "1 layers of the adapter are not in SD3Transformer2DModel",
    ),
    "several kinds": (
        lambda s: s | {f"{STEM[:-1]}k.lora_A.weight": torch.ones(1, 128),
                       f"{STEM[:-1]}k.lora_B.weight": torch.ones(128, 1)},
        "1 of LoHa, 1 of LoRA",
    ),
    "text encoders": (
        lambda s: s | {f"lora_te1_q.{k.rpartition('.')[2]}": v for k, v in s.items()},
        "text_encoders=False",
    ),
    "convolution": (
        lambda s: s | {f"{STEM}.hada_w1_b": torch.ones(2, 14, 3, 3)}, "only adapters of linears",
    ),
    "empty": (lambda s: {}, "it has no tensors"),
    "difference": (lambda s: s | {f"{STEM}.diff": torch.ones(2, 2)}, r"diff: not a tensor of"),
    "magnitudes of LoHa": (
        lambda s: s | {f"{STEM}.dora_scale": torch.ones(2, 1)}, r"dora_scale, hada_w1_a.* no adapter",
    ),
    "alpha not finite": (lambda s: s | {f"{STEM}.alpha": torch.tensor(torch.inf)}, "not finite"),
    "alpha with a shape": (
        lambda s: s | {f"{STEM}.alpha": torch.ones(3)}, r"alpha has the shape \[3\]",
    ),
    "no rank": (
        lambda s: {k: v[:, :0] if k.endswith("_a") else v[:0] if v.ndim else v for k, v in s.items()},
        "hada_w1_a has no numbers",
    ),
    "numbers for matrices": (
        lambda s: {k: torch.tensor(1.0) for k in s}, r"has the shape \[\]",
    ),
    "the same tensor twice": (
        lambda s: {f"{STEM}.{n}.weight": torch.ones(2, 2) for n in ("lora_A", "lora_B", "lora_up")},
        r"lora_up.weight: the layer has this tensor under another name too",
    ),
    "the same layer twice": (
        lambda s: s | {k.removeprefix("transformer."): v for k, v in s.items()},
        r"are both transformer_blocks\.0\.attn\.to_q",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named_and_changes_nothing(case):
    model = quantized(zoo.model("SD3Transformer2DModel"))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    change, message = WRONG[case]
    with pytest.raises(InputError, match=message):
        dtq.load_adapter(pipeline(model), change(state_for(model)))
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_an_adapter_of_a_1_x_1_convolution_is_refused_before_anything_changes():
    model = quantized(zoo.model("SD3Transformer2DModel"))
    state = state_for(model) | {k.replace("to_q", "to_k"): v for k, v in state_for(model).items()}
    layer = model.get_submodule("transformer_blocks.0.attn.to_k")
    conv = nn.Conv2d(layer.in_features, layer.out_features, 1)
    model.set_submodule(
        "transformer_blocks.0.attn.to_k", dtq.QuantLinear.in_place_of(conv, layer.spec)
    )
    with pytest.raises(InputError, match=r"quantized convolutions take no adapters.*attn\.to_k"):
        dtq.load_adapter(model, state)
    assert not any(isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer) for m in model.modules())


@pytest.mark.parametrize("second", ["LoHa", "LoKr", "DoRA"])
@pytest.mark.parametrize("first", ["LoHa", "LoKr", "DoRA"])
def test_the_adapter_that_was_loaded_last_is_the_active_one(first, second):
    model = quantized(zoo.model("SD3Transformer2DModel"))
    layer_name = "transformer_blocks.0.attn.to_q"
    layer = model.get_submodule(layer_name)
    x = torch.randn(3, layer.in_features)
    plain = layer(x)
    states = {"a": state_for(model, first), "b": state_for(model, second)}
    states["b"] = {k: v if "alpha" in k else v * 0.5 for k, v in states["b"].items()}
    pipe, alone = pipeline(model), {}
    for name, state in states.items():
        dtq.load_adapter(pipe, state, name)
        single = quantized(zoo.model("SD3Transformer2DModel"))
        dtq.load_adapter(single, state)
        alone[name] = single.get_submodule(layer_name)(x)
        assert pipe.get_active_adapters() == [name]
        assert torch.equal(model.get_submodule(layer_name)(x), alone[name])
    assert relative(alone["a"], alone["b"]) > 1e-2
    pipe.set_adapters(["a", "b"])
    if "DoRA" not in (first, second):  # the norms are of the weight with the other adapter or not
        total = alone["a"] + alone["b"] - plain
        assert relative(model.get_submodule(layer_name)(x), total) < 1e-5
    pipe.set_adapters("a")
    assert torch.equal(model.get_submodule(layer_name)(x), alone["a"])
    pipe.delete_adapters("a")
    pipe.set_adapters("b")
    assert torch.equal(model.get_submodule(layer_name)(x), alone["b"])
    pipe.unload_lora_weights()
    assert torch.equal(model.get_submodule(layer_name)(x), plain)


def test_adapters_of_a_float_model_that_is_stored_in_float8():
    model = zoo.model("SD3Transformer2DModel")
    state = state_for(quantized(copy.deepcopy(model)), "LoKr")
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    name = "transformer_blocks.0.attn.to_q"
    assert model.get_submodule(name).weight.dtype == torch.float8_e4m3fn
    dtq.load_adapter(model, state)
    kinds = {p.dtype for n, p in model.named_parameters() if "lokr" in n}
    assert kinds == {torch.float32}
    x = torch.randn(3, model.get_submodule(name).in_features)
    change = model.get_submodule(name).get_delta_weight("default")
    got = model.get_submodule(name)(x) - model.get_submodule(name).get_base_layer()(x)
    assert relative(got, x @ change.T) < 1e-5


@pytest.mark.parametrize("name", ["", "my.style"])
def test_names_that_peft_cannot_store_are_refused(name):
    model = quantized(zoo.model("SD3Transformer2DModel"))
    with pytest.raises(InputError, match="name without dots"):
        dtq.load_adapter(model, state_for(model), name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
def test_files_in_other_dtypes_and_with_an_integer_alpha(dtype):
    model = quantized(zoo.model("SD3Transformer2DModel"))
    layer_name = "transformer_blocks.0.attn.to_q"
    layer = model.get_submodule(layer_name)
    down, up = (torch.randn(s).to(dtype) for s in ((4, layer.in_features), (layer.out_features, 4)))
    state = {f"{STEM}.lora_down.weight": down, f"{STEM}.lora_up.weight": up}
    x = torch.randn(3, layer.in_features)
    want = layer(x) + 0.5 * x @ down.float().T @ up.float().T
    dtq.load_adapter(model, state | {f"{STEM}.alpha": torch.tensor(2)})
    assert relative(model.get_submodule(layer_name)(x), want) < 1e-5


@pytest.mark.parametrize("rows", [(0, 4), (4, 12), (2, 6), (3, 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_an_adapter_are_rows_of_the_change_of_the_weight(kind, rows):
    """Whole blocks of LoKr, of 4 rows each, and parts of blocks."""
    tensors, _ = factors(kind, 16, 8, torch.ones(16, 8), torch.Generator().manual_seed(0))
    whole = read_adapter({f"layer.{suffix}": t for suffix, t in tensors.items()})["layer"]
    part = whole.rows(torch.arange(*rows))
    assert part.shape == (rows[1] - rows[0], 8)
    assert relative(change_of(part), change_of(whole)[slice(*rows)]) < 1e-6
    if kind == "LoKr":
        whole_blocks = rows[0] % 4 == rows[1] % 4 == 0
        assert ("lokr_w2_b" in part.tensors) is whole_blocks


def change_of(layer: Factors) -> Tensor:
    t = layer.tensors
    if "lora_A" in t:
        change = t["lora_B"] @ t["lora_A"]
    elif "hada_w1_a" in t:
        change = (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
    else:
        w1, w2 = (t[w] if w in t else t[f"{w}_a"] @ t[f"{w}_b"] for w in ("lokr_w1", "lokr_w2"))
        change = torch.kron(w1, w2)
    return layer.scale * change


def test_layers_of_text_encoders_can_be_left_out():
    model = quantized(zoo.model("SD3Transformer2DModel"))
    change, _ = WRONG["text encoders"]
    state = state_for(model)
    loaded = dtq.load_adapter(model, change(state), text_encoders=False)
    assert loaded == ["transformer_blocks.0.attn.to_q"]
    with pytest.raises(InputError, match="loaded already"):
        dtq.load_adapter(model, state)


def test_scales_per_input_are_refused():
    model = quantized(zoo.model("SD3Transformer2DModel"))
    state = state_for(model, "DoRA")
    columns = model.get_submodule("transformer_blocks.0.attn.to_q").in_features
    state[f"{STEM}.dora_scale"] = torch.ones(1, columns)
    with pytest.raises(InputError, match="scales per input"):
        dtq.load_adapter(model, state)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    model = quantized(zoo.model("SD3Transformer2DModel"))
    (tmp_path / "bad.safetensors").write_bytes(b"no header")
    for name, message in (
        ("bad.safetensors", "cannot be read"),
        ("none.safetensors", "cannot be read"),
        ("pickle.pt", "safetensors files only"),
    ):
        with pytest.raises(InputError, match=message):
            dtq.load_adapter(model, tmp_path / name)
    with pytest.raises(InputError, match="no transformer_2"):
        dtq.load_adapter(pipeline(model), state_for(model), component="transformer_2")
    with pytest.raises(InputError, match="a model was given"):
        dtq.load_adapter(model, state_for(model), component="transformer")


def lora(model: nn.Module, rank: int, seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    state = {}
    for name, layer in linears(model).items():
        if ".attn" in name:
            stem = f"transformer.{name.replace('.base_layer', '')}"
            state[f"{stem}.lora_A.weight"] = torch.randn(rank, layer.in_features, generator=g)
            state[f"{stem}.lora_B.weight"] = torch.randn(layer.out_features, rank, generator=g)
    return state


def fresh(name: str, state: dict[str, Tensor]) -> tuple[nn.Module, Tensor]:
    model = quantized(zoo.model(name))
    pipeline(model).load_lora_weights(state)
    return model, zoo.output(model, name)


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "WanTransformer3DModel"])
def test_hot_swapping_equals_loading_anew(name):
    """Without and with room for a larger rank; unloading gives back every bit."""
    model = quantized(zoo.model(name))
    plain = zoo.output(model, name)
    one, two, three = (lora(model, rank, seed) for rank, seed in ((4, 1), (4, 2), (7, 3)))
    pipe = pipeline(model)
    pipe.load_lora_weights(one, adapter_name="main")
    pipe.load_lora_weights(two, adapter_name="main", hotswap=True)
    assert torch.equal(zoo.output(model, name), fresh(name, two)[1])
    pipe.load_lora_weights(one, adapter_name="main", hotswap=True)
    assert torch.equal(zoo.output(model, name), fresh(name, one)[1])
    pipe.unload_lora_weights()
    assert torch.equal(zoo.output(model, name), plain)

    model = quantized(zoo.model(name))
    pipe = pipeline(model)
    pipe.enable_lora_hotswap(target_rank=8)
    pipe.load_lora_weights(one, adapter_name="main")
    layer = next(m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer))
    assert layer.lora_A["main"].weight.shape[0] == 8
    pipe.load_lora_weights(three, adapter_name="main", hotswap=True)
    assert relative(zoo.output(model, name), fresh(name, three)[1]) < 1e-5
    pipe.fuse_lora()
    with pytest.raises(ValueError, match="merged"):
        pipe.load_lora_weights(one, adapter_name="main", hotswap=True)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert torch.equal(zoo.output(model, name), plain)


def test_lokr_of_fused_layers_by_the_loader_of_diffusers():
    """It fuses q, k and v of the model first, and a quantized model stays as it is."""
    model = quantized(zoo.model("Flux2Transformer2DModel"))
    name = "double_blocks.0.img_attn.qkv"
    layer = model.get_submodule(FLUX2[name][0])
    state = {
        f"diffusion_model.{name}.lokr_w1": torch.ones(1, 1),
        f"diffusion_model.{name}.lokr_w2": torch.ones(3 * layer.out_features, layer.in_features),
    }
    with pytest.raises(ValueError, match=r"to_qkv.* not found"):
        pipeline(model).load_lora_weights(dict(state))
    assert sorted(dtq.load_adapter(pipeline(model), state)) == sorted(FLUX2[name])


def test_hot_swapping_lokr_is_refused_by_diffusers():
    model = quantized(zoo.model("Flux2Transformer2DModel"))
    state, _ = file_of(model, "LoKr of whole factors", FLUX2, "diffusion_model.")
    pipe = pipeline(model)
    pipe.load_lora_weights(lora(model, 4, 1), adapter_name="main")
    with pytest.raises(ValueError, match="Hotswapping LoKr"):
        pipe.load_lora_weights(dict(state), adapter_name="main", hotswap=True)


def test_hot_swapping_does_not_compile_again():
    name = "FluxTransformer2DModel"
    model = quantized(zoo.model(name))
    one, two = lora(model, 4, 1), lora(model, 6, 2)
    pipe = pipeline(model)
    pipe.enable_lora_hotswap(target_rank=8)
    pipe.load_lora_weights(one, adapter_name="main")
    torch._dynamo.reset()
    model.transformer_blocks[0].compile(backend="dtq")
    call = zoo.inputs(name)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        before = model(**call, return_dict=False)[0]
        pipe.load_lora_weights(two, adapter_name="main", hotswap=True)
        after = model(**call, return_dict=False)[0]
    assert relative(before, fresh(name, one)[1]) < 1e-2
    assert relative(after, fresh(name, two)[1]) < 1e-2
    assert relative(after, before) > 0.05
