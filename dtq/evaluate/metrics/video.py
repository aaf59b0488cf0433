# SPDX-License-Identifier: Apache-2.0
"""Figures of videos that need no weights: VBench's temporal flickering, and paired relatives."""

from __future__ import annotations

import torch
from torch import Tensor

from dtq.evaluate.metrics import images


def temporal_flickering(videos: Tensor) -> Tensor:
    """VBench 0.1.5's ``temporal_flickering`` (2311.17982, sec. A.1): 1 is a still.

    ``(255 - mean over pairs of frames of the mean absolute difference) / 255`` of 8-bit frames.
    VBench asks it of videos of static scenes alone; for others compare with the float video.

    Args:
        videos: uint8 (B, F, 3, H, W), or float in [0, 1]; F >= 2.

    Returns:
        float64 (B,).
    """
    return 1 - _changes(videos).mean(1) / 255


def frame_energy(videos: Tensor) -> Tensor:
    """Mean squared difference of neighbouring frames, pictures in [0, 1]: float64 (B,)."""
    return _moves(videos).square().flatten(1).mean(1)


def temporal_psnr(got: Tensor, want: Tensor) -> Tensor:
    """PSNR in dB of frame differences (B,); equal ones give inf.

    Args:
        got: float (B, F, 3, H, W) in [0, 1], F >= 2.
        want: the float model's, same seeds.
    """
    return images.psnr(_halved(got), _halved(want))


def temporal_ssim(got: Tensor, want: Tensor) -> Tensor:
    """Structural similarity of frame differences (B,), mean over pairs of frames."""
    shown, right = (_halved(v).float().flatten(0, 1) for v in (got, want))
    return images.ssim(shown, right).reshape(len(got), -1).mean(1)


def flicker_excess(got: Tensor, want: Tensor) -> Tensor:
    """How much more a video flickers than the float model's of the same seed (B,), in grey levels.

    Mean absolute difference of neighbouring frames, 0 to 255, candidate minus float: above 0 it
    shakes more, below 0 motion was lost.
    """
    return _changes(got).mean(1) - _changes(want).mean(1)


def _changes(videos: Tensor) -> Tensor:
    """Mean absolute difference of each pair of frames in grey levels: float64 (B, F - 1)."""
    if videos.ndim != 5 or videos.shape[1] < 2:
        raise ValueError(f"videos are (B, F, 3, H, W) with F >= 2, got {list(videos.shape)}")
    frames = (videos if videos.dtype == torch.uint8 else images.as_bytes(videos)).double()
    return (frames[:, 1:] - frames[:, :-1]).abs().flatten(2).mean(2)


def _moves(videos: Tensor) -> Tensor:
    if videos.ndim != 5 or videos.shape[1] < 2:
        raise ValueError(f"videos are (B, F, 3, H, W) with F >= 2, got {list(videos.shape)}")
    return videos[:, 1:].double() - videos[:, :-1].double()


def _halved(videos: Tensor) -> Tensor:
    """Frame differences moved from [-1, 1] to [0, 1], so that they are pictures."""
    return (_moves(videos) + 1) / 2
