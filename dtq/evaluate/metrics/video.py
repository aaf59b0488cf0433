# SPDX-License-Identifier: Apache-2.0
"""Metrics of videos that need no weights: VBench's temporal flickering, and paired metrics."""

from __future__ import annotations

import torch
from torch import Tensor

from dtq.evaluate.metrics import images


def temporal_flickering(videos: Tensor) -> Tensor:
    """VBench 0.1.5's ``temporal_flickering`` (2311.17982, sec. A.1): 1 is a still.

    ``(255 - mean over pairs of frames of the mean absolute difference) / 255`` of 8-bit frames.
    VBench applies it to videos of static scenes only; compare other videos with the float video.

    Args:
        videos: uint8 (B, F, 3, H, W), or float in [0, 1]; F >= 2.

    Returns:
        float64 (B,).
    """
    return 1 - _frame_changes(videos).mean(1) / 255


def frame_energy(videos: Tensor) -> Tensor:
    """Mean squared difference of consecutive frames, images in [0, 1]: float64 (B,)."""
    return _differences(videos).square().flatten(1).mean(1)


def temporal_psnr(candidate: Tensor, reference: Tensor) -> Tensor:
    """PSNR in dB of frame differences (B,); inf for equal videos.

    Args:
        candidate: float (B, F, 3, H, W) in [0, 1], F >= 2.
        reference: of the float model, with the same seeds.
    """
    return images.psnr(_as_images(candidate), _as_images(reference))


def temporal_ssim(candidate: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of frame differences (B,), mean over pairs of frames."""
    flat = (_as_images(v).float().flatten(0, 1) for v in (candidate, reference))
    return images.ssim(*flat).reshape(len(candidate), -1).mean(1)


def flicker_excess(candidate: Tensor, reference: Tensor) -> Tensor:
    """Increase of the flicker over the float video with the same seed (B,), in gray levels of 255.

    The flicker is the mean absolute difference of consecutive frames. Above 0 the candidate
    flickers more, below 0 it lost motion.
    """
    return _frame_changes(candidate).mean(1) - _frame_changes(reference).mean(1)


def _check(videos: Tensor) -> None:
    if videos.ndim != 5 or videos.shape[1] < 2:
        raise ValueError(f"videos are (B, F, 3, H, W) with F >= 2, got {list(videos.shape)}")


def _frame_changes(videos: Tensor) -> Tensor:
    """Mean absolute difference of each pair of frames in gray levels: float64 (B, F - 1)."""
    _check(videos)
    frames = (videos if videos.dtype == torch.uint8 else images.as_bytes(videos)).double()
    return (frames[:, 1:] - frames[:, :-1]).abs().flatten(2).mean(2)


def _differences(videos: Tensor) -> Tensor:
    """Frame differences: float64 (B, F - 1, 3, H, W) in [-1, 1]."""
    _check(videos)
    return videos[:, 1:].double() - videos[:, :-1].double()


def _as_images(videos: Tensor) -> Tensor:
    """Frame differences scaled from [-1, 1] to [0, 1], the range of images."""
    return (_differences(videos) + 1) / 2
