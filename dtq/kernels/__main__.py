# SPDX-License-Identifier: Apache-2.0
"""``python -m dtq.kernels``: compile the libraries ahead of time, beside the package."""

from __future__ import annotations

from dtq.kernels import CPU
from dtq.kernels.compile import cuda
from dtq.kernels.compile.nvcc import find_nvcc

print(CPU.build(CPU.beside()))
if find_nvcc() is None:
    print("no nvcc on the path or in CUDA_HOME: no CUDA library")
else:
    print(cuda.ahead())
