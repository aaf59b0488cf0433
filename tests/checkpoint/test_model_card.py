# SPDX-License-Identifier: Apache-2.0
"""The model card says what is in the folder, and nothing that differs between equal folders."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from click.testing import CliRunner
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard

import dtq
from dtq.checkpoint import writer
from dtq.checkpoint.model_card import card, hub_id
from dtq.cli import main


def test_a_pipeline(quantized_folder):
    read = ModelCard.load(quantized_folder / "README.md")
    assert read.data.library_name == "diffusers"
    assert read.data.tags == ["dtq", "quantized"]
    assert read.data.base_model is None
    assert "DiffusionPipeline.from_pretrained" in read.text
    assert "`w4a8`" in read.text
    layers = json.loads((quantized_folder / "transformer/config.json").read_text())[
        "quantization_config"
    ]["layers"]
    assert f"| {len(layers)} of " in read.text
    assert str(quantized_folder) not in read.content


def test_the_code_in_it_runs(quantized_folder):
    text = (quantized_folder / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    told = code.replace("this repository or folder", str(quantized_folder))
    names: dict = {}
    exec(compile(told, "README.md", "exec"), names)
    assert isinstance(names["pipe"], DiffusionPipeline)


def test_a_bare_model_and_its_bits(tmp_path):
    model = dtq.quantize(tiny.flux(), "w4a16", progress=False)
    writer.write(model, tmp_path / "a")
    writer.write(type(model).from_pretrained(tmp_path / "a"), tmp_path / "b")
    text = (tmp_path / "a/README.md").read_text()
    assert (tmp_path / "b/README.md").read_text() == text
    assert "from diffusers import FluxTransformer2DModel" in text
    layers = [m for m in model.modules() if isinstance(m, dtq.QuantLinear)]
    size = sum(t.nbytes for m in layers for t in m.packed_tensors().values())
    count = sum(m.in_features * m.out_features for m in layers)
    assert f"| {8 * size / count:.2f} | float32 |" in text


def test_the_base_model_is_kept(tmp_path):
    model = tiny.flux()
    model.register_to_config(_name_or_path="some-one/Some.Model-1")
    dtq.quantize(model, "w4a16", progress=False)
    writer.write(model, tmp_path / "a")
    again = type(model).from_pretrained(tmp_path / "a", torch_dtype=torch.float32)
    writer.write(again, tmp_path / "b")
    for folder in ("a", "b"):
        data = ModelCard.load(tmp_path / folder / "README.md").data
        assert data.base_model == ["some-one/Some.Model-1"]
    assert card(model) == card(again)


@pytest.mark.parametrize(
    ("where", "found"),
    [
        ("some-one/Some.Model-1", "some-one/Some.Model-1"),
        (
            "/x/hub/models--some-one--Some.Model-1/snapshots/0ab/transformer",
            "some-one/Some.Model-1",
        ),
        ("/home/me/model", None),
        ("./model", None),
        ("a/b/c", None),
        ("", None),
    ],
)
def test_what_is_a_hub_id(where, found):
    assert hub_id(where) == found


def test_the_command_line_adds_what_was_measured(float_folder, tmp_path):
    for name in ("a", "b"):
        done = CliRunner().invoke(
            main,
            ["quantize", str(float_folder), "--recipe", "rtn-w4a8", "-o", str(tmp_path / name)],
        )
        assert done.exit_code == 0, done.output
    text = (tmp_path / "a/README.md").read_text()
    assert "at worst" in text or "calibration inputs: none" in text
    assert (tmp_path / "b/README.md").read_bytes() == (tmp_path / "a/README.md").read_bytes()
