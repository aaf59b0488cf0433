# SPDX-License-Identifier: Apache-2.0
"""Plain diffusers calls, after nothing but ``import dtq``."""

from __future__ import annotations

import copy
import json

import pytest
import tiny
import torch
from conftest import QUICK
from diffusers import AutoModel, DiffusionPipeline, DiTTransformer2DModel
from diffusers.models import modeling_utils

import dtq
from dtq.errors import InputError
from dtq.pipelines.tracing import dummy_inputs
from dtq.recipe import Recipe

COARSE = {"transform": {"search": {"step": 0.5, "max_error_ratio": 1.0}}}


def linears(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, dtq.QuantLinear)}


def test_every_way_to_load(quantized_folder):
    pipe = DiffusionPipeline.from_pretrained(quantized_folder)
    want = pipe.transformer.state_dict()
    for load in (
        lambda: DiTTransformer2DModel.from_pretrained(quantized_folder, subfolder="transformer"),
        lambda: DiTTransformer2DModel.from_pretrained(quantized_folder / "transformer"),
        lambda: AutoModel.from_pretrained(str(quantized_folder / "transformer")),
        lambda: DiTTransformer2DModel.from_pretrained(
            quantized_folder / "transformer", device_map="cpu"
        ),
    ):
        got = load().state_dict()
        assert got.keys() == want.keys()
        assert all(torch.equal(got[k], want[k]) for k in want)


def test_the_loaded_model_says_what_it_is(quantized_folder):
    model = DiTTransformer2DModel.from_pretrained(quantized_folder / "transformer")
    assert model.is_quantized
    assert model.dtype == torch.float32
    assert model.config.quantization_config.recipe == "w4a8"
    assert "dtq" in repr(model.hf_quantizer.quantization_config)
    json.dumps(model.config.quantization_config.to_dict())


@pytest.mark.parametrize("recipe", ["w4a16", "w4a8", "rtn-w4a8"])
def test_quantizing_while_loading(recipe, float_folder, tmp_path):
    config = dtq.DTQConfig(recipe=recipe, modules_to_not_convert=["transformer_blocks.0.ff"])
    model = DiTTransformer2DModel.from_pretrained(
        float_folder, subfolder="transformer", quantization_config=config
    )
    names = linears(model)
    assert "transformer_blocks.1.ff.net.2" in names
    assert not any(n.startswith("transformer_blocks.0.ff") for n in names)
    model.save_pretrained(tmp_path / "m")
    again = DiTTransformer2DModel.from_pretrained(tmp_path / "m")
    x = torch.randn(2, 4, 8, 8)
    arguments = {"timestep": torch.tensor([500, 500]), "class_labels": torch.tensor([1, 2])}
    with torch.no_grad():
        assert torch.equal(model(x, **arguments)[0], again(x, **arguments)[0])


def test_on_the_fly_accepts_recipe_keys(float_folder):
    model = DiTTransformer2DModel.from_pretrained(
        float_folder, subfolder="transformer", torch_dtype=torch.bfloat16,
        quantization_config=dtq.DTQConfig(recipe="w4a16", modulation="keep"),
    )  # fmt: skip
    assert model.dtype == torch.bfloat16
    assert not any("norm" in n for n in linears(model))


def test_parallel_loading(quantized_folder, tmp_path, monkeypatch):
    pipe = DiffusionPipeline.from_pretrained(quantized_folder)
    pipe.save_pretrained(tmp_path / "s", max_shard_size="200kB")
    used = []
    load = modeling_utils._load_shard_files_with_threadpool
    # as the variable of the environment of this name does when diffusers is imported
    monkeypatch.setattr(modeling_utils, "HF_ENABLE_PARALLEL_LOADING", True)
    monkeypatch.setattr(
        modeling_utils, "_load_shard_files_with_threadpool",
        lambda *args, **options: used.append(load(*args, **options)) or used[-1],
    )  # fmt: skip
    again = DiffusionPipeline.from_pretrained(tmp_path / "s")
    assert used
    assert torch.equal(tiny.sample(again), tiny.sample(pipe))


