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
    """Relative squared output error of an input group under a transform, on sampled rows.

    The mean over the weights of ``|Q(x) Q(w)^T - x w^T|^2 / |x w^T|^2``, with plain rounding Q.

    Args:
        weights: matrices (N_i, K) that read the input.
        stats: statistics of the input, with a sample of rows.
        fmt: weight format.
        activations: format of the transformed input.
        num_rows: rows of the sample to use, evenly spaced.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        stats: InputStats,
        fmt: Format,
        activations: ActivationFormat,
        num_rows: int,
    ) -> None:
        assert stats.sample is not None
        self.weights = [w.float() for w in weights]
        sample = stats.sample.rows.to(self.weights[0])
        self.x = sample[:: max(1, len(sample) // num_rows)][:num_rows]
        self.outputs = [self.x @ w.T for w in self.weights]
        self.power = [y.square().sum().clamp(min=1e-30) for y in self.outputs]
        self.fmt, self.activations = search_format(fmt, self.weights[0]), activations

    def __call__(self, transform: OnlineTransform) -> float:
        """The error under a transform; 1 is the power of the output."""
        x = fake_quantize(transform.x(self.x), self.activations)
        error = 0.0
        for w, y, power in zip(self.weights, self.outputs, self.power, strict=True):
            w_t = transform.w(w)
            y_q = x @ fake_quantize_weight(self.fmt, w_t, self.fmt.compute_qparams(w_t)).T
            error += float(y_q.sub_(y).square_().sum() / power) / len(self.weights)
        return error


def search_format(fmt: Format, w: Tensor) -> Format:
    """The format that candidates are evaluated with.

    A data-dependent format would learn a codebook for every candidate. Integers of about as many
    bits, which fit the width of ``w`` (N, K), take its place. ``fp8-matrix`` has no codebook.
    """
    bits = bits_per_weight(fmt, (4096, 4096))
    if not fmt.data_dependent or bits > 7:
        return fmt
    name = "int2-g64" if bits < 2.5 else "int3-g64" if bits < 3.5 else "int4-g64"
    return FORMATS[name if w.shape[1] % 64 == 0 else "int4-row"]
