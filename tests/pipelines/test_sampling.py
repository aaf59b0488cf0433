# SPDX-License-Identifier: Apache-2.0
"""How a pipeline is called: what is passed on, and what it says when it refuses."""

from __future__ import annotations

import inspect
import json

import pipelines
import pytest
import tiny
from click.testing import CliRunner

from dtq.calibrate import store
from dtq.cli import main
from dtq.errors import InputError, RecipeError
from dtq.pipelines import prompts
from dtq.pipelines.sampling import run_pipeline
from dtq.pipelines.settings import SamplingSettings
from dtq.recipe import Recipe

BUILDERS = {"dit": tiny.pipeline, **pipelines.PIPELINES}


def watch(pipe, monkeypatch):
    """Arguments of every call of the pipeline."""
    seen: list[dict] = []
    real = type(pipe).__call__

    def call(self, *args, **kwargs):
        seen.append(kwargs)
        return real(self, *args, **kwargs)

    call.__signature__ = inspect.signature(real)
    monkeypatch.setattr(type(pipe), "__call__", call)
    return seen


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("guidance", [0, 0.0, 1.5, None])
def test_zero_guidance_is_a_value_and_none_is_the_pipelines_own(name, guidance, monkeypatch):
    pipe = BUILDERS[name]()
    seen = watch(pipe, monkeypatch)
    small = pipelines.SMALL.get(name, {})
    settings = SamplingSettings(steps=1, guidance=guidance, batch_size=1, pipeline_args=small)
    list(run_pipeline(pipe, prompts.load("auto", pipe, 1), settings, "latent"))
    want = "own" if guidance is None else guidance
    assert [call.get("guidance_scale", "own") for call in seen] == [want]


@pytest.mark.parametrize("value", [0, 0.0, None])
def test_zero_guidance_reaches_calibration_from_a_recipe_and_from_the_command_line(
    value, monkeypatch, tmp_path
):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"weights: int8-row\ncalibration: {{guidance: {json.dumps(value)}}}\n")
    assert Recipe.load(recipe).calibration.guidance == value
    assert Recipe.load(Recipe.load(recipe)).calibration.guidance == value
    pipe = tiny.pipeline(blocks=1)
    pipe.save_pretrained(tmp_path / "float")
    seen = watch(pipe, monkeypatch)
    asked = "null" if value is None else str(value)
    command = ["calibrate", str(tmp_path / "float"), "-o", str(tmp_path / "s.safetensors")]
    command += ["--samples=1", "--steps=1", "--set", f"calibration.guidance={asked}"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert {call.get("guidance_scale", "own") for call in seen} == {
        "own" if value is None else value
    }
    about = store.load(tmp_path / "s.safetensors").about
    assert about["guidance"] == ("pipeline default" if value is None else value)


@pytest.mark.parametrize("command", ["sample", "eval", "quantize", "calibrate"])
def test_the_commands_agree_about_guidance(command):
    help_ = " ".join(CliRunner().invoke(main, [command, "--help"]).output.split())
    assert "0 is passed on as 0" in help_
    assert "the pipeline's own" in help_


def test_guidance_of_a_pipeline_that_takes_none_is_refused():
    settings = SamplingSettings(steps=1, guidance=0.0, batch_size=1)
    requests = prompts.Requests("given", "class_labels", (1,))
    with pytest.raises(InputError, match="takes no guidance_scale"):
        list(run_pipeline(tiny.two_stages(), requests, settings))


def test_guidance_below_zero_is_refused():
    with pytest.raises(RecipeError, match="guidance: must not be negative"):
        Recipe.load("w4a8", calibration={"guidance": -1})
