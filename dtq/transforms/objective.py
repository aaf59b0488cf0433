# SPDX-License-Identifier: Apache-2.0
"""The output error that transforms are compared by."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dtq.calibrate.observers import InputStats
from dtq.formats import FORMATS, Format, bits_per_weight, fake_quantize_weight
from dtq.formats.activations import ActivationFormat, fake_quantize
from dtq.transforms.base import OnlineTransform


class OutputErrorObjective:
    """Relative squared output error of a site under a transform, on sampled rows."""

    def __init__(
        self,
        weights: Sequence[Tensor],
        stats: InputStats,
        fmt: Format,
        activations: ActivationFormat,
        rows: int,
    ) -> None:
        assert stats.sample is not None
        self.weights = [w.float() for w in weights]
        sample = stats.sample.rows.to(self.weights[0])
        self.x = sample[:: max(1, len(sample) // rows)][:rows]
        self.want = [self.x @ w.T for w in self.weights]
        self.power = [want.square().sum().clamp(min=1e-30) for want in self.want]
        self.fmt, self.acts = search_format(fmt, self.weights[0]), activations

    def __call__(self, transform: OnlineTransform) -> float:
        x = fake_quantize(transform.x(self.x), self.acts)
        error = 0.0
        for w, want, power in zip(self.weights, self.want, self.power, strict=True):
            changed = transform.w(w)
            got = x @ fake_quantize_weight(self.fmt, changed, self.fmt.compute_qparams(changed)).T
            error += float(got.sub_(want).square_().sum() / power) / len(self.weights)
        return error


def search_format(fmt: Format, like: Tensor) -> Format:
    """A format that learns its levels would learn them again for every candidate: judge with
    integers of as many bits in its place."""
    if not fmt.data_dependent:
        return fmt
    bits = bits_per_weight(fmt, (4096, 4096))
    name = "int2-g64" if bits < 2.5 else "int3-g64" if bits < 3.5 else "int4-g64"
    return FORMATS[name if like.shape[1] % 64 == 0 else "int4-row"]
