# SPDX-License-Identifier: Apache-2.0
"""MP4 files: the frames that are measured are the frames that were written."""

import contextlib

import pytest
import torch

from dtq.errors import InputError
from dtq.evaluate import mp4
from dtq.evaluate.metrics.images import as_bytes
from dtq.evaluate.metrics.video import temporal_flickering

pytest.importorskip("imageio_ffmpeg")


def clip(frames=6, height=33, width=48, seed=0):
    return torch.rand(frames, 3, height, width, generator=torch.Generator().manual_seed(seed))


def test_lossless_files_hold_every_bit(tmp_path):
    video = clip()
    mp4.write(video, tmp_path / "a.mp4", lossless=True)
    frames = mp4.read(tmp_path / "a.mp4")
    assert torch.equal(frames, as_bytes(video))
    assert torch.equal(
        temporal_flickering(frames[None]), temporal_flickering(as_bytes(video)[None])
    )


@pytest.mark.parametrize("size", [(32, 48), (33, 47)])
def test_files_for_players_are_near_and_have_even_sides(size, tmp_path):
    smooth = torch.linspace(0, 1, size[1]).expand(6, 3, *size)
    mp4.write(smooth, tmp_path / "a.mp4", fps=24)
    frames = mp4.read(tmp_path / "a.mp4")
    assert frames.shape == (6, 3, size[0] + size[0] % 2, size[1] + size[1] % 2)
    close = frames[..., : size[0], : size[1]].float() - as_bytes(smooth).float()
    assert float(close.abs().mean()) < 4


def test_a_file_that_is_no_video_is_refused(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(InputError, match="not a video") as refused:
        mp4.read(tmp_path / "a.mp4")
    assert "\n" not in str(refused.value)


def test_a_video_without_frames_is_refused(tmp_path, monkeypatch):
    class Empty:
        def get_reader(self, *args, **kwargs):
            return contextlib.nullcontext([])

    monkeypatch.setattr(mp4, "_imageio", Empty)
    with pytest.raises(InputError, match="without frames; remove it"):
        mp4.read(tmp_path / "a.mp4")
