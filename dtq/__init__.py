# SPDX-License-Identifier: Apache-2.0
"""dtq quantizes diffusion transformers after training, and proves that they did not get worse.

Importing it teaches diffusers to load dtq checkpoints, and ``torch.compile`` the backend "dtq".
"""

from __future__ import annotations

from diffusers.utils import is_peft_available

from dtq.api import quantize
from dtq.api import quantize_while_loading as _quantize_while_loading
from dtq.checkpoint.config import DTQConfig
from dtq.demo.outliers import inject_outliers
from dtq.errors import CheckpointError, DtqError, InputError, RecipeError
from dtq.formats import FORMATS
from dtq.integrations import diffusers as _diffusers
from dtq.integrations import torch_compile as _fusion
from dtq.integrations.terdit import load_ternary
from dtq.nn import QuantLinear
from dtq.recipe.resolve import Recipe
from dtq.version import __version__

_diffusers.register(_quantize_while_loading)
_fusion.register()
if is_peft_available():
    from dtq.integrations import peft as _lora

    _lora.register()

__all__ = [
    "FORMATS",
    "CheckpointError",
    "DTQConfig",
    "DtqError",
    "InputError",
    "QuantLinear",
    "Recipe",
    "RecipeError",
    "__version__",
    "inject_outliers",
    "load_ternary",
    "quantize",
]
