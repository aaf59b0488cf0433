# SPDX-License-Identifier: Apache-2.0
"""The format on disk: a diffusers folder with safetensors files and their config."""

from dtq.checkpoint.reader import Reader, verify
from dtq.checkpoint.writer import write

__all__ = ["Reader", "verify", "write"]
