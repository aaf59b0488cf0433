# SPDX-License-Identifier: Apache-2.0
"""The step policy as a file keeps it: which part of the trajectory has which activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dtq.errors import CheckpointError
from dtq.formats.activations import PRECISIONS
from dtq.io.safe_parse import is_finite_numbers


@dataclass(frozen=True)
class StepPolicy:
    """Activation precision by part of the trajectory, on the same weights.

    Written to ``quantization_config.runtime.diffusion_step_policy``: in the ``first_last_n`` form
    that diffusers and vLLM-Omni read where it can be said so, else as ``bins``. ``edges`` and
    ``modes`` are always there: they hold for any number of steps.

    Attributes:
        edges: timesteps that separate the ranges, rising, in the units the transformer is called
            with.
        modes: one of ``MODES`` per range, the least noisy range first.
        steps: of the sampler it was searched with, 0 if unknown.
    """

    edges: tuple[float, ...]
    precisions: tuple[str, ...]
    num_steps: int = 0
    counts: tuple[int, ...] = ()
    """Sampler steps in each range, for the ``first_last_n`` form."""

    def to_json(self) -> dict[str, Any]:
        bins = {"edges": list(self.edges), "modes": list(self.precisions)}
        bins |= {"num_inference_steps": self.num_steps, "counts": list(self.counts)}
        inner = [m for m in self.precisions if m != "native"]
        flips = sum(a != b for a, b in zip(self.precisions, self.precisions[1:], strict=False))
        ends = self.precisions[0] != "native" or self.precisions[-1] != "native"
        if (
            self.counts
            and len(set(inner)) == 1
            and ends
            and flips <= 2
            and "native" in self.precisions
        ):
            first, last = 0, 0
            for mode, count in zip(reversed(self.precisions), reversed(self.counts), strict=True):
                if mode == "native":
                    break
                first += count
            for mode, count in zip(self.precisions, self.counts, strict=True):
                if mode == "native":
                    break
                last += count
            return {
                "schema_version": 1,
                "type": "first_last_n",
                "index_space": "denoising_loop_iteration",
                "scope": ["transformer"],
                "default_mode": "native",
                "first_steps": {"count": first, "mode": inner[0]},
                "last_steps": {"count": last, "mode": inner[0]},
                **bins,
            }
        return {
            "schema_version": 1,
            "type": "bins",
            "scope": ["transformer"],
            "default_mode": "native",
            **bins,
        }

    @classmethod
    def from_json(cls, data: object, where: str) -> StepPolicy:
        """Read what :meth:`to_json` wrote.

        Raises:
            CheckpointError: a field is damaged, or the policy has no ``edges`` and ``modes``: step
                counts alone say nothing to a transformer, which is only told the timestep.
        """
        if not isinstance(data, dict):
            raise CheckpointError(f"{where} must be a mapping")
        edges, modes = data.get("edges"), data.get("modes")
        if not isinstance(edges, list) or not isinstance(modes, list):
            raise CheckpointError(f"{where}: needs the lists 'edges' and 'modes'")
        if not is_finite_numbers(edges) or edges != sorted(edges):
            raise CheckpointError(f"{where}: 'edges' must be a rising list of numbers")
        if len(modes) != len(edges) + 1 or not all(
            isinstance(m, str) and m in PRECISIONS for m in modes
        ):
            raise CheckpointError(
                f"{where}: 'modes' must be one more than the edges, each of {', '.join(PRECISIONS)}"
            )
        counts = data.get("counts", [])
        steps = data.get("num_inference_steps", 0)
        fits = isinstance(counts, list) and len(counts) in (0, len(modes))
        if not fits or not all(type(n) is int and n >= 0 for n in (*counts, steps)):
            raise CheckpointError(
                f"{where}: 'counts', one per range, and 'num_inference_steps' must be whole numbers"
            )
        return cls(tuple(map(float, edges)), tuple(modes), steps, tuple(counts))
