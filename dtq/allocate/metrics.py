# SPDX-License-Identifier: Apache-2.0
"""What a damaged output looks like to one metric, and which metric ranks which layers.

Ours, not the paper's: ViDiT-Q judges generated pictures with CLIPScore, DOVER and an optical-flow
score (2406.02540, sec. 3.4); these proxies read the transformer's output alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from dtq.models import ROLES, InputGroup
from dtq.pipelines.recorded_calls import relative_error

Metric = Callable[[Tensor, Tensor], float]
"""``(want, got) -> damage >= 0`` on two outputs of the transformer, infinite if not finite.

Pictures are (B, C, H, W), videos (B, C, F, H, W), packed latents (B, T, C); the tokens of the last
are taken as a line.
"""


def mse(want: Tensor, got: Tensor) -> float:
    """Relative squared error ``|got - want|^2 / |want|^2``."""
    return relative_error(got, want)


def content(want: Tensor, got: Tensor) -> float:
    """Error of the low frequencies: of moving averages over 4 x 4 pixels, or 4 tokens."""
    return _relative(_low(want), _low(got), want)


def fidelity(want: Tensor, got: Tensor) -> float:
    """Error of the high frequencies: of the differences between neighbours."""
    if all(want.shape[axis] == 1 for axis in _axes(want)):
        return mse(want, got)
    return _relative(_slopes(want), _slopes(got), want)


def temporal(want: Tensor, got: Tensor) -> float:
    """Error of the differences between frames; ``fidelity`` where there are none."""
    if want.ndim != 5 or want.shape[2] == 1:
        return fidelity(want, got)
    return _relative(want.double().diff(dim=2), got.double().diff(dim=2), want)


def text(want: Tensor, got: Tensor) -> float:
    """Error of the guidance direction: of one half of the batch less the other.

    Both its angle and its length count, since the sampler multiplies it by the guidance scale.
    ``content`` where the batch has no halves.
    """
    if len(want) % 2:
        return content(want, got)
    (a, b), (c, d) = want.double().chunk(2), got.double().chunk(2)
    return _relative(a - b, c - d, want)


METRICS: dict[str, Metric] = {
    "mse": mse,
    "content": content,
    "fidelity": fidelity,
    "temporal": temporal,
    "text": text,
}

GROUPS: dict[str, str] = {
    **{role: "text" for role in ROLES if role.startswith("xattn.")},
    **{role: "fidelity" for role in ROLES if role.startswith(("attn.", "ffn."))},
    **dict.fromkeys(("adaln", "embed", "head"), "content"),  # they touch every token alike
    "other": "mse",
}
"""The metric that ranks the layers of a role (ours, for the paper's metrics see the module)."""


def groups_of(input_groups: Iterable[InputGroup]) -> dict[str, str]:
    """The metric of each site, by the role of its first linear and by name for attention in time.

    Returns:
        Name of a site to a key of ``METRICS``.
    """
    first = {site.name: site.linears[0] for site in input_groups}
    return {
        name: "temporal"
        if "temporal" in linear.name and linear.role.startswith("attn.")
        else GROUPS[linear.role]
        for name, linear in first.items()
    }


def _relative(want: Tensor, got: Tensor, whole: Tensor) -> float:
    """Mean squared error over the mean square of ``want``, a part of ``whole``.

    A part without energy, such as the differences of still frames, counts as a millionth of the
    whole: its damage is large then, not infinite.
    """
    want, got, whole = want.double(), got.double(), whole.double()
    scale = torch.maximum(want.square().mean(), 1e-6 * whole.square().mean()).clamp(min=1e-300)
    error = float((got - want).square().mean() / scale)
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
