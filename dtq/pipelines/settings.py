# SPDX-License-Identifier: Apache-2.0
"""Settings for sampling a pipeline, in calibration and in evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dtq.io.schema import key


@dataclass(frozen=True)
class SamplingSettings:
    """How to sample a pipeline, and how calibration splits and bins what it sees.

    Attributes:
        prompts: a prompt set shipped with dtq, a local file, a hub dataset, or ``auto``: the set
            that fits the model.
        samples: number of images (or videos) to generate.
        steps: sampler steps; 0 uses the pipeline's own default.
        guidance: guidance scale, 0 included; None uses the pipeline's own default.
        batch_size: images generated together.
        num_shards: number of shards that calibration splits its batches into. Each shard is
            observed separately, and the results are merged in order. Several processes can
            therefore share the work and get the result of a single process.
        num_timestep_bins: timestep bins of the statistics.
        mixed_prompts: for text encoders: further calls in calibration for each of a prompt, with a
            half of its tokens replaced by random ones.
        seed: seed of the latents.
        pipeline_args: more arguments of the pipeline call: ``{height: 512, num_frames: 17}``.
        images: an image file or a folder of images, for pipelines that need input images. Empty:
            random images.
    """

    prompts: str = "auto"
    samples: int = 64
    steps: int = 20
    guidance: float | None = field(default=None, metadata=key(null=True))
    batch_size: int = 8
    num_shards: int = 8
    num_timestep_bins: int = 8
    mixed_prompts: int = 0
    seed: int = 0
    pipeline_args: dict[str, Any] = field(default_factory=dict)
    images: str = ""

    @property
    def described_guidance(self) -> float | str:
        """The guidance scale as run files and statistics record it."""
        return "pipeline default" if self.guidance is None else self.guidance


def seed_of(seed: int, index: int) -> int:
    """Seed of the latents, and of the random image, of the request at an index."""
    return seed * 1_000_003 + index
