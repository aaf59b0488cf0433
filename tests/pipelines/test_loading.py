# SPDX-License-Identifier: Apache-2.0
"""Other ways to load: single files, whole pipelines, all dtypes and devices, other models."""

from __future__ import annotations

import copy
from pathlib import Path

import diffusers
import pytest
import tiny
import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, PipelineQuantizationConfig
from diffusers.models import modeling_utils
from safetensors.torch import save_file
from torch import nn

import dtq
from dtq.errors import InputError
from dtq.pipelines.tracing import dummy_inputs


def linears(model: nn.Module) -> dict[str, dtq.QuantLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, dtq.QuantLinear)}


def run(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**dummy_inputs(model, 2, 500.0, 1), return_dict=False)[0]


@pytest.fixture(scope="module")
def single_files(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """One float file with diffusers' names, and the folder of its config, per model."""
    files = {}
    for name in ("sd3", "flux", "wan"):
        folder = tmp_path_factory.mktemp(name)
        model = tiny.TRANSFORMERS[name]()
        model.save_config(folder)
        save_file(model.state_dict(), folder / "float.safetensors")
        files[name] = (folder / "float.safetensors", folder)
    return files


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
    "options",
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
def test_a_whole_pipeline_is_told_what_to_quantize(options, float_folder, tmp_path):
    config = PipelineQuantizationConfig(**options)
    pipe = DiffusionPipeline.from_pretrained(float_folder, quantization_config=config)
    assert linears(pipe.transformer)
    assert not linears(pipe.vae)
    pipe.save_pretrained(tmp_path / "p")
    again = DiffusionPipeline.from_pretrained(tmp_path / "p")
    assert torch.equal(tiny.sample(again), tiny.sample(pipe))


def test_a_text_encoder_is_refused(tmp_path):
    transformers = pytest.importorskip("transformers")
    small = transformers.T5Config(
        d_model=32, d_ff=32, d_kv=8, num_heads=4, num_layers=1, vocab_size=64
    )
    transformers.T5EncoderModel(small).save_pretrained(tmp_path / "t")
    with pytest.raises(InputError, match="components_to_quantize"):
        transformers.T5EncoderModel.from_pretrained(
            tmp_path / "t", quantization_config=dtq.DTQConfig("w4a16")
        )


@pytest.mark.parametrize("variant", ["fp16", "w4a8"])
def test_variants(variant, quantized_folder, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(quantized_folder)
    pipe.save_pretrained(tmp_path / "p", variant=variant, max_shard_size="300kB")
    assert len(list((tmp_path / "p/transformer").glob(f"*.{variant}*.safetensors"))) > 1
    again = DiffusionPipeline.from_pretrained(tmp_path / "p", variant=variant)
    assert torch.equal(tiny.sample(again), tiny.sample(pipe))


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, {"": torch.device("cpu")}])
def test_device_maps(device_map, quantized_folder, float_folder):
    want = DiTTransformer2DModel.from_pretrained(quantized_folder / "transformer")
    got = DiTTransformer2DModel.from_pretrained(
        quantized_folder / "transformer", device_map=device_map
    )
    assert torch.equal(run(got), run(want))
    new = DiTTransformer2DModel.from_pretrained(
        float_folder / "transformer",
        device_map=device_map,
        quantization_config=dtq.DTQConfig("w4a16"),
    )
    assert linears(new)


def test_loading_without_low_cpu_memory_is_refused(quantized_folder):
    with pytest.raises(ValueError, match="low_cpu_mem_usage"):
        DiTTransformer2DModel.from_pretrained(
            quantized_folder / "transformer", low_cpu_mem_usage=False
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantizing_while_loading_in_every_dtype(dtype, float_folder, tmp_path):
    model = DiTTransformer2DModel.from_pretrained(
        float_folder / "transformer",
        torch_dtype=dtype,
        quantization_config=dtq.DTQConfig("w4a16", modules_to_not_convert=["re:.*ff.*"]),
    )
    assert model.dtype == dtype
    assert not any(".ff." in name for name in linears(model))
    model.save_pretrained(tmp_path / "m")
    again = DiTTransformer2DModel.from_pretrained(tmp_path / "m")
    assert again.dtype == dtype
    assert again.config.quantization_config.modules_to_not_convert == ["re:.*ff.*"]
    want = model.state_dict()
    assert all(torch.equal(v, want[k]) for k, v in again.state_dict().items())


def test_a_state_dict_goes_through_torch_save(quantized_folder, tmp_path):
    model = DiTTransformer2DModel.from_pretrained(quantized_folder / "transformer")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = copy.deepcopy(model)
    for p in other.parameters():
        p.data.zero_()
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(run(other), run(model))
    torch.save(model, tmp_path / "model.pt")
    whole = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(run(whole), run(model))
    whole.save_pretrained(tmp_path / "again")
    assert torch.equal(run(type(model).from_pretrained(tmp_path / "again")), run(model))


def test_many_shards_load_in_parallel(quantized_folder, tmp_path, monkeypatch):
    pipe = DiffusionPipeline.from_pretrained(quantized_folder)
    pipe.transformer.save_pretrained(tmp_path / "s", max_shard_size="60kB")
    shards = len(list((tmp_path / "s").glob("*.safetensors")))
    assert shards > 8
    threaded = []
    loader = modeling_utils._load_shard_files_with_threadpool
    monkeypatch.setattr(
        modeling_utils,
        "_load_shard_files_with_threadpool",
        lambda *a, **k: threaded.append(1) or loader(*a, **k),
    )
    monkeypatch.setattr(modeling_utils, "HF_ENABLE_PARALLEL_LOADING", True)
    again = DiTTransformer2DModel.from_pretrained(tmp_path / "s")
    assert threaded
    want = pipe.transformer.state_dict()
    assert all(torch.equal(v, want[k]) for k, v in again.state_dict().items())
