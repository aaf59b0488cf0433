# SPDX-License-Identifier: Apache-2.0
"""The plan: what happens to each linear by name, and what that costs in bytes.

A recipe is intent in roles; a plan is fact in layers. The plan is what a checkpoint stores and a
loader reads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from dtq.errors import CheckpointError, InputError
from dtq.formats import FORMATS, TensorSpec
from dtq.formats.activations import ACTIVATION_FORMATS
from dtq.io import schema
from dtq.io.schema import MethodSpec
from dtq.plan.step_policy import StepPolicy

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Dtypes of what is not quantized."""


def check_compute_dtype(dtype: torch.dtype) -> None:
    """Check that a quantized model can compute in a dtype.

    Raises:
        InputError: it is not one of ``COMPUTE_DTYPES``.
    """
    if dtype not in COMPUTE_DTYPES:
        known = ", ".join(str(each).removeprefix("torch.") for each in COMPUTE_DTYPES)
        raise InputError(
            f"a quantized model computes in {known}, not in {str(dtype).removeprefix('torch.')}; "
            f"enable_layerwise_casting stores what is not quantized in fewer bits"
        )


@dataclass(frozen=True)
class LayerSpec:
    """What a loader must know of a quantized linear; the entry of ``layers`` in ``config.json``.

    Attributes:
        weight_format: key of ``FORMATS``.
        activation_format: key of ``ACTIVATION_FORMATS``.
        hadamard_block_size: channels in a block of the online rotation, 1 for no rotation.
        pre_quant: whether the file has a vector (K,) that multiplies the input first.
        rank: of the low-rank branch, 0 for none.
        permutation: whether the file has a permutation of the input channels.
        num_rotations: block rotations, 1 or 2.
    """

    weight_format: str
    activation_format: str
    hadamard_block_size: int = 1
    pre_quant: bool = False
    rank: int = 0
    permutation: bool = False
    num_rotations: int = 1

    ALWAYS = ("weight_format", "activation_format", "hadamard_block_size", "pre_quant")
    """Keys that are always written; the others only where they are not the default."""

    def tensor_specs(self, shape: tuple[int, int], bins: int = 1) -> dict[str, TensorSpec]:
        """Shape and on-disk dtype of every packed tensor of a linear (N, K), without the bias."""
        rows, columns = shape
        specs = dict(FORMATS[self.weight_format].tensor_specs(shape))
        if self.pre_quant:
            specs["pre_quant_scale"] = TensorSpec((1, columns), torch.bfloat16)
        if self.permutation:
            specs["pre_quant_perm"] = TensorSpec((1, columns), torch.int32, _not_a_permutation)
        activations = ACTIVATION_FORMATS[self.activation_format]
        if activations.static:
            count = bins if activations.per_timestep else 1
            specs["input_scale"] = TensorSpec((1, count), torch.float32)
        if self.rank:
            specs["proj_down"] = TensorSpec((self.rank, columns), torch.bfloat16)
            specs["proj_up"] = TensorSpec((rows, self.rank), torch.bfloat16)
        return specs

    def validated_for(self, shape: tuple[int, int], bins: int = 1) -> dict[str, TensorSpec]:
        """:meth:`tensor_specs`, after a check that a linear of this shape can be such a layer.

        Raises:
            InputError: a group of a format, or the rotation block, does not divide K.
        """
        if shape[1] % self.hadamard_block_size:
            raise InputError(
                f"rotation blocks of {self.hadamard_block_size} do not divide K = {shape[1]}"
            )
        if block := ACTIVATION_FORMATS[self.activation_format].block_format:
            FORMATS[block].tensor_specs((1, shape[1]))
        return self.tensor_specs(shape, bins)

    def to_json(self) -> dict[str, Any]:
        """The entry of ``layers``; keys with their default value are left out."""
        optional = {f.name: f.default for f in fields(self) if f.name not in self.ALWAYS}
        return {k: v for k, v in asdict(self).items() if k not in optional or v != optional[k]}

    @classmethod
    def from_json(cls, data: object, where: str) -> LayerSpec:
        """Read an entry of ``layers``.

        Raises:
            CheckpointError: it is not what dtq writes; says which key.
        """
        spec = schema.parse(cls, data, where, CheckpointError, required=cls.ALWAYS, strict=True)
        tables: dict[str, Iterable[str]]
        tables = {"weight_format": FORMATS, "activation_format": ACTIVATION_FORMATS}
        problems = [
            f"{key}: unknown format {getattr(spec, key)!r}; this dtq knows {', '.join(table)}. A "
            f"newer dtq may have written it: pip install -U dtq"
            for key, table in tables.items()
            if getattr(spec, key) not in table
        ]
        size = spec.hadamard_block_size
        if size < 1 or size & (size - 1):
            problems.append(f"hadamard_block_size: expected a power of two, got {size}")
        if spec.num_rotations not in (1, 2):
            problems.append(f"num_rotations: expected 1 or 2, got {spec.num_rotations}")
        if spec.rank < 0:
            problems.append(f"rank: must not be negative, is {spec.rank}")
        if problems:
            raise CheckpointError(f"{where}: {'; '.join(problems)}")
        return spec


