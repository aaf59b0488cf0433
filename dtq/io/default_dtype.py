# SPDX-License-Identifier: Apache-2.0
"""The default dtype of torch, which inference scripts and user interfaces change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Let tensors that are made without a dtype have this one; the user's is restored at the end.

    Args:
        dtype: a float dtype.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
