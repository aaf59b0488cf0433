# SPDX-License-Identifier: Apache-2.0
"""The CPU suites: quantized layers and models, float ones, and those of other libraries."""

from __future__ import annotations

import copy
import logging
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial

import torch
from torch import Tensor, nn

from dtq.bench.cases import Inputs, cases, cast_floats, quantized_model
from dtq.bench.compare import BenchRow, Candidate, Progress, Result, compare, run_all, timing
from dtq.bench.layers import RECIPES, quantized
from dtq.bench.other_libraries import other_libraries, size_of
from dtq.bench.timer import HostClock
from dtq.kernels import CPU
from dtq.kernels.compile import cpu

SHAPES = ((1152, 1152), (1152, 4608), (4608, 1152), (3072, 3072), (3072, 12288))
"""(K, N) of DiT-XL and FLUX."""
TOKENS = (1, 64, 256, 1024)

_log = logging.getLogger(__name__)


def gemm(quick: bool, rounds: int) -> Iterator[list[BenchRow]]:
    """Whole linears, bfloat16 in to bfloat16 out."""
    for k, n in SHAPES[:3] if quick else SHAPES:
        layers = _layers(k, n)
        for m in TOKENS[:3] if quick else TOKENS:
            x = torch.randn(m, k).bfloat16()
            rows = compare(f"{k} x {n}", m, _on(layers, x, n), rounds)
            _set_shares(rows, 2 * m * n * k)
            yield rows


def e2e(quick: bool, rounds: int) -> Iterator[list[BenchRow]]:
    """One denoising step of models of the shapes of DiT-XL/2, PixArt and FLUX, and of the demo."""
    for case in cases(quick):
        yield compare(case.name, case.tokens, _steps(case.model, case.inputs), rounds)


def suite(
    comparisons: Callable[[bool, int], Iterator[list[BenchRow]]],
    *,
    quick: bool,
    rounds: int,
    progress: Progress | None,
) -> Result:
    """Run a suite on the CPU.

    Args:
        comparisons: :func:`gemm` or :func:`e2e`.
        quick: fewer sizes, fewer blocks.
        rounds: of each comparison, at least 2.
        progress: called after each comparison.

    Returns:
        All rows.
    """
    rows = comparisons(quick, rounds)
    return Result(comparisons.__name__, conditions(rounds), run_all(rows, progress))


SUITES = {each.__name__: partial(suite, each) for each in (gemm, e2e)}


def conditions(rounds: int) -> dict[str, str | int]:
    """What times depend on."""
    peak = cpu.peak()
    return {
        "cpu": _cpu(),
        "kernels": CPU.describe(),
        "peak": f"{peak / 1e9:.0f} GOP/s of int8 in registers, a thread" if peak else "unknown",
        "threads": torch.get_num_threads(),
        **timing(HostClock(), rounds),
    }


def _set_shares(rows: Sequence[BenchRow], operations: int) -> None:
    peak = cpu.peak() * torch.get_num_threads()
    for row in rows:
        if peak and row.name in RECIPES:
            row.share = operations / row.seconds / peak


# ---------------------------------------------------------------------------------- candidates


def _layers(k: int, n: int) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    full = nn.Linear(k, n)
    layers: dict[str, nn.Module] = {name: quantized(full, fmt) for name, fmt in RECIPES.items()}
    plain = nn.Linear(k, n, dtype=torch.bfloat16)
    return layers | {"fp32": full, "bf16": plain} | other_libraries(plain)


def _on(layers: dict[str, nn.Module], x: Tensor, n: int) -> list[Candidate]:
    candidates = [
        Candidate(name, partial(layer, x.float() if name == "fp32" else x), size_of(name, layer))
        for name, layer in layers.items()
    ]
    x_q = torch.randint(-127, 128, x.shape, dtype=torch.int8)
    weight = torch.randint(-127, 128, (n, x.shape[1]), dtype=torch.int8)
    # only the product of quantized inputs: no scales, no bias, int32 out
    bare = Candidate("_int_mm, bare", lambda: torch._int_mm(x_q, weight.T), weight.numel())
    weight_t, scale, bias = weight.T, torch.rand(n), torch.rand(n)

    def by_int_mm() -> Tensor:
        x_scale = x.float().abs().amax(1, keepdim=True) / 127
        y = torch._int_mm((x.float() / x_scale).round().to(torch.int8), weight_t)
        return (y.float() * x_scale * scale + bias).to(x.dtype)

    candidates += [bare, Candidate("_int_mm, eager", by_int_mm, weight.numel() + 4 * n)]
    if torch.backends.mkldnn.is_available():
        candidates += _onednn(x, weight, scale, bias)
    return candidates


def _onednn(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> list[Candidate]:
    """The int8 linear of oneDNN: only the product, and with tokens quantized by ``torch.compile``.

    Inputs are unsigned with a zero point of 128: for signed ones oneDNN has no fast kernel without
    AMX.
    """
    packed = torch.ops.onednn.qlinear_prepack(weight, list(x.shape))
    zeros = torch.zeros(len(weight), dtype=torch.int64)

    def product(x_q: Tensor) -> Tensor:
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            x_q, 1.0, 128, packed, scale, zeros, None, 1.0, 0, torch.bfloat16, "none", [], ""
        )
        return y

    def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
        x_scale = x.float().abs().amax(1, keepdim=True) / 127
        return ((x.float() / x_scale).round() + 128).to(torch.uint8), x_scale

    def finish(y: Tensor, x_scale: Tensor) -> Tensor:
        return (y * x_scale + bias).to(x.dtype)

    size = weight.numel() + 4 * len(weight)
    x_q, _ = quantize(x)
    candidates = [Candidate("oneDNN, bare", lambda: product(x_q), size)]
    if _inductor_compiles():
        before = torch.compile(quantize, dynamic=False)
        after = torch.compile(finish, dynamic=False)

        def run() -> Tensor:
            x_q, x_scale = before(x)
            y: Tensor = after(product(x_q), x_scale)
            return y

        candidates.append(Candidate("oneDNN, compiled quantizing", run, size))
    return candidates


@cache
def _inductor_compiles() -> bool:
    compiler = os.environ.get("CXX", "g++")
    exists = shutil.which(compiler) is not None
    if not exists:
        _log.warning("dtq: no %s, so no row of oneDNN with compiled quantizing", compiler)
    return exists


def _steps(model: nn.Module, inputs: Inputs) -> list[Candidate]:
    def candidate(name: str, model: nn.Module, dtype: torch.dtype) -> Candidate:
        run = partial(model, **cast_floats(inputs, dtype))
        return Candidate(name, run, size_of(name, model))

    return [
        *(candidate(name, quantized_model(model, name), torch.bfloat16) for name in RECIPES),
        candidate("bf16", copy.deepcopy(model).bfloat16(), torch.bfloat16),
        candidate("fp32", model, torch.float32),
    ]


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = [line for line in file if line.startswith("model name")]
    except OSError:
        lines = []
    return lines[0].split(":", 1)[1].strip() if lines else platform.machine()
