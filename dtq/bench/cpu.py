# SPDX-License-Identifier: Apache-2.0
"""How fast quantized layers are on this machine, beside float ones and other libraries.

One interleaved run: in every round each candidate runs once (small ones several times), in a random
order. A figure is the median over rounds of the ratio of two times of the same round, so that a
machine that is busy with something else slows both. ``dtq/clock.py`` has the clocks,
``dtq/bench_gpu.py`` the suites for a GPU.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import logging
import math
import os
import platform
import random
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dtq.bench.cases import OURS, cases, quantized, quantized_model
from dtq.bench.timer import Clock, HostClock
from dtq.evaluate.baselines import BASELINES
from dtq.kernels import CPU
from dtq.kernels.compile import cpu

SHAPES = ((1152, 1152), (1152, 4608), (4608, 1152), (3072, 3072), (3072, 12288))
"""(K, N) of DiT-XL and FLUX."""
TOKENS = (1, 64, 256, 1024)
MODULES = {"torchao": "torchao", "quanto": "optimum.quanto", "bnb": "bitsandbytes"}
"""What the baselines import, by the first word of their name."""

_log = logging.getLogger(__name__)


@dataclass
class Candidate:
    """Something that does the job.

    Attributes:
        run: does it once.
        bytes: of its weights, scales and all.
    """

    name: str
    run: Callable[[], object]
    bytes: int


@dataclass
class BenchRow:
    """What one candidate did at one size.

    Attributes:
        case: ``K x N, M tokens`` or the model's name.
        seconds: median of a run.
        share: of the int8 operations that registers could do in that time, see ``cpu.peak``.
        ratio: for each of ours, quartiles of this one's time over ours; above 1 ours is faster.
    """

    case: str
    tokens: int
    name: str
    seconds: float
    bytes: int
    ratio: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    share: float | None = None


@dataclass
class Result:
    """A whole suite, with the conditions it was measured in."""

    suite: str
    conditions: dict[str, str | int]
    rows: list[BenchRow]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"verdict": verdict(self.rows)}


def gemm(
    *,
    quick: bool = False,
    rounds: int = 15,
    progress: Callable[[list[BenchRow]], None] | None = None,
) -> Result:
    """Whole linears, bfloat16 in to bfloat16 out."""
    rows: list[BenchRow] = []
    for k, n in SHAPES[:3] if quick else SHAPES:
        layers = _layers(k, n)
        for m in TOKENS[:3] if quick else TOKENS:
            x = torch.randn(m, k).bfloat16()
            found = race(f"{k} x {n}", m, _on(layers, x, n), rounds)
            _note_shares(found, 2 * m * n * k)
            rows += found
            if progress:
                progress(found)
    return Result("gemm", conditions(rounds), rows)


def e2e(
    *,
    quick: bool = False,
    rounds: int = 15,
    progress: Callable[[list[BenchRow]], None] | None = None,
) -> Result:
    """One denoising step of models of the shapes of DiT-XL/2, PixArt and FLUX, and the demo."""
    rows: list[BenchRow] = []
    for case in cases(quick):
        found = race(case.name, case.tokens, _steps(case.model, case.given), rounds)
        rows += found
        if progress:
            progress(found)
    return Result("e2e", conditions(rounds), rows)


SUITES: dict[str, Callable[..., Result]] = {"gemm": gemm, "e2e": e2e}


def conditions(rounds: int) -> dict[str, str | int]:
    """What a figure needs beside it."""
    peak = cpu.peak()
    return {
        "cpu": _cpu(),
        "kernels": CPU.describe(),
        "peak": f"{peak / 1e9:.0f} GOP/s of int8 in registers, a thread" if peak else "unknown",
        "threads": torch.get_num_threads(),
        "clock": HostClock().name,
        "torch": torch.__version__,
        "rounds": rounds,
        "date": time.strftime("%Y-%m-%d"),
    }


def _note_shares(rows: Sequence[BenchRow], operations: int) -> None:
    peak = cpu.peak() * torch.get_num_threads()
    for row in rows:
        if peak and row.name in OURS:
            row.share = operations / row.seconds / peak


@torch.no_grad()
def race(
    case: str,
    tokens: int,
    candidates: Sequence[Candidate],
    rounds: int,
    clock: Clock | None = None,
    ours: Iterable[str] = tuple(OURS),
) -> list[BenchRow]:
    """Time candidates side by side; ratios are over each of ``ours``."""
    clock = clock or HostClock()
    times: dict[str, list[float]] = {c.name: [] for c in candidates}
    watches = {c.name: clock.watch(c.run) for c in candidates}
    for i in range(rounds):
        order = list(candidates)
        random.Random(i).shuffle(order)
        for c in order:
            times[c.name].append(watches[c.name]())
    rows = []
    for c in candidates:
        ratio = {
            name: _quartiles(a / b for a, b in zip(times[c.name], times[name], strict=True))
            for name in ours
            if name in times and name != c.name
        }
        rows.append(
            BenchRow(case, tokens, c.name, statistics.median(times[c.name]), c.bytes, ratio)
        )
    return rows


def geometric_means(rows: Iterable[BenchRow], ours: str) -> dict[tuple[int, str], float]:
    """By tokens and candidate: how many times as long as ours it takes, over all cases."""
    found: dict[tuple[int, str], list[float]] = {}
    for row in rows:
        if ours in row.ratio:
            found.setdefault((row.tokens, row.name), []).append(row.ratio[ours][1])
    return {key: statistics.geometric_mean(values) for key, values in found.items()}


def ratios(result: Result, ours: str) -> dict[str, dict[str, float]]:
    """By case, or by tokens over all cases of the gemm suite: times over that of ``ours``."""
    found: dict[str, dict[str, float]] = {}
    if result.suite == "gemm":
        for (tokens, name), value in geometric_means(result.rows, ours).items():
            found.setdefault(f"M {tokens}", {})[name] = value
        return found
    for row in result.rows:
        if ours in row.ratio:
            found.setdefault(row.case, {})[row.name] = row.ratio[ours][1]
    return found


def verdict(rows: Sequence[BenchRow]) -> str:
    """A plain sentence. Only what is faster than every float candidate is recommended."""
    many = [row for row in rows if row.tokens > 1]
    said = []
    for ours in OURS:
        speed = {
            rival: statistics.geometric_mean(
                row.ratio[ours][1] for row in many if row.name == rival
            )
            for rival in ("bf16", "fp32")
            if any(row.name == rival and ours in row.ratio for row in many)
        }
        if not speed:
            continue
        rival = min(speed, key=lambda name: speed[name])  # the faster of the two
        smaller = _bytes(many, "bf16") / _bytes(many, ours)
        said.append((speed[rival], ours, rival, smaller))
    if not said:
        return "nothing of dtq was measured"
    pace, ours, rival, smaller = max(said)
    if pace > 1:
        return (
            f"{ours} is {pace:.1f}x faster than {rival} here and {smaller:.1f}x smaller than bf16"
        )
    return (
        f"nothing of dtq is faster than {rival} here; {ours} takes {1 / pace:.1f}x as long "
        f"and is {smaller:.1f}x smaller than bf16: quantize for memory, not for speed"
    )


# ---------------------------------------------------------------------------------- candidates


def _layers(k: int, n: int) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    float_layer = nn.Linear(k, n)
    layers: dict[str, nn.Module] = {
        name: quantized(float_layer, weights) for name, weights in OURS.items()
    }
    layers["fp32"] = float_layer
    layers["bf16"] = nn.Linear(k, n, dtype=torch.bfloat16)
    for name, baseline in BASELINES.items():
        if installed(MODULES[name.split("-")[0]]):
            holder = nn.Sequential(nn.Linear(k, n, dtype=torch.bfloat16))
            baseline.apply(holder, ["0"])
            layers[name] = holder[0]
    return layers


def _on(layers: dict[str, nn.Module], x: Tensor, n: int) -> list[Candidate]:
    found = []
    for name, layer in layers.items():
        given = x.float() if name == "fp32" else x
        found.append(Candidate(name, _call(layer, given), _size(name, layer)))
    codes = torch.randint(-127, 128, x.shape, dtype=torch.int8)
    weight = torch.randint(-127, 128, (n, x.shape[1]), dtype=torch.int8)
    # the bare product: codes given, no scales, no bias, int32 out
    found.append(Candidate("_int_mm, bare", lambda: torch._int_mm(codes, weight.T), weight.numel()))
    bits, unit, bias = weight.T, torch.rand(n), torch.rand(n)

    def by_int_mm() -> Tensor:
        peak = x.float().abs().amax(1, keepdim=True) / 127
        y = torch._int_mm((x.float() / peak).round().to(torch.int8), bits)
        return (y.float() * peak * unit + bias).to(x.dtype)

    found.append(Candidate("_int_mm, eager", by_int_mm, weight.numel() + 4 * n))
    if torch.backends.mkldnn.is_available():
        found += _onednn(x, weight, unit, bias)
    return found


def _onednn(x: Tensor, weight: Tensor, unit: Tensor, bias: Tensor) -> list[Candidate]:
    """oneDNN's int8 linear: the product alone, and with tokens quantized by ``torch.compile``.

    Its codes are unsigned with a zero of 128: for signed ones it has no fast kernel without AMX.
    """
    packed = torch.ops.onednn.qlinear_prepack(weight, list(x.shape))
    zeros = torch.zeros(len(weight), dtype=torch.int64)

    def product(codes: Tensor) -> Tensor:
        made: Tensor = torch.ops.onednn.qlinear_pointwise(
            codes, 1.0, 128, packed, unit, zeros, None, 1.0, 0, torch.bfloat16, "none", [], ""
        )
        return made

    def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
        peak = x.float().abs().amax(1, keepdim=True) / 127
        return ((x.float() / peak).round() + 128).to(torch.uint8), peak

    def finished(y: Tensor, peak: Tensor) -> Tensor:
        return (y * peak + bias).to(x.dtype)

    size = weight.numel() + 4 * len(weight)
    codes, _ = quantized(x)
    rows = [Candidate("oneDNN, bare", lambda: product(codes), size)]
    if _inductor_compiles():
        before = torch.compile(quantized, dynamic=False)
        after = torch.compile(finished, dynamic=False)

        def run() -> Tensor:
            made, peak = before(x)
            y: Tensor = after(product(made), peak)
            return y

        rows.append(Candidate("oneDNN, compiled quantizing", run, size))
    return rows


@functools.cache
def _inductor_compiles() -> bool:
    compiler = os.environ.get("CXX", "g++")
    found = shutil.which(compiler) is not None
    if not found:
        _log.warning("dtq: no %s, so no row of oneDNN with compiled quantizing", compiler)
    return found


def _call(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    return lambda: layer(x)


def _size(name: str, layer: nn.Module) -> int:
    if name in BASELINES:
        assert isinstance(layer, nn.Module)
        weight: Any = layer.weight
        return math.ceil(BASELINES[name].bits(layer) * weight.numel() / 8)
    return sum(p.nbytes for p in layer.parameters())


def _steps(model: nn.Module, given: dict[str, Any]) -> list[Candidate]:
    found = []

    def add(name: str, chosen: nn.Module, dtype: torch.dtype) -> None:
        size = sum(p.nbytes for p in chosen.parameters())
        inputs = {k: _as(v, dtype) for k, v in given.items()}
        found.append(Candidate(name, lambda: chosen(**inputs)[0], size))

    for name in OURS:
        add(name, quantized_model(model, name), torch.bfloat16)
    add("bf16", copy.deepcopy(model).bfloat16(), torch.bfloat16)
    add("fp32", model, torch.float32)
    return found


def _as(value: Any, dtype: torch.dtype) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if floating else value


def installed(module: str) -> bool:
    """Whether a module could be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package above it
        return False


def _quartiles(values: Iterable[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _bytes(rows: Iterable[BenchRow], name: str) -> int:
    return sum(row.bytes for row in rows if row.name == name)


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = [line for line in file if line.startswith("model name")]
    except OSError:
        lines = []
    return lines[0].split(":", 1)[1].strip() if lines else platform.machine()
