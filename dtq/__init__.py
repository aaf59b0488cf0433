# SPDX-License-Identifier: Apache-2.0
"""dtq quantizes diffusion transformers after training, and measures what that changes.

``import dtq`` lets diffusers load dtq checkpoints and gives ``torch.compile`` the backend "dtq". It
imports neither: a name of dtq is imported when it is first used, and other libraries are patched
when they are imported (``dtq.integrations``).
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from dtq import integrations as _integrations
from dtq.version import __version__

if TYPE_CHECKING:
    from dtq.api import quantize as quantize
    from dtq.checkpoint.config import DTQConfig as DTQConfig
    from dtq.demo.outliers import inject_outliers as inject_outliers
    from dtq.engines.export import export as export
    from dtq.engines.load import load as load
    from dtq.errors import CheckpointError as CheckpointError
    from dtq.errors import DtqError as DtqError
    from dtq.errors import InputError as InputError
    from dtq.errors import RecipeError as RecipeError
    from dtq.formats import FORMATS as FORMATS
    from dtq.integrations.adapters import load_adapter as load_adapter
    from dtq.integrations.plain_modules import load_into as load_into
    from dtq.integrations.plain_modules import save as save
    from dtq.integrations.terdit import load_ternary as load_ternary
    from dtq.nn import QuantLinear as QuantLinear
    from dtq.recipe import Recipe as Recipe

_MODULES = {
    "FORMATS": "formats",
    "CheckpointError": "errors",
    "DTQConfig": "checkpoint.config",
    "DtqError": "errors",
    "InputError": "errors",
    "QuantLinear": "nn",
    "Recipe": "recipe",
    "RecipeError": "errors",
    "export": "engines.export",
    "inject_outliers": "demo.outliers",
    "load": "engines.load",
    "load_adapter": "integrations.adapters",
    "load_into": "integrations.plain_modules",
    "load_ternary": "integrations.terdit",
    "quantize": "api",
    "save": "integrations.plain_modules",
}
"""Where each public name is defined."""

__all__ = [*_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    """A public name, or a module of dtq, imported when it is first asked for (PEP 562)."""
    if name in _MODULES:
        value = getattr(importlib.import_module(f"dtq.{_MODULES[name]}"), name)
        globals()[name] = value
        return value
    if not name.startswith("_") and importlib.util.find_spec(f"dtq.{name}") is not None:
        return importlib.import_module(f"dtq.{name}")
    raise AttributeError(f"module 'dtq' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _quantize_while_loading(model: Any, config: DTQConfig) -> object:
    from dtq.api import quantize_while_loading

    return quantize_while_loading(model, config)


_integrations.install(_quantize_while_loading)
