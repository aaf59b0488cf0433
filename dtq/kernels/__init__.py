# SPDX-License-Identifier: Apache-2.0
"""The ops and the table of kernels that implement a quantized product."""

from __future__ import annotations

from dtq.kernels.build import load
from dtq.kernels.table import KERNELS, Kernel, Task, explain, on_cpu, pick

__all__ = ["KERNELS", "Kernel", "Task", "explain", "load", "on_cpu", "pick"]
