# SPDX-License-Identifier: Apache-2.0
"""Estimates of file size, memory, disk and time, made before a run starts."""

from dtq.estimate.size import Estimate, estimate

__all__ = ["Estimate", "estimate"]
