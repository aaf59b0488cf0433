# SPDX-License-Identifier: Apache-2.0
"""The output error that transforms are compared by."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dtq.calibrate.observers import SiteStats
from dtq.formats import FORMATS, Format, bits_per_weight, snapped
from dtq.formats.activations import Acts, fake_quantize
from dtq.transforms.base import Online


class _Judge:
    """Relative squared output error of a site under a transform, on sampled rows."""

    def __init__(
        self, weights: Sequence[Tensor], stats: SiteStats, fmt: Format, acts: Acts, rows: int
    ) -> None:
        assert stats.reservoir is not None
        self.weights = [w.float() for w in weights]
        sample = stats.reservoir.rows.to(self.weights[0])
        self.x = sample[:: max(1, len(sample) // rows)][:rows]
        self.want = [self.x @ w.T for w in self.weights]
        self.power = [want.square().sum().clamp(min=1e-30) for want in self.want]
        self.fmt, self.acts = _stand_in(fmt, self.weights[0]), acts

    def __call__(self, transform: Online) -> float:
        x = fake_quantize(transform.x(self.x), self.acts)
        error = 0.0
        for w, want, power in zip(self.weights, self.want, self.power, strict=True):
            changed = transform.w(w)
            got = x @ snapped(self.fmt, changed, self.fmt.fit(changed)).T
            error += float(got.sub_(want).square_().sum() / power) / len(self.weights)
        return error


def _stand_in(fmt: Format, like: Tensor) -> Format:
    """A format that learns its levels would learn them again for every candidate: judge with
    integers of as many bits in its place."""
    if not fmt.learned:
        return fmt
    bits = bits_per_weight(fmt, (4096, 4096))
    name = "int2-g64" if bits < 2.5 else "int3-g64" if bits < 3.5 else "int4-g64"
    return FORMATS[name if like.shape[1] % 64 == 0 else "int4-row"]
