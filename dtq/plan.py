# SPDX-License-Identifier: Apache-2.0
"""The plan: what happens to each linear by name, and what that costs in bytes.

A recipe is intent in roles; a plan is fact in layers. The plan is what a checkpoint stores and a
loader reads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from dtq.errors import CheckpointError
from dtq.formats import FORMATS, Spec
from dtq.formats.acts import ACTS


@dataclass(frozen=True)
class Call:
    """A row of a method table and its knobs, as a recipe writes it: ``gptq: {damp: 0.02}``."""

    name: str
    knobs: tuple[tuple[str, Any], ...] = ()


def part_specs(
    shape: tuple[int, int], weights: str, acts: str, pre_quant: bool, bins: int
) -> dict[str, Spec]:
    """Shape and on-disk dtype of every stored part of a quantized linear (N, K), bias aside."""
    specs = dict(FORMATS[weights].layout(shape))
    if pre_quant:
        specs["pre_quant_scale"] = Spec((1, shape[1]), torch.bfloat16)
    if ACTS[acts].static:
        specs["input_scale"] = Spec((1, bins), torch.float32)
    return specs


@dataclass(frozen=True)
class LayerPlan:
    """One linear (N, K): how its weight and input are kept, and how that is found.

    Attributes:
        name: dotted path in the model.
        role: what it does, a word of ``families.ROLES``.
        shape: (N, K).
        weights: weight format; empty when the layer is kept as it is.
        acts: activation format.
        block: Hadamard block at run time.
        pre_quant: whether the file has a per-channel vector for its input.
        transform: how its transform is found.
        solver: how its weight is found.
        note: why it is kept, or not as the recipe says.
    """

    name: str
    role: str
    shape: tuple[int, int]
    weights: str = ""
    acts: str = "none"
    block: int = 1
    pre_quant: bool = False
    transform: Call = Call("none")
    solver: Call = Call("rtn")
    note: str = ""

    @property
    def kept(self) -> bool:
        return not self.weights

    def stored(self, bins: int = 1) -> dict[str, Spec]:
        """Shape and dtype of every part that the file holds for this layer, bias aside."""
        return part_specs(self.shape, self.weights, self.acts, self.pre_quant, bins)

    def nbytes(self, bins: int = 1, kept_dtype: torch.dtype = torch.float32) -> int:
        """Bytes of the weight and everything that belongs to it, bias aside."""
        if self.kept:
            return math.prod(self.shape) * kept_dtype.itemsize
        return sum(spec.nbytes for spec in self.stored(bins).values())

    def bits(self, bins: int = 1) -> float:
        """Stored bits per weight, all metadata counted."""
        return 8 * self.nbytes(bins) / math.prod(self.shape)

    def runtime(self) -> dict[str, Any]:
        """What a loader must know; written to ``config.json``."""
        keys = ("weights", "acts", "block", "pre_quant")
        return {key: getattr(self, key) for key in keys}


@dataclass(frozen=True)
class Plan:
    """Every linear of a model, in model order.

    Attributes:
        recipe: name of the recipe.
        layers: one plan per linear, kept ones included.
        bins: timestep bins of static activation scales.
    """

    recipe: str
    layers: tuple[LayerPlan, ...]
    bins: int = 1

    def __getitem__(self, name: str) -> LayerPlan:
        return self._by_name[name]

    def quantized(self) -> list[LayerPlan]:
        return [layer for layer in self.layers if not layer.kept]

    def gemm(self) -> list[LayerPlan]:
        """Quantized layers that see tokens: attention and feed-forward, not modulation."""
        return [layer for layer in self.quantized() if layer.role != "adaln"]

    def bits(self, layers: Iterable[LayerPlan]) -> float:
        """Stored bits per weight over some quantized layers; 0 when there are none."""
        chosen = list(layers)
        weights = sum(math.prod(layer.shape) for layer in chosen)
        return 8 * sum(layer.nbytes(self.bins) for layer in chosen) / weights if weights else 0.0

    def with_layers(self, changed: Mapping[str, LayerPlan]) -> Plan:
        """The plan with some layers replaced, by name."""
        return replace(self, layers=tuple(changed.get(x.name, x) for x in self.layers))

    def to_json(self) -> dict[str, Any]:
        """Everything, for ``dtq plan --json``."""
        return {**asdict(self), "layers": [asdict(layer) for layer in self.layers]}

    @property
    def _by_name(self) -> dict[str, LayerPlan]:
        return {layer.name: layer for layer in self.layers}


@dataclass(frozen=True)
class LoadPlan:
    """The part of a plan that ``config.json`` keeps: what to build before the file is read."""

    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    edges: tuple[float, ...] = ()

    @property
    def bins(self) -> int:
        return len(self.edges) + 1

    @classmethod
    def checked(cls, layers: object, edges: object, where: str) -> LoadPlan:
        """Read the two fields of ``quantization_config``.

        Raises:
            CheckpointError: a field is not what dtq writes; says which layer and key.
        """
        if not isinstance(layers, dict):
            raise CheckpointError(f"{where}: 'layers' must map layer names to their formats")
        for name, layer in layers.items():
            _check_layer(layer, f"{where}: layers[{name!r}]")
        ok = isinstance(edges, list | tuple) and all(isinstance(e, int | float) for e in edges)
        if not ok or list(edges) != sorted(edges):  # type: ignore[call-overload]
            raise CheckpointError(f"{where}: 'timestep_edges' must be a rising list of numbers")
        return cls(layers, tuple(float(e) for e in edges))  # type: ignore[attr-defined]


def _check_layer(layer: object, where: str) -> None:
    expected = {"weights": str, "acts": str, "block": int, "pre_quant": bool}
    if not isinstance(layer, dict) or set(layer) != set(expected):
        raise CheckpointError(f"{where} must have the keys {sorted(expected)}")
    for key, kind in expected.items():
        if type(layer[key]) is not kind:
            raise CheckpointError(f"{where}[{key!r}] must be {kind.__name__}, is {layer[key]!r}")
    for key, table in (("weights", FORMATS), ("acts", ACTS)):
        if layer[key] not in table:
            raise CheckpointError(
                f"{where}[{key!r}]: unknown format {layer[key]!r}; this dtq knows "
                f"{', '.join(table)}. A newer dtq may have written it: pip install -U dtq"
            )
    block = layer["block"]
    if block < 1 or block & (block - 1):
        raise CheckpointError(f"{where}['block'] must be a power of two, is {block}")


def file_bytes(
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], metadata: Mapping[str, str]
) -> int:
    """Exact size of the safetensors file with these tensors and this metadata.

    Format: 8 bytes of length, a JSON header padded to a multiple of 8, the data without gaps.
    """
    # the writer sorts by dtype, widest first, then by name
    rank = list(SAFETENSORS_DTYPES)
    order = sorted(tensors, key=lambda name: (rank.index(tensors[name][1]), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in order:
        shape, dtype = tensors[name]
        size = Spec(tuple(shape), dtype).nbytes
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + offset


# in the order of the safetensors writer
SAFETENSORS_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
