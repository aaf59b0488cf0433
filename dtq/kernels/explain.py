# SPDX-License-Identifier: Apache-2.0
"""Which kernel runs a layer, and why the others do not, in words."""

from __future__ import annotations

from dtq.kernels.compile.cuda import CUDA
from dtq.kernels.compile.format_codes import format_code
from dtq.kernels.compile.library import Library
from dtq.kernels.libraries import LIBRARIES
from dtq.kernels.table import KERNELS, Kernel, LinearProblem, pick


def explain(problem: LinearProblem, shape: tuple[int, int] | None = None) -> list[str]:
    """Why each kernel before the used one is not used, then what each device runs.

    Args:
        problem: what the layer asks for.
        shape: (N, K) of the layer, for a kernel whose choice on a GPU depends on it.
    """
    used = pick(problem)
    above = KERNELS[: KERNELS.index(used)]
    lines = [f"{kernel.name}: {kernel.unsupported_reason(problem)}" for kernel in above]
    lines.append(f"{used.name}: used")
    for library in LIBRARIES.values():
        line = on(used, library, problem)
        if library is CUDA and shape and used.by_shape and _compiled(used, library, problem):
            line += f" ({used.by_shape(problem, shape)})"
        lines.append(line)
    return lines


def on(kernel: Kernel, library: Library, problem: LinearProblem | None = None) -> str:
    """What a device runs for a kernel: the compiled ops of its library or the reference.

    Args:
        kernel: a row of ``KERNELS``.
        library: of the device.
        problem: what a layer asks for; None: any that the kernel supports.
    """
    if library is CUDA and kernel.on_gpu:
        other = next(row for row in KERNELS if row.name == kernel.on_gpu)
        return f"{on(other, library, problem)} (as {other.name})"
    compiled = _compiled(kernel, library, problem)
    form = library.describe() if compiled else "torch reference: no compiled form yet"
    return f"on the {library.title}: {form}"


def _compiled(kernel: Kernel, library: Library, problem: LinearProblem | None) -> bool:
    if problem and "dequantize" in kernel.ops and format_code(problem.weight_format) is None:
        return False  # the op decodes such a weight with torch
    return bool(kernel.ops) and set(kernel.ops) <= set(library.ops)
