# SPDX-License-Identifier: Apache-2.0
"""``to(dtype)``, ``half()`` and what diffusers builds on them: packed tensors keep every bit."""

from __future__ import annotations

import copy
from functools import cache

import diffusers
import pytest
import tiny
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from torch import nn

import dtq
from dtq.errors import InputError
from dtq.pipelines.tracing import dummy_inputs

CASTS = {
    "to": (lambda m: m.to(torch.bfloat16), torch.bfloat16),
    "to by keyword": (lambda m: m.to("cpu", dtype=torch.float64), torch.float64),
    "to the same": (lambda m: m.to(torch.float32), torch.float32),
    "to no dtype": (lambda m: m.to(dtype=None), torch.float32),
    "half": (lambda m: m.half(), torch.float16),
    "float": (lambda m: m.float(), torch.float32),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
    "double": (lambda m: m.double(), torch.float64),
}
OTHERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2")
PIPELINES = {
    "flux": (diffusers.FluxPipeline, diffusers.FluxImg2ImgPipeline),
    "sd3": (diffusers.StableDiffusion3Pipeline, diffusers.StableDiffusion3Img2ImgPipeline),
    "wan": (diffusers.WanPipeline, diffusers.WanVideoToVideoPipeline),
    "pixart": (diffusers.PixArtAlphaPipeline, diffusers.PixArtSigmaPipeline),
}


@cache
def _quantized(name: str) -> nn.Module:
    return dtq.quantize(tiny.TRANSFORMERS[name](), "rtn-w4a8", progress=False, sanity_check=False)


def quantized(name: str) -> nn.Module:
    return copy.deepcopy(_quantized(name))


def run(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**dummy_inputs(model, 2, 0.5, 1))[0].double()


def packed(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v for k, v in model.state_dict().items() if not v.is_floating_point()}


def dtypes(model: nn.Module) -> set[torch.dtype]:
    return {p.dtype for p in model.parameters() if p.is_floating_point()}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("name", tiny.TRANSFORMERS)
def test_casts_apply_to_what_is_not_quantized(name, cast, tmp_path):
    change, dtype = CASTS[cast]
    model, floats = quantized(name), tiny.TRANSFORMERS[name]()
    before = packed(model)
    assert change(model) is model
    assert model.is_quantized
    assert dtypes(model) == {dtype}
    after = packed(model)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    got, want = run(model), run(change(floats))
    assert (got - want).norm() < 0.05 * want.norm()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.dtype == model.dtype
    assert (run(loaded) - got).norm() <= 0.03 * got.norm()  # diffusers makes some buffers anew
    for each in (model, loaded):
        each.dequantize()
        assert (run(each) - got).norm() < 0.02 * got.norm()
    assert dtypes(model) == {dtype}
    model.to(torch.float32).half()


@pytest.mark.parametrize("name", tiny.TRANSFORMERS)
def test_a_model_loaded_in_another_dtype_dequantizes_to_it(name, tmp_path):
    model = quantized(name)
    model.save_pretrained(tmp_path / "a")
    loaded = type(model).from_pretrained(tmp_path / "a", torch_dtype=torch.bfloat16)
    want = run(loaded)
    loaded.save_pretrained(tmp_path / "b")
    again = type(model).from_pretrained(tmp_path / "b")
    assert torch.equal(run(again), want)
    loaded.dequantize()
    assert dtypes(loaded) == dtypes(again)
    assert (run(loaded) - want).norm() < 0.02 * want.norm()
    with pytest.raises(InputError, match=r"computes in float32.*layerwise_casting"):
        type(model).from_pretrained(tmp_path / "a", torch_dtype=torch.float8_e4m3fn)


@pytest.mark.parametrize("name", tiny.TRANSFORMERS)
def test_casts_that_destroy_packed_tensors_are_refused(name):
    model = quantized(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for cast in (lambda: model.type(torch.float16), lambda: model.to(torch.float8_e4m3fn)):
        with pytest.raises(InputError, match=r"packed tensors|computes in"):
            cast()
    after = model.state_dict()
    assert all(after[k].dtype == v.dtype and torch.equal(after[k], v) for k, v in before.items())


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_share_and_cast_a_quantized_model(name):
    first, second = PIPELINES[name]
    parts = [n for n in (*OTHERS, "tokenizer_3", "vae") if n in first.__init__.__annotations__]
    pipe = first(
        transformer=quantized(name), scheduler=FlowMatchEulerDiscreteScheduler(),
        **dict.fromkeys(parts),
    )  # fmt: skip
    want = run(pipe.transformer)
    other = second.from_pipe(pipe)
    assert other.transformer is pipe.transformer
    assert torch.equal(run(other.transformer), want)
    bf16 = second.from_pipe(pipe, torch_dtype=torch.bfloat16)
    assert bf16.transformer.dtype == torch.bfloat16
    pipe.to(torch.float16)
    pipe.to("cpu", torch.float32)
    assert (run(pipe.transformer) - want).norm() < 0.02 * want.norm()


@pytest.mark.parametrize("upcast", [False, True])
@pytest.mark.parametrize("name", ["sd3", "flux", "wan"])
def test_adapters_of_a_quantized_model_are_saved(name, upcast, tmp_path):
    peft = pytest.importorskip("peft")
    model = quantized(name)
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False)
    model.add_adapter(config)
    want = run(model)
    model.save_lora_adapter(tmp_path, upcast_before_saving=upcast)
    again = quantized(name)
    (file,) = tmp_path.iterdir()
    again.load_lora_adapter(load_file(file), prefix=None)
    assert torch.equal(run(again), want)


def test_dequantized_models_take_any_timestep_and_fuse():
    model = dtq.quantize(
        tiny.flux(), "w8a8", activations="int8-static-timestep", progress=False, sanity_check=False,
        calibration={"samples": 2, "batch_size": 2, "steps": 4, "num_timestep_bins": 2},
    )  # fmt: skip
    model.dequantize()
    assert not model._forward_pre_hooks
    assert not hasattr(model, "_dtq_clock")
    model.fuse_qkv_projections()
    assert hasattr(model.transformer_blocks[0].attn, "to_qkv")
