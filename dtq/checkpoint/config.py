# SPDX-License-Identifier: Apache-2.0
"""``DTQConfig``: the ``quantization_config`` of a quantized model in ``config.json``."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from dtq.errors import CheckpointError, InputError
from dtq.io import schema
from dtq.io.schema import key
from dtq.plan.layers import COMPUTE_DTYPES, CheckpointSpec

FORMAT_VERSION = 2
"""Version of the checkpoint format; a loader refuses all others."""


class DTQMethod(str, enum.Enum):
    """The value of ``quant_method``; diffusers reads its ``.value``, so a string does not do."""

    DTQ = "dtq"


class DTQConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Quantization config for diffusers.

    On a float model it quantizes while loading, without calibration data:
    ``DiTTransformer2DModel.from_pretrained(dir, quantization_config=dtq.DTQConfig("w4a16"))``.
    In a saved model it carries the per-layer plan.

    Args:
        recipe: name of a recipe, or path to a YAML file.
        modules_to_not_convert: layers to exclude: names, prefixes, path components, as they are or
            as globs; ``re:...``.
        compute_dtype: dtype of everything that is not quantized; set when saving.
        format_version: of the checkpoint; absent means a float model.
        timestep_edges: boundaries of the bins of static activation scales.
        layers: layer name to the fields of its ``LayerSpec``.
        unknown: other keys of ``config.json``, kept as they are.

    Raises:
        CheckpointError: a field of a saved config is damaged, or from another version of dtq.
    """

    def __init__(
        self,
        /,  # a key named "self" is an unknown one
        recipe: str = "w4a16",
        modules_to_not_convert: str | list[str] | None = None,
        compute_dtype: str | torch.dtype | None = None,
        format_version: int | None = None,
        timestep_edges: list[float] | None = None,
        layers: dict[str, dict[str, Any]] | None = None,
        **unknown: Any,
    ) -> None:
        self.quant_method = DTQMethod.DTQ
        self.recipe = recipe
        names: Any = modules_to_not_convert
        names = [names] if isinstance(names, str) else names
        self.modules_to_not_convert = [*names] if isinstance(names, tuple | set) else names
        self.compute_dtype = _dtype(compute_dtype)
        self.format_version = format_version
        self.timestep_edges = timestep_edges or []
        self.layers = layers or {}
        self.extra = {k: v for k, v in unknown.items() if k != "quant_method"}
        if format_version is not None:
            check_version(format_version, "config.json: 'format_version'")
            self.load_plan()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields, in a fixed order."""
        dtype = None if self.compute_dtype is None else str(self.compute_dtype).split(".")[-1]
        fields: dict[str, Any] = {
            "quant_method": self.quant_method.value,
            "recipe": self.recipe,
            "compute_dtype": dtype,
            "modules_to_not_convert": self.modules_to_not_convert,
        }
        if self.format_version is not None:
            fields["format_version"] = self.format_version
            fields["timestep_edges"] = list(self.timestep_edges)
            fields["layers"] = self.layers
        return fields | self.extra

    def to_diff_dict(self) -> dict[str, Any]:
        """Fields that differ from the defaults; the base class prints these."""
        unset = type(self)().to_dict()
        return {k: v for k, v in self.to_dict().items() if k == "quant_method" or v != unset.get(k)}

    def load_plan(self) -> CheckpointSpec:
        """What to build before the weights are read.

        Raises:
            CheckpointError: a field is damaged.
        """
        fields = {**self.extra, **vars(self)}
        s = schema.parse(_Saved, fields, "config.json", CheckpointError)
        return CheckpointSpec.from_json(s.layers, s.timestep_edges, "config.json", s.runtime)


def is_dtq(config: object) -> bool:
    """Whether a quantization config is one of dtq: a :class:`DTQConfig`, or its fields."""
    method = config.get("quant_method") if isinstance(config, dict) else None
    return isinstance(config, DTQConfig) or method == DTQMethod.DTQ  # which equals "dtq"


def check_version(version: object, where: str) -> None:
    """Check the version of a checkpoint.

    Raises:
        CheckpointError: this dtq does not read it; says what to do.
    """
    if type(version) is not int:
        raise CheckpointError(f"{where} must be a number, is {version!r}")
    if version != FORMAT_VERSION:
        newer = version > FORMAT_VERSION
        way_out = "pip install -U dtq" if newer else "quantize the model again with this version"
        raise CheckpointError(f"{where} is {version}, this dtq reads {FORMAT_VERSION}: {way_out}")


def _one_line(texts: str | tuple[str, ...]) -> bool:
    lines = (texts,) if isinstance(texts, str) else texts
    return all(len(line) <= 1000 and line.isprintable() for line in lines)


_LINE = key(expected="text of one line", holds=_one_line)  # model cards print it


@dataclass(frozen=True)
class _Saved:
    """The fields of ``quantization_config`` that dtq reads, in any order."""

    recipe: str = field(metadata=_LINE)
    layers: dict[str, Any]
    timestep_edges: tuple[float, ...] = field(metadata=schema.RISING)
    modules_to_not_convert: tuple[str, ...] | None = field(metadata=_LINE)
    compute_dtype: Any = field(
        metadata=key(
            expected=f"one of {', '.join(str(d).removeprefix('torch.') for d in COMPUTE_DTYPES)}",
            holds=COMPUTE_DTYPES.__contains__,
        )
    )
    base_model: str = field(default="", metadata=_LINE)
    runtime: dict[str, Any] = field(default_factory=dict)


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    value = getattr(torch, str(dtype), None)
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise InputError(f"compute_dtype {dtype!r} is not a float dtype of torch")
    return value
