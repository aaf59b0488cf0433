# SPDX-License-Identifier: Apache-2.0
"""The rotation of ConvRot in other engines' files: which layers have it, and where columns move."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dtq.engines.target import StoredLayer
from dtq.errors import CheckpointError
from dtq.linalg.hadamard import regular_block_for, regular_columns, regular_signs


def convrot_reason(layer: StoredLayer) -> str | None:
    """Why the input transform of a layer is none that most formats have; None if it is.

    They have the rotation of ConvRot: dtq's, up to a signed permutation of its output.
    """
    transform = layer.transform()
    if transform is None:
        return None
    block, scale = transform.block, transform.scale
    if block > 1 and regular_block_for(block, block) == block and transform.perm is None:
        signs = regular_signs(block).repeat(len(scale) // block).to(scale)
        if transform.num_rotations == 1 and torch.equal(scale, signs):
            return None
    return "its input has smoothing, random signs or another rotation than that of ConvRot"


def to_regular(codes: Tensor, block: int) -> Tensor:
    """Integer codes (N, K) under dtq's rotation as those under the regular one: ``codes A^T``."""
    grouped = codes.unflatten(1, (-1, block))
    sign = regular_signs(block).to(codes.dtype)
    return (grouped[..., regular_columns(block)] * sign).flatten(1)


def from_regular(codes: Tensor, block: int) -> Tensor:
    """Inverse of :func:`to_regular`."""
    sign = regular_signs(block).to(codes.dtype)
    return (codes.unflatten(1, (-1, block)) * sign)[..., regular_columns(block)].flatten(1)


def rotated_block(
    options: dict[str, Any], columns: int, where: str, *, always: bool = False
) -> int:
    """Block of the rotation in a marker, 1 without one.

    Args:
        options: the marker.
        columns: K.
        where: the layer, for messages.
        always: whether the format has no layers without a rotation.

    Raises:
        CheckpointError: it is not a power of 4 that divides K, or is off where it cannot be.
    """
    if not options.get("convrot", always):
        if always:
            raise CheckpointError(f"{where}: convrot is off, and {options['format']} always has it")
        return 1
    block = options.get("convrot_groupsize", 256)
    if (
        type(block) is not int
        or not 4 <= block <= 2**16
        or regular_block_for(block, block) != block
    ):
        raise CheckpointError(f"{where}: convrot_groupsize {block!r} is not a power of 4")
    if columns % block:
        raise CheckpointError(f"{where}: convrot_groupsize {block} does not divide K = {columns}")
    return block
