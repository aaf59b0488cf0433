# SPDX-License-Identifier: Apache-2.0
"""Products large enough for the kernels of large tiles, against float64 on the same device.

``agreement.py`` has random small sizes, which reach small tiles alone. ``CASES`` x ``SIZES`` reach
``wgmma 256x128`` and ``128x128`` on sm_90, ``mma 128x128`` elsewhere and ``fp4 128x128`` on sm_120,
with many steps of K and with incomplete tiles; :func:`missing` says what they do not reach.

Integer sums are exact in float64, so outputs must have the bits of the reference. Exceptions: GELU,
low-rank branches and FP4, whose bound is given in :func:`_difference`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from agreement import GELU_ERROR, few_tokens_bound
from torch import Tensor

from dtq.formats import FORMATS
from dtq.formats.integer import TwoLevelInt
from dtq.kernels.ops_fp4 import _decoded
from dtq.kernels.ops_gemm import expand_table
from dtq.kernels.ops_quantize import gelu

SIZES = (
    (1024, 3072, 3072), (1111, 3080, 1184), (4096, 1152, 3072), (124, 12288, 1152), (257, 12288, 96),
)  # fmt: skip
"""(M, N, K): whole tiles, tails in every direction, more tiles than multiprocessors, fewer tokens
than a tile of 128, few steps of K."""

NameOf = Callable[[int, int, int, int], str]
"""The name of the kernel for M, N, K and a group: ``dtq_cuda_gemm`` for a device."""


@dataclass(frozen=True)
class Case:
    """A kind of weight, and what follows the product.

    Attributes:
        weights: ``int8``, ``two-level``, ``table``, ``nvfp4`` or ``mxfp4``.
        group: columns of a group of 4-bit weights; 0: the whole row.
        dtype: of the output.
        gelu: whether GELU follows.
        images: how many rows the gate has; 0: no gate and no residual.
        rank: of a low-rank branch; 0: none.
    """

    weights: str
    group: int = 0
    dtype: torch.dtype = torch.bfloat16
    gelu: bool = False
    images: int = 0
    rank: int = 0

    @property
    def name(self) -> str:
        """As reports show it."""
        after = [name for name, used in
                 (("GELU", self.gelu), ("gate", self.images), ("branch", self.rank)) if used]  # fmt: skip
        group = f"g{self.group}" if self.group else "row"
        kind = f"{self.weights} {group}" if self.weights in ("two-level", "table") else self.weights
        return " + ".join([f"{kind} to {str(self.dtype)[6:]}", *after])

    @property
    def fp4(self) -> bool:
        """Whether it needs the FP4 products of compute capability 12."""
        return self.weights.endswith("fp4")

    def fits(self, m: int, n: int, k: int) -> bool:
        """Whether K has whole groups, and M whole images."""
        step = {"nvfp4": 64, "mxfp4": 128}.get(self.weights, self.group or 32)
        return k % step == 0 and (not self.images or m % self.images == 0)

    def group_of(self, k: int) -> int:
        """The group as ``dtq_cuda_gemm`` takes it: 0 for int8, negative for FP4."""
        if self.fp4:
            return -16 if self.weights == "nvfp4" else -32
        return 0 if self.weights == "int8" else self.group or k


CASES = (
    Case("int8"), Case("int8", dtype=torch.float32), Case("int8", dtype=torch.float16),
    Case("two-level", 32), Case("two-level", 64), Case("two-level", 128), Case("two-level"),
    Case("two-level", 32, torch.float32),
    Case("table", 32), Case("table", 64), Case("table"),
    Case("int8", gelu=True), Case("int8", images=1), Case("int8", images=4, dtype=torch.float16),
    Case("two-level", 32, gelu=True), Case("two-level", 64, images=2), Case("two-level", images=1),
    Case("int8", rank=32), Case("two-level", 32, torch.float32, True, 1, 16),
)  # fmt: skip
FP4 = (
    Case("nvfp4"), Case("mxfp4"), Case("nvfp4", dtype=torch.float32, rank=32), Case("mxfp4", gelu=True),
)  # fmt: skip
"""For compute capability 12."""


def cases_for(capability: tuple[int, int]) -> tuple[Case, ...]:
    """The cases that a GPU has kernels for."""
    return (*CASES, *FP4) if capability[0] == 12 else CASES


def missing(capability: tuple[int, int], name_of: NameOf) -> list[str]:
    """What the sizes do not reach on a GPU: kernels of large tiles with at least 8 steps of K."""
    gaps = []
    for case in cases_for(capability):
        wanted = {"mma 128x128"} if capability != (9, 0) else {"wgmma 256x128", "wgmma 128x128"}
        wanted = {"fp4 128x128"} if case.fp4 else wanted
        fitting = [size for size in SIZES if case.fits(*size) and size[2] >= 1024]
        found = " | ".join(name_of(*size, case.group_of(size[2])) for size in fitting)
        gaps += [f"{case.name}: {kernel}" for kernel in sorted(wanted) if kernel not in found]
    return gaps


# -------------------------------------------------------------------------------------- operands


class _Random:
    """Random operands on a device."""

    def __init__(self, device: torch.device | str, seed: int) -> None:
        self.g = torch.Generator(device).manual_seed(seed)
        self.device = torch.device(device)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.g, device=self.device)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int8) -> Tensor:
        """From low to high, both included."""
        drawn = torch.randint(low, high + 1, shape, generator=self.g, device=self.device)
        return drawn.to(dtype)

    def groups(self, n: int, count: int) -> Tensor:
        """Bytes of groups whose expanded weights are int8: scale2 - 1 and zero."""
        zero, scale2 = self.integers(0, 15, n, count).int(), self.integers(1, 16, n, count).int()
        fits = (scale2 * zero <= 128) & (scale2 * (15 - zero) <= 127)
        scale2 = torch.where(fits, scale2, 1)
        return (zero | (scale2 - 1) << 4).to(torch.uint8).view(torch.int8)

    def block_scales(self, mx: bool, *shape: int) -> Tensor:
        """Near 1: exponents, or e4m3 from 2^-3 to 2^3."""
        if mx:
            return self.integers(124, 130, *shape, dtype=torch.uint8)
        return self.integers(32, 80, *shape, dtype=torch.uint8).view(torch.float8_e4m3fn)


@dataclass
class _Problem:
    """Arguments of an op in order, and the product in float64."""

    op: str
    given: list[Any]
    exact: Tensor


def _problem(case: Case, m: int, n: int, k: int, r: _Random) -> _Problem:
    rows = r.normal(m).abs() * 0.02 / k**0.5  # outputs of a few units: where GELU is not linear
    if case.fp4:
        mx, group = case.weights == "mxfp4", 32 if case.weights == "mxfp4" else 16
        x, w = r.integers(-128, 127, m, k // 2), r.integers(-128, 127, n, k // 2)
        x_scale, w_scale = (r.block_scales(mx, size, k // group) for size in (m, n))
        exact = _decoded(x, x_scale).double() @ _decoded(w, w_scale).double().T
        outer = None if mx else r.normal(1, 1).abs()
        given = [x, rows, w, w_scale, x_scale, outer]
        return _Problem("fp4_linear", given, exact if outer is None else exact * outer.double())
    x, scale = r.integers(-128, 127, m, k), r.normal(n, 1).abs()
    if case.weights == "int8":
        weight = r.integers(-128, 127, n, k)
        return _Problem("w8a8_linear", [x, rows, weight, scale], _sums(x, weight))
    packed, count = r.integers(-128, 127, n, k // 2), k // (case.group or k)
    if case.weights == "table":
        tables = r.integers(-128, 127, n, count, 16)
        exact = _sums(x, expand_table(packed, tables))
        return _Problem("lut4a8_linear", [x, rows, packed, scale, tables], exact)
    groups = r.groups(n, count)
    exact = _sums(x, TwoLevelInt.expand(packed, groups))
    return _Problem("w4a8_linear", [x, rows, packed, scale, groups], exact)


def _sums(x: Tensor, weight: Tensor) -> Tensor:
    """Exact in any order: below 2^53."""
    return x.double() @ weight.double().T


# ------------------------------------------------------------------------------------ comparison


def run(
    ops: Any, device: torch.device | str, case: Case, size: tuple[int, int, int], seed: int = 0
) -> None:
    """Run a case.

    Raises:
        AssertionError: the output is wrong; the message has the number of wrong values.
    """
    m, n, k = size
    r = _Random(device, seed)
    problem = _problem(case, m, n, k, r)
    bias = r.normal(n).to(case.dtype)
    gate = residual = low = up = None
    if case.images:
        gate, residual = (r.normal(rows, n).to(case.dtype) for rows in (case.images, m))
    if case.rank:
        low, up = (r.normal(rows, case.rank).bfloat16() for rows in (m, n))
    epilogue = (
        [case.gelu, gate, residual] if case.gelu or case.images or case.rank or case.fp4 else []
    )
    op = (
        problem.op.replace("_linear", "_epilogue_linear")
        if epilogue and not case.fp4
        else problem.op
    )
    factors = [low, up] if epilogue else []
    got = getattr(ops, op)(*problem.given, bias, *epilogue, case.dtype, *factors)
    wrong = _difference(case, problem, bias, gate, residual, low, up, got)
    count = int(wrong.sum())
    first = wrong.nonzero()[0].tolist() if count else None
    assert not count, f"{count} of {wrong.numel()} differ, first at {first}"


def _difference(
    case: Case, problem: _Problem, bias: Tensor, gate: Tensor | None, residual: Tensor | None,
    low: Tensor | None, up: Tensor | None, got: Tensor,
) -> Tensor:  # fmt: skip
    """Where the output is wrong: other bits, or where sums or GELU may differ, too far away.

    FP4 sums and branches may have any order; GELU may have an error, whose value may lie on the
    other side of a tie.
    """
    rows, weight_scale = problem.given[1], problem.given[3]
    y = problem.exact.float() * rows.unsqueeze(1)
    if not case.fp4:
        y = y * weight_scale.T
    y = y + bias.float()
    if low is not None and up is not None:
        y = (y.double() + low.double() @ up.double().T).float()
    slack = torch.zeros_like(y)
    if case.fp4 or case.rank:
        slack = 1e-4 * (1 + y.abs())
    if case.gelu:
        y = gelu(y)
        slack = 2 * slack + GELU_ERROR * y.abs() + 1e-7
    if gate is not None and residual is not None:
        gate = gate.float().repeat_interleave(len(y) // len(gate), 0)
        y, slack = gate * y + residual.float(), gate.abs() * slack
    want = y.to(case.dtype)
    if not slack.any():
        return got != want
    slack = slack + torch.finfo(case.dtype).eps * y.abs()
    return ~((got.float() - y).abs() <= slack)


# ----------------------------------------------------------------------------------- weight-only

WEIGHT_FORMATS = (
    "int4-g64",
    "int4-asym-g64",
    "int8-g64",
    "int8-row",
    "nf4-g64",
    "nvfp4",
    "int3-g64",
    "trit-row",
)
WEIGHT_SIZES = ((1, 18432, 3072), (4, 6912, 1152), (16, 3072, 12288))
"""(M, N, K) of modulation layers, and of few tokens."""


def weight_only(
    ops: Any, device: torch.device | str, name: str, size: tuple[int, int, int]
) -> None:
    """Multiply a float input with a packed weight.

    Raises:
        AssertionError: an output is farther from float64 than ``few_tokens_bound``.
    """
    m, n, k = size
    r, fmt = _Random(device, 0), FORMATS[name]
    w = r.normal(n, k) * 0.1
    parts = fmt.pack(w, fmt.compute_qparams(w))
    stored = (list(parts.values()), list(parts), name)
    for dtype in (torch.bfloat16, torch.float16):
        x, bias = r.normal(m, k).to(dtype), r.normal(n).to(dtype)
        exact = torch.ops.dtq_reference.dequantize(*stored, k, dtype).double()
        want = x.double() @ exact.T + bias.double()
        error = (ops.weight_linear(x, *stored, bias).double() - want).abs()
        wrong = ~(error <= few_tokens_bound(x, exact, want))
        assert not wrong.any(), f"{dtype}: {int(wrong.sum())} of {wrong.numel()} are too far away"
