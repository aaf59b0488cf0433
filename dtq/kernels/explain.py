# SPDX-License-Identifier: Apache-2.0
"""Which kernel runs a layer and why not another, in words."""

from __future__ import annotations

from dtq.kernels.compile.cuda import CUDA
from dtq.kernels.compile.library import Library
from dtq.kernels.libraries import LIBRARIES
from dtq.kernels.table import KERNELS, Kernel, LinearProblem


def explain(problem: LinearProblem, shape: tuple[int, int] | None = None) -> list[str]:
    """One line per kernel down to the one that is used, with the reason of each refusal.

    Then one for each device: what it runs there, and why not something faster.

    Args:
        shape: (N, K) of the layer, for what depends on it.
    """
    lines: list[str] = []
    for kernel in KERNELS:
        reason = kernel.unsupported_reason(problem)
        if reason is None:
            lines.append(f"{kernel.name}: used")
            return lines + [_for(problem, shape, kernel, library) for library in LIBRARIES.values()]
        lines.append(f"{kernel.name}: {reason}")
    raise AssertionError("the last kernel fits everything")


def on(kernel: Kernel, library: Library) -> str:
    """What a kernel runs on a device."""
    if library is CUDA and kernel.on_gpu:
        other = next(row for row in KERNELS if row.name == kernel.on_gpu)
        return f"{on(other, library)} (as {other.name})"
    where = f"on the {library.title}"
    if not _has(kernel, library):
        return f"{where}: torch reference: no compiled form yet"
    return f"{where}: {library.describe()}"


def _for(
    problem: LinearProblem, shape: tuple[int, int] | None, kernel: Kernel, library: Library
) -> str:
    said = on(kernel, library)
    if library is CUDA and shape and kernel.by_shape and _has(kernel, library):
        said += f" ({kernel.by_shape(problem, shape)})"
    return said


def _has(kernel: Kernel, library: Library) -> bool:
    return bool(kernel.ops) and all(name in library.ops for name in kernel.ops)
