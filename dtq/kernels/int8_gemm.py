# SPDX-License-Identifier: Apache-2.0
"""Kernels that multiply int8 activations with integer weights; a GPU may take a float path."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dtq.formats import Format, PackedTensors
from dtq.formats.grid import Grid
from dtq.formats.integer import Int, TwoLevelInt
from dtq.formats.lut import UNITS, Lut
from dtq.formats.lut_two_level import TwoLevelLut
from dtq.kernels import gpu_dispatch
from dtq.kernels.compile import cuda
from dtq.kernels.compile.format_codes import format_code
from dtq.kernels.float_gemm import FLOAT_PRODUCT
from dtq.kernels.kernel import Epilogue, Kernel, LinearCall, LinearProblem
from dtq.kernels.ops_gemm import expand_table

ops = torch.ops.dtq

_Weight = Callable[[LinearProblem, PackedTensors], tuple[Tensor, ...]]
"""Returns the operands of an op from the packed weight up to the bias."""


# -------------------------------------------------------------------------------- weight formats


def _is_int8_row(fmt: Format) -> bool:
    return fmt.name == "int8-row"


def _is_int4_two_level(fmt: Format) -> bool:
    return isinstance(fmt, TwoLevelInt) and fmt.bits == 4


def _is_int4_row(fmt: Format) -> bool:
    return isinstance(fmt, Int) and fmt.bits == 4 and not fmt.group


def _is_int3(fmt: Format) -> bool:
    match fmt:
        case TwoLevelInt(bits=3) | Int(bits=3, group=None):
            return True
    return False


def _is_int8_table(fmt: Format) -> bool:
    if isinstance(fmt, Grid):
        return fmt.group is None and fmt.codebook.bits == 4 and fmt.codebook.integers is not None
    return isinstance(fmt, Lut) and fmt.integers


def _is_two_level_table(fmt: Format) -> bool:
    return isinstance(fmt, TwoLevelLut)


def _is_int4_or_int8(fmt: Format) -> bool:
    return isinstance(fmt, Int) and fmt.bits in (4, 8)


def _unsupported_reason(
    is_supported: Callable[[Format], bool], description: str, problem: LinearProblem
) -> str | None:
    weights, activations = problem.weight_format, problem.activation_format
    if not activations.int8:
        return f"activations are {activations.name}, not int8 or e2m1 with one scale per token"
    return None if is_supported(weights) else f"weights are {weights.name}, not {description}"


def _int8_weight(problem: LinearProblem, tensors: PackedTensors) -> tuple[Tensor, ...]:
    return tensors["weight"], tensors["weight_scale"]


def _two_level_weight(problem: LinearProblem, tensors: PackedTensors) -> tuple[Tensor, ...]:
    """With one scale per row, a group is as wide as the row. Its scale2 is 1, its byte the zero."""
    fmt, scale = problem.weight_format, tensors["weight_scale"]
    if not isinstance(fmt, Int):
        groups = tensors["weight_scale_2"]
    elif fmt.asymmetric:
        groups = tensors["weight_zero_point"]
    else:
        groups = torch.full_like(scale, 2 ** (fmt.bits - 1), dtype=torch.int8)
    return tensors["weight"], scale, groups


def _table_weight(problem: LinearProblem, tensors: PackedTensors) -> tuple[Tensor, ...]:
    weight, scale = tensors["weight"], tensors["weight_scale"]
    if isinstance(problem.weight_format, Grid):
        assert problem.weight_format.codebook.integers is not None
        values, unit = problem.weight_format.codebook.integers
        table = torch.tensor(values, dtype=torch.int8, device=weight.device)
    else:
        unit = 1 / UNITS
        table = (tensors["weight_lut"] * UNITS).to(torch.int8)
    tables = table.reshape(1, 1, 16).expand(len(weight), 1, 16).contiguous()
    return weight, scale * unit, tables  # unit: a power of two


def _expanded_weight(problem: LinearProblem, tensors: PackedTensors) -> tuple[Tensor, ...]:
    """Expanded in every call: there is no packed kernel for e4m3 scales inside a row."""
    fmt = problem.weight_format
    assert isinstance(fmt, TwoLevelLut)
    return fmt.expand(tensors), tensors["weight_scale"]


# ------------------------------------------------------------------------------------- products


def _gemm(op: str, weight: _Weight, call: LinearCall) -> Tensor:
    path = gpu_dispatch.path_for(call.x, len(call.tensors["weight"]))
    if path == "int8":
        operands = *call.quantized(), *weight(call.problem, call.tensors)
        return getattr(ops, op)(*operands, call.bias, call.x.dtype)
    if path == "small_m" and format_code(call.problem.weight_format) is not None:
        return ops.weight_linear(call.transformed(), *call.packed_weight(), call.bias)
    # one product: the transform is in the weight. Without a decoder, weight_linear would decode the
    # whole weight with torch in every call
    return ops.cached_linear(call.x, *call.packed_weight(), *call.transform_args(), call.bias)


def _epilogue_gemm(op: str, weight: _Weight, call: LinearCall, epilogue: Epilogue) -> Tensor | None:
    if gpu_dispatch.path_for(call.x, len(call.tensors["weight"])) != "int8":
        return None
    operands = *call.quantized(), *weight(call.problem, call.tensors)
    return getattr(ops, op)(*operands, call.bias, *epilogue.args(call.x.dtype))


def _expand(
    weight: _Weight, expand: Callable[..., Tensor], problem: LinearProblem, tensors: PackedTensors
) -> tuple[Tensor, Tensor]:
    packed, scale, *groups = weight(problem, tensors)
    return expand(packed, *groups), scale


def _by_shape(problem: LinearProblem, shape: tuple[int, int]) -> str:
    if gpu_dispatch.INT8_ONLY:
        return "int8 at every size: DTQ_CUDA_INT8=1"
    gpus = [(c, name) for c, name in cuda.gpus() if c >= cuda.OLDEST] or [((9, 0), "")]
    packed = format_code(problem.weight_format) is not None
    texts = (
        f"sm_{c[0]}{c[1]}: {gpu_dispatch.explanation(c, *shape, name, packed)}" for c, name in gpus
    )
    return "; ".join(dict.fromkeys(texts))  # once for GPUs of the same kind


def _group_gemm(call: LinearCall) -> Tensor:
    fmt, tensors = call.problem.weight_format, call.tensors
    assert isinstance(fmt, Int)
    if gpu_dispatch.on_gpu(call.x):  # a float scale per 64 channels is slower than bfloat16 there
        return FLOAT_PRODUCT.gemm(call)
    weight = tensors["weight"], tensors["weight_scale"], tensors.get("weight_zero_point")
    return ops.group_a8_linear(*call.quantized(), *weight, fmt.bits, call.bias, call.x.dtype)


# ----------------------------------------------------------------------------------------- rows


def _kernel(
    name: str,
    is_supported: Callable[[Format], bool],
    description: str,  # of the supported formats
    weight: _Weight,
    expand: Callable[..., Tensor],  # the int8 weight (N, K) of the operands, without their scale
    op: str,
    epilogue_op: str = "",
) -> Kernel:
    # partial, not nested functions: layers, which hold a row, are pickled
    return Kernel(
        name,
        partial(_unsupported_reason, is_supported, description),
        partial(_gemm, op, weight),
        ("quantize_rows", op),
        partial(_epilogue_gemm, epilogue_op, weight) if epilogue_op else None,
        expand=partial(_expand, weight, expand),
        by_shape=_by_shape,
    )


def _unchanged(weight: Tensor) -> Tensor:
    return weight


_W8A8 = "w8a8_linear", "w8a8_epilogue_linear"
_W4A8 = "w4a8_linear", "w4a8_epilogue_linear"

W8A8 = _kernel("w8a8", _is_int8_row, "int8-row", _int8_weight, _unchanged, *_W8A8)

W4A8_TWO_LEVEL = _kernel(
    "w4a8-two-level",
    _is_int4_two_level,
    "4-bit two-level",
    _two_level_weight,
    TwoLevelInt.expand,
    *_W4A8,
)
W4A8_ROW = _kernel(
    "w4a8-row",
    _is_int4_row,
    "4-bit integers with one scale per row",
    _two_level_weight,
    TwoLevelInt.expand,
    *_W4A8,
)
W3A8 = _kernel(
    "w3a8",
    _is_int3,
    "3-bit, two-level or with a scale per row",
    _two_level_weight,
    partial(TwoLevelInt.expand, bits=3),
    "w3a8_linear",
)
W4A8_TABLE = _kernel(
    "w4a8-table",
    _is_int8_table,
    "4-bit with a codebook of int8 and one scale per row",
    _table_weight,
    expand_table,
    "lut4a8_linear",
)
W4A8_EXPANDED = _kernel(
    "w4a8-expanded",
    _is_two_level_table,
    "a table of 4 bits that expands to int8",
    _expanded_weight,
    _unchanged,
    *_W8A8,
)
INTEGER_GROUPS = Kernel(
    "integer-groups",
    partial(_unsupported_reason, _is_int4_or_int8, "4- or 8-bit integers"),
    _group_gemm,
    ("quantize_rows", "group_a8_linear"),
    on_gpu=FLOAT_PRODUCT.name,
)
