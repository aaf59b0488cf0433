# SPDX-License-Identifier: Apache-2.0
"""Kernels that decode the weight and multiply in float, and FP4, which some GPUs multiply."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dtq.formats import FORMATS
from dtq.formats.floats import MxFp4, NvFp4
from dtq.kernels import gpu_dispatch
from dtq.kernels.kernel import Epilogue, Kernel, LinearCall, LinearProblem

ops = torch.ops.dtq


def _unsupported_weight(problem: LinearProblem) -> str | None:
    weights = problem.weight_format
    if FORMATS.get(weights.name) is weights:
        return None
    return f"weights are {weights.name}, not of the table of formats"


def _not_weight_only(problem: LinearProblem) -> str | None:
    if problem.activation_format.bits != 16:
        return f"activations are {problem.activation_format.name}, not float"
    return _unsupported_weight(problem)


def _gemm(call: LinearCall) -> Tensor:
    def gemm(rows: Tensor, bias: Tensor | None) -> Tensor:
        return ops.weight_linear(rows, *call.packed_weight(), bias)

    return _with_activations(gemm, call)


def _reference(call: LinearCall) -> Tensor:
    packed = {n: t for n, t in call.tensors.items() if n.startswith("weight")}
    w = call.problem.weight_format.unpack(packed)

    def gemm(rows: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(rows, w.to(rows.dtype), None if bias is None else bias.to(rows.dtype))

    return _with_activations(gemm, call)


def _with_activations(gemm: Callable[[Tensor, Tensor | None], Tensor], call: LinearCall) -> Tensor:
    """The product of a decoded weight with the input, transformed and rounded before.

    ``gemm`` takes rows (M, K) and the bias.
    """
    x, bias, activations = call.x, call.bias, call.problem.activation_format
    if activations.bits == 16:
        return gemm(call.transformed(), bias)
    # bfloat16 holds every quantized value; the transformed input may leave the range of float16
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    if not activations.int8:
        rows = ops.round_rows(x, *call.transform_args(), activations.name, dtype)
        return gemm(rows, bias).to(x.dtype)
    x_q, row_scale = call.quantized()
    y = gemm(x_q.to(dtype), None).float() * row_scale.unsqueeze(1)
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _not_fp4(problem: LinearProblem) -> str | None:
    weights, activations = problem.weight_format, problem.activation_format
    if not isinstance(weights, NvFp4 | MxFp4):
        return f"weights are {weights.name}, not nvfp4 or mxfp4"
    same = "nvfp4" if isinstance(weights, NvFp4) else "mxfp4"
    return None if activations.name == same else f"activations are {activations.name}, not {same}"


def _fp4_gemm(call: LinearCall) -> Tensor:
    y = _fp4_epilogue_gemm(call, Epilogue())
    return _gemm(call) if y is None else y


def _fp4_epilogue_gemm(call: LinearCall, epilogue: Epilogue) -> Tensor | None:
    x, tensors, mx = call.x, call.tensors, isinstance(call.problem.weight_format, MxFp4)
    if not gpu_dispatch.multiplies_fp4(x, mx):
        return None
    x_q, block_scale, row_scale = ops.fp4_quantize_rows(x, *call.transform_args(), mx)
    weight = tensors["weight"], tensors["weight_scale"]
    operands = x_q, row_scale, *weight, block_scale, tensors.get("weight_scale_2"), call.bias
    return ops.fp4_linear(*operands, *epilogue.args(x.dtype))


def _fp4_by_shape(problem: LinearProblem, shape: tuple[int, int]) -> str:
    multiple = gpu_dispatch.FP4_COLUMNS[isinstance(problem.weight_format, MxFp4)]
    if shape[1] % multiple:
        return f"sm_120: no FP4 products, K {shape[1]} is not a multiple of {multiple}"
    return "sm_120: FP4 products; other GPUs decode the weight to float"


def _always(problem: LinearProblem) -> str | None:
    return None


_OPS = "dequantize", "weight_linear"

WEIGHT_ONLY = Kernel("weight-only", _not_weight_only, _gemm, _OPS)
_FP4_OPS = "round_rows", *_OPS
FP4 = Kernel("fp4", _not_fp4, _fp4_gemm, _FP4_OPS, _fp4_epilogue_gemm, by_shape=_fp4_by_shape)
FLOAT_PRODUCT = Kernel("float-product", _unsupported_weight, _gemm, _OPS)
REFERENCE = Kernel("reference", _always, _reference)
