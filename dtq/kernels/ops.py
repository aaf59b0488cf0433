# SPDX-License-Identifier: Apache-2.0
"""Every ``dtq::`` op: schema, torch reference and fake. Extensions only add implementations.

The reference is registered for every device (CompositeExplicitAutograd). An implementation that an
extension registers for one device takes precedence there. The first call on a device loads the
extension. ``dtq_reference::`` has the same ops without extensions.

Conventions: M tokens, N output and K input channels. Scales are float32 unless a comment names
another dtype. The references define the numbers of the integer ops: a kernel that performs their
float32 operations one after the other, in the order written there (butterflies smallest stride
first, ties to even), gives the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dtq.formats import FORMATS
from dtq.formats.activations import activation_format_of
from dtq.kernels import ops_attention, ops_fp4, ops_gemm, ops_quantize, ops_weight
from dtq.kernels.libraries import LIBRARIES
from dtq.kernels.table import LinearProblem, pick

_LIBRARY = torch.library.Library("dtq", "DEF")
_REFERENCE = torch.library.Library("dtq_reference", "DEF")  # extensions call it without a kernel


def _gelu(x: Tensor) -> Tensor:  # any shape and float dtype
    return F.gelu(x, approximate="tanh")


def _step_linear(
    x: Tensor,  # (M, K)
    mode: Tensor,  # (1,) int64 on the CPU, index into modes
    modes: list[str],  # keys of PRECISIONS
    weight_format: str,
    activation_format: str,
    hadamard_block: int,
    num_rotations: int,
    names: list[str],  # of the tensors
    tensors: list[Tensor],
    bias: Tensor | None,
    out_features: int,
) -> Tensor:
    activations = activation_format_of(modes[int(mode)], activation_format)
    weights = FORMATS[weight_format]
    problem = LinearProblem(weights, activations, hadamard_block, num_rotations)
    packed = dict(zip(names, tensors, strict=True))
    if not activations.static:
        packed.pop("input_scale", None)
    return pick(problem).call(problem, x, packed, bias)


def _step_linear_fake(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((x.shape[0], rest[-1]))


OPS = (
    *ops_quantize.OPS,
    *ops_gemm.OPS,
    *ops_fp4.OPS,
    *ops_weight.OPS,
    *ops_attention.OPS,
    ("gelu(Tensor x) -> Tensor", _gelu, torch.empty_like),
    (
        "step_linear(Tensor x, Tensor mode, str[] modes, str weight_format, str activation_format,"
        " int hadamard_block, int num_rotations, str[] names, Tensor[] tensors, Tensor? bias,"
        " int out_features) -> Tensor",
        _step_linear,
        _step_linear_fake,
    ),
)
"""Schema, reference and fake of each op."""


def _loading(name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """The reference, which loads the library of a device first; the library's op then replaces it.

    Here and not in the layers: an op is opaque to ``torch.compile``, and nothing is compiled for
    a device on which no op runs.
    """
    libraries = {d: library for d, library in LIBRARIES.items() if name in library.ops}
    if not libraries:
        return reference

    @functools.wraps(reference)
    def call(first: Any, *rest: Any) -> Any:
        device = (first[0] if isinstance(first, list) else first).device.type
        if device in libraries and libraries[device].load():
            return getattr(torch.ops.dtq, name)(first, *rest)
        return reference(first, *rest)

    return call


for _schema, _reference, _fake in OPS:
    _name = _schema.split("(")[0]
    _LIBRARY.define(_schema)
    _LIBRARY.impl(_name, _loading(_name, _reference), "CompositeExplicitAutograd")
    torch.library.register_fake(f"dtq::{_name}", _fake, lib=_LIBRARY)
    if any(_name in library.ops for library in LIBRARIES.values()):
        _REFERENCE.define(_schema)
        _REFERENCE.impl(_name, _reference, "CompositeExplicitAutograd")
