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
from PIL import Image

from dtq.cli import main
from dtq.errors import InputError
from dtq.evaluate import run_file
from dtq.evaluate.gate.decision import Outcome, decide
from dtq.evaluate.gate.metrics import METRICS
from dtq.evaluate.gate.policy import Limit, Policy
from dtq.nn import QuantLinear
from dtq.pipelines import image_inputs
from dtq.pipelines.settings import SamplingSettings

SPATIAL = {"height", "width", "num_frames", "use_resolution_binning"}


def quantize(folder, out, name, *more):
    arguments = [f"--arg={k}={json.dumps(v)}" for k, v in pipelines.SMALL[name].items()]
    few = ("--samples=2", "--steps=4", "--set", "calibration.batch_size=2")
    # what is searched in layers depends on no pipeline
    few += ("--set", "transform=smooth", "--set", "solver=rtn")
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
    assert float((got - want).square().mean()) < 0.01  # pixels are between 0 and 1
    again = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert torch.equal(got, pipelines.sample(again, name))


def test_videos_are_sampled_and_compared(tmp_path):
    """A video through all commands: frames on disk, temporal metrics, an animated page, the gate."""
    float_pipe = pipelines.wan()
    float_pipe.save_pretrained(tmp_path / "float")
    assert quantize(tmp_path / "float", tmp_path / "out", "wan").exit_code == 0
    small = [f"--arg={k}={json.dumps(v)}" for k, v in pipelines.SMALL["wan"].items()]

    def run(*words):
        result = CliRunner().invoke(main, [str(w) for w in (*words, *small)])
        assert result.exit_code == 0, result.output
        return result.output

    output = run("sample", tmp_path / "out", "-p", "A CAT", "--steps", 2, "-o", tmp_path / "made")
    assert "1 videos of 5 frames" in output
    assert len(list((tmp_path / "made" / "0000").glob("*.png"))) == 5
    with Image.open(tmp_path / "made" / "0000.png") as moving:
        assert moving.n_frames == 5
        assert moving.size == (16, 16)
    with Image.open(tmp_path / "made" / "sheet.png") as sheet:
        assert sheet.size[0] > 5 * 16
    words = ("eval", tmp_path / "out", "--reference", tmp_path / "float", "--samples", 2)
    run(*words, "--steps", 2, "--keep-images", "-o", tmp_path / "run")
    held = run_file.read(tmp_path / "run")
    of_videos = {name for name, metric in METRICS.items() if metric.when == "video"}
    assert len(of_videos) == 5
    assert of_videos <= set(held.values)
    assert of_videos <= set(held.rerun)
    assert held.conditions["pipeline_args"]["num_frames"] == 5
    shown = tmp_path / "run" / "pictures" / "candidate" / "0000.png"
    with Image.open(shown) as moving:
        assert moving.n_frames == 5
    policy = Policy(
        primary=(Limit("error", 1.05), Limit("flicker", 1.0), Limit("temporal-ssim", 0.01)),
        looks=(2,), resamples=999,
    )  # fmt: skip
    assert decide(held, held, policy).outcome is Outcome.PASS


def test_a_pipeline_of_two_transformers_is_compared(tmp_path):
    """Both are evaluated, the page has the layers of both, and damage in either is reported."""
    pipelines.wan_two().save_pretrained(tmp_path / "float")
    result = quantize(tmp_path / "float", tmp_path / "out", "wan 2.2", "--recipe=rtn-w4a8")
    assert result.exit_code == 0, result.output
    small = [f"--arg={k}={json.dumps(v)}" for k, v in pipelines.SMALL["wan 2.2"].items()]
    command = ["eval", str(tmp_path / "out"), "--reference", str(tmp_path / "float"), *small]
    more = ["--samples=2", "--steps=4", "-o", str(tmp_path / "report")]
    result = CliRunner().invoke(main, [*command, *more])
    assert result.exit_code == 0, result.output
    held = run_file.read(tmp_path / "report")
    calls = held.conditions["calls"]
    assert min(calls["transformer"], calls["transformer_2"]) > 0
    assert len(held.values["error"]["0000"]) == sum(calls.values())
    page = (tmp_path / "report" / "report.html").read_text()
    for name in ("transformer", "transformer_2"):
        assert f"{name}.blocks.0.attn1.to_q" in page
    for file in (tmp_path / "out" / "transformer_2").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:5000])
    result = CliRunner().invoke(main, [*command, *more])
    assert result.exit_code == 1
    assert "truncated or damaged" in result.output


