# SPDX-License-Identifier: Apache-2.0
"""Store the text encoders of a pipeline in NF4 of bitsandbytes, in its own format.

The pipeline then loads where dtq is not installed. What is converted are the layers that dtq itself
would quantize; transformers and bitsandbytes do the conversion (QLoRA, 2305.14314, sec. 3).
"""

from __future__ import annotations

import math
import tempfile
from typing import Any

import torch
from torch import nn

from dtq.checkpoint.file_size import file_bytes
from dtq.evaluate.optional_packages import need
from dtq.models.linears import linears_of
from dtq.pipelines.loading import LoadedModel, text_encoders_of
from dtq.plan.layers import Plan
from dtq.recipe import Recipe
from dtq.recipe.resolve import TEXT_RECIPE
from dtq.stages.file_tensors import file_tensors
from dtq.stages.plan import plan
from dtq.stages.run import Run

GROUP = 64
"""Weights that share a scale; bitsandbytes' own default."""
NESTED_GROUP = 256
"""Scales that share a scale of the second level, which the 8-bit scales have."""
STATE_BYTES = 200
"""Most bytes of the text in which bitsandbytes describes a layer."""


def check_nf4() -> None:
    """Refuse a machine without bitsandbytes before any work.

    Raises:
        InputError: it is not installed.
    """
    need("bitsandbytes", "bitsandbytes")


def quantize_text_encoders_nf4(loaded: LoadedModel) -> dict[str, dict[str, int]]:
    """Replace the text encoders of a pipeline by ones with linears in NF4.

    Each of them is saved to a temporary folder and loaded again, once in its float dtype.

    Args:
        loaded: a model with its pipeline, which is changed.

    Returns:
        The report: component to ``layers``, ``bytes_before`` and ``bytes``.

    Raises:
        InputError: there is no text encoder, or bitsandbytes is not installed.
    """
    check_nf4()
    from transformers import BitsAndBytesConfig

    report = {}
    for text in text_encoders_of(loaded):
        layers, model = nf4_layers(text), text.model
        skipped = [name for name, _ in linears_of(model) if name not in layers]
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=text.dtype,
            llm_int8_skip_modules=skipped,
        )
        device, kind = next(model.parameters()).device, type(model)
        with tempfile.TemporaryDirectory(prefix="dtq-nf4-") as folder:
            model.save_pretrained(folder)  # type: ignore[operator]
            new: nn.Module = kind.from_pretrained(  # type: ignore[attr-defined]
                folder, quantization_config=config, dtype=text.dtype, device_map={"": device}
            )
        new.config._name_or_path = ""  # type: ignore[union-attr]  # the temporary folder
        report[text.component] = {
            "layers": len(layers),
            "bytes_before": _bytes(model),
            "bytes": _bytes(new),
        }
        loaded.pipeline.register_modules(**{text.component: new})  # type: ignore[union-attr]
    return report


def nf4_layers(text: LoadedModel) -> dict[str, tuple[int, int]]:
    """Names and shapes of the linears of a text encoder that are converted.

    Those that dtq would quantize, without narrow ones: bitsandbytes 0.50 cannot multiply a layer on
    a CPU whose inputs are not whole groups.
    """
    run = Run(text, Recipe.load(TEXT_RECIPE))
    plan(run)
    return {x.name: x.shape for x in run.plan.quantized() if x.shape[1] % GROUP == 0}


def nf4_bytes(text: LoadedModel) -> int:
    """Bytes that the file of a text encoder takes at most; the meta device will do."""
    tensors = file_tensors(text.model, Plan("", ()), text.dtype)
    for name, shape in nf4_layers(text).items():
        del tensors[f"{name}.weight"]
        weights = math.prod(shape)
        scales = math.ceil(weights / GROUP)
        parts = {
            "": ((weights // 2, 1), torch.uint8),
            ".absmax": ((scales,), torch.uint8),
            ".nested_absmax": ((math.ceil(scales / NESTED_GROUP),), torch.float32),
            ".nested_quant_map": ((256,), torch.float32),
            ".quant_map": ((16,), torch.float32),
            ".quant_state.bitsandbytes__nf4": ((STATE_BYTES,), torch.uint8),
        }
        tensors |= {f"{name}.weight{part}": spec for part, spec in parts.items()}
    return file_bytes(tensors, {"format": "pt"})


def _bytes(model: Any) -> int:
    return int(model.get_memory_footprint())
