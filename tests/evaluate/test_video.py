# SPDX-License-Identifier: Apache-2.0
"""Metrics of videos against an independent implementation, and the runner of the real vbench."""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dtq.errors import InputError
from dtq.evaluate import paired_run, vbench
from dtq.evaluate.metrics import images, video

RECORDED = Path(__file__).parent.parent / "assets" / "vbench_eval_results.json"
"""What vbench 0.1.5 wrote for three clips of moving discs, ``dimension_list=["temporal_flickering"]``."""

FILES = ["a cat, waving-0.mp4", "a dog, jumping-0.mp4", "rain on a lake-0.mp4"]


def moving(count=3, frames=6, size=32, seed=0):
    """Smoothly moving noise, float (B, F, 3, H, W) in [0, 1]."""
    g = torch.Generator().manual_seed(seed)
    start = torch.rand(count, 1, 3, size, size, generator=g)
    step = 0.05 * torch.randn(count, frames, 3, size, size, generator=g)
    return (start + step.cumsum(1)).clamp(0, 1)


def in_numpy(clips):
    """VBench's formula as the paper's text has it, with integers."""
    scores = []
    for clip in clips.numpy().astype(np.int64):
        pairs = [np.abs(b - a).sum() / a.size for a, b in itertools.pairwise(clip)]
        scores.append((255.0 - sum(pairs) / len(pairs)) / 255.0)
    return scores


def test_temporal_flickering_against_integers():
    clips = images.as_bytes(moving())
    assert video.temporal_flickering(clips).tolist() == pytest.approx(in_numpy(clips), abs=1e-12)
    assert video.temporal_flickering(moving()).tolist() == pytest.approx(in_numpy(clips), abs=1e-12)


def test_temporal_flickering_has_the_known_values():
    still = torch.full((1, 4, 3, 8, 8), 0.5)
    assert video.temporal_flickering(still).item() == 1.0
    blinking = torch.zeros(1, 4, 3, 8, 8)
    blinking[:, 1::2] = 1
    assert video.temporal_flickering(blinking).item() == 0.0


def test_temporal_flickering_against_the_package(monkeypatch):
    """The package's own function on the same frames; its reader of files is left out."""
    pytest.importorskip("cv2")
    theirs = pytest.importorskip("vbench.temporal_flickering", exc_type=ImportError)
    clips = images.as_bytes(moving(seed=4))
    frames = {str(i): list(c.permute(0, 2, 3, 1).numpy()[..., ::-1]) for i, c in enumerate(clips)}
    monkeypatch.setattr(theirs, "get_frames", frames.__getitem__)
    want = [theirs.cal_score(name) for name in frames]
    assert video.temporal_flickering(clips).tolist() == pytest.approx(want, abs=1e-6)


def test_paired_metrics_of_a_video_with_itself():
    clips = moving()
    assert video.flicker_excess(clips, clips).abs().max() == 0
    assert video.temporal_psnr(clips, clips).isinf().all()
    torch.testing.assert_close(video.temporal_ssim(clips, clips), torch.ones(3))
    values = paired_run.video_metrics(clips, clips)
    assert values["frame-energy"].tolist() == [1.0] * 3


def test_flicker_is_seen_and_a_shift_of_brightness_is_not():
    clips = moving()
    brighter = (clips * 0.5 + 0.25) + 0.1
    steady = clips * 0.5 + 0.25
    assert video.temporal_psnr(brighter, steady).min() > 100
    shaking = steady.clone()
    shaking[:, ::2] += 0.02
    assert video.flicker_excess(shaking, steady).min() > 0
    frozen = steady[:, :1].expand_as(steady)
    assert video.flicker_excess(frozen, steady).max() < 0
    for changed in (shaking, frozen):
        assert paired_run.video_metrics(changed, steady)["frame-energy"].min() > 1.001


def test_temporal_psnr_has_the_known_value():
    want = torch.full((1, 3, 3, 8, 8), 0.5)
    got = want.clone()
    got[:, 1] += 0.1  # differences +0.1, -0.1, halved: 0.05
    assert video.temporal_psnr(got, want).item() == pytest.approx(-20 * math.log10(0.05), rel=1e-5)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 3, 8, 8)])
def test_what_is_no_video(shape):
    with pytest.raises(ValueError, match="F >= 2"):
        video.temporal_flickering(torch.rand(shape))
    with pytest.raises(ValueError, match="F >= 2"):
        video.frame_energy(torch.rand(shape))


def test_a_recorded_result_is_read():
    found = vbench.read(RECORDED, ["temporal_flickering"], FILES)["temporal_flickering"]
    assert found.videos[FILES[1]] == pytest.approx(0.985909, abs=1e-6)
    assert found.mean == pytest.approx(found.reported, abs=1e-9)


