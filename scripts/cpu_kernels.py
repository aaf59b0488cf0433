# SPDX-License-Identifier: Apache-2.0
"""Time every format on this CPU: the smaller tables of docs/kernels.md.

    python scripts/cpu_kernels.py

CPU time of one thread, candidates interleaved, medians in milliseconds. ``dtq bench`` compares dtq
with other libraries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import nn

from dtq.bench.compare import Candidate, compare
from dtq.bench.cpu import conditions
from dtq.bench.layers import quantized, weight_only
from dtq.kernels import CPU
from dtq.kernels.compile import cpu

INT8 = ("int8-row", "int4-2l-g64", "int4-asym-row", "e2m1-row", "twinlog4-row", "int3-row",
        "int4-g64", "int4-asym-g128", "int8-asym-g128", "nf4-g64")  # fmt: skip
WEIGHT_ONLY = ("int8-row", "int4-asym-g64", "nf4-g64", "nvfp4", "vq-256x4", "trit-row", "int3-g64")
OTHER = {
    "int4-2l-g64 x int8": ("int4-2l-g64", "int8-row"),
    "e2m1-row x e2m1-row": ("e2m1-row", "e2m1-row"),
    "e2m1-row x fp8-row": ("e2m1-row", "fp8-row"),
    "nvfp4 x nvfp4": ("nvfp4", "nvfp4"),
    "mxfp4 x mxfp4": ("mxfp4", "mxfp4"),
    "int4-g64 x int4-g64": ("int4-g64", "int4-g64"),
    "int4-asym-g128 x int8-asym-g128": ("int4-asym-g128", "int8-asym-g128"),
}
"""Label to formats of weights and activations."""
SHAPE, MODULATION = (1152, 4608), (1152, 6912)
"""(K, N)."""
PRODUCTS = (
    (256, 1152, 1152),
    (256, 4608, 1152),
    (512, 1152, 4608),
    (512, 4608, 1152),
    (1024, 256, 1024),
)
"""(M, K, N)."""


@click.command(help=__doc__)
@click.option("--rounds", default=11, show_default=True)
def main(rounds: int) -> None:
    torch.set_num_threads(1)
    CPU.load()
    print(", ".join(f"{k} {v}" for k, v in conditions(rounds).items()), flush=True)
    with torch.no_grad():
        products(rounds)
        layer = nn.Linear(*SHAPE)
        layers = {name: quantized(layer, name) for name in INT8}
        time_layers(f"int8 activations, {SHAPE}", layers, layer, (1, 8, 64, 256, 1024), rounds)
        layers = {name: quantized(layer, *formats) for name, formats in OTHER.items()}
        time_layers(f"other activations, {SHAPE}", layers, layer, (1, 64, 256, 1024), rounds)
        layer = nn.Linear(*MODULATION)
        layers = {name: weight_only(layer, name) for name in WEIGHT_ONLY}
        time_layers(f"weight-only, {MODULATION}", layers, layer, (1, 2, 8, 16, 64), rounds)
        gelu(rounds)
        rotations(rounds)
        normalization(rounds)
        activation_formats(rounds)


def products(rounds: int) -> None:
    """Time the int8 product with its scales and bias, as a fraction of the peak of the registers."""
    print("\nw8a8_linear, share of the register peak")
    for m, k, n in PRODUCTS:
        x_q, weight = (
            torch.randint(-127, 128, size, dtype=torch.int8) for size in ((m, k), (n, k))
        )
        operands = (x_q, torch.rand(m), weight, torch.rand(n), torch.randn(n), torch.bfloat16)
        run = Candidate("dtq", partial(torch.ops.dtq.w8a8_linear, *operands), 0)
        (row,) = compare("product", m, [run], rounds, relative_to=())
        print(f"| {m} x {k} x {n} | {2 * m * k * n / row.seconds / cpu.peak():.2f} |", flush=True)


def time_layers(
    title: str, layers: dict[str, nn.Module], plain: nn.Linear, tokens: Iterable[int], rounds: int
) -> None:
    layers = {**layers, "bfloat16": nn.Linear(plain.in_features, plain.out_features).bfloat16()}
    print(f"\n{title}\n| M | {' | '.join(layers)} |\n| --- |{' --- |' * len(layers)}")
    for m in tokens:
        x = torch.randn(m, plain.in_features).bfloat16()
        runs = [Candidate(name, _call(layer, x), 0) for name, layer in layers.items()]
        results = compare(title, m, runs, rounds, relative_to=())
        print(f"| {m} | {' | '.join(f'{row.seconds * 1e3:.3g}' for row in results)} |", flush=True)


def _call(layer: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    return lambda: layer(x)


def gelu(rounds: int) -> None:
    x = torch.randn(512, 4608).bfloat16()
    runs = [
        Candidate("dtq", lambda: torch.ops.dtq.gelu(x), 0),
        Candidate("torch", lambda: F.gelu(x, approximate="tanh"), 0),
    ]
    results = compare("gelu", 512, runs, rounds, relative_to=())
    print("\nGELU of 512 x 4608:", ", ".join(f"{r.name} {r.seconds * 1e3:.3g}" for r in results))


def rotations(rounds: int) -> None:
    """Time the quantization of an input with one and two rotations, and with a permutation."""
    x = torch.randn(512, 4608).bfloat16()
    perm = torch.randperm(4608).int()

    def quantize(
        ops: Any, num_rotations: int, perm: torch.Tensor | None = None
    ) -> Callable[[], object]:
        return lambda: ops.binned_quantize_rows(x, None, perm, 512, num_rotations, None, None)

    runs = [
        Candidate("one rotation", quantize(torch.ops.dtq, 1), 0),
        Candidate("two", quantize(torch.ops.dtq, 2), 0),
        Candidate("two, permuted", quantize(torch.ops.dtq, 2, perm), 0),
        Candidate("two in torch", quantize(torch.ops.dtq_reference, 2), 0),
    ]
    results = compare("rotations", 512, runs, rounds, relative_to=())
    print("\nQuantizing 512 x 4608:", ", ".join(f"{r.name} {r.seconds * 1e3:.3g}" for r in results))
    print("Quantizing with one rotation:")
    for columns, block in ((1152, 128), (4608, 512), (3072, 1024)):
        part = torch.randn(512, columns).bfloat16()
        run = Candidate("one", partial(torch.ops.dtq.quantize_rows, part, None, block, None), 0)
        (row,) = compare("rotation", 512, [run], rounds, relative_to=())
        print(f"  512 x {columns} in blocks of {block}: {row.seconds * 1e3:.3g}", flush=True)


def normalization(rounds: int) -> None:
    """Time LayerNorm, modulation and quantization of two images: fused, by inductor, in eager mode."""
    print("\nLayerNorm, modulation and quantization of 1152 channels")
    for tokens in (256, 1024):
        x = torch.randn(2, tokens, 1152).bfloat16()
        scale, shift = torch.randn(2, 2, 1152).bfloat16()

        def apart(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> Any:
            x = F.layer_norm(x, (1152,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
            return torch.ops.dtq.quantize_rows(x.reshape(-1, 1152), None, 1, None)

        def fused(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> Any:
            x = x.reshape(-1, 1152)
            options = (None, None, 1, 1, None, None)  # no transform, one scale per token
            return torch.ops.dtq.norm_quantize_rows(x, scale, shift, 1e-6, *options)

        ways = {"fused": fused, "inductor": torch.compile(apart), "eager": apart}
        runs = [Candidate(name, partial(way, x, scale, shift), 0) for name, way in ways.items()]
        results = compare("normalization", 2 * tokens, runs, rounds, relative_to=())
        times = ", ".join(f"{r.name} {r.seconds * 1e3:.3g}" for r in results)
        print(f"  2 x {tokens} tokens: {times}", flush=True)


def activation_formats(rounds: int) -> None:
    """Time the fake-quantization of an input in the activation formats other than int8."""
    x = torch.randn(1024, 1152).bfloat16()
    names = ("int4-g64", "int4-asym-g64", "int8-asym-g128", "fp8-row", "nvfp4", "mxfp4")

    def fake_quantize(ops: Any, name: str) -> Callable[[], object]:
        return lambda: ops.round_rows(x, None, None, 64, 1, name, torch.bfloat16)

    print("\nRounding 1024 x 1152, rotated in blocks of 64: dtq, torch")
    for name in names:
        runs = [
            Candidate("dtq", fake_quantize(torch.ops.dtq, name), 0),
            Candidate("torch", fake_quantize(torch.ops.dtq_reference, name), 0),
        ]
        mine, theirs = (
            r.seconds * 1e3 for r in compare("rounding", 1024, runs, rounds, relative_to=())
        )
        print(f"  {name}: {mine:.3g}, {theirs:.3g}")


if __name__ == "__main__":
    main()