def test_what_diffusers_does_to_models_leaves_the_numbers_alone(quantized_folder):
    pipe = DiffusionPipeline.from_pretrained(quantized_folder)
    want = tiny.sample(pipe)
    pipe.transformer = copy.deepcopy(pipe.transformer)
    assert torch.equal(tiny.sample(pipe), want)


@pytest.mark.parametrize("level", ["leaf_level", "block_level"])
def test_group_offload_leaves_the_numbers_alone(level):
    model = dtq.quantize(tiny.flux(), "rtn-w4a8", progress=False)
    arguments = dummy_inputs(model, 2, 0.5, 1)
    with torch.no_grad():
        want = model(**arguments)[0]
        model.enable_group_offload(
            onload_device=torch.device("cpu"), offload_type=level, num_blocks_per_group=1
        )
        assert torch.equal(model(**arguments)[0], want)


def test_dequantize_gives_a_plain_model_that_saves_as_one(quantized_folder, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(quantized_folder)
    quantized = tiny.sample(pipe)
    pipe.transformer.dequantize()
    assert not linears(pipe.transformer)
    assert (tiny.sample(pipe) - quantized).abs().max() < 0.1
    pipe.save_pretrained(tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "transformer" / "config.json").read_text())
    assert "quantization_config" not in config


def test_disk_in_a_device_map_is_refused(quantized_folder):
    with pytest.raises(ValueError, match="group_offload"):
        DiTTransformer2DModel.from_pretrained(
            quantized_folder / "transformer", device_map={"": "disk"}, offload_folder="unused"
        )


def test_a_quantized_model_is_not_quantized_again(quantized_folder):
    with pytest.raises(InputError, match="quantized already"):
        dtq.quantize(quantized_folder, "w4a8", progress=False)


@pytest.mark.parametrize("name", tiny.TRANSFORMERS)
@pytest.mark.parametrize("recipe", ["w4a8", "w8a8", "w4a16"])
def test_bare_transformers_of_every_known_family(name, recipe, tmp_path, caplog):
    model = tiny.TRANSFORMERS[name]()
    arguments = dummy_inputs(model, 2, 500.0, 1)
    with torch.no_grad():
        want = model(**arguments)[0]
        caplog.set_level("WARNING", "dtq")
        coarse = {} if recipe == "w4a16" else COARSE
        assert dtq.quantize(model, recipe, progress=False, **QUICK, **coarse) is model
        if recipe == "w4a16":
            assert "no calibration data" in caplog.text
        else:
            assert "random latents" in caplog.text
        got = model(**arguments)[0]
        error = ((got - want).square().sum() / want.square().sum()).item()
        assert error < (2e-3 if recipe == "w8a8" else 5e-2)
        model.save_pretrained(tmp_path / "m")
        again = type(model).from_pretrained(tmp_path / "m")
        assert torch.equal(again(**arguments)[0], got)


def test_given_inputs_are_used(caplog):
    model = tiny.dit()
    inputs = [dummy_inputs(model, 4, t, i) for i, t in enumerate((900.0, 500.0, 100.0))]
    dtq.quantize(model, "w4a8", inputs=inputs, progress=False, transform="none")
    assert model.hf_quantizer.report.calibration["origin"] == "given"
    assert "random latents" not in caplog.text
    with pytest.raises(InputError, match="inputs is empty"):
        dtq.quantize(tiny.dit(), "w4a8", inputs=[], progress=False)


def test_keep_in_fp32_modules_stay_float():
    model = tiny.wan()
    dtq.quantize(model, "rtn-w4a8", progress=False, **QUICK)
    for name in linears(model):
        assert not any(part in name.split(".") for part in model._keep_in_fp32_modules)


def test_recipe_objects_are_accepted():
    recipe = Recipe.load("rtn-w4a8", name="mine")
    model = dtq.quantize(tiny.dit(), recipe, progress=False)
    assert linears(model)
