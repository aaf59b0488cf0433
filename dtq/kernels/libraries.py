# SPDX-License-Identifier: Apache-2.0
"""The compiled libraries, one per kind of device."""

from __future__ import annotations

from dtq.kernels.compile.cpu import CPU
from dtq.kernels.compile.cuda import CUDA
from dtq.kernels.compile.library import Library

LIBRARIES: dict[str, Library] = {"cpu": CPU, "cuda": CUDA}
"""The library for a device, by torch's name of the device; other devices run the reference."""
