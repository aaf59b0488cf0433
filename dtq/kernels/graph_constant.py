# SPDX-License-Identifier: Apache-2.0
"""Functions whose result is a constant in a compiled graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])


def graph_constant(function: F) -> F:
    """``torch.compiler.assume_constant_result``, without its import of ``torch._dynamo``.

    That import takes as long as that of torch, and nothing else of ``dtq.kernels`` needs it.

    Args:
        function: ``torch.compile`` calls it while it traces, and puts the result into the graph.

    Returns:
        The same function.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
