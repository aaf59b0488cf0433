# SPDX-License-Identifier: Apache-2.0
"""``DTQConfig``: what ``config.json`` says of a quantized model, and what diffusers is given."""

from __future__ import annotations

import enum
from typing import Any

import torch
from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from dtq.errors import CheckpointError, InputError
from dtq.plan.layers import CheckpointSpec

FORMAT_VERSION = 2
"""Version of the checkpoint format; a loader refuses newer ones."""


class DTQMethod(str, enum.Enum):
    """diffusers reads ``quant_method.value``, so a plain string will not do."""

    DTQ = "dtq"


class DTQConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Quantization config for diffusers.

    On a float model it quantizes while loading, without calibration data:
    ``DiTTransformer2DModel.from_pretrained(dir, quantization_config=dtq.DTQConfig("w4a16"))``.
    In a saved model it carries the per-layer plan.

    Args:
        recipe: name of a recipe, or path to a YAML file.
        modules_to_not_convert: layers to keep: full names, prefixes, path components, ``re:...``.
        compute_dtype: dtype of everything that is not quantized; set when saving.
        format_version: of the checkpoint; absent means a float model.
        timestep_edges: boundaries of the bins of static activation scales.
        layers: name -> what ``plan.Runtime`` holds.

    Raises:
        CheckpointError: a field of a saved config is damaged, or from a newer dtq.
    """

    def __init__(
        self,
        recipe: str = "w4a16",
        modules_to_not_convert: list[str] | None = None,
        compute_dtype: str | torch.dtype | None = None,
        format_version: int | None = None,
        timestep_edges: list[float] | None = None,
        layers: dict[str, dict[str, Any]] | None = None,
        **unknown: Any,
    ) -> None:
        self.quant_method = DTQMethod.DTQ
        self.recipe = recipe
        self.modules_to_not_convert = modules_to_not_convert
        self.compute_dtype = _dtype(compute_dtype)
        self.format_version = format_version
        self.timestep_edges = timestep_edges or []
        self.layers = layers or {}
        # from_dict passes every key of config.json; keys of other tools are kept, not obeyed
        self.extra = {k: v for k, v in unknown.items() if k != "quant_method"}
        if format_version is not None:
            self._check_saved()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields, in a fixed order."""
        saved = (
            {}
            if self.format_version is None
            else {
                "format_version": self.format_version,
                "timestep_edges": list(self.timestep_edges),
                "layers": self.layers,
            }
        )
        dtype = None if self.compute_dtype is None else str(self.compute_dtype).split(".")[-1]
        return {
            "quant_method": self.quant_method.value,
            "recipe": self.recipe,
            "compute_dtype": dtype,
            "modules_to_not_convert": self.modules_to_not_convert,
            **saved,
            **self.extra,
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """Fields that differ from the defaults; the base class prints these."""
        default = type(self)().to_dict()
        return {
            k: v for k, v in self.to_dict().items() if k == "quant_method" or v != default.get(k)
        }

    def load_plan(self) -> CheckpointSpec:
        """What to build before the weights are read.

        Raises:
            CheckpointError: a field is damaged.
        """
        runtime = self.extra.get("runtime")
        return CheckpointSpec.from_json(self.layers, self.timestep_edges, "config.json", runtime)

    def _check_saved(self) -> None:
        version = self.format_version
        if type(version) is not int or version < 1:
            raise CheckpointError(f"config.json: 'format_version' must be a number, is {version!r}")
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"config.json: 'format_version' is {version}, this dtq reads up to "
                f"{FORMAT_VERSION}: pip install -U dtq"
            )
        self._check_words()
        self.load_plan()

    def _check_words(self) -> None:
        """Fields that only people read are text all the same: model cards print them."""
        keep = self.modules_to_not_convert
        for key, good, words in (
            ("recipe", _word(self.recipe), "a name"),
            ("base_model", _word(self.extra.get("base_model", "")), "a hub id"),
            ("runtime", isinstance(self.extra.get("runtime", {}), dict), "a mapping"),
            (
                "modules_to_not_convert",
                keep is None or (isinstance(keep, list) and all(map(_word, keep))),
                "a list of names",
            ),
        ):
            if not good:
                raise CheckpointError(f"config.json: {key!r} must be {words}")
        if self.compute_dtype not in (None, *_COMPUTE):
            raise CheckpointError(
                f"config.json: 'compute_dtype' must be one of "
                f"{', '.join(str(d).removeprefix('torch.') for d in _COMPUTE)}"
            )


_COMPUTE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _word(value: object) -> bool:
    """Text of one line."""
    return isinstance(value, str) and len(value) <= 1000 and value.isprintable()


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, str(dtype), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InputError(f"compute_dtype {dtype!r} is not a float dtype of torch")
    return found