def misfit(name: str, shape: tuple[int, int]) -> str:
    """Why a weight (N, K) cannot be stored in a format; empty if it can."""
    try:
        FORMATS[name].tensor_specs(shape)
    except InputError as error:
        return str(error).split(". Use")[0]
    return ""


def _not_a_permutation(perm: Tensor) -> str | None:
    channels = torch.arange(perm.numel(), dtype=perm.dtype)
    if torch.equal(perm.reshape(-1).sort().values, channels):
        return None
    return f"values that are not a permutation of {perm.numel()} channels"


@dataclass(frozen=True)
class LayerPlan:
    """One linear (N, K): what is stored of it, and the methods that find it.

    Attributes:
        name: dotted path in the model.
        role: what the layer does, one of ``dtq.models.ROLES``.
        shape: (N, K).
        spec: what the checkpoint stores; an empty weight format leaves the layer unquantized.
        transform: method that chooses its input transform.
        solver: method that quantizes its weight.
        lowrank: method that finds its low-rank branch.
        format_candidates: weight formats that are all solved; the one with the lowest error stays.
        note: why the layer is unquantized, or why it differs from the recipe.
    """

    name: str
    role: str
    shape: tuple[int, int]
    spec: LayerSpec = LayerSpec("", "none")
    transform: MethodSpec = MethodSpec("none")
    solver: MethodSpec = MethodSpec("rtn")
    lowrank: MethodSpec = MethodSpec("none")
    format_candidates: tuple[str, ...] = ()
    note: str = ""

    @property
    def weight_format(self) -> str:
        """Key of ``FORMATS``, empty for an unquantized layer."""
        return self.spec.weight_format

    @property
    def activation_format(self) -> str:
        """Key of ``ACTIVATION_FORMATS``."""
        return self.spec.activation_format

    @property
    def unquantized(self) -> bool:
        """Whether the float layer stays."""
        return not self.spec.weight_format

    def with_spec(self, **changes: Any) -> LayerPlan:
        """The plan with some fields of ``spec`` replaced."""
        return replace(self, spec=replace(self.spec, **changes))

    def in_format(self, name: str) -> LayerPlan:
        """The plan with another weight format; unchanged but for a note if K does not fit it."""
        if problem := misfit(name, self.shape):
            return replace(self, note=self.note or problem)
        return replace(self.with_spec(weight_format=name), format_candidates=())

    def nbytes(self, bins: int = 1, float_dtype: torch.dtype = torch.float32) -> int:
        """Bytes of the weight and its metadata, bias not counted.

        Args:
            bins: timestep bins of static activation scales.
            float_dtype: dtype of the weight of an unquantized layer.
        """
        if self.unquantized:
            return math.prod(self.shape) * float_dtype.itemsize
        return sum(spec.nbytes for spec in self.spec.tensor_specs(self.shape, bins).values())

    def bits(self, bins: int = 1) -> float:
        """Stored bits per weight, all metadata counted."""
        return 8 * self.nbytes(bins) / math.prod(self.shape)

    def to_json(self) -> dict[str, Any]:
        """Plain data; the fields of ``spec`` stand next to the others."""
        data = asdict(self)
        spec = data.pop("spec")
        return {**{key: data.pop(key) for key in ("name", "role", "shape")}, **spec, **data}


