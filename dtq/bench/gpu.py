# SPDX-License-Identifier: Apache-2.0
"""The GPU suites: linears (``gpu_linears.py``) and whole models.

Compiled models are captured in a CUDA graph, as linears are, so no candidate pays for launches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from dtq.bench.cases import (
    Inputs,
    calibration_calls,
    cast_floats,
    dit,
    flux,
    quantized_model,
)
from dtq.bench.compare import (
    BenchRow,
    Candidate,
    Progress,
    Result,
    compare,
    first_output,
    linear_name,
    run_all,
)
from dtq.bench.gpu_linears import compare_linears, conditions
from dtq.bench.other_libraries import by
from dtq.bench.timer import clock_of
from dtq.errors import InputError

SHAPES = ((1152, 1152), (1152, 4608), (4608, 1152), (3072, 3072), (3072, 12288), (12288, 3072))
"""(K, N) of DiT-XL and FLUX."""
TOKENS = (1, 16, 64, 256, 1024, 4096)
MODULATION = {"w8a8": "keep", "w4a8": "int4-g64"}
"""Weight-only format of the modulation linears; ``keep``: they stay in bfloat16."""


def gpu() -> torch.device:
    """The current GPU.

    Raises:
        InputError: there is none.
    """
    if not torch.cuda.is_available():
        raise InputError("no GPU that torch can use for CUDA suites; --device cpu runs the others")
    return torch.device("cuda", torch.cuda.current_device())


def gemm(device: torch.device, quick: bool, rounds: int, case: str) -> Iterator[list[BenchRow]]:
    """Whole linears, bfloat16 in to bfloat16 out, and the bare products.

    Args:
        device: where they run.
        quick: fewer sizes.
        rounds: of each comparison, at least 2.
        case: only comparisons whose names contain this text.
    """
    for k, n in [s for s in (SHAPES[::2] if quick else SHAPES) if case in linear_name(*s)]:
        for m in TOKENS[::2] if quick else TOKENS:
            yield compare_linears(m, k, n, rounds, device)


def e2e(device: torch.device, quick: bool, rounds: int, case: str) -> Iterator[list[BenchRow]]:
    """One denoising step of models with random weights, eager and compiled.

    Args:
        device: where they run.
        quick: fewer blocks.
        rounds: of each comparison, at least 2.
        case: only comparisons whose names contain this text.
    """
    for name, make in (("flux shape", flux), ("dit shape", dit)):
        if case not in name:
            continue
        model, inputs, tokens = make(device, quick)
        yield compare_models(name, tokens, model, inputs, rounds)
        del model, inputs  # frees them before the next model is built


def suite(
    comparisons: Callable[[torch.device, bool, int, str], Iterator[list[BenchRow]]],
    *,
    quick: bool,
    rounds: int,
    case: str = "",
    progress: Progress | None,
    device: torch.device | None = None,
) -> Result:
    """Run a suite on a device.

    Args:
        comparisons: :func:`gemm` or :func:`e2e`.
        quick: fewer sizes, fewer blocks.
        rounds: of each comparison, at least 2.
        case: only comparisons whose names contain this text.
        progress: called after each comparison.
        device: None: the current GPU.

    Returns:
        All rows.

    Raises:
        InputError: ``device`` is None, and there is no GPU; or no name contains ``case``.
    """
    device = device or gpu()
    rows = run_all(comparisons(device, quick, rounds, case), progress, case)
    return Result(comparisons.__name__, conditions(rounds, device), rows)


SUITES = {each.__name__: partial(suite, each) for each in (gemm, e2e)}


# -------------------------------------------------------------------------------------- models


def compare_models(
    case: str, tokens: int, model: nn.Module, inputs: Inputs, rounds: int
) -> list[BenchRow]:
    """Time a step of the float model and of its quantized copies, eager and compiled.

    Args:
        case: name of the rows.
        tokens: of a sample.
        model: bfloat16, in evaluation mode. On a GPU it is compiled, too.
        inputs: keyword arguments of its forward.
        rounds: at least 2.

    Returns:
        Rows with ratios to the quantized copies. Their bytes are the most that is allocated during
        a step on a GPU, else those of the parameters.
    """
    device = next(model.parameters()).device
    with torch.no_grad():
        full, given = copy.deepcopy(model).float(), cast_floats(inputs, torch.float32)
        reference = first_output(full(**given, return_dict=False))
        del full
    calls = calibration_calls(inputs)
    models = {name: quantized_model(model, name, calls, fmt) for name, fmt in MODULATION.items()}
    candidates = []
    for name, variant in ({"bf16": model} | models).items():
        size, about = _footprint(variant, inputs), by(name)
        run = partial(variant, **inputs, return_dict=False)
        candidates.append(Candidate(name, run, size, about))
        if device.type == "cuda":
            backend = "inductor" if variant is model else "dtq"
            fast: Any = torch.compile(variant, backend=backend)
            run, about = partial(fast, **inputs, return_dict=False), f"{about}, by {backend}"
            candidates.append(Candidate(f"{name} compiled", run, size, about))
    names = [c.name for c in candidates if not c.name.startswith("bf16")]
    return compare(case, tokens, candidates, rounds, clock_of(device), names, reference)


@torch.no_grad()
def _footprint(model: nn.Module, inputs: Inputs) -> int:
    parameters = sum(p.nbytes for p in model.parameters())
    device = next(model.parameters()).device
    if device.type != "cuda":
        return parameters
    model(**inputs)  # what the first run keeps counts as allocated before
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    model(**inputs)
    torch.cuda.synchronize(device)
    # the models of the other rows are allocated, too: count what this step adds, and its weights
    return parameters + torch.cuda.max_memory_allocated(device) - before
