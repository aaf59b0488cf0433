# SPDX-License-Identifier: Apache-2.0
"""``dtq_call_defaults.json``: pipelines are called with the sizes of their training."""

from __future__ import annotations

import json

import pipelines
import pytest
import torch
from click.testing import CliRunner
from diffusers import DiffusionPipeline

from dtq.cli import main
from dtq.errors import InputError
from dtq.evaluate import evaluate
from dtq.pipelines import call_defaults, prompts
from dtq.pipelines.loading import load_transformer
from dtq.pipelines.sampling import run_pipeline
from dtq.pipelines.settings import SamplingSettings

SIZES = {"height": 16, "width": 16, "num_frames": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("wan")
    pipelines.wan().save_pretrained(path)
    call_defaults.write(path, call_defaults.CallDefaults(SIZES, "moving-emoji"))
    return path


@pytest.fixture(scope="module")
def quantized(folder):
    out = folder.with_name("quantized")
    done = CliRunner().invoke(
        main,
        ["quantize", str(folder), "--recipe", "rtn-w4a8", "-o", str(out), "--no-sanity-check"],
    )
    assert done.exit_code == 0, done.output
    return out


def shapes(loaded, **arguments):
    settings = SamplingSettings(samples=1, steps=1, batch_size=1, pipeline_args=arguments)
    requests = prompts.load("auto", loaded.pipeline, 1)
    with torch.no_grad():
        return [
            torch.as_tensor(x.frames).shape
            for x in run_pipeline(loaded.pipeline, requests, settings)
        ]


def test_sizes_of_the_folder_apply_unless_the_user_gives_others(folder):
    loaded = load_transformer(str(folder))
    assert shapes(loaded) == [(1, 5, 3, 16, 16)]
    assert shapes(loaded, num_frames=9) == [(1, 9, 3, 16, 16)]
    captions = list(prompts.load("moving-emoji", loaded.pipeline, 64).entries)
    assert list(prompts.load("auto", loaded.pipeline, 64).entries) == captions
    assert len(set(captions)) == 64


def test_they_apply_to_a_pipeline_that_the_user_loaded(folder):
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert call_defaults.of(pipe) == call_defaults.CallDefaults(SIZES, "moving-emoji")
    assert call_defaults.of(pipelines.wan()) == call_defaults.CallDefaults()


def test_the_quantized_folder_has_the_same_defaults(folder, quantized):
    assert call_defaults.read(quantized) == call_defaults.read(folder)
    DiffusionPipeline.from_pretrained(quantized)


def test_the_sizes_are_in_the_conditions_of_an_evaluation(folder, quantized):
    settings = SamplingSettings(samples=1, steps=1, batch_size=1)
    result = evaluate.evaluate(
        load_transformer(str(quantized)), load_transformer(str(folder)), settings
    )
    assert result.run.conditions["pipeline_args"] == SIZES
    assert result.run.conditions["prompts"] == "moving-emoji"


def test_no_defaults_write_no_file(tmp_path):
    call_defaults.write(tmp_path, call_defaults.CallDefaults())
    assert not list(tmp_path.iterdir())
    assert call_defaults.read(tmp_path) == call_defaults.CallDefaults()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "expected a JSON object"),
        ({"size": {}}, "size: unknown key; did you mean 'sizes'"),
        ({"sizes": {"height": 0}}, "whole numbers from 1"),
        ({"sizes": {"height": 10**6}}, "whole numbers from 1"),
        ({"sizes": {"height": True}}, r"sizes\['height'\]: expected a whole number"),
        ({"sizes": {"height": "64"}}, r"sizes\['height'\]: expected a whole number"),
        ({"sizes": [64]}, "sizes: expected a mapping"),
        ({"prompts": "../secret"}, "expected a set that dtq ships"),
        ({"prompts": ["prompts-64"]}, "prompts: expected a name"),
    ],
)
def test_a_file_can_only_hold_sizes_and_a_prompt_set(data, message, tmp_path):
    (tmp_path / call_defaults.FILE).write_text(json.dumps(data))
    with pytest.raises(InputError, match=message):
        call_defaults.read(tmp_path)


def test_an_unknown_argument_is_reported_in_one_line(folder, tmp_path):
    bad = tmp_path / "bad"
    pipelines.wan().save_pretrained(bad)
    (bad / call_defaults.FILE).write_text('{"sizes": {"heigth": 16}}')
    done = CliRunner().invoke(
        main, ["sample", str(bad), "-n", "1", "--steps", "1", "-o", str(tmp_path / "o")]
    )
    assert done.exit_code != 0
    assert "did you mean height" in done.output
