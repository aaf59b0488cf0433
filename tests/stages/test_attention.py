# SPDX-License-Identifier: Apache-2.0
"""The choice of modules with int8 attention: measured, within the limit, kept by the checkpoint."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from conftest import hasty
from diffusers import DiffusionPipeline

import dtq
from dtq.checkpoint import writer
from dtq.errors import CheckpointError, RecipeError
from dtq.evaluate.fingerprint import fingerprint
from dtq.nn.attention import int8_attention_modules
from dtq.stages import attention as stage

BLOCKS = ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"]


def quantized(**overrides):
    return dtq.quantize(tiny.pipeline(), hasty("w4a8", **overrides), progress=False)


def step(model):
    g = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, generator=g)
    labels = torch.tensor([1, 2])
    with torch.no_grad():
        return model(latents, timestep=torch.tensor([500, 500]), class_labels=labels).sample


@pytest.fixture(scope="module")
def pipe():
    return quantized(attention="int8")


def test_float_is_the_default():
    model = quantized().transformer
    assert int8_attention_modules(model) == []
    assert model.hf_quantizer.report.attention == {}
    assert "runtime" not in model.config.quantization_config.to_dict()


def test_modules_are_chosen_by_the_error_of_a_step(pipe):
    model = pipe.transformer
    report = model.hf_quantizer.report.attention
    assert report["int8"] == int8_attention_modules(model) == BLOCKS
    assert 0 < report["error"] <= stage.LIMIT * report["error_float"]
    assert report["error"] != report["error_float"]
    config = model.config.quantization_config.to_dict()
    assert config["runtime"] == {"int8_attention": BLOCKS}


def test_the_checkpoint_keeps_the_choice(pipe, tmp_path):
    folder = writer.write(pipe, tmp_path / "pipe")
    loaded = DiffusionPipeline.from_pretrained(folder).transformer
    assert int8_attention_modules(loaded) == BLOCKS
    assert torch.equal(step(loaded), step(pipe.transformer))
    loaded.save_pretrained(tmp_path / "again")
    first = json.loads((folder / "transformer" / "config.json").read_text())
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert first["quantization_config"] == again["quantization_config"]
    before = fingerprint(loaded)
    dtq_attention = loaded.config.quantization_config.load_plan().int8_attention
    assert list(dtq_attention) == BLOCKS
    stage.use_int8_attention(loaded, BLOCKS[:1])
    assert fingerprint(loaded) != before
    floats = loaded.dequantize()
    assert int8_attention_modules(floats) == []


@pytest.mark.parametrize("names", [["nothing"], "attn1", [3]], ids=str)
def test_a_damaged_choice_is_refused(pipe, tmp_path, names):
    folder = writer.write(pipe, tmp_path / "pipe")
    file = folder / "transformer" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["runtime"]["int8_attention"] = names
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="int8_attention"):
        type(pipe.transformer).from_pretrained(folder / "transformer")


def test_modules_beyond_the_limit_stay_float(monkeypatch):
    errors = {0: 1.0, 1: 1.01, 2: 1.2}  # by the number of modules with int8 attention

    def error(run, calls, names):
        stage.use_int8_attention(run.model, names)
        return errors[len(names)] + (0.01 if BLOCKS[0] in names else 0)

    monkeypatch.setattr(stage, "_error", error)
    report = quantized(attention="int8").transformer.hf_quantizer.report.attention
    assert (report["int8"], report["float"]) == ([BLOCKS[1]], [BLOCKS[0]])
    assert report["error"] == 1.01
    errors[1] = 1.06
    model = quantized(attention="int8").transformer
    report = model.hf_quantizer.report.attention
    assert (report["int8"], report["error"]) == ([], 1.0)
    assert int8_attention_modules(model) == []
    assert "runtime" not in model.config.quantization_config.to_dict()


def test_a_step_policy_and_the_choice_are_kept_together():
    policy = {"precisions": ["native", "a16"], "num_bins": 2}
    model = quantized(attention="int8", step_policy=policy).transformer
    runtime = model.config.quantization_config.to_dict()["runtime"]
    assert set(runtime) == {"diffusion_step_policy", "int8_attention"}


def test_another_word_is_refused():
    with pytest.raises(RecipeError, match="attention"):
        dtq.Recipe.load("w4a8", attention="int4")


def test_a_model_that_is_quantized_while_it_loads_has_the_choice_too(tmp_path):
    tiny.dit().save_pretrained(tmp_path)
    config = dtq.DTQConfig("w4a8", attention="int8")
    model = type(tiny.dit()).from_pretrained(tmp_path, quantization_config=config)
    report = model.hf_quantizer.report.attention
    assert int8_attention_modules(model) == report["int8"]
    assert report["error"] <= stage.LIMIT * report["error_float"]