@dataclass(frozen=True)
class Plan:
    """Every linear of a model, in model order, then quantized convolutions and tables.

    Attributes:
        recipe: name of the recipe.
        layers: one entry per linear, unquantized ones included; and one per quantized convolution
            and table of token embeddings.
        bins: timestep bins of static activation scales.
    """

    recipe: str
    layers: tuple[LayerPlan, ...]
    bins: int = 1

    def __getitem__(self, name: str) -> LayerPlan:
        return {layer.name: layer for layer in self.layers}[name]

    def quantized(self) -> list[LayerPlan]:
        """Layers with a weight format."""
        return [layer for layer in self.layers if not layer.unquantized]

    def gemm(self) -> list[LayerPlan]:
        """Quantized linears that see tokens: attention and feed-forward, not modulation."""
        return [layer for layer in self.quantized() if layer.role not in ("adaln", "conv", "vocab")]

    def convolutions(self) -> list[LayerPlan]:
        """Quantized convolutions other than those that are linears; always weight-only."""
        return [layer for layer in self.quantized() if layer.role == "conv"]

    def tables(self) -> list[LayerPlan]:
        """Quantized tables of token embeddings; always weight-only."""
        return [layer for layer in self.quantized() if layer.role == "vocab"]

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
        return {**asdict(self), "layers": [layer.to_json() for layer in self.layers]}


@dataclass(frozen=True)
class CheckpointSpec:
    """What ``config.json`` says must be built before the tensors are read.

    Attributes:
        layers: layer name to its spec.
        edges: of the timestep bins of static activation scales, rising.
        policy: step policy, None without one.
        int8_attention: modules whose attention is computed in int8 on a CPU.
    """

    layers: dict[str, LayerSpec] = field(default_factory=dict)
    edges: tuple[float, ...] = ()
    policy: StepPolicy | None = None
    int8_attention: tuple[str, ...] = ()

    @property
    def bins(self) -> int:
        """Number of timestep bins of static activation scales."""
        return len(self.edges) + 1

    @classmethod
    def from_json(
        cls, layers: dict[str, Any], edges: Iterable[float], where: str, runtime: dict[str, Any]
    ) -> CheckpointSpec:
        """Read the fields of the config that say how layers are stored and run.

        Args:
            layers: layer name to what :meth:`LayerSpec.to_json` wrote.
            edges: of the timestep bins, rising.
            where: begins the message.
            runtime: has the step policy, and the modules with int8 attention, when there are any.

        Raises:
            CheckpointError: a field is not what dtq writes; names the layer and the key.
        """
        specs = {
            name: LayerSpec.from_json(layer, f"{where}: layers[{name!r}]")
            for name, layer in layers.items()
        }
        policy = None
        if "diffusion_step_policy" in runtime:
            at = f"{where}: runtime.diffusion_step_policy"
            policy = StepPolicy.from_json(runtime["diffusion_step_policy"], at)
        s = schema.parse(_Runtime, runtime, f"{where}: runtime", CheckpointError)
        return cls(specs, tuple(edges), policy, s.int8_attention)


@dataclass(frozen=True)
class _Runtime:
    """The parts of ``quantization_config.runtime`` that dtq reads besides the step policy."""

    int8_attention: tuple[str, ...] = ()
