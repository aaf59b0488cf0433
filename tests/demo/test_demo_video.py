# SPDX-License-Identifier: Apache-2.0
"""The clips ``demo-video`` is trained on, and the folder that its training script writes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image
from train_demo.clips import FRAMES, MOTIONS, SIZE, THINGS, captions, clip, clips
from train_demo.train_video import Film, export, new_tokenizer

from dtq import demo
from dtq.cli import main
from dtq.evaluate import paired_run
from dtq.pipelines import call_defaults, prompts
from dtq.pipelines.loading import load_transformer
from dtq.pipelines.settings import SamplingSettings

WHERE = {  # of the ink: how it goes from the first frame to the last, in x, y and amount
    "moves left": (-1, 0, 0),
    "moves right": (1, 0, 0),
    "moves up": (0, -1, 0),
    "moves down": (0, 1, 0),
    "grows": (0, 0, 1),
    "shrinks": (0, 0, -1),
    "turns": (0, 0, 0),
    "stands still": (0, 0, 0),
}


def ink(frame: torch.Tensor) -> tuple[float, float, float]:
    """Middle and amount of what is not white."""
    dark = 255.0 - frame.float().mean(0)
    places = torch.arange(SIZE).float()
    amount = dark.sum()
    x, y = ((dark.sum(d) * places).sum() / amount for d in (0, 1))
    return float(x), float(y), float(amount.sqrt())


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_clip_moves_as_its_caption_says(motion):
    drawn = clip(Image.new("RGBA", (SIZE, SIZE), "red"), motion)
    assert drawn.shape == (FRAMES, 3, SIZE, SIZE)
    assert drawn.dtype == torch.uint8
    first, last = ink(drawn[0]), ink(drawn[-1])
    for a, b, sign in zip(first, last, WHERE[motion], strict=True):
        assert (b - a) * sign > 10 if sign else abs(b - a) < 2
    assert bool((drawn[0] != drawn[3]).any()) == (motion != "stands still")


def test_every_caption_is_drawn_and_asked_for():
    pictures = {name: Image.new("RGBA", (SIZE, SIZE), "blue") for name in THINGS.values()}
    drawn, labels = clips(pictures, variants=1, seed=0)
    assert len(drawn) == len(captions()) == len(set(captions())) == len(THINGS) * len(MOTIONS)
    assert labels.tolist() == list(range(len(captions())))
    asked = prompts._shipped("moving-emoji")
    assert set(asked) <= set(captions())
    unknown = new_tokenizer().unk_token_id
    assert unknown not in new_tokenizer()(captions()[0]).input_ids


def without_paths(folder):
    return not [f for f in folder.rglob("*.json") if "_name_or_path" in f.read_text()]


def test_the_bundled_folder_is_stock_and_small():
    folder = demo.folder("demo-video")
    files = [f for f in folder.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 32e6
    assert {f.suffix for f in files} <= {".json", ".safetensors", ".md"}
    index = json.loads((folder / "model_index.json").read_text())
    assert index.pop("_class_name") == "LattePipeline"
    libraries = {kind[0] for name, kind in index.items() if not name.startswith("_")}
    assert libraries == {"diffusers", "transformers"}
    assert without_paths(folder)
    readme = (folder / "README.md").read_text()
    assert "Apache" in readme
    assert "emoji-datasource-google" in readme


@pytest.mark.slow
def test_its_clips_move_and_have_the_colour_that_the_captions_say():
    pipe = DiffusionPipeline.from_pretrained(demo.folder("demo-video"))
    pipe.set_progress_bar_config(disable=True)
    asked = [
        "red heart moves left",
        "green apple moves right",
        "yellow star moves up",
        "blue heart moves down",
    ]
    seeds = [torch.Generator().manual_seed(i) for i in range(len(asked))]
    made = torch.as_tensor(
        pipe(asked, generator=seeds, num_inference_steps=6, guidance_scale=4, output_type="pt",
             **call_defaults.of(pipe).sizes).frames
    )  # fmt: skip
    assert made.shape == (4, FRAMES, 3, SIZE, SIZE)
    right = 0
    for frames, caption in zip(made, asked, strict=True):
        (x0, y0, _), (x1, y1, _) = ink(frames[0] * 255), ink(frames[-1] * 255)
        dx, dy, _ = WHERE[caption.split(" ", 2)[2]]
        right += (x1 - x0) * dx + (y1 - y0) * dy > 8
    assert right >= 3
    most = [int((1 - frame).mean((0, 2, 3)).argmin()) for frame in made]  # least taken away
    assert most[0] == 0
    assert most[1] == 1
    assert most[3] == 2


def test_what_the_script_writes_is_stock_and_quantized_at_its_sizes(tmp_path):
    vae = AutoencoderKL.from_pretrained(demo.folder() / "vae", torch_dtype=torch.float32)
    torch.manual_seed(0)
    export(tmp_path / "video", Film(len(new_tokenizer())), vae)
    assert without_paths(tmp_path / "video")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "video")
    assert type(pipe).__name__ == "LattePipeline"
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    parts = (pipe.text_encoder, pipe.vae, pipe.transformer)
    assert {part.dtype for part in parts} == {torch.float32}  # nobody named one
    assert call_defaults.of(pipe).sizes == {"height": SIZE, "width": SIZE, "video_length": FRAMES}
    few = [
        "--samples",
        "2",
        "--steps",
        "2",
        "--set",
        "calibration.num_timestep_bins=2",
        "--no-sanity-check",
    ]
    out = tmp_path / "quantized"
    for command in (
        ["quantize", tmp_path / "video", "--recipe", "rtn-w4a8", *few, "-o", out],
        ["sample", out, "-p", "red heart moves left", "--steps", "2", "-o", tmp_path / "seen"],
    ):
        done = CliRunner().invoke(main, [str(word) for word in command])
        assert done.exit_code == 0, done.output
    assert len(list((tmp_path / "seen" / "0000").glob("*.png"))) == FRAMES
    assert call_defaults.read(out) == call_defaults.of(pipe)


def test_the_noise_of_a_pipeline_that_treats_one_prompt_otherwise_is_not_that_of_one_by_one():
    how = SamplingSettings(samples=4, steps=1, batch_size=4, guidance=4.0)
    for name, invariant in (("demo", True), ("demo-video", False)):
        source = load_transformer(name)
        requests = prompts.load("auto", source.pipeline, 4)
        assert (
            paired_run.is_batch_invariant(
                source, requests, call_defaults.of(source.pipeline).fill(how)
            )
            is invariant
        )
    assert paired_run.rerun_settings(how, batch_invariant=True).batch_size == 1
    assert paired_run.rerun_settings(how, batch_invariant=False).batch_size == 2
    assert (
        paired_run.rerun_settings(replace(how, batch_size=2), batch_invariant=False).batch_size == 3
    )
    assert (
        paired_run.rerun_settings(replace(how, batch_size=1), batch_invariant=True).batch_size == 2
    )
    assert (
        paired_run.rerun_settings(replace(how, batch_size=1), batch_invariant=False).batch_size == 1
    )
