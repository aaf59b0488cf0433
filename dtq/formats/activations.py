# SPDX-License-Identifier: Apache-2.0
"""How activations are stored between the quantize step and the matrix product.

A row of an activation matrix (R, K) is a token. Every dynamic format computes its scales from the
token alone, so a token does not depend on the rest of its batch (ViDiT-Q, 2406.02540, sec. 3.2).
``int8-static-timestep`` reads one scale per layer and timestep bin from the file, ``int8-static``
one per layer. ``none`` leaves activations in the compute dtype (weight-only).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MIN_SCALE = 1e-8
"""Smallest activation scale. A row of zeros has the scale 1."""


@dataclass(frozen=True)
class ActivationFormat:
    """One way to store activations.

    Attributes:
        name: key of ``ACTIVATION_FORMATS``.
        bits: bits of a value; 16 means not quantized.
        static: the scale is read from the file; otherwise it is computed from the token.
        per_timestep: one static scale per timestep bin; otherwise one for all.
        block_format: name of the weight format that rounds a token, as if it were a row of a
            matrix; empty for integers with one scale per token.
        doubled: twice an entry of the codebook of ``block_format`` is an integer, so integer
            kernels multiply it.
        token_scale: ``block_format`` has a scale for the whole matrix; here each token has its own,
            because a token must not depend on its batch.
    """

    name: str
    bits: int
    static: bool = False
    per_timestep: bool = False
    block_format: str = ""
    doubled: bool = False
    token_scale: bool = False

    @property
    def qmax(self) -> int:
        """Largest integer of the integer formats: 127 for 8 bits."""
        return 2 ** (self.bits - 1) - 1

    @property
    def integer(self) -> bool:
        """Values are integers with one scale per token."""
        return self.bits < 16 and not self.block_format

    @property
    def int8(self) -> bool:
        """Integer kernels can multiply the values: int8 with one scale per token."""
        return self.integer or self.doubled


ACTIVATION_FORMATS: dict[str, ActivationFormat] = {
    a.name: a
    for a in (
        ActivationFormat("none", 16),
        ActivationFormat("int8-row", 8),
        ActivationFormat("int8-static-timestep", 8, static=True, per_timestep=True),
        ActivationFormat("int8-static", 8, static=True),
        ActivationFormat("int6-row", 6),
        ActivationFormat("int4-row", 4),
        ActivationFormat("int4-g64", 4, block_format="int4-g64"),
        ActivationFormat("int4-asym-g64", 4, block_format="int4-asym-g64"),
        ActivationFormat("int8-asym-g128", 8, block_format="int8-asym-g128"),
        ActivationFormat("fp8-row", 8, block_format="fp8-row"),
        ActivationFormat("e2m1-row", 4, block_format="e2m1-row", doubled=True),
        ActivationFormat("nvfp4", 4, block_format="nvfp4", token_scale=True),
        ActivationFormat("mxfp4", 4, block_format="mxfp4"),
    )
}


PRECISIONS: dict[str, str] = {
    "native": "",
    "a16": "none",
    "a8": "int8-row",
    "a6": "int6-row",
    "a4": "int4-row",
}
"""Precisions of a step policy, and the activation format of each; ``native`` is the layer's own."""


def activation_format_of(precision: str, native: str) -> ActivationFormat:
    """The format for a precision of the step policy, in a layer whose own format is ``native``."""
    return ACTIVATION_FORMATS[PRECISIONS[precision] or native]


def row_scale(x: Tensor, qmax: int = 127) -> Tensor:
    """Scale of each row of float32 (..., K): its largest magnitude over ``qmax``, (..., 1)."""
    return scale_of(x.abs().amax(-1, keepdim=True), qmax)


def scale_of(amax: Tensor, qmax: int = 127) -> Tensor:
    """Scale of rows with these largest magnitudes, float32 of the same shape.

    The scale of a row with a NaN is NaN. The row's integers cannot hold a NaN, so only the scale
    carries it to the output.
    """
    return torch.where(amax == 0, torch.ones_like(amax), (amax / qmax).clamp(min=MIN_SCALE))


def row_codes(x: Tensor, scale: Tensor, qmax: int = 127) -> Tensor:
    """Integers in [-qmax, qmax] of ``x / scale``, as float, ties to even."""
    return torch.round(x / scale).clamp(-qmax, qmax)


def fake_quantize(x: Tensor, activations: ActivationFormat, amax: Tensor | None = None) -> Tensor:
    """Quantize tokens and dequantize them again.

    Args:
        x: float32 (R, K), tokens, or some channels of them in whole groups.
        activations: the format. A static scale is computed from all of ``x``.
        amax: largest magnitude of each whole token (R, 1), for formats with a ``block_format`` when
            ``x`` holds some channels only. None: ``x`` holds all.

    Returns:
        float32 (R, K).
    """
    if activations.bits == 16:
        return x
    if activations.block_format:
        return _fake_quantize_blocks(x, activations, amax)
    scale = row_scale(x.reshape(1, -1) if activations.static else x, activations.qmax)
    return row_codes(x, scale, activations.qmax) * scale


def _fake_quantize_blocks(x: Tensor, activations: ActivationFormat, amax: Tensor | None) -> Tensor:
    """Round rows with a weight format. Its scale of the whole matrix becomes one per row."""
    from dtq.formats import FORMATS  # the table imports this package

    fmt = FORMATS[activations.block_format]
    if not activations.token_scale:
        # without groups the scale belongs to the whole token: its amax joins as a channel
        whole = x if amax is None or fmt.group is not None else torch.cat([x, amax], 1)
        return fmt.fake_quantize(x, fmt.compute_qparams(whole))
    amax = (x.abs().amax(-1, keepdim=True) if amax is None else amax).clamp(min=1e-30)
    unit_params = fmt.compute_qparams(x.new_ones(1, x.shape[1]))
    unit = x / amax
    return fmt.fake_quantize(unit, fmt.compute_qparams(unit, outer=unit_params)) * amax
