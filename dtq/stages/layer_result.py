# SPDX-License-Identifier: Apache-2.0
"""What becomes of a layer: packed parts, a transform, how it came out; to a file and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from dtq.formats import Parts
from dtq.plan.layers import LayerPlan, Plan, Runtime
from dtq.transforms import Online


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
    weights: str
    bits: float
    transform: str
    error: float | None = None
    promoted: bool = False
    error_before: float | None = None


@dataclass
class SiteReport:
    """How one input looks.

    Attributes:
        peaks: largest magnitude per timestep bin over the typical channel's, before.
        peaks_after: the same on sampled rows after the transform.
        candidates: output error of each candidate family of the transform search.
    """

    name: str
    peaks: list[float] = field(default_factory=list)
    peaks_after: list[float] = field(default_factory=list)
    candidates: dict[str, float] = field(default_factory=dict)


@dataclass
class Solved:
    """One layer's result, packed: the float weight stays in the model until the swap."""

    plan: LayerPlan
    parts: Parts
    transform: Online
    bias_shift: Tensor | None
    report: LayerReport
    misfit: float = 0.0


def to_result(solved: list[Solved], site: SiteReport) -> tuple[dict[str, Tensor], Any]:
    """Tensors and plain data that :func:`from_result` reads; the layers of one input."""
    tensors: dict[str, Tensor] = {}
    layers = []
    for one in solved:
        name, change = one.plan.name, one.transform
        mine = {f"part.{part}": tensor for part, tensor in one.parts.items()}
        mine["scale"] = change.scale
        if change.order is not None:
            mine["order"] = change.order
        if one.bias_shift is not None:
            mine["bias_shift"] = one.bias_shift
        tensors |= {f"{name}|{key}": tensor for key, tensor in mine.items()}
        layers.append(
            {
                "name": name,
                "runtime": asdict(one.plan.runtime()),
                "block": change.block,
                "turns": change.turns,
                "report": asdict(one.report),
                "misfit": one.misfit,
            }
        )
    return tensors, {"layers": layers, "site": asdict(site)}


def from_result(
    tensors: Mapping[str, Tensor], data: Any, plan: Plan
) -> tuple[list[Solved], SiteReport]:
    """Inverse of :func:`to_result`, for the plan that was solved."""
    solved = []
    for layer in data["layers"]:
        prefix = f"{layer['name']}|"
        mine = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        parts = {k.removeprefix("part."): t for k, t in mine.items() if k.startswith("part.")}
        runtime = Runtime(**layer["runtime"])
        change = Online(mine["scale"], layer["block"], mine.get("order"), layer["turns"])
        solved.append(
            Solved(
                replace(plan[layer["name"]], **asdict(runtime)),
                parts,
                change,
                mine.get("bias_shift"),
                LayerReport(**layer["report"]),
                layer["misfit"],
            )
        )
    return solved, SiteReport(**data["site"])


def final(plan: Plan, solved: dict[str, Solved]) -> Plan:
    """The plan with the formats, transforms and ranks that were chosen."""
    return plan.with_layers(
        {
            x.name: replace(solved[x.name].plan, note=x.note or solved[x.name].plan.note)
            for x in plan.quantized()
        }
    )
