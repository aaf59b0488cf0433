# SPDX-License-Identifier: Apache-2.0
"""The step policy as a file keeps it: activation precision by part of the trajectory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dtq.errors import CheckpointError
from dtq.formats.activations import PRECISIONS
from dtq.io import schema
from dtq.io.schema import RISING, key, within


@dataclass(frozen=True)
class StepPolicy:
    """Activation precision by timestep range, with the same weights.

    Written to ``quantization_config.runtime.diffusion_step_policy``: in the ``first_last_n`` form
    that diffusers and vLLM-Omni read where that form can express it, else as ``bins``. ``edges``
    and ``modes`` are always there: they hold for any number of steps.

    Attributes:
        edges: timesteps that separate the ranges, rising, in the units the transformer is called
            with.
        precisions: one of ``PRECISIONS`` per range, the least noisy range first; ``modes`` in the
            file.
        num_steps: of the sampler that the policy was searched with, 0 if unknown.
        counts: sampler steps in each range, for the ``first_last_n`` form.
    """

    edges: tuple[float, ...] = field(metadata=RISING)
    precisions: tuple[str, ...] = field(
        metadata=key("modes", f"each of {', '.join(PRECISIONS)}", set(PRECISIONS).issuperset)
    )
    num_steps: int = field(default=0, metadata=key("num_inference_steps", *within(0)))
    counts: tuple[int, ...] = field(default=(), metadata=key("", *within(0)))

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``config.json``."""
        bins = {"edges": list(self.edges), "modes": list(self.precisions)}
        bins |= {"num_inference_steps": self.num_steps, "counts": list(self.counts)}
        scope = {"scope": ["transformer"], "default_mode": "native"}
        others = {mode for mode in self.precisions if mode != "native"}
        least_noisy, noisiest = self._end(1), self._end(-1)
        inner = self.precisions[least_noisy : len(self.precisions) - noisiest]
        if not self.counts or len(others) != 1 or set(inner) != {"native"}:
            return {"schema_version": 1, "type": "bins", **scope, **bins}
        (mode,) = others
        first = sum(self.counts[len(self.counts) - noisiest :])
        last = sum(self.counts[:least_noisy])
        return {
            "schema_version": 1,
            "type": "first_last_n",
            "index_space": "denoising_loop_iteration",
            **scope,
            "first_steps": {"count": first, "mode": mode},
            "last_steps": {"count": last, "mode": mode},
            **bins,
        }

    def _end(self, direction: int) -> int:
        """How many ranges at one end are not ``native``."""
        modes = self.precisions[::direction]
        return next((i for i, mode in enumerate(modes) if mode == "native"), len(modes))

    @classmethod
    def from_json(cls, data: object, where: str) -> StepPolicy:
        """Inverse of :meth:`to_json`.

        Raises:
            CheckpointError: a field is damaged, or the policy has no ``edges`` and ``modes``: step
                counts alone do not help a transformer, which is only given the timestep.
        """
        policy = schema.parse(cls, data, where, CheckpointError)
        ranges = len(policy.edges) + 1
        if len(policy.precisions) != ranges or len(policy.counts) not in (0, ranges):
            raise CheckpointError(
                f"{where}: 'modes' must be one more than 'edges', and 'counts' too or empty"
            )
        return policy
