# SPDX-License-Identifier: Apache-2.0
"""Every ``dtq::`` op: schema, fake and torch reference. Extensions only add implementations.

The reference is registered for every device (CompositeExplicitAutograd); what an extension
registers for one device comes before it there. The first call on the CPU looks for the extension.

Conventions: M tokens, N output and K input channels. Scales are float32 unless said otherwise.
The products of the int8 ops are exact int32; the epilogue is
``float(acc) * row_scale * weight_scale + bias`` in float32, in that order, then one cast; with a
scale for each group ``(float(acc_0) * scale_0 + float(acc_1) * scale_1 + ...) * row_scale + bias``.
A kernel that follows it gives the same numbers bit for bit. So does ``quantize_rows``: one float32
operation after the other in the order written here, butterflies smallest distance first, ties to
even.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dtq.formats.activations import (
    ACTIVATION_FORMATS,
    activation_format_of,
    fake_quantize,
    row_codes,
    row_scale,
)
from dtq.formats.integer import TwoLevelInt
from dtq.formats.packing import unpack_bits
from dtq.kernels import ops_fp4, ops_gemm, ops_quantize
from dtq.kernels.libraries import LIBRARIES
from dtq.kernels.weight_cache import WeightCache
from dtq.linalg.hadamard import fwht

_WEIGHT_CACHE = WeightCache()

_LIBRARY = torch.library.Library("dtq", "DEF")
# the same ops, torch reference on every device: what an extension calls when it has no kernel
_REFERENCE = torch.library.Library("dtq_reference", "DEF")


def _quantize_rows(
    x: Tensor,  # (M, K) any float dtype
    pre_scale: Tensor | None,  # (K,) bfloat16
    hadamard_block: int,
    scale: Tensor | None,  # (1,) float32, or None: one per row
    qmax: int = 127,
) -> tuple[Tensor, Tensor]:
    x = x.float()
    if pre_scale is not None:
        x = x * pre_scale.float()
    x = fwht(x, hadamard_block)
    rows = row_scale(x, qmax) if scale is None else scale.reshape(1, 1).expand(x.shape[0], 1)
    return row_codes(x, rows, qmax).to(torch.int8), rows.reshape(-1).clone()  # (M, K), (M,)


def _transform_rows(
    x: Tensor,  # (M, K) any float dtype
    pre_scale: Tensor | None,  # (K,) bfloat16
    perm: Tensor | None,  # (K,) int32, the channel that moves to each place
    hadamard_block: int,
    num_rotations: int,
) -> Tensor:
    changed = ops_quantize.transform_input(
        x.float(), pre_scale, perm, hadamard_block, num_rotations
    )
    return changed.clone()  # (M, K) float32


def _float_like(x: Tensor, *rest: object) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


def _round_rows(
    x: Tensor,  # (M, K) any float dtype
    pre_scale: Tensor | None,  # (K,) bfloat16
    perm: Tensor | None,  # (K,) int32
    hadamard_block: int,
    num_rotations: int,
    activation_format: str,  # a key of ACTIVATION_FORMATS
    dtype: torch.dtype,
) -> Tensor:
    changed = ops_quantize.transform_input(
        x.float(), pre_scale, perm, hadamard_block, num_rotations
    )
    return fake_quantize(changed, ACTIVATION_FORMATS[activation_format]).to(
        dtype, copy=True
    )  # (M, K)


def _round_rows_fake(x: Tensor, *rest: object) -> Tensor:
    dtype = rest[-1]
    assert isinstance(dtype, torch.dtype)
    return x.new_empty(x.shape, dtype=dtype)


def _step_linear(
    x: Tensor,  # (M, K)
    mode: Tensor,  # (1,) int64 on the CPU, index into modes
    modes: list[str],  # keys of acts.MODES
    weight_format: str,
    activation_format: str,
    hadamard_block: int,
    num_rotations: int,
    names: list[str],  # of the parts
    parts: list[Tensor],
    bias: Tensor | None,
    out_features: int,
) -> Tensor:
    from dtq.formats import FORMATS
    from dtq.kernels.table import LinearProblem, pick

    acts = activation_format_of(modes[int(mode)], activation_format)
    task = LinearProblem(FORMATS[weight_format], acts, hadamard_block, num_rotations)
    named = dict(zip(names, parts, strict=True))
    if not task.activation_format.static:
        named.pop("input_scale", None)
    return pick(task).call(task, x, named, bias)


def _step_linear_fake(x: Tensor, *rest: object) -> Tensor:
    columns = rest[-1]
    assert isinstance(columns, int)
    return x.new_empty((x.shape[0], columns))


def _w8a8_linear(
    x_q: Tensor,  # (M, K) int8
    row_scale: Tensor,  # (M,)
    weight: Tensor,  # (N, K) int8
    weight_scale: Tensor,  # (N, 1)
    bias: Tensor | None,  # (N,) any float dtype
    dtype: torch.dtype,
) -> Tensor:
    y = int_matmul(x_q, weight).float() * row_scale.unsqueeze(1) * weight_scale.T
    if bias is not None:
        y = y + bias.float()
    return y.to(dtype)  # (M, N)


def _w4a8_linear(
    x_q: Tensor,  # (M, K) int8
    row_scale: Tensor,  # (M,)
    weight: Tensor,  # (N, K/2) int8, two codes a byte
    weight_scale: Tensor,  # (N, 1)
    weight_scale_2: Tensor,  # (N, K/group) int8, scale2 - 1 and zero
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    expanded = TwoLevelInt.expand(weight, weight_scale_2)
    return _w8a8_linear(x_q, row_scale, expanded, weight_scale, bias, dtype)


def _w3a8_linear(
    x_q: Tensor,  # (M, K) int8
    row_scale: Tensor,  # (M,)
    weight: Tensor,  # (N, 3K/8) int8, eight codes in three bytes
    weight_scale: Tensor,  # (N, 1)
    weight_scale_2: Tensor,  # (N, K/group) int8, scale2 - 1 and zero
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    expanded = TwoLevelInt.expand(weight, weight_scale_2, 3)
    return _w8a8_linear(x_q, row_scale, expanded, weight_scale, bias, dtype)


def _group_a8_linear(
    x_q: Tensor,  # (M, K) int8
    row_scale: Tensor,  # (M,)
    weight: Tensor,  # (N, K) or (N, K/2) int8
    weight_scale: Tensor,  # (N, groups) float32 or bfloat16
    weight_zero_point: Tensor | None,  # (N, groups) int8
    bits: int,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    stored, zero = (unpack_bits(weight, 4).view(torch.int8), 8) if bits == 4 else (weight, 0)
    groups = weight_scale.shape[1]
    x, w = x_q.tensor_split(groups, 1), stored.tensor_split(groups, 1)
    y = x_q.new_zeros((len(x_q), len(weight)), dtype=torch.float32)
    for i in range(groups):  # exact sums, then float32, the first group first
        raised = zero if weight_zero_point is None else weight_zero_point[:, i].int()
        total = int_matmul(x[i].contiguous(), w[i].contiguous())
        total = total - x[i].sum(1, keepdim=True, dtype=torch.int32) * raised
        part = total.float() * weight_scale[:, i].float()
        y = y + part if i else part
    y = y * row_scale.unsqueeze(1)
    if bias is not None:
        y = y + bias.float()
    return y.to(dtype)


def _dequantize(
    parts: list[Tensor],
    names: list[str],  # of the parts
    weight_format: str,  # a key of FORMATS
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    from dtq.formats import FORMATS

    named = dict(zip(names, parts, strict=True))
    return FORMATS[weight_format].unpack(named).to(dtype)  # (N, K)


def _dequantize_fake(
    parts: list[Tensor], names: list[str], weight_format: str, columns: int, dtype: torch.dtype
) -> Tensor:
    return parts[0].new_empty((parts[0].shape[0], columns), dtype=dtype)


def _weight_linear(
    x: Tensor,  # (M, K)
    parts: list[Tensor],
    names: list[str],
    weight_format: str,
    bias: Tensor | None,
) -> Tensor:
    w = torch.ops.dtq.dequantize(parts, names, weight_format, x.shape[1], x.dtype)
    return F.linear(x, w, None if bias is None else bias.to(x.dtype))


def _resident_linear(
    x: Tensor, parts: list[Tensor], names: list[str], weight_format: str, bias: Tensor | None
) -> Tensor:
    w = _WEIGHT_CACHE.weight(parts, names, weight_format, x.shape[1], x.dtype)
    return F.linear(x, w, None if bias is None else bias.to(x.dtype))


def _weight_linear_fake(x: Tensor, parts: list[Tensor], *rest: object) -> Tensor:
    return x.new_empty((x.shape[0], parts[0].shape[0]))


def _gelu(
    x: Tensor,  # any shape and float dtype
) -> Tensor:
    return F.gelu(x, approximate="tanh")


def int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Exact int32 (M, N) of int8 (M, K) and (N, K)."""
    rows, columns = a.shape
    if columns == 1:  # torch._int_mm returns memory that it has not written
        return a.int() * b.int().T
    if a.is_cuda:  # torch._int_mm wants more than 16 rows and multiples of 8 there
        if rows > 16 and columns % 8 == 0 and len(b) % 8 == 0:
            return torch._int_mm(a, b.T)
        return (a.double() @ b.double().T).to(torch.int32)
    return torch._int_mm(a, b.T)


