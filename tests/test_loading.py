# SPDX-License-Identifier: Apache-2.0
"""The other ways in: one file, whole pipelines, odd dtypes and devices, and models beside it."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import tiny
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from safetensors.torch import save_file
from torch import nn

import dtq
from dtq.errors import InputError
from dtq.source import made_inputs


def linears(model: nn.Module) -> dict[str, dtq.QuantLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, dtq.QuantLinear)}


def run(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**made_inputs(model, 2, 500.0, 1), return_dict=False)[0]


@pytest.fixture(scope="module")
def single_files(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """One float file with diffusers' names, and the folder of its config, per model."""
    found = {}
    for name in ("sd3", "flux", "wan"):
        folder = tmp_path_factory.mktemp(name)
        model = tiny.TRANSFORMERS[name]()
        model.save_config(folder)
        save_file(model.state_dict(), folder / "float.safetensors")
        found[name] = (folder / "float.safetensors", folder)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["sd3", "flux", "wan"])
def test_a_float_single_file_is_quantized_while_loading(name, dtype, single_files, tmp_path):
    file, folder = single_files[name]
    kind = type(tiny.TRANSFORMERS[name]())
    model = kind.from_single_file(
        str(file), config=str(folder), torch_dtype=dtype, quantization_config=dtq.DTQConfig("w4a16")
    )
    assert linears(model)
    assert model.is_quantized
    assert not any(
        part in name.split(".")
        for name in linears(model)
        for part in kind._keep_in_fp32_modules or ()
    )
    model.save_pretrained(tmp_path / "m")
    again = kind.from_pretrained(tmp_path / "m")
    state = again.state_dict()
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert torch.equal(run(again), run(model))
    if dtype == torch.float32:
        same = dtq.quantize(tiny.TRANSFORMERS[name](), "w4a16", progress=False)
        assert torch.equal(run(model), run(same))


def test_a_quantized_single_file_is_refused(single_files, tmp_path):
    _, folder = single_files["flux"]
    model = dtq.quantize(tiny.flux(), "w4a16", progress=False)
    model.save_pretrained(tmp_path / "m")
    (packed,) = (tmp_path / "m").glob("*.safetensors")
    with pytest.raises(InputError, match="from_pretrained"):
        diffusers.FluxTransformer2DModel.from_single_file(
            str(packed), config=str(folder), quantization_config=dtq.DTQConfig("w4a16")
        )


@pytest.mark.parametrize(
    "how",
    [
        {"quant_mapping": {"transformer": dtq.DTQConfig("w4a16")}},
        {
            "quant_backend": "dtq",
            "quant_kwargs": {"recipe": "w4a16"},
            "components_to_quantize": ["transformer"],
        },
    ],
    ids=["mapping", "backend"],
)
def test_a_whole_pipeline_is_told_what_to_quantize(how, float_folder, tmp_path):
    config = PipelineQuantizationConfig(**how)
    pipe = DiffusionPipeline.from_pretrained(float_folder, quantization_config=config)
    assert linears(pipe.transformer)
    assert not linears(pipe.vae)
    pipe.save_pretrained(tmp_path / "p")
    again = DiffusionPipeline.from_pretrained(tmp_path / "p")
    assert torch.equal(tiny.sample(again), tiny.sample(pipe))


def test_a_text_encoder_is_not_for_dtq(tmp_path):
    transformers = pytest.importorskip("transformers")
    small = transformers.T5Config(
        d_model=32, d_ff=32, d_kv=8, num_heads=4, num_layers=1, vocab_size=64
    )
    transformers.T5EncoderModel(small).save_pretrained(tmp_path / "t")
    with pytest.raises(InputError, match="components_to_quantize"):
        transformers.T5EncoderModel.from_pretrained(
            tmp_path / "t", quantization_config=dtq.DTQConfig("w4a16")
        )
