# SPDX-License-Identifier: Apache-2.0
"""The result of quantizing a layer: packed tensors, transform, error; to a task file and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from dtq.formats import PackedTensors
from dtq.plan.layers import LayerPlan, LayerSpec, Plan
from dtq.transforms import OnlineTransform


@dataclass
class LayerReport:
    """How accurate one quantized layer is.

    Attributes:
        name: dotted path in the model.
        role: what the layer does, one of ``dtq.models.ROLES``.
        weight_format: key of ``FORMATS``.
        bits: stored bits per weight.
        transform: the chosen input transform, in words.
        error: relative squared error of the output on sampled rows, None without them.
        promoted: whether a stage gave the layer a finer format.
        error_before: relative squared error before it was promoted.
    """

    name: str
    role: str
    weight_format: str
    bits: float
    transform: str
    error: float | None = None
    promoted: bool = False
    error_before: float | None = None


@dataclass
class InputReport:
    """How unequal the channels of an input group are.

    Attributes:
        name: of the input group.
        imbalance: largest channel amax over the mean channel amax, for each of ``bins``.
        imbalance_after: the same on sampled rows after the transform.
        candidates: relative squared output error of each kind of transform in the search.
        bins: timestep bins from 1 in which rows were sampled; the last is the noisiest.
    """

    name: str
    imbalance: list[float] = field(default_factory=list)
    imbalance_after: list[float] = field(default_factory=list)
    candidates: dict[str, float] = field(default_factory=dict)
    bins: list[int] = field(default_factory=list)


@dataclass
class LayerResult:
    """One quantized layer; its float weight stays in the model until it is replaced.

    Attributes:
        plan: with the format, transform and rank that were chosen.
        tensors: packed tensors as the checkpoint stores them.
        transform: the online input transform.
        bias_shift: (N,) mean output error, which is added to the bias; None without correction.
        report: how accurate the layer is.
        weight_error: squared error of the transformed weight.
    """

    plan: LayerPlan
    tensors: PackedTensors
    transform: OnlineTransform
    bias_shift: Tensor | None
    report: LayerReport
    weight_error: float = 0.0


def to_result(results: list[LayerResult], group: InputReport) -> tuple[dict[str, Tensor], Any]:
    """Tensors and plain data of the layers of one input group, for :func:`from_result`."""
    tensors: dict[str, Tensor] = {}
    layers = []
    for result in results:
        name, transform = result.plan.name, result.transform
        own: dict[str, Tensor | None] = {
            f"packed.{key}": tensor for key, tensor in result.tensors.items()
        }
        own |= {"scale": transform.scale, "perm": transform.perm, "bias_shift": result.bias_shift}
        tensors |= {f"{name}|{key}": tensor for key, tensor in own.items() if tensor is not None}
        layer = {
            "name": name,
            "spec": asdict(result.plan.spec),
            "block": transform.block,
            "num_rotations": transform.num_rotations,
            "report": asdict(result.report),
            "weight_error": result.weight_error,
        }
        layers.append(layer)
    return tensors, {"layers": layers, "input": asdict(group)}


def from_result(
    tensors: Mapping[str, Tensor], data: Any, plan: Plan
) -> tuple[list[LayerResult], InputReport]:
    """Inverse of :func:`to_result`, for the plan that was solved."""
    results = []
    for layer in data["layers"]:
        prefix = f"{layer['name']}|"
        own = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        transform = OnlineTransform(
            own["scale"], layer["block"], own.get("perm"), layer["num_rotations"]
        )
        packed = {k.removeprefix("packed."): t for k, t in own.items() if k.startswith("packed.")}
        chosen = replace(plan[layer["name"]], spec=LayerSpec(**layer["spec"]))
        shift, report = own.get("bias_shift"), LayerReport(**layer["report"])
        results.append(LayerResult(chosen, packed, transform, shift, report, layer["weight_error"]))
    return results, InputReport(**data["input"])


def finalize(plan: Plan, results: Mapping[str, LayerResult]) -> Plan:
    """The plan with the formats, transforms and ranks that were chosen."""
    pairs = [(x, results[x.name].plan) for x in plan.quantized()]
    return plan.with_layers({x.name: replace(y, note=x.note or y.note) for x, y in pairs})
