# SPDX-License-Identifier: Apache-2.0
"""How fast it is, as checks of ``tests/gpu.py``: what the machine reaches, and T1 to T12."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from gpu_run import Check, Session, need
from torch import Tensor, nn

from dtq.bench import gpu_linears
from dtq.bench.compare import BenchRow, Candidate, compare
from dtq.bench.layers import quantized, weight_only
from dtq.bench.timer import Clock
from dtq.formats import FORMATS

dtq = torch.ops.dtq


def bandwidth(device: torch.device, rounds: int, clock: Clock) -> float:
    """Bytes per second of a copy that no cache holds, reads and writes counted."""
    count = 2**28 if device.type == "cuda" else 2**20
    a, b = (torch.randint(0, 255, (count,), dtype=torch.uint8, device=device) for _ in range(2))
    watch = clock.watch(lambda: b.copy_(a))
    times = sorted(watch() for _ in range(rounds))
    return 2 * count / times[len(times) // 2]


def ceilings(s: Session) -> None:
    """Copy, cuBLAS bfloat16, torch's 8-bit products, on random data."""
    s.tell("copy, GB/s", f"{bandwidth(s.device, s.rounds, s.clock) / 1e9:.0f}")
    for m, k, n in [(4096, 3072, 3072), (8192, 8192, 8192)]:
        m, k, n = (s.size(v, 64) for v in (m, k, n))
        plain = nn.Linear(k, n, bias=False, device=s.device, dtype=torch.bfloat16)
        x = torch.randn(m, k, device=s.device, dtype=torch.bfloat16)
        count = gpu_linears.copies(s.device, x.nbytes + plain.weight.nbytes)
        for peer in gpu_linears.peers(plain, x, count):
            if peer.name in ("bf16", "_int_mm, bare", "_scaled_mm e4m3"):
                rate = 2 * m * n * k / s.seconds(peer.run) / 1e12
                s.tell(f"{peer.name} {m} x {k} x {n}, T(FL)OP/s", f"{rate:.0f}")


@dataclass(frozen=True)
class Target:
    """A row of the table of targets, for one H200.

    Attributes:
        must: least that is good enough; the most where ``below``.
        stretch: what to hope for.
        measure: gives figures by case.
        below: whether less is better.
    """

    name: str
    about: str
    must: float
    stretch: float
    measure: Callable[[Session], Iterator[tuple[str, float]]]
    below: bool = False


def _raced(s: Session, m: int, k: int, n: int) -> dict[str, BenchRow]:
    m, k, n = s.size(m, 24), s.size(k, 128), s.size(n, 64)
    before = _compared.cache_info().misses
    found = _compared(m, k, n, s.rounds, s.device)
    if _compared.cache_info().misses > before:
        s.keep(found)
    return {row.name: row for row in found}


@cache
def _compared(m: int, k: int, n: int, rounds: int, device: torch.device) -> list[BenchRow]:
    """Once for all targets that are of these sizes."""
    return gpu_linears.compare_linears(m, k, n, rounds, device)


def _ratio(rows: dict[str, BenchRow], slow: str, fast: str) -> float:
    return rows[slow].ratio[fast][1]


def t1(s: Session) -> Iterator[tuple[str, float]]:
    yield "4096 x 3072 x 3072", _ratio(_raced(s, 4096, 3072, 3072), "bf16", "w8a8 product")


def t2(s: Session) -> Iterator[tuple[str, float]]:
    for k, n in ((3072, 12288), (12288, 3072)):
        yield f"4096 x {k} x {n}", _ratio(_raced(s, 4096, k, n), "bf16", "w8a8 product")


def t2_rate(s: Session) -> Iterator[tuple[str, float]]:
    for k, n in ((3072, 12288), (12288, 3072)):
        seconds = _raced(s, 4096, k, n)["w8a8 product"].seconds
        yield f"4096 x {k} x {n}", 2 * 4096 * k * n / seconds / 1e12


def _with_norm(s: Session, k: int, n: int) -> list[Candidate]:
    m, k, n = s.size(4096, 24), s.size(k, 128), s.size(n, 64)
    plain = nn.Linear(k, n, device=s.device, dtype=torch.bfloat16)
    layer = quantized(plain, "int8-row")
    x = torch.randn(m, k, device=s.device, dtype=torch.bfloat16)
    up, along = (torch.randn(1, k, device=s.device, dtype=torch.bfloat16) for _ in range(2))
    p, bias = layer.packed_tensors(), plain.bias

    def norm(x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), x.shape[1:]).to(x.dtype) * (1 + up) + along

    one = torch.compile(norm) if s.cuda else norm

    def float_side() -> Tensor:
        with torch.no_grad():
            return plain(one(x))

    def ours() -> Tensor:
        codes, scale = dtq.norm_quantize_rows(x, up, along, 1e-6, None, None, 1, 1, None, None)
        return dtq.w8a8_linear(codes, scale, p["weight"], p["weight_scale"], bias, x.dtype)

    return [Candidate("bf16", float_side, 0), Candidate("w8a8", ours, 0)]


