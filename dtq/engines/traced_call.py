# SPDX-License-Identifier: Apache-2.0
"""The call with which a model is traced to a graph: what of it becomes a part of the graph."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

ARGUMENTS = "dtq_arguments"
"""Key of a graph's config: see :func:`constants_of`."""
SWITCHES = ("return_dict",)
"""Arguments of a forward that do not change its numbers."""


def constants_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call that tracing makes a part of the graph, as plain data.

    Args:
        arguments: of the call, by name.

    Returns:
        Those that are neither a tensor nor empty nor one of ``SWITCHES``.
    """
    plain = {name: _plain(value) for name, value in arguments.items() if name not in SWITCHES}
    return {name: value for name, value in plain.items() if value is not None}


def _plain(value: Any) -> Any:
    """A value as JSON gives it back; None for a tensor and for what is empty."""
    if value is None or isinstance(value, Tensor) or value in ((), [], {}):
        return None
    return json.loads(json.dumps(value, default=repr))
