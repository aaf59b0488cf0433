# SPDX-License-Identifier: Apache-2.0
"""Kernels that are not the default yet, as checks of ``tests/gpu.py``: are they right, are they faster.

``dtq_cuda_options`` chooses them (``Options`` of ``cuda_ext/types.h``): persistent blocks of the GEMM
on sm_90, and programmatic dependent launch of a GEMM behind the kernel that quantizes its rows.
docs/kernels.md says how they become the default.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import products
import torch
from gpu_run import Check, Session, Skipped
from torch import Tensor

from dtq.bench.compare import Candidate, compare
from dtq.formats import FORMATS
from dtq.kernels import CUDA

PERSISTENT, DEPENDENT = 1, 2
"""``Options`` of ``cuda_ext/types.h``."""
NAME = "wgmma 256x128, persistent"
CASES = tuple(
    case
    for case in products.CASES
    if case.dtype != torch.float32 and not case.images and not case.rank
)
"""Products that the persistent kernel computes: 16-bit outputs, GELU or nothing after them."""
SIZES = ((4096, 3072, 3072), (2100, 3080, 1184), (4096, 6144, 96))
"""(M, N, K): three tiles of most clusters, tails in every direction, fewer steps than stages."""
SHAPES = ((4096, 3072, 3072), (4096, 3072, 12288), (4096, 12288, 3072))
"""(M, K, N) that are timed: those of T1 and T2."""

dtq = torch.ops.dtq


@contextmanager
def options(library: Any, value: int) -> Iterator[None]:
    """Options of every launch in the block; ``library`` is None for the reference."""
    if library is None:
        yield
        return
    before = library.dtq_cuda_options(value)
    try:
        yield
    finally:
        library.dtq_cuda_options(before)


def library_of(s: Session) -> Any:
    """The library of the GPU; without one there is none, and the reference runs."""
    if not s.cuda:
        return None
    if s.capability[0] != 9:
        raise Skipped("needs compute capability 9")
    assert CUDA.load(), CUDA.describe()
    return CUDA.opened


def persistent(case: products.Case, s: Session) -> str:
    """Products of several tiles for each block, against float64 on the same device."""
    library = library_of(s)
    fitting = [size for size in SIZES if case.fits(*size)]
    with options(library, PERSISTENT):
        for m, n, k in fitting:
            if library is not None:
                sizes = m, n, k, case.group_of(k)
                name = library.dtq_cuda_gemm(90, s.multiprocessors, *sizes).decode()
                assert name == NAME, f"{name} for {m} x {n} x {k}"
            products.run(dtq, s.device, case, (40, 72, 256) if s.small else (m, n, k))
    return f"equal, {len(fitting)} sizes" if s.cuda else "equal, the torch reference on a CPU"


Chain = Callable[[Tensor], Tensor]


def chains(device: torch.device, k: int, n: int, ops: Any = dtq) -> dict[str, Chain]:
    """Rows are quantized and multiplied, by kind of weight."""
    g = torch.Generator(device).manual_seed(0)
    w = torch.randn(n, k, generator=g, device=device) * 0.1
    parts = {name: FORMATS[name].pack(w, FORMATS[name].compute_qparams(w))
             for name in ("int8-row", "int4-2l-g64")}  # fmt: skip
    eight, four = parts.values()

    def w8a8(x: Tensor) -> Tensor:
        codes, rows = ops.quantize_rows(x, None, 1, None)
        return ops.w8a8_linear(codes, rows, eight["weight"], eight["weight_scale"], None, x.dtype)

    def w4a8(x: Tensor) -> Tensor:
        codes, rows = ops.quantize_rows(x, None, 64, None)
        weight = (four[name] for name in ("weight", "weight_scale", "weight_scale_2"))
        return ops.w4a8_linear(codes, rows, *weight, None, x.dtype)

    return {"w8a8": w8a8, "w4a8": w4a8}


def wrong_inputs(
    library: Any, device: torch.device, chain: Chain, m: int, k: int, chosen: int, rounds: int
) -> int:
    """For how many inputs the output differs from that of the default.

    Each input follows another one, whose codes were at the same addresses: a product that starts
    too early multiplies those.
    """
    g = torch.Generator(device).manual_seed(1)
    every = [torch.randn(m, k, generator=g, device=device).bfloat16() for _ in range(rounds)]
    with options(library, chosen):
        got = [chain(x) for x in every]
    with options(library, 0):
        want = [chain(x) for x in every]
    return sum(not torch.equal(a, b) for a, b in zip(got, want, strict=True))


def dependent(s: Session) -> str:
    """Products that start while their rows are quantized, with the default and with persistent blocks."""
    library, rounds = library_of(s), s.size(20, 2)
    for m, k, n in ((4096, 3072, 3072), (300, 3072, 6144)):
        m, k, n = s.size(m, 40), s.size(k, 128), s.size(n, 64)
        for name, chain in chains(s.device, k, n).items():
            for chosen in (DEPENDENT, DEPENDENT | PERSISTENT):
                wrong = wrong_inputs(library, s.device, chain, m, k, chosen, rounds)
                assert not wrong, f"{name} {m} x {k} x {n}, options {chosen}: {wrong} of {rounds}"
    return f"equal, {rounds} inputs one after the other"


def captured(s: Session) -> str:
    """The same in a CUDA graph, which is replayed with new inputs."""
    s.need_gpu()
    library, m, k = library_of(s), 4096, 3072
    x = torch.zeros(m, k, device=s.device, dtype=torch.bfloat16)
    for name, chain in chains(s.device, k, 3072).items():
        with options(library, 0):
            chain(x)
        graph = torch.cuda.CUDAGraph()
        with options(library, DEPENDENT), torch.cuda.graph(graph):
            y = chain(x)
        for seed in range(20):
            x.normal_(generator=torch.Generator(s.device).manual_seed(seed))
            graph.replay()
            with options(library, 0):
                assert torch.equal(y, chain(x)), f"{name}, input {seed}"
    return "equal, 20 replays"


def checks() -> list[Check]:
    """Whether they are right."""
    return [
        *(
            Check("options", f"persistent, {case.name}", partial(persistent, case))
            for case in CASES
        ),
        Check("options", "dependent launch", dependent),
        Check("options", "dependent launch in a graph", captured),
    ]


# ------------------------------------------------------------------------------------------ time


def timed(kind: str, what: str, s: Session) -> None:
    """Time over that of the default, for a product or a chain; a ratio above 1 is faster."""
    library = library_of(s)
    choices = {"persistent": PERSISTENT} if what == "product" else {
        "dependent": DEPENDENT, "both": DEPENDENT | PERSISTENT
    }  # fmt: skip
    for m, k, n in SHAPES:
        m, k, n = s.size(m, 24), s.size(k, 128), s.size(n, 64)
        chain = chains(s.device, k, n, dtq if what == "chain" else _Quantized())[kind]
        x = torch.randn(m, k, device=s.device, dtype=torch.bfloat16)

        def run(chosen: int, chain: Chain = chain, x: Tensor = x) -> Tensor:
            with options(library, chosen):
                return chain(x)

        candidates = [
            Candidate(name, partial(run, chosen), 0)
            for name, chosen in {"default": 0, **choices}.items()
        ]
        rows = s.keep(
            compare(f"{k} x {n}, {kind} {what}", m, candidates, s.rounds, s.clock, choices)
        )
        for name in choices:
            low, ratio, high = rows[0].ratio[name]
            found = f"{ratio:.3f} ({low:.3f} to {high:.3f})"
            s.tell(
                f"{kind} {what} {m} x {k} x {n}, {name} over the default",
                found if s.cuda else "a test of this script, no measurement",
            )


class _Quantized:
    """The ops, with rows that are quantized once: products alone."""

    w8a8_linear, w4a8_linear = dtq.w8a8_linear, dtq.w4a8_linear

    def __init__(self) -> None:
        self.rows: tuple[Tensor, Tensor] | None = None

    def quantize_rows(self, x: Tensor, *transform: Any) -> tuple[Tensor, Tensor]:
        """The result of the first call."""
        if self.rows is None:
            self.rows = dtq.quantize_rows(x, *transform)
        return self.rows


def timing_checks() -> list[Check]:
    """Whether they are faster; nothing is required of them."""
    return [
        Check("options", f"time of a {kind} {what}", partial(timed, kind, what), 60)
        for kind in ("w8a8", "w4a8")
        for what in ("product", "chain")
    ]
