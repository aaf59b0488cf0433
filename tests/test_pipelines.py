# SPDX-License-Identifier: Apache-2.0
"""Whole text-to-image and text-to-video pipelines, tiny and random: calibrated on prompts by their
own sampler, quantized, saved, loaded with plain diffusers, sampled."""

from __future__ import annotations

import json

import pipelines
import pytest
import torch
from click.testing import CliRunner
from diffusers import DiffusionPipeline

from dtq.cli import main
from dtq.nn import QuantLinear

SPATIAL = {"height", "width", "num_frames", "use_resolution_binning"}


def quantize(folder, out, name, *more):
    arguments = [f"--arg={k}={json.dumps(v)}" for k, v in pipelines.SMALL[name].items()]
    few = ("--samples=2", "--steps=4", "--set", "calibration.batch=2")
    command = ["quantize", str(folder), "-o", str(out), *few, *arguments, *more]
    return CliRunner().invoke(main, command)


@pytest.mark.parametrize("name", pipelines.PIPELINES)
def test_a_pipeline_from_folder_to_folder(name, tmp_path):
    pipe = pipelines.PIPELINES[name]()
    want = pipelines.sample(pipe, name)
    pipe.save_pretrained(tmp_path / "float")
    result = quantize(tmp_path / "float", tmp_path / "out", name)
    assert result.exit_code == 0, result.output
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "out")
    parts = {n: m for n, m in loaded.components.items() if n.startswith("transformer") and m}
    assert len(parts) == (2 if name == "wan 2.2" else 1)
    for model in parts.values():
        assert any(isinstance(m, QuantLinear) for m in model.modules())
    assert type(loaded) is type(pipe)
    got = pipelines.sample(loaded, name)
    assert got.shape == want.shape
    assert float((got - want).square().mean()) < 0.01  # of pictures between 0 and 1
    again = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert torch.equal(got, pipelines.sample(again, name))


def test_an_unknown_argument_is_named(tmp_path):
    pipelines.pixart().save_pretrained(tmp_path / "float")
    result = quantize(tmp_path / "float", tmp_path / "out", "pixart", "--arg", "hight=16")
    assert result.exit_code == 1
    assert "no argument 'hight'; did you mean height" in result.output
    assert not (tmp_path / "out").exists()
