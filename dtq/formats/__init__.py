# SPDX-License-Identifier: Apache-2.0
"""Number formats: ``FORMATS`` lists every way to store a weight matrix.

The name of a format is its number type, then its granularity: ``-row`` has one scale per row (the
output channel of a weight, the token of activations), ``-g64`` one per 64 columns of a row.
Formats that another project has named keep its name: ``nvfp4``, and ``q4_k`` of GGUF.
"""

from __future__ import annotations

from dtq.formats.base import (
    Format,
    PackedTensors,
    QParams,
    TensorSpec,
    bits_per_weight,
    fake_quantize_weight,
)
from dtq.formats.floats import Fp8, MxFp4, NvFp4
from dtq.formats.gguf import IQ4_NL_VALUES, HalfBlock, KQuant
from dtq.formats.grid import E1M2, E2M1, E3M0, NF4, Grid
from dtq.formats.integer import Int, TwoLevelInt
from dtq.formats.lut import Lut, lloyd
from dtq.formats.lut_two_level import TwoLevelLut
from dtq.formats.ternary import Ternary
from dtq.formats.twinlog import companded, geometric, geometric_with_zero
from dtq.formats.vq import Vq

FORMATS: dict[str, Format] = {
    fmt.name: fmt
    for fmt in (
        Int("int8-row", 8),
        Int("int8-g64", 8, group=64),
        Int("int8-asym-g128", 8, group=128, asymmetric=True),
        Int("int4-row", 4),
        Int("int4-narrow-row", 4, narrow=True),
        Int("int4-g32", 4, group=32),
        Int("int4-g64", 4, group=64),
        Int("int4-g128", 4, group=128),
        Int("int4-asym-row", 4, asymmetric=True),
        Int("int4-asym-g32", 4, group=32, asymmetric=True),
        Int("int4-asym-g64", 4, group=64, asymmetric=True),
        Int("int4-asym-g128", 4, group=128, asymmetric=True),
        Int("int3-row", 3),
        Int("int3-g64", 3, group=64),
        Int("int3-asym-g64", 3, group=64, asymmetric=True),
        Int("int2-g64", 2, group=64),
        Int("int2-asym-g64", 2, group=64, asymmetric=True),
        TwoLevelInt("int4-2l-g32", group=32),
        TwoLevelInt("int4-2l-g64", group=64),
        TwoLevelInt("int4-2l-g128", group=128),
        TwoLevelInt("int3-2l-g64", group=64, bits=3),
        Fp8("fp8-row"),
        Fp8("fp8-matrix", whole=True),
        Grid("e1m2-row", E1M2),
        Grid("e2m1-row", E2M1),
        Grid("e3m0-row", E3M0),
        Grid("nf4-g64", NF4, group=64),
        NvFp4("nvfp4"),
        NvFp4("nvfp4-46", block_amax=(6.0, 4.0)),
        MxFp4("mxfp4"),
        Lut("lut4-row", 4, lloyd),
        Lut("lut4-g64", 4, lloyd, group=64),
        TwoLevelLut("lut4-2l-g16"),
        Lut("lut3-g64", 3, lloyd, group=64),
        Lut("twinlog4-row", 4, geometric),
        Lut("twinlog4-g64", 4, geometric, group=64),
        Lut("twinlog4z-row", 4, geometric_with_zero),
        Lut("twinlog4c-row", 4, companded),
        Lut("twinlog3-row", 3, geometric),
        Lut("twinlog3-g64", 3, geometric, group=64),
        Lut("twinlog3z-row", 3, geometric_with_zero),
        Lut("twinlog3c-row", 3, companded),
        Vq("vq-256x4", 256, 4),
        Vq("vq-256x4-row", 256, 4, scaled=True),
        Vq("vq-64x2", 64, 2),
        Vq("vq-64x2-row", 64, 2, scaled=True),
        Ternary("ternary-row"),
        Ternary("ternary-g64", group=64),
        Ternary("trit-row", trits=True),
        HalfBlock("q8_0", 8),
        KQuant("q6_k", 6, columns=16, scale_bits=8, minimum=False),
        KQuant("q5_k", 5, columns=32, scale_bits=6, minimum=True),
        KQuant("q4_k", 4, columns=32, scale_bits=6, minimum=True),
        HalfBlock("iq4_nl", 4, IQ4_NL_VALUES),
        KQuant("q3_k", 3, columns=16, scale_bits=6, minimum=False),
        KQuant("q2_k", 2, columns=16, scale_bits=4, minimum=True),
    )
}

__all__ = [
    "FORMATS",
    "Format",
    "PackedTensors",
    "QParams",
    "TensorSpec",
    "bits_per_weight",
    "fake_quantize_weight",
]
