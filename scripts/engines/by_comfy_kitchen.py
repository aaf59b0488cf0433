# SPDX-License-Identifier: Apache-2.0
"""comfy-kitchen's own quantizers, with which ComfyUI's files are made.

On a CPU the package multiplies FP8 and NVFP4 weights with float tokens: these rows compare weights.
"""

from __future__ import annotations

from pathlib import Path

from data_free import Quantizer, bytes_of_weights
from torch import nn

from dtq.models.linears import matrix_of
from dtq.nn import QuantLinear

LAYOUTS = {
    "int8-row": ("TensorWiseINT8Layout", {"per_channel": True}),
    "lut4-2l-g16": ("AsymW4A8Int8Layout", {}),
    "int4-narrow-row": ("TensorCoreConvRotW4A4Layout", {}),
    "nvfp4-46": ("TensorCoreNVFP4Layout", {}),
    "fp8-matrix": ("TensorCoreFP8Layout", {}),
}
"""By weight format: the layout of comfy-kitchen, and the options of its quantizer."""


def make(made: nn.Module, floats: nn.Module, path: Path) -> nn.Module:
    """The float model in the layouts of ``made``; in place."""
    from comfy_kitchen.tensor import QuantizedTensor

    for name, layer in list(made.named_modules()):
        if not isinstance(layer, QuantLinear):
            continue
        layout, options = LAYOUTS[layer.weight_format]
        block = layer.spec.hadamard_block_size
        if block > 1:
            options = {**options, "convrot_groupsize": block}
            if layer.weight_format == "int8-row":
                options["convrot"] = True
        old = floats.get_submodule(name)
        weight = QuantizedTensor.from_float(matrix_of(old).detach().float(), layout, **options)
        if layer.activation_format == "none":
            weight = weight.dequantize()
        old.weight = nn.Parameter(weight, requires_grad=False)
    return floats


QUANTIZER = Quantizer("comfy-kitchen", {"comfy_kitchen": "comfy-kitchen"}, make, bytes_of_weights)