_OPS = (
    (
        "quantize_rows(Tensor x, Tensor? pre_scale, int hadamard_block, Tensor? scale,"
        " int qmax=127) -> (Tensor, Tensor)",
        _quantize_rows,
        ops_quantize.codes_like,
    ),
    (
        f"transform_rows(Tensor x, {ops_quantize.TRANSFORM_ARGS}) -> Tensor",
        _transform_rows,
        _float_like,
    ),
    (
        "step_linear(Tensor x, Tensor mode, str[] modes, str weight_format, str activation_format,"
        " int hadamard_block, int num_rotations, str[] names, Tensor[] parts, Tensor? bias,"
        " int out_features) -> Tensor",
        _step_linear,
        _step_linear_fake,
    ),
    (
        f"round_rows(Tensor x, {ops_quantize.TRANSFORM_ARGS}, str activation_format, ScalarType dtype) -> Tensor",
        _round_rows,
        _round_rows_fake,
    ),
    (
        "w8a8_linear(Tensor x_q, Tensor row_scale, Tensor weight, Tensor weight_scale,"
        " Tensor? bias, ScalarType dtype) -> Tensor",
        _w8a8_linear,
        ops_gemm.gemm_fake,
    ),
    (
        "w4a8_linear(Tensor x_q, Tensor row_scale, Tensor weight, Tensor weight_scale,"
        " Tensor weight_scale_2, Tensor? bias, ScalarType dtype) -> Tensor",
        _w4a8_linear,
        ops_gemm.gemm_fake,
    ),
    (
        "w3a8_linear(Tensor x_q, Tensor row_scale, Tensor weight, Tensor weight_scale,"
        " Tensor weight_scale_2, Tensor? bias, ScalarType dtype) -> Tensor",
        _w3a8_linear,
        ops_gemm.gemm_fake,
    ),
    (
        "group_a8_linear(Tensor x_q, Tensor row_scale, Tensor weight, Tensor weight_scale,"
        " Tensor? weight_zero_point, int bits, Tensor? bias, ScalarType dtype) -> Tensor",
        _group_a8_linear,
        ops_gemm.gemm_fake,
    ),
    (
        "dequantize(Tensor[] parts, str[] names, str weight_format, int columns, ScalarType dtype)"
        " -> Tensor",
        _dequantize,
        _dequantize_fake,
    ),
    (
        "weight_linear(Tensor x, Tensor[] parts, str[] names, str weight_format, Tensor? bias)"
        " -> Tensor",
        _weight_linear,
        _weight_linear_fake,
    ),
    (
        "resident_linear(Tensor x, Tensor[] parts, str[] names, str weight_format, Tensor? bias)"
        " -> Tensor",
        _resident_linear,
        _weight_linear_fake,
    ),
    ("gelu(Tensor x) -> Tensor", _gelu, torch.empty_like),
    *ops_quantize.OPS,
    *ops_gemm.OPS,
    *ops_fp4.OPS,
)


def _loading(name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """The reference; the first call on a device loads its library, which then takes its place.

    Here and not in the layers: an op is opaque to ``torch.compile``, and nothing is compiled for
    those who never multiply on that device.
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


for _schema, _reference, _fake in _OPS:
    _name = _schema.split("(")[0]
    _LIBRARY.define(_schema)
    _LIBRARY.impl(_name, _loading(_name, _reference), "CompositeExplicitAutograd")
    torch.library.register_fake(f"dtq::{_name}", _fake, lib=_LIBRARY)
    if any(_name in library.ops for library in LIBRARIES.values()):
        _REFERENCE.define(_schema)
        _REFERENCE.impl(_name, _reference, "CompositeExplicitAutograd")
