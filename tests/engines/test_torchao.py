# SPDX-License-Identifier: Apache-2.0
"""diffusers loads the folders with torchao's tensors, and torchao runs them."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from engine_models import THOROUGH, agreement, layer_input, quantized

import dtq
from dtq.engines import torchao
from dtq.engines.model_folder import WEIGHTS
from dtq.engines.runtimes import run_by
from dtq.engines.target import Contents, StoredLayer
from dtq.errors import CheckpointError
from dtq.formats import FORMATS
from dtq.nn import QuantLinear
from dtq.plan.layers import LayerSpec

needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="needs torchao: see docs/engines/README.md"
)
RUNS = [
    ("dit", "torchao-w8a8"),
    ("dit", "torchao-w4a8"),
    ("flux", "torchao-w8a8"),
    ("sd3", "torchao-w4a8"),
]
if THOROUGH:
    RUNS += [("flux", "torchao-w4a8"), ("sd3", "torchao-w8a8")]


@pytest.fixture(scope="module", params=RUNS, ids=lambda pair: "-".join(pair))
def exported(request, tmp_path_factory):
    """The float model, the quantized one, and its folder."""
    family, recipe = request.param
    model, made = quantized(family, recipe, "torchao")
    folder = tmp_path_factory.mktemp(recipe) / family
    dtq.export(made, "torchao", folder)
    return model, made, folder


@needs_torchao
def test_layers_and_model_have_the_error_of_dtq(exported):
    from torchao.utils import TorchAOBaseTensor

    model, made, folder = exported
    engine = run_by("torchao", folder, model)
    theirs = {n for n, p in engine.named_parameters() if isinstance(p, TorchAOBaseTensor)}
    ours = {f"{n}.weight" for n, m in made.named_modules() if isinstance(m, QuantLinear)}
    assert theirs == ours
    layer, whole = agreement(model, made, lambda n, x: engine.get_submodule(n)(x), engine)
    assert layer <= 1.01
    assert whole <= 1.01


@needs_torchao
def test_integer_sums_are_equal(tmp_path):
    from torchao.kernel import int_scaled_matmul

    model, made = quantized("dit", "torchao-w8a8", "torchao")
    dtq.export(made, "torchao", tmp_path / "model")
    engine = run_by("torchao", tmp_path / "model", model)
    g, checked = torch.Generator().manual_seed(3), 0
    for name, layer in made.named_modules():
        if not isinstance(layer, QuantLinear) or layer.activation_format == "none":
            continue
        codes = torch.randint(-127, 128, (33, layer.in_features), generator=g, dtype=torch.int8)
        own = torch._int_mm(codes, layer.packed_tensor("weight").T.contiguous())
        weight = engine.get_submodule(name).weight
        theirs = int_scaled_matmul(codes, weight.qdata.contiguous().t(), torch.ones(33, 1))
        assert torch.equal(own.float(), theirs.float()), name  # below 2^24: exact in float32
        assert int(own.abs().max()) < 2**24
        checked += 1
    assert checked > 8


@needs_torchao
@pytest.mark.parametrize("kind", torchao.LIMITS.formats)
def test_torchao_decodes_every_format_to_the_values_of_dtq(kind, tmp_path):
    from safetensors import safe_open
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    w = layer_input(256, rows=8)
    fmt = FORMATS[kind]
    tensors = fmt.pack(w, fmt.compute_qparams(w))
    layer = StoredLayer(LayerSpec(kind, "none"), (8, 256), tensors)
    torchao.write(Contents({"a.b": layer}, {"a.c": torch.ones(3)}), tmp_path / "x")
    with safe_open(tmp_path / "x" / WEIGHTS, framework="pt") as opened:
        stored = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        made, left = unflatten_tensor_state_dict(stored, opened.metadata())
    assert not left
    assert torch.equal(made["a.b.weight"].dequantize(), fmt.unpack(tensors))
    again = torchao.read(tmp_path / "x").layers["a.b"]
    assert again.spec == layer.spec
    assert {k: t.dtype for k, t in again.tensors.items()} == {
        k: t.dtype for k, t in tensors.items()
    }
    assert all(torch.equal(again.tensors[key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": [1, 48]}, "block_size"),
        ({"block_size": [2, 256]}, "block_size"),
        ({"act_quant_kwargs": {"_type": "other"}}, "act_quant_kwargs"),
    ],
)
def test_other_layouts_are_refused(changes, message, tmp_path, monkeypatch):
    w, fmt = layer_input(256, rows=8), FORMATS["int8-row"]
    layer = StoredLayer(
        LayerSpec("int8-row", "none"), (8, 256), fmt.pack(w, fmt.compute_qparams(w))
    )
    stored, about = torchao.encode(layer, "float32")
    about["_data"] |= changes
    monkeypatch.setattr(torchao, "encode", lambda *_: (stored, about))
    torchao.write(Contents({"a.b": layer}, {}), tmp_path / "x")
    with pytest.raises(CheckpointError, match=message):
        torchao.read(tmp_path / "x")
