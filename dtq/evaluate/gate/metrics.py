# SPDX-License-Identifier: Apache-2.0
"""``METRICS``: the metrics of a sample in a run file, and how two runs are compared in each."""

from __future__ import annotations

import math
from dataclasses import dataclass

TINY = 1e-12
"""Relative squared errors below it count as equal: it is the rounding error of float32."""

MIN_IMAGES = 64
"""Of a set metric; with fewer images its interval is too short."""

EQUAL_DB = 100.0
"""PSNR of equal images; the true value is infinite."""


@dataclass(frozen=True)
class Metric:
    """One metric of one sample.

    Attributes:
        name: key of ``values`` in a run file, and of a policy.
        about: one line.
        ratio: whether values are compared by the logarithm of their quotient; the margin is then a
            factor above 1.
        higher: whether a higher value is better.
        steps: whether there is one value per step; the value of a sample is their mean.
        when: which runs have it: ``always``, ``video``, or ``requested``; ``set``: requested, of a
            whole image set, so that a sample has no value.
    """

    name: str
    about: str
    ratio: bool = False
    higher: bool = False
    steps: bool = False
    when: str = "always"

    @property
    def of_sets(self) -> bool:
        """Whether a whole image set has the value, and a sample has none."""
        return self.when == "set"

    def worse(self, candidate: float, baseline: float) -> float:
        """The difference of two values, positive if the candidate is worse.

        It is the logarithm of a factor if ``ratio``, else in the unit of the metric.
        """
        if self.ratio:
            return math.log(max(candidate, TINY) / max(baseline, TINY))
        return baseline - candidate if self.higher else candidate - baseline

    def to_difference(self, margin: float) -> float:
        """A margin of a policy on the scale of :meth:`worse`."""
        return math.log(margin) if self.ratio else margin

    def from_difference(self, difference: float) -> float:
        """Inverse of :meth:`to_difference`."""
        return math.exp(min(difference, 700.0)) if self.ratio else difference

    def shown(self, difference: float) -> str:
        """A difference as text: a factor, or a signed number that is positive when worse."""
        if not math.isfinite(difference):
            return "–" if math.isnan(difference) else "unbounded"
        return f"x{self.from_difference(difference):.4g}" if self.ratio else f"{difference:+.4g}"


VBENCH = (
    "temporal_flickering", "subject_consistency", "background_consistency", "motion_smoothness",
    "dynamic_degree", "aesthetic_quality", "imaging_quality", "human_action", "temporal_style",
    "overall_consistency",
)  # fmt: skip
"""Dimensions that vbench computes for a user's videos (``mode="custom_input"``)."""

METRICS: dict[str, Metric] = {
    m.name: m
    for m in (
        Metric("error", "teacher-forced relative squared error of the transformer's output",
               ratio=True, steps=True),
        Metric("divergence",
               "free-running relative squared distance of the latents that enter each step",
               ratio=True, steps=True),
        Metric("psnr", "dB against the float model's image of the same seed", higher=True),
        Metric("ssim", "structural similarity to that image", higher=True),
        Metric("color", "change of the colors of that image, in gray levels"),
        Metric("flicker", "increase of the difference of consecutive frames, in gray levels",
               when="video"),
        Metric("flickering", "VBench's temporal flickering", higher=True, when="video"),
        Metric("frame-energy", "squared frame differences, candidate / float or its inverse",
               ratio=True, when="video"),
        Metric("temporal-psnr", "dB of frame differences", higher=True, when="video"),
        Metric("temporal-ssim", "structural similarity of frame differences", higher=True,
               when="video"),
        Metric("ms-ssim", "multi-scale structural similarity", higher=True, when="requested"),
        Metric("lpips", "LPIPS to the float model's image", when="requested"),
        Metric("perceptual-lite0", "distance of EfficientNet-Lite0's maps to that image",
               when="requested"),
        Metric("clip-score", "CLIPScore of image and prompt", higher=True, when="requested"),
        Metric("clip-iqa", "CLIP-IQA of the image", higher=True, when="requested"),
        Metric("image-reward", "ImageReward of the image", higher=True, when="requested"),
        *(Metric(f"vbench.{name}", f"VBench's {name}", higher=True, when="requested")
          for name in VBENCH),
        Metric("fid", "Frechet distance from the float model's images", when="set"),
        Metric("sfid", "the same of 7 channels of a feature map", when="set"),
        Metric("fd-dinov2", "the same of DINOv2 features", when="set"),
        Metric("fvd", "the same of I3D features of videos", when="set"),
        Metric("kid", "MMD^2 from the float model's images, cubic kernel", when="set"),
        Metric("cmmd", "MMD^2 of CLIP features x 1000", when="set"),
        Metric("is", "Inception score, change from the float model's", higher=True, when="set"),
        Metric("precision", "share of images within 3-NN of the float model's", higher=True,
               when="set"),
        Metric("recall", "share of the float model's images within 3-NN", higher=True, when="set"),
    )
}  # fmt: skip
