# SPDX-License-Identifier: Apache-2.0
"""How activations are kept between the quantize step and the product: ``ACTS``.

A row is a token. Every dynamic format takes its scales from the token itself, so no token depends
on the rest of its batch (ViDiT-Q, 2406.02540, sec. 3.2). ``int8-static-timestep`` reads one scale per layer
and timestep bin from the file, ``int8-static`` one per layer. ``none`` leaves activations in the
compute dtype (weight-only).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = 1e-8
"""Smallest activation scale. Rows that are all zero take scale 1."""


@dataclass(frozen=True)
class ActivationFormat:
    """One way to keep activations.

    Attributes:
        bits: bits of a code; 16 means not quantized.
        static: the scale is stored instead of measured.
        stepped: one stored scale per timestep bin; otherwise one for all.
        grid: name of the weight format that a token is rounded with, as if it were a row of a
            matrix; empty for integers with one scale per token.
        doubled: twice a level of that format is an integer.
        outer: that format has a scale for the whole matrix too; each token takes its own instead,
            else it would depend on its batch.
    """

    name: str
    bits: int
    static: bool = False
    per_timestep: bool = False
    block_format: str = ""
    doubled: bool = False
    token_scale: bool = False

    @property
    def levels(self) -> int:
        """Largest code of the integer formats."""
        return 2 ** (self.bits - 1) - 1

    @property
    def integer(self) -> bool:
        """Codes are integers with one scale per token."""
        return self.bits < 16 and not self.block_format

    @property
    def int8(self) -> bool:
        """What the integer kernels multiply: int8 and one scale per token."""
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
"""Activation modes of a step policy, and the format each one means; native is the layer's own."""


def activation_format_of(mode: str, native: str) -> ActivationFormat:
    """What a mode of the step policy means for a layer whose own format is ``native``."""
    return ACTIVATION_FORMATS[PRECISIONS[mode] or native]


def row_scale(x: Tensor, levels: int = 127) -> Tensor:
    """Scale of each row, float32 (..., 1), of float32 (..., K): largest magnitude over levels."""
    return scale_of(x.abs().amax(-1, keepdim=True), levels)


def scale_of(peak: Tensor, levels: int = 127) -> Tensor:
    """Scale of rows with these largest magnitudes.

    NaN for a row with NaN in it: its codes are numbers, and only the scale can say so.
    """
    return torch.where(peak == 0, torch.ones_like(peak), (peak / levels).clamp(min=FLOOR))


def row_codes(x: Tensor, scale: Tensor, levels: int = 127) -> Tensor:
    """Codes in [-levels, levels] as float, ties to even."""
    return torch.round(x / scale).clamp(-levels, levels)


def fake_quantize(x: Tensor, activations: ActivationFormat, peak: Tensor | None = None) -> Tensor:
    """Float32 ``x`` (R, K) after quantizing and back; a static scale is fitted to ``x``.

    Args:
        x: tokens, or some channels of them, in whole groups.
        acts: the format, with a ``grid`` if there is a peak.
        peak: largest magnitude of each whole token (R, 1), if ``x`` is not whole.
    """
    if activations.bits == 16:
        return x
    if activations.block_format:
        return _on_grid(x, activations, peak)
    scale = row_scale(x.reshape(1, -1) if activations.static else x, activations.levels)
    return row_codes(x, scale, activations.levels) * scale


def _on_grid(x: Tensor, activations: ActivationFormat, peak: Tensor | None) -> Tensor:
    """Round rows with a weight format; what that keeps per matrix is kept per row here."""
    from dtq.formats import FORMATS  # the table imports this package

    fmt = FORMATS[activations.block_format]
    if not activations.token_scale:
        beyond = peak is not None and fmt.group is None  # the scale belongs to the whole token
        return fmt.fake_quantize(x, fmt.compute_qparams(torch.cat([x, peak], 1) if beyond else x))  # type: ignore[list-item]
    peak = (x.abs().amax(-1, keepdim=True) if peak is None else peak).clamp(min=1e-30)
    one = fmt.compute_qparams(x.new_ones(1, x.shape[1]))
    unit = x / peak
    return fmt.fake_quantize(unit, fmt.compute_qparams(unit, outer=one)) * peak
