# SPDX-License-Identifier: Apache-2.0
"""Files of other engines: ``TARGETS`` lists what ``dtq export`` writes and dtq reads back."""

from __future__ import annotations

from dtq.engines import (
    comfy_fp8,
    comfy_int8,
    comfy_nvfp4,
    comfy_svdquant,
    comfy_w4a4,
    comfy_w4a8,
    gguf,
    modelopt,
    nunchaku_lite,
    onnx,
    openvino,
    torchao,
)
from dtq.engines.target import Contents, Limits, Loss, StoredLayer, Target
from dtq.errors import InputError, hint

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        comfy_int8.TARGET,
        comfy_w4a8.TARGET,
        comfy_w4a4.TARGET,
        comfy_nvfp4.TARGET,
        comfy_fp8.TARGET,
        comfy_svdquant.TARGET,
        gguf.TARGET,
        nunchaku_lite.TARGET,
        modelopt.TARGET,
        torchao.TARGET,
        onnx.TARGET,
        openvino.TARGET,
    )
}
"""Every target; a file is read by the first that recognizes it."""

__all__ = ["TARGETS", "Contents", "Limits", "Loss", "StoredLayer", "Target", "find_target"]


def find_target(name: str) -> Target:
    """The target of a name.

    Raises:
        InputError: there is none; says which there are.
    """
    if name not in TARGETS:
        words = hint(name, TARGETS, f"targets: {', '.join(TARGETS)}")
        raise InputError(f"{name!r} is not a target of dtq export; {words}")
    return TARGETS[name]
