# SPDX-License-Identifier: Apache-2.0
"""The quantized linear behaves as an nn.Linear where possible, and raises an error elsewhere."""

from __future__ import annotations

import copy
import pickle

import pytest
import tiny
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import dtq
from dtq.errors import CheckpointError
from dtq.formats import FORMATS, bits_per_weight
from dtq.nn import QuantLinear
from dtq.plan.layers import LayerSpec
from dtq.transforms.choice import online_transform


def make(weights="int4-2l-g64", activations="int8-row", n=48, k=None, seed=0, dtype=torch.float32):
    """A quantized layer and the float weight that it was made from."""
    k = k or max(128, FORMATS[weights].group or 0)
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=g) * 0.05
    transform = online_transform(w, torch.rand(k, generator=g) + 0.5, 64)
    fmt = FORMATS[weights]
    transformed = transform.w(w)
    layer = QuantLinear(
        k, n, True, LayerSpec(weights, activations, 64, True), bins=4, compute_dtype=dtype
    )
    tensors = fmt.pack(transformed, fmt.compute_qparams(transformed))
    tensors["pre_quant_scale"] = transform.scale.reshape(1, -1)
    if activations == "int8-static-timestep":
        tensors["input_scale"] = torch.tensor([[0.01, 0.02, 0.04, 0.08]])
    layer.fill(tensors)
    with torch.no_grad():
        layer.bias.zero_()
    return layer, w


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("activations", ["none", "int8-row", "fp8-row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_is_close_to_the_float_layer(weights, activations, dtype):
    layer, w = make(weights, activations, dtype=dtype)
    x = torch.randn(2, 7, w.shape[1], dtype=dtype, generator=torch.Generator().manual_seed(7))
    y = layer(x)
    assert y.dtype == dtype
    assert y.shape == (2, 7, 48)
    want = x.float() @ w.T
    bits = bits_per_weight(FORMATS[weights], (1152, 2304))
    limit = 1.0 if bits < 2.6 else 0.4 if bits < 3.6 else 0.3 if "e3m0" in weights else 0.25
    assert (y.float() - want).norm() / want.norm() < limit


@pytest.mark.parametrize("weights", FORMATS)
def test_dequantize_is_the_matrix_that_forward_multiplies_by(weights):
    layer, _ = make(weights, "none")
    x = torch.randn(5, layer.in_features)
    torch.testing.assert_close(layer(x), x @ layer.dequantize().T, rtol=1e-4, atol=1e-4)


def test_other_shapes_and_strides():
    layer, _ = make()
    x = torch.randn(6, 128, 3).transpose(1, 2)  # (6, 3, 128), not contiguous
    assert torch.equal(layer(x), layer(x.contiguous()))
    assert layer(torch.randn(0, 128)).shape == (0, 48)
    assert layer(torch.randn(128)).shape == (48,)


def test_casts_do_not_change_packed_tensors():
    layer, _ = make()
    before = {k: v.clone() for k, v in layer.state_dict().items() if k != "bias"}
    for cast in (layer.bfloat16, layer.half, layer.double, layer.float):
        cast()
    assert all(torch.equal(before[k], layer.state_dict()[k]) for k in before)


def test_use_as_a_float_weight_raises():
    layer, _ = make()
    assert isinstance(layer, nn.Linear)
    assert layer.weight.dtype == torch.int8
    with pytest.raises(RuntimeError):
        layer.weight.data += torch.randn(48, 128)  # a LoRA merge does this
    with pytest.raises(RuntimeError):
        nn.functional.linear(torch.randn(3, 128), layer.weight)


def test_copies_and_pickles():
    layer, _ = make()
    x = torch.randn(3, 128)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


def test_wrong_tensors_are_refused_by_name():
    layer, _ = make()
    tensors = {k: v.clone() for k, v in layer.packed_tensors().items()}
    with pytest.raises(CheckpointError, match="weight_scale_2"):
        layer.fill({k: v for k, v in tensors.items() if k != "weight_scale_2"})
    with pytest.raises(CheckpointError, match=r"weight_scale: expected torch.float32 \[48, 1\]"):
        layer.fill({**tensors, "weight_scale": tensors["weight_scale"].half()})


def test_static_scales_follow_the_clock():
    layer, _ = make(activations="int8-static-timestep")
    with pytest.raises(RuntimeError, match="clock"):
        layer(torch.randn(1, 128))
    clock = dtq.nn.StepClock([250.0, 500.0, 750.0])
    layer.set_clock(clock)
    x = torch.randn(4, 128)
    outputs = []
    for t in (10, 300, 600, 999):
        clock.set(torch.tensor([t]))
        outputs.append(layer(x))
    assert not torch.equal(outputs[0], outputs[3])
    assert [int(clock.bin)] == [3]


def test_one_compilation_serves_every_timestep():
    model = dtq.quantize(
        tiny.pipeline(), "w4a8", activations="int8-static-timestep", progress=False,
        calibration={"samples": 4, "batch_size": 4, "steps": 4, "num_timestep_bins": 4},
    ).transformer  # fmt: skip
    x = torch.randn(2, 4, 8, 8)
    label = torch.tensor([1, 2])
    eager = [model(x, timestep=torch.tensor([t, t]), class_labels=label)[0] for t in (999, 600, 30)]
    assert not torch.equal(eager[0], eager[2])
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    got, frames = [], []
    for t in (999, 600, 30):
        got.append(compiled(x, timestep=torch.tensor([t, t]), class_labels=label)[0])
        frames.append(counter.frame_count)
    assert frames[0] == frames[1] == frames[2]  # nothing is compiled after the first call
    for a, b in zip(eager, got, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_inductor_gives_the_same_numbers():
    layer, _ = make()
    x = torch.randn(16, 128)
    torch._dynamo.reset()
    torch.testing.assert_close(
        torch.compile(layer, fullgraph=True)(x), layer(x), atol=1e-5, rtol=1e-5
    )


def test_lora_trains_on_top_and_sees_the_raw_input():
    peft = pytest.importorskip("peft")
    layer, _ = make()
    model = nn.Sequential()
    model.add_module("proj", layer)
    x = torch.randn(3, 128)
    base = model(x)
    adapted = peft.inject_adapter_in_model(
        peft.LoraConfig(r=4, target_modules=["proj"], init_lora_weights=False), model
    )
    lora = adapted.proj
    delta = x @ lora.lora_A["default"].weight.T @ lora.lora_B["default"].weight.T
    torch.testing.assert_close(
        adapted(x), base + delta * lora.scaling["default"], rtol=1e-4, atol=1e-4
    )
    adapted(x).sum().backward()
    assert lora.lora_A["default"].weight.grad is not None


def test_gradients_pass_through_to_the_input_and_the_bias():
    layer, _ = make()
    layer.bias.requires_grad_(True)
    x = torch.randn(3, 128, requires_grad=True)
    want = layer(x.detach())
    y = layer(x)
    assert torch.equal(y.detach(), want.detach())
    y.sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(3, 128))
    assert layer.bias.grad.eq(3).all()
