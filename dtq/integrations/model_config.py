# SPDX-License-Identifier: Apache-2.0
"""The config of a float model that is made from the config of a quantized one."""

from __future__ import annotations

import functools
from typing import Any

from dtq.checkpoint.config import is_dtq


def drop_config_of_quantized() -> None:
    """Make ``from_config`` of models leave out the config of a quantized model.

    The model that it makes is float, and would save a folder that claims to be quantized. The
    quantizer sets the config again where weights are loaded.
    """
    from diffusers.configuration_utils import ConfigMixin

    made = ConfigMixin.from_config.__func__
    if hasattr(made, "dtq"):
        return

    @functools.wraps(made)
    def from_config(cls: Any, config: Any = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(config, dict) and is_dtq(config.get("quantization_config")):
            config = {key: v for key, v in config.items() if key != "quantization_config"}
        return made(cls, config, *args, **kwargs)

    from_config.dtq = True  # type: ignore[attr-defined]
    ConfigMixin.from_config = classmethod(from_config)
