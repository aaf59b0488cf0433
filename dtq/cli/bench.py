# SPDX-License-Identifier: Apache-2.0
"""``dtq bench``: quantized layers compared with float ones, timed on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dtq.cli import options as opt
from dtq.cli.output import or_dash, size, table

if TYPE_CHECKING:
    from dtq.bench.compare import BenchRow, Result


# fmt: off
_options = opt.combined(
    click.option("--suite", type=click.Choice(["gemm", "e2e", "attention"]), default="gemm",
                 help="What to time: gemm is single linears, e2e one denoising step of models with "
                      "random weights, attention int8 attention and that of torch."),
    click.option("--device", type=click.Choice(["cpu", "cuda"]),
                 help="Device to time. Default: cuda if there is a GPU, else cpu."),
    click.option("--case", metavar="TEXT",
                 help="Time only cases whose names contain this text, as '256 tokens' or "
                      "'1152 x 4608'. Default: all."),
    opt.flag("--quick", help="Time fewer sizes, and only blocks of the large model."),
    click.option("--rounds", default=15, type=click.IntRange(2),
                 help="Number of interleaved measurements."),
    opt.count("--threads", default=1, help="Number of CPU threads."),
    opt.json(help="Print the result as JSON, without tables."),
    opt.output(help="File to write the result to, as JSON. Default: not written."),
    opt.path("--plot", help="SVG file to write a chart of the ratios to. Default: not written."),
)
# fmt: on


@click.command()
@_options
def bench(
    suite: str,
    device: str | None,
    case: str | None,
    quick: bool,
    rounds: int,
    threads: int,
    as_json: bool,
    output: Path | None,
    plot: Path | None,
) -> None:
    """Time quantized and float layers on this machine.

    It compares dtq with float32, bfloat16, torch._int_mm and other libraries that are installed:
    torchao, optimum-quanto, bitsandbytes and ggml for linears, OpenVINO for models on a CPU
    (pip install 'dtq[bench]'). Their rounds are interleaved, so that noise of the machine falls on
    all. "error" is the relative squared error of the output, compared with float32 on the same
    input. One thread is timed by CPU time of the process, several by wall time.

    \b
    dtq bench --quick
    dtq bench --suite e2e -o bench.json --plot bench.svg
    dtq bench --suite attention
    dtq bench --suite e2e --case PixArt --threads 2
    dtq bench --suite e2e --device cuda --json -o bench.json
    """
    import torch

    from dtq.bench import compare, cpu, gpu
    from dtq.errors import InputError
    from dtq.evaluate.optional_packages import need
    from dtq.evaluate.report import plots
    from dtq.io.atomic import atomic_write
    from dtq.kernels import LIBRARIES

    if plot is not None:
        need("matplotlib", "matplotlib")  # before minutes of measuring
    suites = {"cpu": cpu.SUITES, "cuda": gpu.SUITES}
    available = "cuda" if torch.cuda.is_available() and suite in gpu.SUITES else "cpu"
    device = device or available
    if suite not in suites[device]:
        raise InputError(f"--suite {suite} is for CPUs: add --device cpu")
    if device == "cuda":
        gpu.gpu()
    LIBRARIES[device].load()
    run = suites[device][suite]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        progress = None if as_json else _print_case
        result = run(quick=quick, rounds=rounds, case=case or "", progress=progress)
    finally:
        torch.set_num_threads(before)
    text = json.dumps(result.to_json(), indent=1)
    if output is not None:
        atomic_write(output, f"{text}\n")
    if plot is not None:
        atomic_write(plot, plots.bench(compare.groups(result, "w4a8"), "w4a8"))
    if as_json:
        click.echo(text)
    else:
        _print(result)


def _print_case(rows: Sequence[BenchRow]) -> None:
    """Print one size as soon as it is measured."""
    from dtq.bench.attention import REFERENCE
    from dtq.bench.compare import PEER, fastest
    from dtq.bench.layers import RECIPES

    shares = any(row.share is not None for row in rows)
    peer = fastest(rows, (PEER,))
    measured = {row.name for row in rows}
    references = [name for name in (*RECIPES, REFERENCE) if name in measured]
    references += [peer.name] if peer else []
    head = [f"{rows[0].case}, M {rows[0].tokens}", "error", "ms", "weights"]
    head += [*(["of peak"] if shares else []), *(f"/ {name}" for name in references), "by"]
    table(head, [_cells(row, references, shares) for row in rows])
    click.echo()


def _cells(row: BenchRow, references: Iterable[str], shares: bool) -> list[str]:
    weights = "-" if row.bytes is None else size(row.bytes)
    cells = [row.name, or_dash(row.error, ".1e"), f"{row.seconds * 1e3:.3f}", weights]
    if shares:
        cells.append(or_dash(row.share, ".0%"))
    for name in references:
        low, middle, high = row.ratio.get(name, (0.0, 0.0, 0.0))
        cells.append(f"{middle:.2f} ({low:.2f}-{high:.2f})" if name in row.ratio else "1")
    return [*cells, row.about]


def _print(result: Result) -> None:
    """Print geometric means over the cases, the conditions, and a sentence."""
    from dtq.bench.compare import geometric_means, peer_verdicts, verdict
    from dtq.bench.layers import RECIPES

    for recipe in RECIPES:
        means = geometric_means(result.rows, recipe)
        if not means:
            continue
        tokens, others = sorted({t for t, _ in means}), list(dict.fromkeys(n for _, n in means))
        head = (f"time / {recipe}", *(f"M {t}" for t in tokens))
        table(head, [(n, *(or_dash(means.get((t, n)), ".2f") for t in tokens)) for n in others])
        click.echo()
    click.echo(", ".join(f"{key} {value}" for key, value in result.conditions.items()))
    click.echo("\n".join(filter(None, [*peer_verdicts(result.rows), verdict(result.rows)])))
