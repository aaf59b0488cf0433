# SPDX-License-Identifier: Apache-2.0
"""Metrics of an output error, and which metric ranks which layers.

Ours, not the paper's: ViDiT-Q evaluates generated images with CLIPScore, DOVER and an optical-flow
score (2406.02540, sec. 3.4); these proxies read only the transformer's output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from dtq.linalg.relative_error import relative_error
from dtq.models import ROLES, InputGroup

Metric = Callable[[Tensor, Tensor], float]
"""``(reference, output) -> error >= 0`` of two outputs of the transformer, infinite if not finite.

Errors are squared and relative to the reference. Images are (B, C, H, W), videos (B, C, F, H, W),
packed latents (B, T, C); the tokens of the last are treated as a line.
"""


def mse(reference: Tensor, output: Tensor) -> float:
    """Relative squared error ``|output - reference|^2 / |reference|^2``."""
    return relative_error(output, reference)


def content(reference: Tensor, output: Tensor) -> float:
    """Error of the low frequencies: of moving averages over 4 x 4 pixels, or 4 tokens."""
    return _relative(_low(reference), _low(output), reference)


def fidelity(reference: Tensor, output: Tensor) -> float:
    """Error of the high frequencies: of the differences between neighbors."""
    if all(reference.shape[axis] == 1 for axis in _axes(reference)):
        return mse(reference, output)
    return _relative(_slopes(reference), _slopes(output), reference)


def temporal(reference: Tensor, output: Tensor) -> float:
    """Error of the differences between frames; ``fidelity`` where there are none."""
    if reference.ndim != 5 or reference.shape[2] == 1:
        return fidelity(reference, output)
    return _relative(reference.double().diff(dim=2), output.double().diff(dim=2), reference)


def text(reference: Tensor, output: Tensor) -> float:
    """Error of the guidance direction: one half of the batch minus the other.

    Both its angle and its length count, because the sampler multiplies it by the guidance scale.
    ``content`` where the batch has no halves.
    """
    if len(reference) % 2:
        return content(reference, output)
    (a, b), (c, d) = reference.double().chunk(2), output.double().chunk(2)
    return _relative(a - b, c - d, reference)


METRICS: dict[str, Metric] = {m.__name__: m for m in (mse, content, fidelity, temporal, text)}

GROUPS: dict[str, str] = {
    **{role: "text" for role in ROLES if role.startswith("xattn.")},
    **{role: "fidelity" for role in ROLES if role.startswith(("attn.", "ffn."))},
    **dict.fromkeys(("adaln", "embed", "head"), "content"),  # they affect every token equally
    "proj": "mse",
    "conv": "mse",
    "vocab": "mse",
    "other": "mse",
}
"""The metric that ranks the layers of a role (ours; see the module for the paper's metrics)."""


def groups_of(input_groups: Iterable[InputGroup]) -> dict[str, str]:
    """The metric of each input group.

    It follows from the role of the group's first linear; attention with "temporal" in its name has
    the metric ``temporal``.

    Returns:
        Name of an input group to a key of ``METRICS``.
    """
    groups = {}
    for group in input_groups:
        linear = group.linears[0]
        temporal = "temporal" in linear.name and linear.role.startswith("attn.")
        groups[group.name] = "temporal" if temporal else GROUPS[linear.role]
    return groups


def _relative(reference: Tensor, output: Tensor, whole: Tensor) -> float:
    """Mean squared error over the mean square of ``reference``, a component of ``whole``.

    A component without energy, such as the differences of still frames, counts as a millionth of
    the whole: its error is large then, not infinite.
    """
    reference, output, whole = reference.double(), output.double(), whole.double()
    power = torch.maximum(reference.square().mean(), 1e-6 * whole.square().mean())
    error = float((output - reference).square().mean() / power.clamp(min=1e-300))
    return error if math.isfinite(error) else math.inf


def _axes(x: Tensor) -> tuple[int, ...]:
    return (1,) if x.ndim == 3 else (-2, -1)


def _low(x: Tensor) -> Tensor:
    x = x.double()
    for axis in _axes(x):
        x = x.unfold(axis, min(4, x.shape[axis]), 1).mean(-1)
    return x


def _slopes(x: Tensor) -> Tensor:
    return torch.cat([x.double().diff(dim=axis).flatten() for axis in _axes(x)])