def t3(s: Session) -> Iterator[tuple[str, float]]:
    for n in (3072, 9216):
        rows = s.keep(compare("norm", 4096, _with_norm(s, 3072, n), s.rounds, s.clock))
        yield f"4096 x 3072 x {n}", _ratio({r.name: r for r in rows}, "bf16", "w8a8")


def _two_level(s: Session, m: int, k: int, n: int) -> float:
    m, k, n = s.size(m, 24), s.size(k, 128), s.size(n, 64)
    plain = nn.Linear(k, n, device=s.device, dtype=torch.bfloat16)
    x = torch.randn(m, k, device=s.device, dtype=torch.bfloat16)
    codes, scale = dtq.quantize_rows(x, None, 1, None)
    eight, four = (
        quantized(plain, "int8-row").packed_tensors(),
        quantized(plain, "int4-2l-g128").packed_tensors(),
    )
    count = gpu_linears.copies(s.device, codes.nbytes + four["weight"].nbytes)

    def sets(parts: dict[str, Tensor], names: tuple[str, ...]) -> list[tuple[Tensor, ...]]:
        return [(codes.clone(), scale, *(parts[n].clone() for n in names)) for _ in range(count)]

    w8 = sets(eight, ("weight", "weight_scale"))
    w4 = sets(four, ("weight", "weight_scale", "weight_scale_2"))
    found = s.keep(compare(
        f"{k} x {n}, g128", m,
        [
            Candidate("w8a8", gpu_linears.round_robin([lambda g=g: dtq.w8a8_linear(*g, None, x.dtype) for g in w8]), 0),
            Candidate("w4a8", gpu_linears.round_robin([lambda g=g: dtq.w4a8_linear(*g, None, x.dtype) for g in w4]), 0),
        ],
        s.rounds, s.clock,
    ))  # fmt: skip
    return {r.name: r for r in found}["w8a8"].ratio["w4a8"][1]


def t4(s: Session) -> Iterator[tuple[str, float]]:
    for m, k, n in (
        (1024, 3072, 3072),
        (4096, 3072, 3072),
        (4096, 3072, 12288),
        (4096, 1152, 4608),
    ):
        yield f"{m} x {k} x {n}", _two_level(s, m, k, n)


def t5(s: Session) -> Iterator[tuple[str, float]]:
    for k, n in ((3072, 3072), (3072, 12288), (12288, 3072)):
        yield f"4096 x {k} x {n}", _ratio(_raced(s, 4096, k, n), "bf16", "w4a8 product")


def t6(s: Session) -> Iterator[tuple[str, float]]:
    fmt = FORMATS["int4-2l-g128"]
    total = sum(spec.nbytes for spec in fmt.tensor_specs((3072, 3072)).values())
    yield "of bfloat16, 3072 x 3072", total / (2 * 3072 * 3072)


def t7(s: Session) -> Iterator[tuple[str, float]]:
    for m in (1, 16, 64):
        yield f"{m} x 3072 x 12288", _two_level(s, m, 3072, 12288)


def _norm_seconds(s: Session, block: int) -> float:
    m, k = s.size(4096, 24), s.size(3072, 256)
    up, along = (torch.randn(1, k, device=s.device, dtype=torch.bfloat16) for _ in range(2))
    count = gpu_linears.copies(s.device, 3 * m * k)
    every = [torch.randn(m, k, device=s.device, dtype=torch.bfloat16) for _ in range(count)]
    pre = None if block == 1 else torch.ones(k, device=s.device, dtype=torch.bfloat16)
    runs = [
        lambda x=x: dtq.norm_quantize_rows(x, up, along, 1e-6, pre, None, block, 1, None, None)
        for x in every
    ]
    return s.seconds(gpu_linears.round_robin(runs))


def t8(s: Session) -> Iterator[tuple[str, float]]:
    m, k = s.size(4096, 24), s.size(3072, 256)
    reached = bandwidth(s.device, s.rounds, s.clock)
    yield "4096 x 3072", 3 * m * k / _norm_seconds(s, 1) / reached


