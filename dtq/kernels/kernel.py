# SPDX-License-Identifier: Apache-2.0
"""What a kernel is: the problem it is given, what it returns, and what kernels have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dtq.formats import Format, PackedTensors
from dtq.formats.activations import ActivationFormat

ops = torch.ops.dtq


@dataclass(frozen=True)
class LinearProblem:
    """What a layer asks of a kernel: formats, and the rotation of its input.

    Attributes:
        weight_format: how the weight is stored.
        activation_format: how the input is quantized.
        hadamard_block: channels of a Hadamard block; 1: no rotation.
        num_rotations: block rotations, see :func:`dtq.linalg.hadamard.rotate`.
    """

    weight_format: Format
    activation_format: ActivationFormat
    hadamard_block: int = 1
    num_rotations: int = 1


@dataclass(frozen=True)
class Epilogue:
    """What a kernel applies after the bias and before it rounds the output.

    Attributes:
        gelu: GELU, tanh form.
        branch: the input times the first factor of a low-rank branch, (M, R), and the second
            factor (N, R); their product is added before GELU. None for no branch.
    """

    gelu: bool = False
    branch: tuple[Tensor, Tensor] | None = None

    def args(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """Arguments of an op after the bias, for an output in ``dtype``; no gate, no residual."""
        return (self.gelu, None, None, dtype, *(self.branch or ()))


KernelFunction = Callable[[LinearProblem, Tensor, PackedTensors, Tensor | None], Tensor]
"""``(problem, x (M, K), tensors, bias (N,)) -> (M, N)`` in the dtype of x.

``tensors`` are the packed tensors of the layer, by name, with on-disk dtypes. ``input_scale`` is
the one of the current timestep bin.
"""

EpilogueFunction = Callable[
    [LinearProblem, Tensor, PackedTensors, Tensor | None, Epilogue], Tensor | None
]
"""Likewise, with an epilogue before the output is rounded; None where it cannot be applied."""


@dataclass(frozen=True)
class Kernel:
    """A row of the table.

    Attributes:
        name: as ``dtq inspect`` shows it.
        unsupported_reason: returns why it does not support a problem, None if it does.
        call: computes the output.
        ops: the ops that it calls; it runs compiled where a library has them all.
        with_epilogue: computes the output with an epilogue; returns None where it does not run its
            own GEMM.
        on_gpu: name of the row that runs on a GPU instead, if this one has no kernel there.
        expand: returns the int8 weight (N, K) of the GEMM, and its scale per channel (N, 1).
        by_shape: returns what it does on a GPU for a weight (N, K), in words.
    """

    name: str
    unsupported_reason: Callable[[LinearProblem], str | None]
    call: KernelFunction
    ops: tuple[str, ...] = ()
    with_epilogue: EpilogueFunction | None = None
    on_gpu: str = ""
    expand: Callable[[LinearProblem, PackedTensors], tuple[Tensor, Tensor]] | None = None
    by_shape: Callable[[LinearProblem, tuple[int, int]], str] | None = None


def transform_args(
    problem: LinearProblem, tensors: PackedTensors
) -> tuple[Tensor | None, Tensor | None, int, int]:
    """The input transform as ops take it: pre_scale, perm, hadamard_block, num_rotations."""
    scale, perm = (tensors.get(name) for name in ("pre_quant_scale", "pre_quant_perm"))
    return (
        None if scale is None else scale.reshape(-1),
        None if perm is None else perm.reshape(-1),
        problem.hadamard_block,
        problem.num_rotations,
    )


def transformed(problem: LinearProblem, x: Tensor, tensors: PackedTensors) -> Tensor:
    """The transformed input (M, K), in the dtype of ``x``."""
    if "pre_quant_scale" not in tensors and problem.hadamard_block == 1:
        return x
    return ops.transform_rows(x, *transform_args(problem, tensors)).to(x.dtype)


def quantized(problem: LinearProblem, x: Tensor, tensors: PackedTensors) -> tuple[Tensor, Tensor]:
    """The transformed input as int8 (M, K), and its row scales (M,)."""
    activations, transform = problem.activation_format, transform_args(problem, tensors)
    pre_scale, perm, block, num_rotations = transform
    scale, qmax = tensors.get("input_scale"), activations.qmax
    if not activations.integer:
        return ops.e2m1_quantize_rows(x, *transform)
    if perm is None and num_rotations == 1:
        return ops.quantize_rows(x, pre_scale, block, scale, qmax)
    return ops.binned_quantize_rows(x, *transform, scale, None, qmax)


def packed_weight(
    problem: LinearProblem, tensors: PackedTensors
) -> tuple[list[Tensor], list[str], str]:
    """The packed weight as ops take it: tensors, their names, the format."""
    names = [name for name in tensors if name.startswith("weight")]
    return [tensors[name] for name in names], names, problem.weight_format.name
