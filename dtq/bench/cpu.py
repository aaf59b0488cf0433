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
from typing import Any, cast

import torch
from torch import Tensor, nn

from dtq.bench import ggml, openvino
from dtq.bench.attention import attention
from dtq.bench.cases import Case, Inputs, calibration_calls, cases, cast_floats, quantized_model
from dtq.bench.compare import (
    BenchRow,
    Candidate,
    Progress,
    Result,
    compare,
    first_output,
    linear_name,
    run_all,
    timing,
)
from dtq.bench.layers import RECIPES, quantized, rounded
from dtq.bench.other_libraries import by, dtq_version, other_libraries, size_of
from dtq.bench.packages import versions
from dtq.bench.timer import HostClock
from dtq.kernels import CPU
from dtq.kernels.compile import cpu

SHAPES = ((1152, 1152), (1152, 4608), (4608, 1152), (3072, 3072), (3072, 12288))
"""(K, N) of DiT-XL and FLUX."""
TOKENS = (1, 64, 256, 1024)


_log = logging.getLogger(__name__)


def gemm(quick: bool, rounds: int, case: str) -> Iterator[list[BenchRow]]:
    """Whole linears, bfloat16 in to bfloat16 out."""
    for k, n in [s for s in (SHAPES[:3] if quick else SHAPES) if case in linear_name(*s)]:
        layers = _layers(k, n)
        for m in TOKENS[:3] if quick else TOKENS:
            x = torch.randn(m, k).bfloat16()
            rows = compare_linears(layers, x, rounds)
            _set_shares(rows, 2 * m * n * k)
            yield rows


def e2e(quick: bool, rounds: int, case: str) -> Iterator[list[BenchRow]]:
    """One denoising step of models of the shapes of DiT-XL/2, PixArt and FLUX, and of the demo."""
    for each in cases(quick, case):
        yield compare_models(each, rounds)


def suite(
    comparisons: Callable[[bool, int, str], Iterator[list[BenchRow]]],
    *,
    quick: bool,
    rounds: int,
    case: str = "",
    progress: Progress | None,
) -> Result:
    """Run a suite on the CPU.

    Args:
        comparisons: :func:`gemm`, :func:`e2e` or :func:`attention`.
        quick: fewer sizes, fewer blocks.
        rounds: of each comparison, at least 2.
        case: only comparisons whose names contain this text.
        progress: called after each comparison.

    Returns:
        All rows.

    Raises:
        InputError: no name contains ``case``.
    """
    rows = comparisons(quick, rounds, case)
    return Result(comparisons.__name__, conditions(rounds), run_all(rows, progress, case))


SUITES = {each.__name__: partial(suite, each) for each in (gemm, e2e, attention)}


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


# ------------------------------------------------------------------------------------- linears


def compare_linears(layers: dict[str, nn.Module], x: Tensor, rounds: int) -> list[BenchRow]:
    """Time the linears of one size.

    Args:
        layers: the same linear, as the candidates hold it; ``fp32`` is the float one.
        x: (M, K), bfloat16.
        rounds: at least 2.
    """
    full = cast(nn.Linear, layers["fp32"])
    with torch.no_grad():
        candidates, reference = _on(layers, x), full(x.float())
    case = linear_name(full.in_features, full.out_features)
    return compare(case, len(x), candidates, rounds, reference=reference)


def _layers(k: int, n: int) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    full = nn.Linear(k, n)
    layers: dict[str, nn.Module] = {name: quantized(full, fmt) for name, fmt in RECIPES.items()}
    plain = copy.deepcopy(full).bfloat16()
    return layers | {"fp32": full, "bf16": plain} | other_libraries(plain)


def _on(layers: dict[str, nn.Module], x: Tensor) -> list[Candidate]:
    candidates = [
        Candidate(
            name, partial(layer, x.float() if name == "fp32" else x), size_of(name, layer), by(name)
        )
        for name, layer in layers.items()
    ]
    full = cast(nn.Linear, layers["fp32"])
    candidates += [*_int_mm(full, x), *ggml.linears(full, x)]
    if torch.backends.mkldnn.is_available():
        candidates += _onednn(full, x)
    return candidates


def _int_mm(full: nn.Linear, x: Tensor) -> list[Candidate]:
    """``torch._int_mm``: only the product, and with quantized tokens."""
    weight, scale = rounded(full.weight.detach())
    x_q, x_scale = rounded(x.float())
    bias, weight_t, size = full.bias.detach(), weight.T, weight.numel()

    def finish(y: Tensor, x_scale: Tensor = x_scale[:, None]) -> Tensor:
        return (y.float() * x_scale * scale + bias).to(x.dtype)

    def whole() -> Tensor:
        x_scale = x.float().abs().amax(1, keepdim=True) / 127
        return finish(
            torch._int_mm((x.float() / x_scale).round().to(torch.int8), weight_t), x_scale
        )

    product = f"{versions('torch')}: int8 product of quantized tokens, no scales, no bias"
    eager = f"{versions('torch')}: int8, quantizing in eager mode"
    return [
        Candidate("_int_mm, bare", lambda: torch._int_mm(x_q, weight_t), size, product, finish),
        Candidate("_int_mm, eager", whole, size + 4 * len(weight), eager),
    ]


