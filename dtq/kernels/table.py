# SPDX-License-Identifier: Apache-2.0
"""``KERNELS``: who multiplies, in order of preference. The last row always fits.

A kernel is chosen once, when a layer is built, never per call. ``explain`` gives the reason of
every refusal; ``dtq inspect --kernels`` prints them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import dtq.kernels.ops  # noqa: F401  (defines torch.ops.dtq)
from dtq.formats import Format, Parts
from dtq.formats.acts import Acts
from dtq.formats.integer import Int, TwoLevelInt
from dtq.transforms.hadamard import fwht

ops = torch.ops.dtq


@dataclass(frozen=True)
class Task:
    """What a layer asks of a kernel: formats, transform, and its tensors at call time."""

    weights: Format
    acts: Acts
    block: int


Call = Callable[
    [Task, Tensor, Parts, Tensor | None, Tensor | None, Tensor | None], Tensor
]  # (task, x (M, K), parts, pre_scale (K,), act_scale (1,), bias (N,)) -> (M, N) in x's dtype


@dataclass(frozen=True)
class Kernel:
    """A row of the table.

    Attributes:
        name: shown by ``dtq inspect``.
        fits: None when the kernel can do the task, else why not.
        call: does it.
    """

    name: str
    fits: Callable[[Task], str | None]
    call: Call


def _int8_fits(task: Task) -> str | None:
    if task.acts.bits != 8:
        return f"activations are {task.acts.name}, not int8"
    if task.weights.name != "int8-row":
        return f"weights are {task.weights.name}, not int8-row"
    return None


def _int8(
    task: Task,
    x: Tensor,
    parts: Parts,
    pre_scale: Tensor | None,
    act_scale: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    codes, scale = ops.quantize_rows(x, pre_scale, task.block, act_scale)
    y: Tensor = ops.w8a8_linear(codes, scale, parts["weight"], parts["weight_scale"], bias, x.dtype)
    return y


def _two_level_fits(task: Task) -> str | None:
    if task.acts.bits != 8:
        return f"activations are {task.acts.name}, not int8"
    if not isinstance(task.weights, TwoLevelInt):
        return f"weights are {task.weights.name}, not two-level"
    return None


def _two_level(
    task: Task,
    x: Tensor,
    parts: Parts,
    pre_scale: Tensor | None,
    act_scale: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    codes, scale = ops.quantize_rows(x, pre_scale, task.block, act_scale)
    weight = parts["weight"], parts["weight_scale"], parts["weight_scale_2"]
    y: Tensor = ops.w4a8_linear(codes, scale, *weight, bias, x.dtype)
    return y


def _group_fits(task: Task) -> str | None:
    return None if isinstance(task.weights, Int) else f"weights are {task.weights.name}"


def _group(
    task: Task,
    x: Tensor,
    parts: Parts,
    pre_scale: Tensor | None,
    act_scale: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    assert isinstance(task.weights, Int)
    weight = parts["weight"], parts["weight_scale"], parts.get("weight_zero_point")
    bits = task.weights.bits
    if task.acts.bits == 16:
        y: Tensor = ops.group_a16_linear(_changed(x, pre_scale, task.block), *weight, bits, bias)
        return y
    codes, scale = ops.quantize_rows(x, pre_scale, task.block, act_scale)
    y = ops.group_a8_linear(codes, scale, *weight, bits, bias, x.dtype)
    return y


def _always(task: Task) -> str | None:
    return None


def _reference(
    task: Task,
    x: Tensor,
    parts: Parts,
    pre_scale: Tensor | None,
    act_scale: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    w = task.weights.unpack(parts)
    if task.acts.bits == 16:
        bias = None if bias is None else bias.to(x.dtype)
        return F.linear(_changed(x, pre_scale, task.block), w.to(x.dtype), bias)
    codes, scale = ops.quantize_rows(x, pre_scale, task.block, act_scale)
    y = (codes.float() @ w.T) * scale.unsqueeze(1)
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _changed(x: Tensor, pre_scale: Tensor | None, block: int) -> Tensor:
    if pre_scale is None and block == 1:
        return x
    wide = x.float() if pre_scale is None else x.float() * pre_scale.float()
    return fwht(wide, block).to(x.dtype)


KERNELS: tuple[Kernel, ...] = (
    Kernel("w8a8", _int8_fits, _int8),
    Kernel("w4a8-two-level", _two_level_fits, _two_level),
    Kernel("integer-groups", _group_fits, _group),
    Kernel("reference", _always, _reference),
)


def pick(task: Task) -> Kernel:
    """The first kernel of the table that fits."""
    return next(kernel for kernel in KERNELS if kernel.fits(task) is None)


def explain(task: Task) -> list[str]:
    """One line per kernel down to the one that is used, with the reason of each refusal."""
    lines = []
    for kernel in KERNELS:
        reason = kernel.fits(task)
        lines.append(f"{kernel.name}: {'used' if reason is None else reason}")
        if reason is None:
            break
    return lines
