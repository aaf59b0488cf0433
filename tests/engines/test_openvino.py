# SPDX-License-Identifier: Apache-2.0
"""OpenVINO runs the IRs on the CPU with at most the error of the checkpoint."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path

import pytest
import torch
from engine_models import (
    THOROUGH,
    error,
    float_output,
    layer_input,
    model_errors,
    output,
    quantized,
)
from torch import nn

import dtq
from dtq.engines import onnx_graph, openvino
from dtq.engines.runtimes import run_by
from dtq.engines.runtimes.openvino import Compiled
from dtq.engines.target import StoredLayer
from dtq.formats import FORMATS
from dtq.nn import QuantLinear
from dtq.pipelines.tracing import dummy_inputs
from dtq.plan.layers import LayerSpec

PACKAGES = ("openvino", "onnx", "onnxscript")
needs_openvino = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in PACKAGES),
    reason=f"needs {', '.join(PACKAGES)}: see docs/engines/README.md",
)
CPU_FLAGS = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
ROUNDS_TOKENS = any(flag in CPU_FLAGS for flag in ("avx512_vnni", "avx_vnni"))
GROUP = openvino.OPTION[1]


def compiled_layer(module: nn.Module, columns: int, folder, group: int) -> Compiled:
    """A linear alone, whose tokens have a scale for each group of columns; 0: float tokens."""
    from openvino import convert_model

    graph = folder / "layer.onnx"
    torch.onnx.export(
        module.eval(), (), graph, kwargs={"x": torch.ones(3, columns)}, dynamo=True, verbose=False,
        dynamic_shapes={"x": {0: torch.export.Dim.AUTO}}, opset_version=onnx_graph.OPSET,
        external_data=False, optimize=False,
    )  # fmt: skip
    return Compiled(convert_model(graph), options={GROUP: str(group)})


RUNS = [("dit", "openvino-w8a8"), ("flux", "openvino-w4a16")]
"""Each pair is an export of a whole model, which torch traces for 8 to 17 s of a core."""
if THOROUGH:
    RUNS += [("dit", "openvino-w4a16"), ("flux", "openvino-w8a8")]


@needs_openvino
@pytest.mark.parametrize(("family", "recipe"), RUNS)
def test_the_model_has_at_most_the_error_of_dtq(family, recipe, tmp_path):
    from openvino import Core

    model, made = quantized(family, recipe, "openvino")
    file = tmp_path / "model.xml"
    report = dtq.export(made, "openvino", file)
    assert report.nbytes == file.stat().st_size + file.with_suffix(".bin").stat().st_size
    ir = Core().read_model(file)
    constants = (
        op for op in ir.get_ops() if op.get_type_name() == "Constant" and len(op.shape) > 1
    )
    types = Counter(op.get_element_type().get_type_name() for op in constants)
    layers = [m.spec for m in made.modules() if isinstance(m, QuantLinear)]
    kinds = Counter(
        {"int8-row": "i8" if spec.activation_format != "none" else "u8", "int8-g64": "u8"}.get(
            spec.weight_format, "u4"
        )
        for spec in layers
    )
    assert {name: types[name] for name in kinds} == kinds
    assert max(kinds.values()) > 8
    tokens = any(spec.activation_format != "none" for spec in layers)
    option = ir.get_rt_info(list(openvino.OPTION)).astype(str)
    assert option == str(openvino.TOKEN_GROUP if tokens else 0)
    engine = run_by("openvino", file, model)
    flux = family == "flux"
    ours, theirs = model_errors(model, made, engine, largest=1 if flux else 1000)
    print(f"\n{type(model).__name__} {recipe}: {theirs / ours:.4f}")
    assert ours > 0
    assert theirs <= 1.01 * ours
    inputs = dummy_inputs(model, 3, 0.3 if flux else 300, 5)  # another batch size than the traced
    assert error(output(engine, inputs), output(made, inputs)) < 2 * error(
        output(made, inputs), output(model, inputs)
    )


@needs_openvino
@pytest.mark.parametrize("recipe", ["openvino-w8a8", "openvino-w4a16"])
def test_every_layer_has_at_most_the_error_of_dtq(recipe, tmp_path):
    model, made = quantized("dit", recipe, "openvino")
    ratios, seen = {}, set()
    for name, layer in made.named_modules():
        if not isinstance(layer, QuantLinear) or (layer.spec, layer._shape) in seen:
            continue
        seen.add((layer.spec, layer._shape))  # each is compiled by itself
        x = layer_input(layer.in_features)
        want = float_output(model, name, x)
        stored = StoredLayer(layer.spec, layer._shape, dict(layer.packed_tensors()))
        module = openvino.module_of(stored, layer.bias)
        run = compiled_layer(module, layer.in_features, tmp_path, openvino.TOKEN_GROUP)
        theirs = run({"x": x})
        with torch.no_grad():
            own = error(layer(x), want)
        assert 0 < own < 0.1
        ratios[name] = error(theirs, want) / own
    print(f"\nlayers of {recipe}: {min(ratios.values()):.4f} to {max(ratios.values()):.4f}")
    assert len(ratios) >= 4
    assert max(ratios.values()) <= 1.01


@needs_openvino
@pytest.mark.skipif(not ROUNDS_TOKENS, reason="OpenVINO rounds tokens on CPUs with VNNI")
def test_one_scale_for_a_token_gives_the_products_of_dtq(tmp_path):
    """Scales of one and integer tokens: the output is the sum of int8 products."""
    g = torch.Generator().manual_seed(3)
    weight = torch.randint(-127, 128, (48, 256), generator=g, dtype=torch.int8)
    tensors = {"weight": weight, "weight_scale": torch.ones(48, 1)}
    layer = StoredLayer(LayerSpec("int8-row", "int8-row"), (48, 256), tensors)
    x = layer_input(256)
    scale = x.abs().amax(1, keepdim=True) / 127
    codes = (x / scale).round().to(torch.int8)
    own = torch._int_mm(codes, weight.T.contiguous()).float() * scale
    theirs = compiled_layer(openvino.module_of(layer, None), 256, tmp_path, 256)({"x": x})
    exact = x @ weight.T.float()
    assert error(theirs, exact) == pytest.approx(error(own, exact), rel=1e-3)
    assert error(theirs, own) < 1e-2 * error(own, exact)


@needs_openvino
@pytest.mark.parametrize("kind", openvino.LIMITS.formats)
def test_weight_only_layers_have_the_weights_of_dtq_and_float_tokens(kind, tmp_path):
    w, fmt = layer_input(384, rows=16), FORMATS[kind]
    layer = StoredLayer(LayerSpec(kind, "none"), (16, 384), fmt.pack(w, fmt.compute_qparams(w)))
    run = compiled_layer(openvino.module_of(layer, None), 384, tmp_path, openvino.TOKEN_GROUP)
    theirs = run({"x": torch.eye(384)}).T
    torch.testing.assert_close(theirs, fmt.unpack(layer.tensors), rtol=1e-5, atol=5e-6)
    x = layer_input(384)
    assert error(run({"x": x}), x @ fmt.unpack(layer.tensors).T) < 1e-10