def test_dimensions_that_say_yes_or_no(tmp_path):
    """``dynamic_degree`` writes true and false."""
    answers = dict(zip(FILES, (False, True, True), strict=True))
    rows = [{"video_path": f"v/{n}", "video_results": yes} for n, yes in answers.items()]
    (tmp_path / "r.json").write_text(json.dumps({"dynamic_degree": [2 / 3, rows]}))
    found = vbench.read(tmp_path / "r.json", ["dynamic_degree"], FILES)["dynamic_degree"]
    assert found.videos == {name: float(yes) for name, yes in answers.items()}
    assert found.mean == pytest.approx(found.reported)


def damage(data, how):
    rows = data["temporal_flickering"][1]
    if how == "no dimension":
        del data["temporal_flickering"]
    elif how == "a video less":
        rows.pop()
    elif how == "a video twice":
        rows.append(rows[0])
    elif how == "nan":
        rows[0]["video_results"] = math.nan
    elif how == "unknown":
        rows.append({"video_path": "x/other.mp4", "video_results": 0.5})
    elif how == "empty":
        data["temporal_flickering"] = [math.nan, []]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("no dimension", "temporal_flickering: missing"),
        ("a video less", "no value of rain on a lake-0.mp4"),
        ("a video twice", "is there twice"),
        ("nan", "has the value nan"),
        ("unknown", "unknown videos other.mp4"),
        ("empty", "no value of a cat"),
    ],
)
def test_a_result_that_is_not_complete(tmp_path, how, words):
    data = json.loads(RECORDED.read_text())
    damage(data, how)
    (tmp_path / "r.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=words):
        vbench.read(tmp_path / "r.json", ["temporal_flickering"], FILES)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Videos, and an interpreter that finds stand-ins for vbench and torchvision."""
    (tmp_path / "videos").mkdir()
    for name in FILES:
        (tmp_path / "videos" / name).write_bytes(b"")
    package = tmp_path / "site" / "vbench"
    package.mkdir(parents=True)
    (package / "VBench_full_info.json").write_text("[]")
    (package / "__init__.py").write_text(
        "import json, os, time\n"
        f"RECORDED = {str(RECORDED)!r}\n"
        "class VBench:\n"
        "    def __init__(self, device, info, out):\n"
        "        assert json.load(open(info)) == []\n"
        "        self.out = out\n"
        "        os.makedirs(out, exist_ok=True)\n"
        "    def evaluate(self, videos_path, name, prompt_list, dimension_list, local, read_frame,\n"
        "                 mode):\n"
        "        assert mode == 'custom_input' and local and not read_frame\n"
        "        if os.environ.get('STUCK'): time.sleep(60)\n"
        "        if os.environ.get('BROKEN'): raise RuntimeError('no weights')\n"
        "        data = json.load(open(RECORDED))\n"
        "        some = {d: data[d] for d in dimension_list}\n"
        "        json.dump(some, open(f'{self.out}/{name}_eval_results.json', 'w'))\n"
    )
    # what torchvision does at import, whose compiled operators do not load next to a torch for CPUs
    (tmp_path / "site" / "torchvision.py").write_text(
        "import torch\n"
        "for name in ('nms', 'qnms'):\n"
        "    torch.library.register_fake('torchvision::' + name, lambda boxes, scores, limit: boxes)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    return tmp_path


def score(place, dimensions=("temporal_flickering",), **more):
    return vbench.run(
        place / "videos", dimensions, place / "out", python=Path(sys.executable), **more
    )


def test_the_runner(place):
    found = score(place, cache=place)
    assert set(found["temporal_flickering"].videos) == set(FILES)
    with pytest.raises(InputError, match="not empty"):
        score(place)


def test_the_runner_says_what_went_wrong(place, monkeypatch):
    with pytest.raises(InputError, match="not in color"):
        score(place, ("color",))
    with pytest.raises(InputError, match="no prompt for"):
        score(place, prompts={FILES[0]: "a cat"})
    monkeypatch.setenv("BROKEN", "1")
    with pytest.raises(InputError, match="no weights"):
        score(place)
    monkeypatch.setenv("BROKEN", "")
    monkeypatch.setenv("STUCK", "1")
    with pytest.raises(InputError, match="longer than 1 s"):
        score(place, timeout=1.0)
    (place / "videos" / "new.mp4").write_bytes(b"")
    monkeypatch.setenv("STUCK", "")
    with pytest.raises(InputError, match=r"no value of new.mp4"):
        score(place)
    for file in (place / "videos").iterdir():
        file.unlink()
    with pytest.raises(InputError, match=r"no .mp4 or .gif"):
        vbench.run(place / "videos", ["temporal_flickering"], place / "new", python=Path("python"))