def _onednn(full: nn.Linear, x: Tensor) -> list[Candidate]:
    """The int8 linear of oneDNN: only the product, and with tokens quantized by ``torch.compile``.

    Inputs are unsigned with a zero point of 128: for signed ones oneDNN has no fast kernel without
    AMX.
    """
    weight, scale = rounded(full.weight.detach())
    bias = full.bias.detach()
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

    size, torch_by = weight.numel() + 4 * len(weight), versions("torch")
    x_q, x_scale = quantize(x)
    mode = f"{torch_by}: oneDNN int8 product of quantized tokens, no bias"
    bare = Candidate("oneDNN, bare", lambda: product(x_q), size, mode, lambda y: finish(y, x_scale))
    if not _inductor_compiles():
        return [bare]
    torch.compiler.reset()  # it compiles a function 8 times at most, then runs it in eager mode
    before = torch.compile(quantize, dynamic=False)
    after = torch.compile(finish, dynamic=False)

    def run() -> Tensor:
        x_q, x_scale = before(x)
        y: Tensor = after(product(x_q), x_scale)
        return y

    mode = f"{torch_by}: oneDNN int8 product, quantizing compiled"
    return [bare, Candidate("oneDNN, compiled quantizing", run, size, mode)]


@cache
def _inductor_compiles() -> bool:
    compiler = os.environ.get("CXX", "g++")
    exists = shutil.which(compiler) is not None
    if not exists:
        _log.warning("dtq: no %s, so no compiled rows", compiler)
    return exists


# -------------------------------------------------------------------------------------- models


def compare_models(case: Case, rounds: int) -> list[BenchRow]:
    """Time a step of the float model, of its quantized copies and of other libraries.

    Args:
        case: the float model and its inputs.
        rounds: at least 2.

    Returns:
        Rows with ratios to each recipe and to each mode of OpenVINO.
    """
    with torch.no_grad():
        reference = first_output(case.model(**case.inputs, return_dict=False))
    relative_to = (*RECIPES, *openvino.MODES)
    candidates = [*_steps(case)]
    return compare(
        case.name, case.tokens, candidates, rounds, relative_to=relative_to, reference=reference
    )


def _steps(case: Case) -> Iterator[Candidate]:
    """One denoising step: eager, compiled if there is a compiler, in OpenVINO if it is there."""
    torch.compiler.reset()  # it compiles one forward 8 times at most, and all cases have the same
    calls = calibration_calls(case.inputs)
    inputs = cast_floats(case.inputs, torch.bfloat16)
    for name in RECIPES:
        about = f"{dtq_version()}: recipe {name}, rotated, rounded to nearest"
        model = quantized_model(case.model, name, calls)
        yield from _eager_and_compiled(name, model, inputs, about, backend="dtq")
        model = quantized_model(case.model, name, calls, attention="int8")
        about += ", int8 attention where the error of a step allows it"
        yield from _eager_and_compiled(f"{name} attention", model, inputs, about, backend="dtq")
        if name == "w8a8":  # OpenVINO quantizes the embedders, too
            model = quantized_model(case.model, name, calls, attention="int8", exclude=("head",))
            about += ", embedders too"
            row = f"{name} attention embed"
            yield from _eager_and_compiled(row, model, inputs, about, backend="dtq")
    model, about = copy.deepcopy(case.model).bfloat16(), f"{versions('torch')}: bfloat16"
    yield from _eager_and_compiled("bf16", model, inputs, about, backend="inductor")
    run = partial(case.model, **case.inputs, return_dict=False)
    size = size_of("fp32", case.model)
    yield Candidate("fp32", run, size, f"{versions('torch')}: float32")
    yield from openvino.models(case.model, case.inputs, calls)


def _eager_and_compiled(
    name: str, model: nn.Module, inputs: Inputs, about: str, *, backend: str
) -> Iterator[Candidate]:
    size = size_of(name, model)
    yield Candidate(name, partial(model, **inputs, return_dict=False), size, about)
    if _inductor_compiles():
        fast: Any = torch.compile(model, backend=backend)
        run = partial(fast, **inputs, return_dict=False)
        yield Candidate(f"{name} compiled", run, size, f"{about}, compiled by {backend}")


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = [line for line in file if line.startswith("model name")]
    except OSError:
        lines = []
    return lines[0].split(":", 1)[1].strip() if lines else platform.machine()
