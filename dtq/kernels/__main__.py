# SPDX-License-Identifier: Apache-2.0
"""``python -m dtq.kernels``: compile the libraries ahead of time, into the package."""

from __future__ import annotations

from dtq.kernels import CPU
from dtq.kernels.compile import cuda, nvcc
from dtq.kernels.compile.compiler import Unavailable

print(CPU.build(CPU.packaged()))
try:
    nvcc.find()
except Unavailable as reason:
    print(f"{reason}: no CUDA library")
else:
    print(cuda.build_ahead())
