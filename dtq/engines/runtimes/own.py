# SPDX-License-Identifier: Apache-2.0
"""Files of every engine by dtq's own layers and kernels."""

from __future__ import annotations

from torch import nn

from dtq.engines import TARGETS
from dtq.engines.load import filled
from dtq.engines.runtimes.engine import Engine, EngineFile, unquantized


def load(file: EngineFile) -> nn.Module:
    """The model as :func:`dtq.load` gives it."""
    return filled(unquantized(file), file.contents, file.path.stem)


ENGINE = Engine("dtq", tuple(n for n, target in TARGETS.items() if target.read), {}, load)
