# SPDX-License-Identifier: Apache-2.0
"""How a pipeline is sampled for calibration and evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class SamplingSettings:
    """What to run the float model on.

    Attributes:
        set: a set shipped with dtq, a local file, a hub data set, or ``auto``: what fits the model.
        samples: pictures (or videos) to generate.
        steps: sampler steps; 0 takes the pipeline's own default.
        guidance: guidance scale; 0 takes the pipeline's own default.
        batch: pictures generated together.
        parts: the batches are seen in so many parts, which are then added up in order, whoever saw
            them: so many processes can share the work, and get what one alone gets.
        bins: timestep bins of the statistics.
        seed: of the latents.
        arguments: more arguments of the pipeline's call: ``{height: 512, num_frames: 17}``.
        images: a picture, or a folder of them, for pipelines that edit or continue pictures; empty:
            made-up ones.
    """

    prompts: str = "auto"
    samples: int = 64
    steps: int = 20
    guidance: float = 0.0
    batch_size: int = 8
    num_shards: int = 8
    num_timestep_bins: int = 8
    seed: int = 0
    pipeline_args: dict[str, Any] = field(default_factory=dict)
    images: str = ""
