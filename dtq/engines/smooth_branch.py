# SPDX-License-Identifier: Apache-2.0
"""What engines of SVDQuant layers have in common: a divisor of the input, and a branch.

Such engines divide the input by a bfloat16 vector, where dtq multiplies by one. For a bfloat16 x,
``1 / (1 / (1 / x))`` is ``1 / x`` if each division is rounded to bfloat16, so a vector of dtq comes
back from a file if it is itself such a reciprocal: the knob ``divisor`` of a smoothing method. The
two products differ by at most 2^-8 of the input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dtq.engines.target import StoredLayer
from dtq.errors import CheckpointError
from dtq.plan.layers import LayerPlan

SMOOTHED = ("int4-g64", "int4-g64")
"""Weight and activation format of the layers that have smoothing and a branch there."""
WITHOUT = f"only layers with {' weights and '.join(SMOOTHED)} activations have smoothing there"


def divided_by(layer: StoredLayer) -> Tensor:
    """The divisor of a layer's input, bfloat16 (K,); ones without smoothing."""
    scale = layer.tensors.get("pre_quant_scale")
    if scale is None:
        return torch.ones(layer.shape[1], dtype=torch.bfloat16)
    return _reciprocal(scale.reshape(-1))


def from_divisor(factor: Tensor, where: str) -> Tensor:
    """The vector that dtq multiplies the input by, bfloat16 (1, K).

    Raises:
        CheckpointError: the divisor is not positive and finite, or its reciprocal is not.
    """
    scale = _reciprocal(factor)
    if not bool((factor > 0).all() and scale.isfinite().all() and (scale > 0).all()):
        raise CheckpointError(f"{where}: holds values that the input cannot be divided by")
    return scale.reshape(1, -1)


def branch_of(layer: StoredLayer, rank: int = 0) -> tuple[Tensor, Tensor]:
    """The branch of a layer with zeros up to a rank.

    Args:
        layer: with a branch or without.
        rank: at least this; 0: the rank of the layer.

    Returns:
        bfloat16 (R, K) and (N, R).
    """
    rows, columns = layer.shape
    down = layer.tensors.get("proj_down", torch.zeros(0, columns, dtype=torch.bfloat16))
    up = layer.tensors.get("proj_up", torch.zeros(rows, 0, dtype=torch.bfloat16))
    more = max(0, rank - len(down))
    pad = torch.nn.functional.pad
    return pad(down, (0, 0, 0, more)), pad(up, (0, more))


def smooth_branch_reason(layer: StoredLayer) -> str | None:
    """Why an engine cannot run the input transform of a layer; None if it can."""
    transform = layer.transform()
    if transform is None:
        return None
    if (layer.spec.weight_format, layer.spec.activation_format) != SMOOTHED:
        return WITHOUT
    if transform.block > 1 or transform.perm is not None:
        return "its input is rotated or permuted, and this format has smoothing alone"
    scale = transform.scale
    again = _reciprocal(_reciprocal(scale))
    if not torch.equal(again, scale) or not bool((scale > 0).all()):
        return (
            "its smoothing vector is no reciprocal of a bfloat16 divisor; quantize with the knob "
            "divisor of its transform"
        )
    return None


def smoothing_reason(layer: LayerPlan) -> str | None:
    """Why a smoothing method may choose what such an engine does not run; None if it cannot."""
    transform = layer.transform
    if transform.name == "none":
        return None
    if (layer.weight_format, layer.activation_format) != SMOOTHED:
        return WITHOUT
    knobs = dict(transform.knobs)
    if knobs.get("divisor") and (transform.name != "search" or not knobs.get("rotate", True)):
        return None
    wanted = "divisor: true" if transform.name == "smooth" else "rotate: false, divisor: true"
    return (
        f"the engine has smoothing alone, and divides by a bfloat16 vector; "
        f"--set 'transform={{{transform.name}: {{{wanted}}}}}'"
    )


def _reciprocal(x: Tensor) -> Tensor:
    return (1 / x.float()).to(torch.bfloat16)