def test_an_unknown_argument_is_named(tmp_path):
    pipelines.pixart().save_pretrained(tmp_path / "float")
    result = quantize(tmp_path / "float", tmp_path / "out", "pixart", "--arg", "hight=16")
    assert result.exit_code == 1
    assert "no argument 'hight'; did you mean height" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", pipelines.FROM_IMAGES)
def test_a_pipeline_with_image_inputs(name, tmp_path):
    pipelines.FROM_IMAGES[name]().save_pretrained(tmp_path / "float")
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(2):
        image_inputs.random_image((20, 24), i).save(photos / f"{i}.png")
    result = quantize(tmp_path / "float", tmp_path / "out", name, "--images", str(photos))
    assert result.exit_code == 0, result.output
    assert "random images" not in result.output
    small = [f"--arg={k}={json.dumps(v)}" for k, v in pipelines.SMALL[name].items()]
    command = ["eval", str(tmp_path / "out"), "--reference", str(tmp_path / "float"), "--json"]
    few = ("--samples", "2", "--steps", "4", "--images", str(photos))
    result = CliRunner().invoke(main, [*command, *few, *small])
    assert result.exit_code == 0, result.output
    row = json.loads(result.stdout)["rows"][0]
    assert 0 < row["error"] < 0.1
    command = ["sample", str(tmp_path / "out"), "-n", "1", "--steps", "2", "-o"]
    result = CliRunner().invoke(main, [*command, str(tmp_path / "made"), *small])
    assert result.exit_code == 0, result.output
    files = sorted(path.name for path in (tmp_path / "made").iterdir())
    folder = ["0000"] if name == "wan i2v" else []
    assert files == [*folder, "0000.png", "sheet.png"]


def test_images_are_random_with_a_warning():
    settings = SamplingSettings(
        samples=1, steps=2, batch_size=4, pipeline_args=pipelines.SMALL["inpaint"]
    )
    images = image_inputs.required(pipelines.inpaint(), settings)
    assert images.arguments == ("image", "mask_image")
    assert images.batch(4) == 1
    assert "--images" in images.warning
    first = images.of(0)
    assert first["image"].size == first["mask_image"].size == (16, 16)
    assert first["mask_image"].getextrema() == (0, 255)
    assert images.of(0)["image"].tobytes() == first["image"].tobytes()
    assert images.of(1)["image"].tobytes() != first["image"].tobytes()


def test_other_pipelines_need_no_images():
    for name, make in pipelines.PIPELINES.items():
        images = image_inputs.required(make(), SamplingSettings())
        assert images.arguments == (), name
        assert images.batch(4) == 4
        assert images.of(0) == {}


def test_bad_images_are_reported(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    (tmp_path / "empty").mkdir()
    pipe = pipelines.sd3_from_image()
    cases = {
        "no such file or folder": tmp_path / "nowhere",
        "no .png": tmp_path / "empty",
        "not an image": tmp_path / "broken.png",
    }
    for reason, path in cases.items():
        with pytest.raises(InputError, match=reason):
            image_inputs.required(pipe, SamplingSettings(images=str(path))).of(0)
    with pytest.raises(InputError, match="takes no images"):
        image_inputs.required(
            pipelines.pixart(), SamplingSettings(images=str(tmp_path / "broken.png"))
        )
    with pytest.raises(InputError, match="give it with --images"):
        image_inputs.required(pipe, SamplingSettings(pipeline_args={"image": "cat.png"}))


def test_a_clip_pans_over_an_image():
    clip = image_inputs.MAKERS["video"](image_inputs.random_image((32, 48), 0))
    assert len(clip) == image_inputs.FRAMES
    assert {frame.size for frame in clip} == {(48, 32)}
    assert clip[0].tobytes() != clip[-1].tobytes()