def t9(s: Session) -> Iterator[tuple[str, float]]:
    plain = _norm_seconds(s, 1)
    for block in (64, 256):
        yield f"block {block}", _norm_seconds(s, block) / plain


def t10(s: Session) -> Iterator[tuple[str, float]]:
    k, n = s.size(3072, 128), s.size(18432, 64)
    plain = nn.Linear(k, n, device=s.device, dtype=torch.bfloat16)
    layer = weight_only(plain, "int4-g64")
    for m in (1, 2, 4):
        x = torch.randn(m, k, device=s.device, dtype=torch.bfloat16)
        count = gpu_linears.copies(s.device, plain.weight.nbytes // 4)
        found = s.keep(compare(
            f"{k} x {n}, weight-only", m,
            [
                Candidate("bf16", gpu_linears.repeat_layer(plain, x, count), 0),
                Candidate("w4a16", gpu_linears.repeat_layer(layer, x, count), 0),
            ],
            s.rounds, s.clock, ("w4a16",),
        ))  # fmt: skip
        yield f"M {m}", {r.name: r for r in found}["bf16"].ratio["w4a16"][1]


def t11(s: Session) -> Iterator[tuple[str, float]]:
    for m, k, n in ((64, 1152, 1152), (256, 1152, 1152), (256, 1152, 4608), (1024, 1152, 1152)):
        rows = _raced(s, m, k, n)
        for name in ("w8a8", "w4a8"):
            yield f"{name} {m} x {k} x {n}", _ratio(rows, "bf16", name)


def t12(s: Session) -> Iterator[tuple[str, float]]:
    need("diffusers")
    from dtq.bench import cases, gpu

    model, given, tokens = cases.flux(
        s.device, quick=True
    )  # few blocks: three of them are compiled
    rows = gpu.compare_models("flux shape", tokens, model, given, max(3, s.rounds // 3))
    s.keep(rows)
    found = {row.name: row for row in rows}
    for name in ("w8a8", "w4a8"):
        both = f"{name} compiled" in found
        ours, peer = (f"{name} compiled", "bf16 compiled") if both else (name, "bf16")
        yield f"{ours}, {peer} is 1", _ratio(found, peer, ours)


TARGETS = (
    Target("T1", "W8A8 product over cuBLAS bf16", 1.55, 1.70, t1),
    Target("T2", "the same, wide", 1.60, 1.70, t2),
    Target("T2", "the same, wide, in TOP/s", 1250, 1350, t2_rate),
    Target("T3", "LayerNorm, modulate, quantize and W8A8 over bf16", 1.50, 1.70, t3),
    Target("T4", "W4A8 over our W8A8, M >= 1024", 0.95, 1.0, t4),
    Target("T5", "W4A8 product over cuBLAS bf16", 1.45, 1.65, t5),
    Target("T6", "W4A8 weight bytes", 0.26, 0.26, t6, below=True),
    Target("T7", "W4A8 over our W8A8, M <= 64", 1.3, 1.6, t7),
    Target("T8", "LayerNorm, modulate, quantize: share of copy bandwidth", 0.75, 0.85, t8),
    Target("T9", "time with a rotation over without", 1.15, 1.05, t9, below=True),
    Target("T10", "W4A16, 3072 -> 18432, over cuBLAS bf16", 2.5, 3.2, t10),
    # equal but for the noise of a measurement
    Target("T11", "small layers, dispatcher included, over bf16", 0.97, 1.0, t11),
    Target("T12", "FLUX-shaped blocks over compiled bf16", 1.30, 1.40, t12),
)


def measured(target: Target, s: Session) -> None:
    """Report each case of a target when it is measured."""
    for case, value in target.measure(s):
        good = value <= target.must if target.below else value >= target.must
        best = value <= target.stretch if target.below else value >= target.stretch
        goal = f"must {target.must}, stretch {target.stretch}{', reached' if best else ''}"
        found = f"{value:.2f} ({goal})" if s.cuda else "a test of this script, no measurement"
        s.tell(f"{target.name} {target.about}, {case}", found, good if s.cuda else None)


def checks() -> list[Check]:
    """What the machine reaches, and the targets; the longest, T12, at the end."""
    limits = {"T12": 280}
    return [
        Check("ceilings", "products and copies of torch", ceilings, 60),
        *(
            Check("targets", f"{t.name} {t.about}", partial(measured, t), limits.get(t.name, 90))
            for t in TARGETS
        ),
    ]
