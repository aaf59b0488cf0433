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
from dtq.kernels import gpu_dispatch

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


@dataclass(frozen=True)
class LinearCall:
    """What a kernel is called with.

    Attributes:
        problem: what the layer asks for.
        x: the input (M, K); the output (M, N) has its dtype.
        tensors: the packed tensors of the layer, by name, with on-disk dtypes. ``input_scale`` is
            the one of the current timestep bin.
        bias: (N,).
    """

    problem: LinearProblem
    x: Tensor
    tensors: PackedTensors
    bias: Tensor | None

    def transform_args(self) -> tuple[Tensor | None, Tensor | None, int, int]:
        """The input transform as ops take it: pre_scale, perm, hadamard_block, num_rotations."""
        scale, perm = (self.tensors.get(name) for name in ("pre_quant_scale", "pre_quant_perm"))
        scale = None if scale is None else scale.reshape(-1)
        perm = None if perm is None else perm.reshape(-1)
        return scale, perm, self.problem.hadamard_block, self.problem.num_rotations

    def transformed(self) -> Tensor:
        """The transformed input (M, K), in the dtype of ``x``."""
        if "pre_quant_scale" not in self.tensors and self.problem.hadamard_block == 1:
            return self.x
        if gpu_dispatch.on_gpu(self.x):  # one pass, which rounds to the dtype
            return ops.round_rows(self.x, *self.transform_args(), "none", self.x.dtype)
        return ops.transform_rows(self.x, *self.transform_args()).to(self.x.dtype)

    def quantized(self) -> tuple[Tensor, Tensor]:
        """The transformed input as int8 (M, K), and its row scales (M,)."""
        activations, transform = self.problem.activation_format, self.transform_args()
        pre_scale, perm, block, num_rotations = transform
        scale, qmax = self.tensors.get("input_scale"), activations.qmax
        if not activations.integer:
            return ops.e2m1_quantize_rows(self.x, *transform)
        if perm is None and num_rotations == 1:
            return ops.quantize_rows(self.x, pre_scale, block, scale, qmax)
        return ops.binned_quantize_rows(self.x, *transform, scale, None, qmax)

    def packed_weight(self) -> tuple[list[Tensor], list[str], str]:
        """The packed weight as ops take it: tensors, their names, the format."""
        names = [name for name in self.tensors if name.startswith("weight")]
        return [self.tensors[name] for name in names], names, self.problem.weight_format.name


@dataclass(frozen=True)
class Kernel:
    """A row of the table.

    Attributes:
        name: as ``dtq inspect`` shows it.
        unsupported_reason: returns why it does not support a problem, None if it does.
        gemm: computes the output.
        ops: the ops that it calls; it runs compiled where a library has them all.
        with_epilogue: computes the output, and applies an epilogue before it is rounded; returns
            None where it does not run its own GEMM.
        on_gpu: name of the row that runs on a GPU instead, if this one has no kernel there.
        expand: returns the int8 weight (N, K) of the GEMM, and its scale per channel (N, 1).
        by_shape: returns what it does on a GPU for a weight (N, K), in words.
    """

    name: str
    unsupported_reason: Callable[[LinearProblem], str | None]
    gemm: Callable[[LinearCall], Tensor]
    ops: tuple[str, ...] = ()
    with_epilogue: Callable[[LinearCall, Epilogue], Tensor | None] | None = None
    on_gpu: str = ""
    expand: Callable[[LinearProblem, PackedTensors], tuple[Tensor, Tensor]] | None = None
    by_shape: Callable[[LinearProblem, tuple[int, int]], str] | None = None

    def call(
        self, problem: LinearProblem, x: Tensor, tensors: PackedTensors, bias: Tensor | None
    ) -> Tensor:
        """Compute the output (M, N).

        Args:
            problem: see :class:`LinearCall`.
            x: likewise.
            tensors: likewise.
            bias: likewise.
        """
        return self.gemm(LinearCall(problem, x, tensors, bias))
