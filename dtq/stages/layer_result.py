# SPDX-License-Identifier: Apache-2.0
"""What becomes of a layer: packed parts, a transform, how it came out; to a file and back."""

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
    """How one layer came out.

    Attributes:
        error: relative squared error of its output on sampled rows, None without them.
        bits: stored bits per weight.
        transform: what was chosen, in words.
        promoted: the guard raised it; ``error_before`` is why.
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
    """How one input looks.

    Attributes:
        peaks: largest magnitude per timestep bin over the typical channel's, before.
        peaks_after: the same on sampled rows after the transform.
        candidates: output error of each candidate family of the transform search.
    """

    name: str
    imbalance: list[float] = field(default_factory=list)
    imbalance_after: list[float] = field(default_factory=list)
    candidates: dict[str, float] = field(default_factory=dict)


@dataclass
class LayerResult:
    """One layer's result, packed: the float weight stays in the model until the swap."""

    plan: LayerPlan
    tensors: PackedTensors
    transform: OnlineTransform
    bias_shift: Tensor | None
    report: LayerReport
    weight_error: float = 0.0


def to_result(solved: list[LayerResult], site: InputReport) -> tuple[dict[str, Tensor], Any]:
    """Tensors and plain data that :func:`from_result` reads; the layers of one input."""
    tensors: dict[str, Tensor] = {}
    layers = []
    for one in solved:
        name, change = one.plan.name, one.transform
        mine = {f"part.{part}": tensor for part, tensor in one.tensors.items()}
        mine["scale"] = change.scale
        if change.perm is not None:
            mine["perm"] = change.perm
        if one.bias_shift is not None:
            mine["bias_shift"] = one.bias_shift
        tensors |= {f"{name}|{key}": tensor for key, tensor in mine.items()}
        layers.append(
            {
                "name": name,
                "runtime": asdict(one.plan.spec()),
                "hadamard_block_size": change.block,
                "num_rotations": change.num_rotations,
                "report": asdict(one.report),
                "misfit": one.weight_error,
            }
        )
    return tensors, {"layers": layers, "input": asdict(site)}


def from_result(
    tensors: Mapping[str, Tensor], data: Any, plan: Plan
) -> tuple[list[LayerResult], InputReport]:
    """Inverse of :func:`to_result`, for the plan that was solved."""
    solved = []
    for layer in data["layers"]:
        prefix = f"{layer['name']}|"
        mine = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        parts = {k.removeprefix("part."): t for k, t in mine.items() if k.startswith("part.")}
        runtime = LayerSpec(**layer["runtime"])
        change = OnlineTransform(
            mine["scale"], layer["hadamard_block_size"], mine.get("perm"), layer["num_rotations"]
        )
        solved.append(
            LayerResult(
                replace(plan[layer["name"]], **asdict(runtime)),
                parts,
                change,
                mine.get("bias_shift"),
                LayerReport(**layer["report"]),
                layer["misfit"],
            )
        )
    return solved, InputReport(**data["input"])


def finalize(plan: Plan, solved: dict[str, LayerResult]) -> Plan:
    """The plan with the formats, transforms and ranks that were chosen."""
    return plan.with_layers(
        {
            x.name: replace(solved[x.name].plan, note=x.note or solved[x.name].plan.note)
            for x in plan.quantized()
        }
    )
