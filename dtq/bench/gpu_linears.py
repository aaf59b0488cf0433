# SPDX-License-Identifier: Apache-2.0
"""Linears on a GPU against cuBLAS, torch and other libraries. Nothing here needs diffusers.

Data are random: with constant data a GPU draws less power and clocks higher. Every candidate goes
through copies of its operands that together are larger than three times the L2 cache, as the layers
of a model are.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dtq.bench.compare import BenchRow, Candidate, compare, linear_name, timing
from dtq.bench.layers import RECIPES, quantized, rounded
from dtq.bench.other_libraries import by, other_libraries, size_of
from dtq.bench.packages import versions
from dtq.bench.timer import clock_of
from dtq.kernels import CUDA, gpu_dispatch

PRODUCTS = ("w8a8 product", "w4a8 product")
"""Candidates that multiply quantized inputs, without the rest of the layer."""

ops = torch.ops.dtq


def conditions(rounds: int, device: torch.device) -> dict[str, str | int]:
    """What times depend on."""
    machine: dict[str, str | int] = {"device": str(device)}
    if device.type == "cuda":
        properties: Any = torch.cuda.get_device_properties(device)
        machine |= {
            "device": properties.name,
            "capability": f"sm_{properties.major}{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "kernels": CUDA.describe(),
            "cuda": str(torch.version.cuda),
        }
    return machine | timing(clock_of(device), rounds)


# ------------------------------------------------------------------------------------- linears


def compare_linears(m: int, k: int, n: int, rounds: int, device: torch.device) -> list[BenchRow]:
    """Time the linears of one size.

    Args:
        m: tokens.
        k: input features.
        n: output features.
        rounds: at least 2.
        device: where they run.

    Returns:
        Rows with ratios to the quantized layers and their bare products.
    """
    torch.manual_seed(0)
    plain = nn.Linear(k, n, device=device, dtype=torch.bfloat16)
    x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
    count = copies(device, x.nbytes + plain.weight.nbytes)
    layers = {name: quantized(plain, weight_format) for name, weight_format in RECIPES.items()}
    if gpu_dispatch.multiplies_fp4(x, mx=False):
        layers["nvfp4"] = quantized(plain, "nvfp4", "nvfp4")
    candidates = [
        *(_repeated(name, layer, x, count) for name, layer in layers.items()),
        *(_product(name, plain, x, count) for name in RECIPES),
        *peers(plain, x, count),
    ]
    with torch.no_grad():
        reference = copy.deepcopy(plain).float()(x.float())
    return compare(
        linear_name(k, n), m, candidates, rounds, clock_of(device), (*layers, *PRODUCTS), reference
    )


def copies(device: torch.device, size: int) -> int:
    """How many sets of operands of ``size`` bytes exceed three times the L2 cache; at most 32."""
    if device.type != "cuda":
        return 2
    cache = int(torch.cuda.get_device_properties(device).L2_cache_size)
    return max(2, min(32, math.ceil(3 * cache / size)))


def round_robin(runs: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """A function that calls the next of them each time."""
    cycle = itertools.cycle(runs)
    return lambda: next(cycle)()


def _repeated(name: str, layer: nn.Module, x: Tensor, count: int) -> Candidate:
    return Candidate(name, repeat_layer(layer, x, count), size_of(name, layer), by(name))


def _product(name: str, plain: nn.Linear, x: Tensor, count: int) -> Candidate:
    """Only the product, of inputs that are quantized already."""
    layer = quantized(plain, RECIPES[name], transformed=False)
    x_q, scale = ops.quantize_rows(x, None, 1, None)
    tensors, op = layer.packed_tensors(), ops.w8a8_linear if name == "w8a8" else ops.w4a8_linear
    names = ("weight", "weight_scale", "weight_scale_2")
    w = [tensors[n] for n in names if n in tensors]
    sets = [(x_q.clone(), scale, *map(torch.clone, w), layer.bias, x.dtype) for _ in range(count)]
    runs = round_robin([partial(op, *operands) for operands in sets])
    about = f"{by(name)}, only the product of quantized tokens"
    return Candidate(f"{name} product", runs, sum(t.nbytes for t in w), about)


def peers(plain: nn.Linear, x: Tensor, count: int) -> Iterator[Candidate]:
    """The bfloat16 layer, torch's own 8-bit products, and libraries that are installed."""
    k, n = plain.in_features, plain.out_features
    bf16 = by("bf16")
    yield Candidate("bf16", repeat_layer(plain, x, count), plain.weight.nbytes, bf16)
    on_cpu = x.device.type == "cpu"
    if on_cpu or (len(x) > 16 and k % 8 == n % 8 == 0):
        yield _int_mm(plain, x, count)
    if on_cpu:
        return
    if torch.cuda.get_device_capability(x.device) >= (8, 9) and k % 16 == n % 16 == 0:
        yield _scaled_mm(plain, x, count)
    for name, layer in other_libraries(plain).items():
        yield _repeated(name, layer, x, count)


def _with_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias


def _int_mm(plain: nn.Linear, x: Tensor, count: int) -> Candidate:
    x_q, x_scale = rounded(x.float())
    weight, scale = rounded(plain.weight.detach().float())
    runs = [partial(torch._int_mm, x_q.clone(), weight.clone().T) for _ in range(count)]

    def finish(y: Tensor) -> Tensor:
        return _with_bias(y.float() * x_scale[:, None] * scale, plain.bias)

    about = f"{versions('torch')}: int8 product of quantized tokens, no scales, no bias"
    return Candidate("_int_mm, bare", round_robin(runs), weight.numel(), about, finish)


def _scaled_mm(plain: nn.Linear, x: Tensor, count: int) -> Candidate:
    e4m3 = torch.float8_e4m3fn

    def scaled(rows: Tensor) -> tuple[Tensor, Tensor]:
        scale = rows.float().abs().amax(1, keepdim=True) / torch.finfo(e4m3).max
        return (rows.float() / scale).to(e4m3), scale

    (a, rows), (b, columns) = scaled(x), scaled(plain.weight.detach())
    run = partial(torch._scaled_mm, scale_a=rows, scale_b=columns.T, out_dtype=x.dtype)
    runs = [partial(run, a.clone(), b.clone().T) for _ in range(count)]
    about = f"{versions('torch')}: E4M3 product of quantized tokens, no bias"

    def finish(y: Tensor) -> Tensor:
        return _with_bias(y, plain.bias)

    return Candidate("_scaled_mm e4m3", round_robin(runs), b.numel(), about, finish)


def repeat_layer(layer: nn.Module, x: Tensor, count: int) -> Callable[[], object]:
    """Runs of ``count`` copies of a layer and its input, one after the other."""
    layers = [layer, *(copy.deepcopy(layer) for _ in range(count - 1))]
    return round_robin([partial(one, x.clone()) for one in layers])
