# SPDX-License-Identifier: Apache-2.0
"""What a run file holds of each sample, and how two runs are compared in it: ``METRICS``."""

from __future__ import annotations

import math
from dataclasses import dataclass

TINY = 1e-12
"""Relative squared errors below it are equal: it is the rounding of float32."""

EQUAL_DB = 100.0
"""PSNR of pictures that are equal; the true value is infinite."""


@dataclass(frozen=True)
class Metric:
    """One figure of one sample.

    Attributes:
        name: key of ``values`` in a run file, and of a policy.
        about: one line.
        unit: of the margin.
        ratio: compared as a logarithm of the quotient; the margin is a factor above 1.
        higher: more is better.
        steps: one value per step; a sample's is their mean.
        when: which runs have it: all, those of videos, or those that asked for it.
    """

    name: str
    about: str
    unit: str
    ratio: bool = False
    higher: bool = False
    steps: bool = False
    when: str = "always"

    def worse(self, candidate: float, baseline: float) -> float:
        """How much worse the candidate is: a logarithm of a factor, or a difference."""
        if self.ratio:
            return math.log(max(candidate, TINY) / max(baseline, TINY))
        return baseline - candidate if self.higher else candidate - baseline

    def inside(self, margin: float) -> float:
        """A margin as a policy writes it, on the scale of :meth:`worse`."""
        return math.log(margin) if self.ratio else margin

    def outside(self, difference: float) -> float:
        """Inverse of :meth:`inside`."""
        return math.exp(min(difference, 700.0)) if self.ratio else difference

    def shown(self, difference: float) -> str:
        """A difference as people read it: a factor, or a number that is positive when worse."""
        if not math.isfinite(difference):
            return "unbounded"
        return f"x{self.outside(difference):.4g}" if self.ratio else f"{difference:+.4g}"


METRICS: dict[str, Metric] = {
    m.name: m
    for m in (
        Metric(
            "error",
            "teacher-forced relative squared error of the transformer's output",
            "factor",
            ratio=True,
            steps=True,
        ),
        Metric(
            "divergence",
            "free-running relative squared distance of the latents that enter each step",
            "factor",
            ratio=True,
            steps=True,
        ),
        Metric("psnr", "dB against the float model's picture of the same seed", "dB", higher=True),
        Metric("ssim", "structural similarity to that picture", "", higher=True),
        Metric("flicker", "grey levels by which neighbouring frames differ more", "", when="video"),
        Metric("flickering", "VBench's temporal flickering", "", higher=True, when="video"),
        Metric("frame-energy", "frame differences, squared, candidate / float or its inverse",
               "factor", ratio=True, when="video"),
        Metric("temporal-psnr", "dB of frame differences", "dB", higher=True, when="video"),
        Metric("temporal-ssim", "structural similarity of frame differences", "", higher=True,
               when="video"),
        Metric("ms-ssim", "multi-scale structural similarity", "", higher=True, when="asked"),
        Metric("lpips", "LPIPS to the float model's picture", "", when="asked"),
        Metric("clip-score", "CLIPScore of picture and prompt", "", higher=True, when="asked"),
        Metric("clip-iqa", "CLIP-IQA of the picture", "", higher=True, when="asked"),
        Metric("image-reward", "ImageReward of the picture", "", higher=True, when="asked"),
    )
}  # fmt: skip
