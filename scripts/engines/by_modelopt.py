# SPDX-License-Identifier: Apache-2.0
"""ModelOpt's own quantizer with maximum calibration, which is by weights alone: tokens are dynamic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_free import Quantizer
from torch import nn

from dtq.engines import modelopt
from dtq.nn import QuantLinear


def load(path: Path, model: nn.Module) -> nn.Module:
    """The model of a folder, as ModelOpt's page says."""
    import modelopt.torch.opt as mto

    mto.enable_huggingface_checkpointing()
    kind: Any = type(model)
    return kind.from_pretrained(path, low_cpu_mem_usage=False).eval()


def make(made: nn.Module, floats: nn.Module, path: Path) -> nn.Module:
    """The float model in the formats of ``made``; in place."""
    import modelopt.torch.quantization as mtq

    entries: list[dict[str, Any]] = [modelopt.OFF]
    for name, layer in made.named_modules():
        if not isinstance(layer, QuantLinear):
            continue
        quantizers = {"weight_quantizer": modelopt.WEIGHT[layer.weight_format]}
        if layer.activation_format != "none":
            quantizers["input_quantizer"] = modelopt.TOKENS
        entries += [
            {"quantizer_name": f"{name}.{key}", "cfg": dict(cfg)} for key, cfg in quantizers.items()
        ]
    mtq.quantize(floats, {"quant_cfg": entries, "algorithm": "max"})
    mtq.compress(floats)
    return floats


def nbytes(model: nn.Module, path: Path) -> int:
    """Bytes of the tensors of a model."""
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())


QUANTIZER = Quantizer("modelopt", {"modelopt": "nvidia-modelopt"}, make, nbytes, load=load)
