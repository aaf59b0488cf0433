# SPDX-License-Identifier: Apache-2.0
"""``dtq bench``: quantized layers beside float ones, timed on this machine."""

from __future__ import annotations

import json
from pathlib import Path

import click
import torch

from dtq.bench.compare import ratios
from dtq.bench.cpu import SUITES
from dtq.cli.output import print_bench, print_race
from dtq.evaluate.optional_packages import need
from dtq.evaluate.report import plots
from dtq.io.atomic import atomic_write
from dtq.kernels import LIBRARIES


@click.command("bench")
@click.option("--suite", type=click.Choice(["gemm", "e2e"]), default="gemm", show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="The GPU where there is one.")
@click.option(
    "--quick", is_flag=True, help="Fewer sizes; blocks of the large model, not all of it."
)
@click.option("--rounds", default=15, show_default=True, type=click.IntRange(2))
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1))
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="FILE for every figure.")
@click.option("--plot", type=click.Path(path_type=Path), help="FILE.svg for a chart of the ratios.")
def bench(
    suite: str,
    device: str | None,
    quick: bool,
    rounds: int,
    threads: int,
    json_file: Path | None,
    plot: Path | None,
) -> None:
    """Time quantized layers beside float ones on this machine.

    gemm: single linears. e2e: one denoising step of models with random weights. Beside float32 and
    bfloat16 stand torch._int_mm and, where installed, torchao, optimum-quanto and bitsandbytes.

    \b
    dtq bench --quick
    dtq bench --suite e2e --device cuda
    """
    from dtq.bench import gpu

    if plot is not None:
        need("matplotlib", "matplotlib")  # before minutes of measuring
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        gpu.gpu()
    LIBRARIES[device].load()
    suites = gpu.SUITES if device == "cuda" else SUITES
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        result = suites[suite](quick=quick, rounds=rounds, progress=print_race)
    finally:
        torch.set_num_threads(before)
    if json_file is not None:
        atomic_write(json_file, json.dumps(result.to_json(), indent=1) + "\n")
    if plot is not None:
        atomic_write(plot, plots.bench(ratios(result, "w4a8"), "w4a8"))
    print_bench(result)
