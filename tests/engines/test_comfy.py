# SPDX-License-Identifier: Apache-2.0
"""comfy-kitchen, as released, runs the files for ComfyUI as dtq runs the checkpoint."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from engine_models import FAMILIES, error, float_output, layer_input, model_errors, quantized

import dtq
from dtq.engines import TARGETS
from dtq.engines.comfy_nvfp4 import tiled, untiled
from dtq.engines.convrot import from_regular, to_regular
from dtq.engines.runtimes import run_by
from dtq.engines.runtimes.comfy_kitchen import quantized_weights
from dtq.formats import FORMATS
from dtq.formats.lut import interval
from dtq.nn import QuantLinear

needs_kitchen = pytest.mark.skipif(
    importlib.util.find_spec("comfy_kitchen") is None,
    reason="needs comfy-kitchen: see docs/engines/README.md",
)
CALLS = {("comfy-svdquant", "dit"): 96}
"""Where the engine rounds tokens by a rule of its own (scales that are not rounded to bfloat16), the ratio of
two errors has a standard error of 0.02 after 12 calls, of 0.006 after 96."""
RECIPES = {name: t.limits.recipe for name, t in TARGETS.items() if name.startswith("comfy")}


@pytest.fixture(scope="module", params=RECIPES)
def target(request):
    return request.param


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request, target, tmp_path_factory):
    """The float model, the quantized one, and its file."""
    model, made = quantized(request.param, RECIPES[target], target)
    file = tmp_path_factory.mktemp(target) / f"{request.param}.safetensors"
    dtq.export(made, target, file, names="diffusers")
    return model, made, file


@needs_kitchen
def test_every_layer_has_the_error_of_dtq(exported, target):
    model, made, file = exported
    weights, others = quantized_weights(file)
    layers = {n: m for n, m in made.named_modules() if isinstance(m, QuantLinear)}
    assert set(layers) == set(weights)
    assert len(layers) > 8
    ratios = []
    for name, layer in layers.items():
        x = layer_input(layer.in_features)
        want = float_output(model, name, x)
        with torch.no_grad():
            theirs = torch.nn.functional.linear(x, weights[name], others.get(f"{name}.bias"))
            own = error(layer(x), want)
        assert 0 < own < 0.1
        assert error(theirs, want) <= 1.01 * own, name
        ratios.append(error(theirs, want) / own)
    print(f"\n{target} {file.stem}: layers {max(ratios):.4f}")


@needs_kitchen
def test_the_whole_model_has_the_error_of_dtq(exported, target):
    model, made, file = exported
    engine = run_by("comfy-kitchen", file, model)
    calls = CALLS.get((target, file.stem), 12)
    ours, theirs = model_errors(model, made, engine, calls=calls)
    print(f"\n{target} {file.stem}: model {theirs / ours:.4f}")
    assert ours > 0
    assert theirs <= 1.01 * ours


@needs_kitchen
def test_integer_sums_are_equal(tmp_path):
    from comfy_kitchen.backends.eager.quantization import mm_int8

    _, made = quantized("dit", "convrot-w8a8", "comfy-int8")
    file = tmp_path / "model.safetensors"
    dtq.export(made, "comfy-int8", file)
    weights, _ = quantized_weights(file)
    g = torch.Generator().manual_seed(3)
    rotated = 0
    for name, layer in made.named_modules():
        if not isinstance(layer, QuantLinear) or layer.activation_format == "none":
            continue
        codes = torch.randint(-127, 128, (33, layer.in_features), generator=g, dtype=torch.int8)
        own = torch._int_mm(codes, layer.packed_tensor("weight").T.contiguous())
        block = layer.problem.hadamard_block
        rotated += block > 1
        theirs = mm_int8(to_regular(codes, block), weights[name]._qdata.T.contiguous())
        assert torch.equal(own, theirs), name
    assert rotated > 8


@needs_kitchen
@pytest.mark.parametrize(("target_name", "limit"), [("comfy-w4a8", 127), ("comfy-w4a4", 7)])
def test_integer_sums_of_4_bit_weights_are_equal(target_name, limit, tmp_path):
    from comfy_kitchen.backends.eager.convrot_w4a4 import prepare_int4_weight_for_int8_linear
    from comfy_kitchen.backends.eager.quantization import mm_int8
    from comfy_kitchen.backends.eager.w4a8_int8 import _dequant_int4_grouped_to_int8

    _, made = quantized("dit", RECIPES[target_name], target_name)
    file = tmp_path / "model.safetensors"
    dtq.export(made, target_name, file)
    weights, _ = quantized_weights(file)
    g, checked = torch.Generator().manual_seed(3), 0
    for name, layer in made.named_modules():
        if not isinstance(layer, QuantLinear) or layer.activation_format == "none":
            continue
        codes = torch.randint(-limit, limit + 1, (9, layer.in_features), generator=g)
        codes = codes.to(torch.int8)
        fmt = FORMATS[layer.weight_format]
        own = fmt.unpack({n: layer.packed_tensor(n) for n in fmt.tensor_specs(layer._shape)})
        own = (own / layer.packed_tensor("weight_scale")).round().to(torch.int8)
        quantized_weight = weights[name]
        if target_name == "comfy-w4a8":
            params = quantized_weight._params
            theirs = _dequant_int4_grouped_to_int8(
                quantized_weight._qdata, params.scale, params.codebook, params.group_size
            )
        else:
            theirs = prepare_int4_weight_for_int8_linear(quantized_weight._qdata)
        regular = to_regular(codes, layer.problem.hadamard_block)
        assert torch.equal(
            torch._int_mm(codes, own.T.contiguous()), mm_int8(regular, theirs.T.contiguous())
        ), name
        checked += 1
    assert checked > 8


# few numbers are searched in the table, many are counted
@pytest.mark.parametrize("rows", [8, 200])
def test_codes_of_4_bits_are_those_of_the_nearest_int8_level(rows):
    w, fmt = layer_input(256, rows), FORMATS["lut4-2l-g16"]
    params = fmt.compute_qparams(w)
    scale_2 = params["weight_scale_2"].float().repeat_interleave(16, 1).unsqueeze(-1)
    levels = (params["weight_lut"].reshape(-1) * scale_2).round().clamp(-127, 127)
    u = w / params["weight_scale"]
    nearest = (levels - u.unsqueeze(-1)).abs().amin(-1)
    got = fmt.unpack(fmt.pack(w, params)) / params["weight_scale"]
    torch.testing.assert_close((got - u).abs(), nearest, rtol=0, atol=1e-4)
    assert torch.equal(fmt.fake_quantize(w, params), fmt.unpack(fmt.pack(w, params)))
    bounds = u[-1, :15].sort().values
    u[0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    assert torch.equal(interval(u, bounds), torch.bucketize(u, bounds, out_int32=True))


@pytest.mark.parametrize("block", [4, 16, 64, 256])
def test_columns_go_to_the_regular_rotation_and_back(block):
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (8, 2 * block), generator=g, dtype=torch.int8)
    assert torch.equal(from_regular(to_regular(codes, block), block), codes)
    assert not torch.equal(to_regular(codes, block), codes)


@needs_kitchen
@pytest.mark.parametrize(
    ("name", "kind", "activations"),
    [
        ("comfy-nvfp4", "nvfp4-46", "nvfp4"),
        ("comfy-nvfp4", "nvfp4-46", "none"),
        ("comfy-fp8", "fp8-matrix", "fp8-row"),
        ("comfy-fp8", "fp8-matrix", "none"),
    ],
)
def test_float_weights_are_those_of_dtq(name, kind, activations, tmp_path):
    """On a CPU the package multiplies them with float activations, whatever the file asks for."""
    model, made = quantized("dit", name, name, activations=activations)
    file = tmp_path / "model.safetensors"
    dtq.export(made, name, file)
    weights, others = quantized_weights(file)
    checked = 0
    for name, layer in made.named_modules():
        if not isinstance(layer, QuantLinear) or layer.weight_format != kind:
            continue
        weight = weights[name].dequantize() if activations != "none" else weights[name]
        torch.testing.assert_close(weight, layer.dequantize(), rtol=1e-6, atol=0)
        if activations == "none":
            x = layer_input(layer.in_features)
            want = float_output(model, name, x)
            with torch.no_grad():
                theirs = torch.nn.functional.linear(x, weight, others.get(f"{name}.bias"))
                own = error(layer(x), want)
            assert error(theirs, want) == pytest.approx(own, rel=1e-3)
        checked += 1
    assert checked > 8


def test_scales_are_tiled_as_the_package_tiles_them():
    blocked = pytest.importorskip("comfy_kitchen.float_utils").to_blocked
    g = torch.Generator().manual_seed(5)
    for shape in ((128, 4), (16, 8), (300, 6), (256, 64)):
        scale = torch.rand(shape, generator=g).to(torch.float8_e4m3fn)
        ours = tiled(scale)
        assert torch.equal(ours.view(torch.uint8), blocked(scale, flatten=False).view(torch.uint8))
        assert torch.equal(untiled(ours, *shape).view(torch.uint8), scale.view(torch.uint8))
