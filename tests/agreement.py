# SPDX-License-Identifier: Apache-2.0
"""Compiled ops compared with the torch reference, on a GPU or on the emulator.

Each check of ``CHECKS`` takes the ops, the device, a seed and an upper limit of the problem size.
It raises AssertionError with the sizes of the operands. References are computed on the CPU. The
checks are plain functions, so that they also run on a machine without pytest.
"""

from __future__ import annotations

import random as dice
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from dtq.formats import FORMATS
from dtq.formats.activations import ACTIVATION_FORMATS
from dtq.kernels.compile import format_codes

reference = torch.ops.dtq_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = (1, 2, 15, 16, 17, 31, 33, 64, 127, 128, 129, 200, 257)
COLUMNS = (64, 96, 128, 192, 256, 320, 1152, 3072)
OUTPUTS = (1, 7, 16, 33, 64, 72, 127, 128, 130, 256, 1152)


class Size:
    """Random sizes whose product stays below a limit, from lists of awkward ones."""

    def __init__(self, seed: int, limit: int) -> None:
        self.dice, self.limit = dice.Random(seed), limit

    def rows(self) -> tuple[int, int]:
        """(M, K)"""
        return self._below(ROWS, COLUMNS)

    def product(self) -> tuple[int, int, int]:
        """(M, N, K)"""
        return self._below(ROWS, OUTPUTS, COLUMNS)

    def _below(self, *lists: tuple[int, ...]) -> Any:
        while True:
            found = tuple(self.dice.choice(each) for each in lists)
            total = 1
            for one in found:
                total *= one
            if total <= self.limit:
                return found


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def int8(*shape: int, seed: int = 0, low: int = -127) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(low, 128, shape, dtype=torch.int8, generator=g)


def agree(
    op: Any, check: Callable[..., Any], args: tuple[Any, ...], device: Any, what: str
) -> None:
    """Assert that the op on the device gives the bits of the reference on the CPU."""

    def there(value: Any) -> Any:
        if isinstance(value, list):
            return [there(v) for v in value]
        return value.to(device) if isinstance(value, torch.Tensor) else value

    got, want = op(*map(there, args)), check(*args)
    if isinstance(want, torch.Tensor):
        got, want = (got,), (want,)
    for a, b in zip(got, want, strict=True):
        a = a.cpu()
        assert (a.dtype, a.shape) == (b.dtype, b.shape), f"{what}: {a.dtype} {tuple(a.shape)}"
        differ = ~((a == b) | (a.isnan() & b.isnan())) if a.is_floating_point() else a != b
        count = int(differ.sum())
        assert not count, (
            f"{what}: {count} of {a.numel()} differ, first at {differ.nonzero()[0].tolist()}"
        )


def quantize_rows(ops: Any, device: Any, seed: int, limit: int) -> None:
    size = Size(seed, limit)
    (m, k), d = size.rows(), size.dice
    block = d.choice([b for b in (1, 2, 16, 32, 64, 128, 256) if k % b == 0])
    dtype, levels = d.choice(DTYPES), d.choice((127, 31, 7))
    x = (normal(m, k, seed=seed) * 3).to(dtype)
    x[0] = 0
    pre = d.choice((None, (torch.rand(k) - 0.5).to(torch.bfloat16)))
    scale = d.choice((None, torch.tensor([0.02])))
    what = f"quantize_rows M {m} K {k} block {block} {dtype} levels {levels} scale {scale} pre {pre is not None}"
    agree(ops.quantize_rows, reference.quantize_rows, (x, pre, block, scale, levels), device, what)


