# SPDX-License-Identifier: Apache-2.0
"""The structs of cuda_ext/launch.h and launch_rows.h, and the parameters of the kernels, for ctypes."""

from __future__ import annotations

import ctypes
from typing import Any

POINTER = 0x7F0000000000  # for a kernel that is walked and not run: any address that is not null

i64, i32, u32, f32 = ctypes.c_int64, ctypes.c_int, ctypes.c_uint32, ctypes.c_float
flag, pointer = ctypes.c_bool, ctypes.c_void_p


def _named(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class Gemm(ctypes.Structure):
    """dtq::Gemm."""

    _fields_ = (
        *_named(i64, "tokens rows columns"),
        *_named(pointer, "x_q x_block_scale row_scale"),
        ("weights", i32),
        *_named(pointer, "weight groups codebooks"),
        ("group", i64),
        *_named(pointer, "weight_scale bias"),
        ("bias_type", i32),
        ("out", pointer),
        ("out_type", i32),
        *_named(pointer, "down up"),
        ("rank", i64),
        ("lowrank_type", i32),
        ("gelu", flag),
        ("gate", pointer),
        ("gate_tokens", i64),
        *_named(pointer, "residual workspace"),
        ("workspace_bytes", i64),
        *_named(i32, "arch sms options"),
    )


class GemmArgs(ctypes.Structure):
    """dtq::GemmArgs of epilogue.cuh."""

    _fields_ = (
        ("g", Gemm),
        ("groups", pointer),
        *_named(i32, "count shift splits steps_per_split"),
        ("partial", flag),
    )


class Rows(ctypes.Structure):
    """dtq::Rows."""

    _fields_ = (
        ("x", pointer),
        ("type", i32),
        *_named(i64, "rows columns stride"),
        ("prologue", i32),
        *_named(pointer, "modulate_scale modulate_shift"),
        ("modulate_type", i32),
        *_named(i64, "modulate_stride rows_per_modulate"),
        ("eps", f32),
        *_named(pointer, "pre_scale perm"),
        ("hadamard_block", i64),
        *_named(i32, "num_rotations output qmax"),
        *_named(pointer, "static_scale bin"),
        *_named(i32, "rounding out_type"),
        ("out", pointer),
        ("out_stride", i64),
        ("block_scale", pointer),
        ("width", i64),
        *_named(pointer, "scale sums"),
        ("next_may_start", flag),
    )


class RowPlan(ctypes.Structure):
    """dtq::RowPlan of rows.cuh."""

    _fields_ = (
        ("r", Rows),
        ("hadamard_scale", f32),
        *_named(flag, "aligned_x aligned_modulate aligned_pre aligned_out"),
        ("tiles", i64),
        ("transposed_offset", i32),
        ("inverse_qmax", f32),
        ("modulate_multiplier", u32),
        ("modulate_shift", i32),
        *_named(u32, "x_pitch modulate_pitch out_pitch"),
        ("inverse_columns", f32),
    )


class Weight(ctypes.Structure):
    """dtq::Weight."""

    _fields_ = (
        *_named(i32, "encoding bits"),
        *_named(i64, "rows columns"),
        *_named(pointer, "weight tail"),
        ("scale_type", i32),
        *_named(pointer, "scale scale_2"),
        ("groups", i64),
        ("zero", pointer),
        ("offset", i32),
        *_named(pointer, "group_bytes codebook"),
        ("format_codebook", f32 * 16),
        ("words", pointer),
        ("vector", i32),
    )


class WeightPlan(ctypes.Structure):
    """dtq::WeightPlan of weights.cuh."""

    _fields_ = (
        ("w", Weight),
        ("row_bytes", i64),
        *_named(i32, "group shift"),
        ("aligned", flag),
    )


class SmallM(ctypes.Structure):
    """dtq::SmallM."""

    _fields_ = (
        ("weight", Weight),
        ("x", pointer),
        ("type", i32),
        *_named(i64, "tokens stride"),
        *_named(pointer, "bias y"),
    )


class SmallMPlan(ctypes.Structure):
    """dtq::SmallMPlan of small_m.cuh."""

    _fields_ = (("weight", WeightPlan), ("f", SmallM), ("first", i64), ("aligned_x", flag))
