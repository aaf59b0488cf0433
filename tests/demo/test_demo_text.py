# SPDX-License-Identifier: Apache-2.0
"""The scenes ``demo-text`` is trained on, its distillation, and the folders that its script writes."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn
from train_demo import distil_text, text_bank
from train_demo.distil_text import GUIDANCE, STEPS, SUBSTEPS, trajectories, without_guidance
from train_demo.export_text import SIZES, export
from train_demo.painter import LENGTH, SIDE, Painter, new_tokenizer, token_ids
from train_demo.scenes import (
    COUNTS,
    RELATIONS,
    SIZE,
    THINGS,
    count_scene,
    draw,
    pair_scene,
    scenes,
)

from dtq import demo
from dtq.cli import main
from dtq.pipelines import call_defaults, prompts

SIDES = {"and": (-1, 0), "left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


def pictures():
    """A disc of its own colour for every thing."""
    made = {}
    for i, short in enumerate(THINGS.values()):
        colour = (40 * (i % 6), 40 * (i // 6 % 6), 40 * (i // 36), 255)
        made[short] = Image.new("RGBA", (SIZE, SIZE), colour)
    return made


def lively(guidance):
    """A painter whose output depends on everything: what starts at zero does not stay there."""
    torch.manual_seed(0)
    model = Painter(guidance)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return model.eval()


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    """A training set of noise, as if ``Bank`` had encoded it before."""
    work = tmp_path_factory.mktemp("bank")
    torch.manual_seed(1)
    captions = [*THINGS, "two frog", "red heart above frog"]
    kinds = torch.tensor([0] * len(THINGS) + [1, 2])
    latents = torch.randn(len(captions), 4, 2 * SIDE, 2 * SIDE)
    state = {"latents": latents, "captions": captions, "kinds": kinds, "shift": -0.5, "scale": 0.4}
    torch.save(state, work / "latents.pt")
    return text_bank.Bank(work, work / "no package", 0)


@pytest.mark.parametrize("relation", RELATIONS)
def test_a_pair_lies_as_its_caption_says(relation):
    colours = {name: Image.new("RGBA", (SIZE, SIZE), "black") for name in THINGS.values()}
    colours["frog"] = Image.new("RGBA", (SIZE, SIZE), (0, 255, 0, 255))
    caption, scene = pair_scene("frog", relation, "bear")
    assert caption == f"frog {relation} bear"
    drawn = draw(colours, scene, (0, 0), 1.0).float()
    green, black = drawn[1] - drawn[0], 255 - drawn[1]
    places = torch.arange(SIZE).float()
    (gx, gy), (bx, by) = (
        [float((ink.sum(d) * places).sum() / ink.sum()) for d in (0, 1)] for ink in (green, black)
    )
    for distance, sign in zip((gx - bx, gy - by), SIDES[relation], strict=True):
        assert distance * sign > 25 if sign else abs(distance) < 1


def test_copies_are_counted_and_small_ones_are_small():
    ink = {}
    for count in COUNTS:
        caption, scene = count_scene(count, "frog")
        assert caption == f"{count} frog".strip()
        ink[count] = float((255 - draw(pictures(), scene, (0, 0), 1.0).float()).sum())
    assert ink["small"] < 0.3 * ink[""]
    assert ink["two"] == pytest.approx(2.2 * ink["small"], rel=0.15)
    assert ink["four"] == pytest.approx(2 * ink["two"], rel=0.15)


def test_every_caption_is_drawn_and_its_words_are_known():
    drawn, captions, kinds = scenes(pictures(), pairs=40, seed=0)
    assert drawn.shape == (len(captions), 3, SIZE, SIZE)
    assert drawn.dtype == torch.uint8
    assert kinds.bincount().tolist() == [6 * len(THINGS), 6 * len(THINGS), 40]
    asked = prompts._shipped("emoji-scenes")
    for begin in (True, False):
        tokenizer = new_tokenizer(begin)
        rows = tokenizer([*captions, *asked]).input_ids
        assert max(map(len, rows)) <= LENGTH
        assert tokenizer.unk_token_id not in {token for row in rows for token in row}
        assert tokenizer("Red HEART").input_ids == tokenizer("red heart").input_ids


def test_the_student_starts_as_the_teacher_at_its_guidance():
    teacher = lively(guidance=True)
    student = without_guidance(teacher, GUIDANCE)
    x, sigma = torch.randn(2, SIDE**2, 16), torch.tensor([0.9, 0.3])
    text = teacher.encode(*token_ids(["red heart", "two frog"]))
    with torch.no_grad():
        want, other = (
            teacher.velocity(x, sigma, text, torch.full((2,), w)) for w in (GUIDANCE, 1.0)
        )
        have = student.velocity(x, sigma, text, None)
    assert torch.allclose(have, want, atol=1e-5)
    assert not torch.allclose(have, other, atol=1e-2)
    assert not student.transformer.config.guidance_embeds


def test_trajectories_are_those_of_the_pipeline(bank, tmp_path):
    teacher = lively(guidance=True)
    teacher.transformer.bfloat16().float()  # as export rounds it
    taught = trajectories(teacher, bank, 2, torch.Generator().manual_seed(0))
    assert taught["states"].shape == (2, STEPS + 1, SIDE**2, 16)
    export(tmp_path, teacher, bank)
    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    made = pipe(
        [bank.captions[i] for i in taught["pick"]], latents=taught["states"][:, 0].float(),
        num_inference_steps=STEPS * SUBSTEPS, guidance_scale=GUIDANCE, output_type="latent", **SIZES,
    ).images  # fmt: skip
    assert torch.allclose(made, taught["states"][:, -1].float(), atol=2e-2)
    assert not torch.allclose(made, taught["states"][:, 0].float(), atol=0.3)


def test_distillation_learns_the_segments_and_leaves_the_text_encoders(bank, tmp_path):
    teacher = lively(guidance=True)
    taught = distil_text.teach(teacher, bank, tmp_path, count=8, chunk=8, device="cpu")

    def error(student):
        x, end = taught["states"][:, 0].float(), taught["states"][:, 1].float()
        text = student.encode(bank.clip[taught["pick"]], bank.t5[taught["pick"]])
        guess = student.velocity(x, torch.ones(len(x)), text, None)
        return float((x - guess / STEPS - end).square().mean())

    with torch.no_grad():
        before = error(without_guidance(teacher, GUIDANCE))
    student = distil_text.distil(teacher, bank, taught, tmp_path, 30, 8, "cpu")
    with torch.no_grad():
        assert error(student) < 0.8 * before
    for name in ("text_encoder", "text_encoder_2"):
        old, new = (getattr(m, name).state_dict() for m in (teacher, student))
        assert all(torch.equal(old[key], new[key]) for key in old)


@pytest.mark.parametrize("guidance", [True, False])
def test_what_the_script_writes_is_stock_and_small_and_sampled_at_its_size(
    guidance, bank, tmp_path
):
    folder = tmp_path / "text"
    export(folder, Painter(guidance), bank)
    files = [f for f in folder.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 10e6  # both forms: at most 20 MB
    assert not [f for f in folder.rglob("*.json") if "_name_or_path" in f.read_text()]
    index = json.loads((folder / "model_index.json").read_text())
    assert index.pop("_class_name") == "FluxPipeline"
    libraries = {kind[0] for name, kind in index.items() if not name.startswith("_")}
    assert libraries == {"diffusers", "transformers", None}
    pipe = DiffusionPipeline.from_pretrained(folder)
    parts = (pipe.text_encoder, pipe.text_encoder_2, pipe.vae, pipe.transformer)
    assert {part.dtype for part in parts} == {torch.float32}  # nobody named one
    assert pipe.vae.config.shift_factor == bank.shift
    assert call_defaults.of(pipe).sizes == SIZES
    out = tmp_path / "seen"
    command = ["sample", folder, "-p", "frog above bear", "--steps", "2", "-o", out]
    done = CliRunner().invoke(main, [str(word) for word in command])
    assert done.exit_code == 0, done.output
    assert Image.open(out / "0000.png").size == (SIZE, SIZE)


BUNDLED = ("demo-text", "demo-text-4step")


def test_the_bundled_folders_are_small_and_share_text_encoders_and_autoencoder():
    base, few = (demo.folder(name) for name in BUNDLED)
    files = [f for folder in (base, few) for f in folder.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 20e6
    assert {f.suffix for f in files} <= {".json", ".safetensors", ".md"}
    for part in ("text_encoder", "text_encoder_2", "vae"):
        (weights,) = (base / part).glob("*.safetensors")
        assert weights.read_bytes() == (few / part / weights.name).read_bytes()
    for folder in (base, few):
        readme = (folder / "README.md").read_text()
        assert "Apache" in readme
        assert "emoji-datasource-google" in readme


@pytest.mark.parametrize(("name", "steps"), [("demo-text", 8), ("demo-text-4step", 4)])
def test_images_have_the_colours_and_places_of_their_captions(name, steps):
    pipe = DiffusionPipeline.from_pretrained(demo.folder(name))
    pipe.set_progress_bar_config(disable=True)
    asked = ["red heart", "frog", "blue heart", "two yellow star"]
    seeds = [torch.Generator().manual_seed(i) for i in range(len(asked))]
    made = pipe(asked, generator=seeds, num_inference_steps=steps, output_type="pt", **SIZES).images
    assert made.shape == (4, 3, SIZE, SIZE)
    ink = 1 - made.float()  # how much of each colour is taken away from white
    half, every = SIZE // 2, slice(None)
    parts = {
        "red": (0, every, every),
        "green": (1, every, every),
        "blue": (2, every, every),
        "yellow left": (3, every, slice(0, half)),
        "yellow right": (3, every, slice(half, None)),
    }
    left = {k: ink[i, :, rows, columns].mean((1, 2)) for k, (i, rows, columns) in parts.items()}
    assert all(float(ink.sum()) > 0.05 for ink in left.values())
    assert [left[colour].argmin() for colour in ("red", "green", "blue")] == [0, 1, 2]
    assert left["yellow left"].argmax() == left["yellow right"].argmax() == 2  # no blue in yellow