def transform_rows(ops: Any, device: Any, seed: int, limit: int) -> None:
    size = Size(seed, limit)
    (m, k), d = size.rows(), size.dice
    block, num_rotations = d.choice([b for b in (1, 16, 32, 64) if k % b == 0]), d.choice((1, 2))
    num_rotations = num_rotations if block > 1 and (k // block) >= 1 else 1
    order = d.choice((None, torch.randperm(k, dtype=torch.int32)))
    x = normal(m, k, seed=seed).to(d.choice(DTYPES))
    args = (x, (torch.rand(k) + 0.5).to(torch.bfloat16), order, block, num_rotations)
    what = f"transform_rows M {m} K {k} block {block} num_rotations {num_rotations} order {order is not None}"
    agree(ops.transform_rows, reference.transform_rows, args, device, what)


def fused_rows(ops: Any, device: Any, seed: int, limit: int) -> None:
    size = Size(seed, limit)
    (m, k), d = size.rows(), size.dice
    block, dtype = d.choice([b for b in (1, 64) if k % b == 0]), d.choice(DTYPES)
    x = normal(m, k, seed=seed).to(dtype)
    images = d.choice([i for i in (1, 2, 4, m) if m % i == 0])
    up, along = (normal(images, k, seed=seed + i).to(dtype) * 0.1 for i in (1, 2))
    change = ((torch.rand(k) + 0.5).to(torch.bfloat16), None, block, 1)
    table, place = torch.rand(5) / 10, torch.tensor([d.randrange(5)])
    grid = d.choice(((None, None, 127), (table, place, 127)))
    what = f"M {m} K {k} block {block} {dtype} images {images} binned {grid[0] is not None}"
    args = (x, up, along, 1e-6, *change, *grid)
    agree(ops.norm_quantize_rows, reference.norm_quantize_rows, args, device, f"norm {what}")
    args = (x, *change, *grid)
    agree(ops.gelu_quantize_rows, reference.gelu_quantize_rows, args, device, f"gelu {what}")
    agree(ops.binned_quantize_rows, reference.binned_quantize_rows, args, device, f"binned {what}")
    agree(
        ops.e2m1_quantize_rows,
        reference.e2m1_quantize_rows,
        (x, *change),
        device,
        f"e2m1 {what}",
    )
    if torch.device(device).type == "cuda":  # e4m3 tensors are compared as bytes
        codes, _ = ops.e4m3_quantize_rows(x.to(device), *(_to(c, device) for c in change))
        want, _ = reference.e4m3_quantize_rows(x, *change)
        assert torch.equal(codes.cpu().view(torch.uint8), want.view(torch.uint8)), f"e4m3 {what}"


def _to(value: Any, device: Any) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def w8a8(ops: Any, device: Any, seed: int, limit: int) -> None:
    size = Size(seed, limit)
    (m, n, k), d = size.product(), size.dice
    k += d.choice((0, 0, 0, 1, 8))  # also rows that are no multiple of 16 bytes
    dtype = d.choice(DTYPES)
    bias = d.choice((None, normal(n, seed=3).to(d.choice(DTYPES))))
    args = (
        int8(m, k, seed=seed), normal(m, seed=1).abs(), int8(n, k, seed=seed + 1),
        normal(n, 1, seed=2).abs(), bias, dtype,
    )  # fmt: skip
    agree(ops.w8a8_linear, reference.w8a8_linear, args, device, f"w8a8 M {m} N {n} K {k} {dtype}")


def w4a8(ops: Any, device: Any, seed: int, limit: int) -> None:
    size = Size(seed, limit)
    (m, n, k), d = size.product(), size.dice
    group = d.choice([*(g for g in (32, 64, 128) if k % g == 0), "row"])
    name = "int4-asym-row" if group == "row" else f"int4-2l-g{group}"
    fmt, dtype, w = FORMATS[name], d.choice(DTYPES), normal(n, k, seed=seed)
    p = fmt.pack(w, fmt.compute_qparams(w))
    # one zero per row is the byte of a group as wide as the row, whose scale2 is 1
    groups = p["weight_zero_point"] if group == "row" else p["weight_scale_2"]
    args = (
        int8(m, k, seed=seed), normal(m, seed=1).abs(), p["weight"], p["weight_scale"],
        groups, d.choice((None, normal(n, seed=3).to(dtype))), dtype,
    )  # fmt: skip
    what = f"w4a8 M {m} N {n} K {k} group {group} {dtype}"
    agree(ops.w4a8_linear, reference.w4a8_linear, args, device, what)


def w3a8(ops: Any, device: Any, seed: int, limit: int) -> None:
    size = Size(seed, limit)
    (m, n, k), d = size.product(), size.dice
    name = d.choice(("int3-2l-g64", "int3-row") if k % 64 == 0 else ("int3-row",))
    fmt, dtype, w = FORMATS[name], d.choice(DTYPES), normal(n, k, seed=seed)
    p = fmt.pack(w, fmt.compute_qparams(w))
    groups = p.get("weight_scale_2")
    if groups is None:  # the offset of symmetric 3-bit codes
        groups = torch.full((n, 1), 4, dtype=torch.int8)
    args = (
        int8(m, k, seed=seed), normal(m, seed=1).abs(), p["weight"], p["weight_scale"],
        groups, d.choice((None, normal(n, seed=3).to(dtype))), dtype,
    )  # fmt: skip
    what = f"w3a8 {name} M {m} N {n} K {k} {dtype}"
    agree(ops.w3a8_linear, reference.w3a8_linear, args, device, what)


GELU_ERROR = 2.0**-16
"""Relative error of the GELU in the epilogues of the CUDA kernels (docs/kernels.md)."""


def near_gelu(got: torch.Tensor, want: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    """Which outputs with a GELU are right: its error, and one step of their dtype.

    A value near the middle of two numbers of the dtype may be rounded to either.
    """
    a, b = got.cpu().double(), want.double()
    term = b.abs() if residual is None else b.abs() + residual.double().abs()
    kind = torch.finfo(want.dtype)
    step = kind.eps * b.abs() + kind.smallest_normal * kind.eps
    return ((a - b).abs() <= GELU_ERROR * term + step) | (a.isnan() & b.isnan())


def epilogues(ops: Any, device: Any, seed: int, limit: int) -> None:
    size = Size(seed, limit)
    (m, n, k), d = size.product(), size.dice
    group, dtype = d.choice([g for g in (32, 64, 128) if k % g == 0]), d.choice(DTYPES)
    fmt, w = FORMATS[f"int4-2l-g{group}"], normal(n, k, seed=seed)
    p = fmt.pack(w, fmt.compute_qparams(w))
    # sums of a few units: where GELU is not linear
    rows = normal(m, seed=1).abs() * 0.02 / k**0.5
    given = int8(m, k, seed=seed), rows, p["weight"], p["weight_scale"]
    bias = d.choice((None, normal(n, seed=3).to(dtype)))
    images = d.choice([i for i in (1, 2, 4, m) if m % i == 0])
    both = normal(images, n, seed=4).to(dtype), normal(m, n, seed=5).to(dtype)
    gate = d.choice(((None, None), both))
    then = (bias, d.choice((False, True)), *gate, dtype)
    what = f"M {m} N {n} K {k} {dtype} gelu {then[1]} gate {gate[0] is not None} images {images}"
    four, eight = ops.w4a8_epilogue_linear, ops.w8a8_epilogue_linear

    def check(op: Any, against: Any, args: tuple[Any, ...], name: str) -> None:
        if not then[1]:
            agree(op, against, args, device, f"{name} {what}")
            return
        there = [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]
        right = near_gelu(op(*there), against(*args), gate[1])
        assert right.all(), f"{name} {what}: {int((~right).sum())} of {right.numel()} differ"

    args = (*given, p["weight_scale_2"], *then)
    check(four, reference.w4a8_epilogue_linear, args, "w4a8")
    args = (*given[:2], int8(n, k, seed=6), *given[3:], *then)
    check(eight, reference.w8a8_epilogue_linear, args, "w8a8")
    tables = int8(n, d.choice((1, k // group)), 16, seed=7, low=-128)
    args = (*given, tables, bias, dtype)
    agree(ops.lut4a8_linear, reference.lut4a8_linear, args, device, f"lut4a8 {what}")


def branches(ops: Any, device: Any, seed: int, limit: int) -> None:
    """Low-rank branches are near the reference: devices sum their float products in any order."""
    size = Size(seed, limit)
    (m, n, k), d = size.product(), size.dice
    group, half, rank = d.choice([g for g in (32, 64) if k % g == 0]), d.choice(DTYPES[1:]), 16
    rank *= d.choice((1, 2, 3, 8))
    low, up = normal(m, rank, seed=1).to(half), normal(n, rank, seed=2).to(half) / rank**0.5
    given = int8(m, k, seed=seed), torch.full((m,), 0.02 / k**0.5)
    then = normal(n, seed=3), d.choice((False, True)), None, None, torch.float32
    for name, fmt in (("w8a8", FORMATS["int8-row"]), ("w4a8", FORMATS[f"int4-2l-g{group}"])):
        w = normal(n, k, seed=seed)
        args = (*given, *fmt.pack(w, fmt.compute_qparams(w)).values(), *then)
        op, check = (getattr(o, f"{name}_epilogue_linear") for o in (ops, reference))
        there = [a.to(device) if isinstance(a, torch.Tensor) else a for a in (*args, low, up)]
        got, want = op(*there).cpu(), check(*args, low, up)
        far = (got - want).abs() > 1e-4 + 1e-4 * want.abs()
        what = f"{name} M {m} N {n} K {k} rank {rank} {half} gelu {then[1]}"
        assert not far.any(), f"{what}: {int(far.sum())} of {far.numel()} differ"
        assert not torch.allclose(want, check(*args), atol=1e-3), (
            f"{what}: the branch has no effect"
        )


def fp4_rows(ops: Any, device: Any, seed: int, limit: int) -> None:
    size = Size(seed, limit)
    (m, k), d = size.rows(), size.dice
    mx = d.choice((False, True))
    block, num_rotations = (
        d.choice([b for b in (1, 16, 32, 64, 128) if k % b == 0]),
        d.choice((1, 2)),
    )
    x = (normal(m, k, seed=seed) * 10 ** normal(m, 1, seed=1)).to(d.choice(DTYPES))
    x[0, 32:64] = 0
    x[-1, :] *= 0
    pre = d.choice((None, (torch.rand(k) + 0.5).to(torch.bfloat16)))
    order = d.choice((None, torch.randperm(k, dtype=torch.int32)))
    args = (x, pre, order, block, num_rotations if block > 1 else 1, mx)
    what = f"fp4_quantize_rows M {m} K {k} mx {mx} block {block} num_rotations {args[4]} order {order is not None}"

    def bytes_of(found: Any) -> tuple[torch.Tensor, ...]:
        codes, scales, row = found
        return codes.cpu(), scales.cpu().view(torch.uint8), row.cpu()

    want = bytes_of(reference.fp4_quantize_rows(*args))
    agree(lambda *a: bytes_of(ops.fp4_quantize_rows(*a)), lambda *a: want, args, device, what)


def rounded(ops: Any, device: Any, seed: int, limit: int) -> None:
    size = Size(seed, limit)
    d = size.dice
    activations = d.choice(
        [name for name, a in ACTIVATION_FORMATS.items() if a.block_format and not a.int8] + ["none"]
    )
    m, k = d.choice(ROWS), d.choice((128, 256, 1152, 3072))
    m = max(1, min(m, limit // k))
    block = d.choice((1, 32, 128))
    x = (normal(m, k, seed=seed) * 10 ** normal(m, 1, seed=1)).to(d.choice(DTYPES))
    x[-1, :64] = 0
    change = (
        d.choice((None, (torch.rand(k) + 0.5).to(torch.bfloat16))),
        d.choice((None, torch.randperm(k, dtype=torch.int32))),
        block, d.choice((1, 2)) if block > 1 else 1,
    )  # fmt: skip
    args = (x, *change, activations, d.choice(DTYPES[:2]))
    what = f"round_rows {activations} M {m} K {k} block {block} num_rotations {change[3]} {x.dtype} to {args[-1]}"
    agree(ops.round_rows, reference.round_rows, args, device, what)


def fp4_product(ops: Any, device: Any, seed: int, limit: int) -> None:
    """FP4 products are near the reference: devices sum in any order."""
    size = Size(seed, limit)
    (m, n, _), d = size.product(), size.dice
    name = d.choice(("nvfp4", "nvfp4-46", "mxfp4"))
    k = d.choice((128, 384, 1152) if name == "mxfp4" else (64, 192, 320, 1152))
    fmt, w = FORMATS[name], normal(n, k, seed=seed) / k**0.5
    p = fmt.pack(w, fmt.compute_qparams(w))
    x = normal(m, k, seed=seed + 1)
    codes = reference.fp4_quantize_rows(x, None, None, 1, 1, name == "mxfp4")
    half, dtype = d.choice(DTYPES[1:]), torch.float32
    branch = d.choice(
        ((None, None), (normal(m, 32, seed=2).to(half), normal(n, 32, seed=3).to(half)))
    )
    gate = d.choice(((None, None), (normal(1, n, seed=4), normal(m, n, seed=5))))
    bias, gelu = d.choice((None, normal(n, seed=6))), d.choice((False, True))
    args = (
        codes[0], codes[2], p["weight"], p["weight_scale"], codes[1], p.get("weight_scale_2"), bias,
        gelu, *gate, dtype, *branch,
    )  # fmt: skip
    there = [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]
    got, want = ops.fp4_linear(*there).cpu(), reference.fp4_linear(*args)
    far = ~((got - want).abs() <= 1e-4 + 1e-4 * want.abs())
    what = f"fp4_linear {name} M {m} N {n} K {k} gelu {gelu} branch {branch[0] is not None}"
    assert not far.any(), f"{what}: {int(far.sum())} of {far.numel()} differ"
    assert want.abs().mean() > 0.05, f"{what}: the output is near zero"


def few_tokens_bound(x: torch.Tensor, w: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """Error that products of few tokens may have: that of the sum, half a unit of the output.

    Args:
        x: input, of the dtype of the output.
        w: decoded weight, float64.
        want: exact output, float64.
    """
    slack = F.linear(x.double().abs(), w.abs()) * 2**-22  # cuda_ext/ROWS.md
    kind = torch.finfo(x.dtype)
    return slack + (want.abs() + slack).clamp(min=kind.smallest_normal) * kind.eps / 2


def decoded(ops: Any, device: Any, seed: int, limit: int) -> None:
    d = dice.Random(seed)
    name = d.choice(format_codes.decoded())
    n, k = d.choice((33, 67, 128)), d.choice((256, 384))
    w = normal(n, k, seed=seed) * 0.1
    parts = FORMATS[name].pack(w, FORMATS[name].compute_qparams(w))
    stored = (list(parts.values()), list(parts), name)
    dtype = d.choice(DTYPES)
    agree(ops.dequantize, reference.dequantize, (*stored, k, dtype), device, f"{name} N {n} K {k}")
    m, dtype = d.choice((1, 3, 16)), d.choice(DTYPES[1:])  # float32 has no kernel
    x, bias = normal(m, k, seed=seed + 1).to(dtype), normal(n, seed=2).to(dtype)
    there = [part.to(device) for part in stored[0]]
    got = ops.weight_linear(x.to(device), there, *stored[1:], bias.to(device)).cpu().double()
    exact = reference.dequantize(*stored, k, dtype).double()
    want = F.linear(x.double(), exact, bias.double())
    assert ((got - want).abs() <= few_tokens_bound(x, exact, want)).all(), (
        f"weight_linear {name} M {m} N {n} K {k} {dtype}"
    )


CHECKS = (
    quantize_rows, transform_rows, fused_rows, fp4_rows, rounded, w8a8, w4a8, w3a8, epilogues, branches, decoded,
)  # fmt: skip
"""On every architecture with kernels."""

FP4 = (fp4_product,)
"""For compute capability 12, whose tensor cores multiply FP4."""
