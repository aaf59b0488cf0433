# SPDX-License-Identifier: Apache-2.0
"""``torch.ops.dtq`` exists where dtq and torch are imported: exported graphs call ops by name."""

from __future__ import annotations

import importlib


def declare() -> None:
    """Declare the ops; no library is loaded or compiled."""
    importlib.import_module("dtq.kernels.ops")
