# SPDX-License-Identifier: Apache-2.0
"""Adapter files: the tensors of each layer, whatever their suffixes are called.

A key is the name of a layer, in one of many layouts (``adapter_names.py``), and a suffix. kohya,
LyCORIS, peft and diffusers have their own suffixes for the same tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dtq.errors import InputError, first_line

SUFFIXES = {
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_A.default.weight": "lora_A",
    "lora_B.default.weight": "lora_B",
    "lora_down.weight": "lora_A",
    "lora_up.weight": "lora_B",
    "lora.down.weight": "lora_A",
    "lora.up.weight": "lora_B",
    "lora_linear_layer.down.weight": "lora_A",
    "lora_linear_layer.up.weight": "lora_B",
    "lora_magnitude_vector": "dora_scale",
    "lora_magnitude_vector.weight": "dora_scale",
    "lora_magnitude_vector.default.weight": "dora_scale",
    "dora_scale": "dora_scale",
    "alpha": "alpha",
    **{f"hada_w{w}": f"hada_w{w}" for w in ("1_a", "1_b", "2_a", "2_b")},
    **{f"lokr_w{w}": f"lokr_w{w}" for w in ("1", "1_a", "1_b", "2", "2_a", "2_b")},
}
"""Suffix to the name of the tensor in this module."""

KINDS = {
    "LoRA": [{"lora_A", "lora_B"}],
    "DoRA": [{"lora_A", "lora_B", "dora_scale"}],
    "LoHa": [{"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}],
    "LoKr": [
        {*left, *right}
        for left in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
        for right in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
    ],
}
"""Kind to the tensors that a layer has; every kind may have an alpha too."""


@dataclass(frozen=True)
class Factors:
    """The adapter of one layer.

    Attributes:
        kind: a key of :data:`KINDS`.
        tensors: float factors by name; matrices, and a vector (N,) for the magnitude.
        scale: number that the change of the weight is multiplied with.
    """

    kind: str
    tensors: Mapping[str, Tensor] = field(repr=False)
    scale: float

    @property
    def rank(self) -> int | None:
        """Rank of the factors; None for LoKr of two whole factors."""
        ranked = ("lora_A", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
        return next((len(self.tensors[n]) for n in ranked if n in self.tensors), None)

    @property
    def shape(self) -> tuple[int, int]:
        """N and K of the layer that it is for."""
        t = self.tensors
        if self.kind == "LoHa":
            return len(t["hada_w1_a"]), t["hada_w1_b"].shape[1]
        if self.kind == "LoKr":
            (a, b), (c, d) = self._sides("lokr_w1"), self._sides("lokr_w2")
            return a * c, b * d
        return len(t["lora_B"]), t["lora_A"].shape[1]

    def _sides(self, name: str) -> tuple[int, int]:
        if name in self.tensors:
            rows, columns = self.tensors[name].shape
            return rows, columns
        return len(self.tensors[f"{name}_a"]), self.tensors[f"{name}_b"].shape[1]

    def problem(self) -> str | None:
        """Why the factors do not fit together; None if they do."""
        matrices = {n: t for n, t in self.tensors.items() if n != "dora_scale"}
        wrong = [n for n, t in matrices.items() if t.ndim != 2]
        if wrong:
            shape = list(matrices[wrong[0]].shape)
            return f"{wrong[0]} has the shape {shape}; only adapters of linears are supported"
        empty = [n for n, t in self.tensors.items() if not t.numel()]
        if empty:
            return f"{empty[0]} has no numbers"
        inner = (("lora_B", "lora_A"), ("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b"),
                 ("lokr_w1_a", "lokr_w1_b"), ("lokr_w2_a", "lokr_w2_b"))  # fmt: skip
        for up, down in inner:
            if up in matrices and matrices[up].shape[1] != len(matrices[down]):
                return f"{up} and {down} have different ranks"
        if self.kind == "LoHa" and (
            len(matrices["hada_w1_a"]) != len(matrices["hada_w2_a"])
            or matrices["hada_w1_b"].shape[1] != matrices["hada_w2_b"].shape[1]
        ):
            return "the two products of LoHa have different shapes"
        magnitude = self.tensors.get("dora_scale")
        if magnitude is not None and magnitude.shape != (self.shape[0],):
            return (
                f"its dora_scale is not one number per output, {self.shape[0]} of them; scales per "
                f"input (LyCORIS without wd_on_output) are not supported: merge the adapter into "
                f"the float model"
            )
        return None

    def rows(self, rows: Tensor) -> Factors:
        """The adapter of some rows of the weight: of q, k or v of a fused layer.

        Args:
            rows: int64 (M,).
        """
        if torch.equal(rows, torch.arange(self.shape[0])):
            return self
        tensors = dict(self.tensors)
        for name in ("lora_B", "dora_scale", "hada_w1_a", "hada_w2_a"):
            if name in tensors:
                tensors[name] = tensors[name][rows].contiguous()
        if self.kind != "LoKr":
            return replace(self, tensors=tensors)
        high = self._sides("lokr_w2")[0]
        blocks = rows[::high] // high
        whole_blocks = (blocks[:, None] * high + torch.arange(high)).flatten()
        if torch.equal(rows, whole_blocks):
            left = "lokr_w1" if "lokr_w1" in tensors else "lokr_w1_a"
            tensors[left] = tensors[left][blocks].contiguous()
            return replace(self, tensors=tensors)
        # the rows are no Kronecker product: one of 1 x 1 with the rows as they are
        w1, w2 = (
            tensors[w].float()
            if w in tensors
            else tensors[f"{w}_a"].float() @ tensors[f"{w}_b"].float()
            for w in ("lokr_w1", "lokr_w2")
        )
        whole = torch.kron(w1, w2)[rows]
        return replace(self, tensors={"lokr_w1": torch.ones(1, 1), "lokr_w2": whole})


def split_key(key: str) -> tuple[str, str] | None:
    """The name of the layer and that of the tensor; None if the suffix is not known."""
    suffix = next((s for s in SUFFIXES if key.endswith(f".{s}")), None)
    return None if suffix is None else (key.removesuffix(f".{suffix}"), SUFFIXES[suffix])


def read_adapter(file: str | Path | Mapping[str, Tensor]) -> dict[str, Factors]:
    """The adapter of every layer in a file, by the layer's name in the file.

    Args:
        file: a safetensors file, or its tensors.

    Raises:
        InputError: the file cannot be read, or has tensors of another kind of adapter.
    """
    where, state = _state(file)
    layers: dict[str, dict[str, Tensor]] = {}
    problems = [] if state else ["it has no tensors"]
    for key, tensor in state.items():
        split = split_key(key)
        if split is None or not (tensor.is_floating_point() or split[1] == "alpha"):
            problems.append(f"{key}: not a tensor of LoRA, DoRA, LoKr or LoHa on a linear")
            continue
        layer, name = split
        if name in layers.setdefault(layer, {}):
            problems.append(f"{key}: the layer has this tensor under another name too")
        layers[layer][name] = tensor
    found = {}
    for name, tensors in layers.items():
        made = _factors(tensors)
        if isinstance(made, Factors):
            found[name] = made
        else:
            problems.append(f"{name}: {made}")
    if problems:
        raise InputError(listed(f"{where}: this adapter cannot be loaded", problems))
    return found


def listed(what: str, problems: list[str], most: int = 5) -> str:
    """An error text with the first few problems."""
    more = [f"and {len(problems) - most} more"] if len(problems) > most else []
    return f"{what}: {'; '.join([*problems[:most], *more])}"


def _state(file: str | Path | Mapping[str, Tensor]) -> tuple[str, Mapping[str, Tensor]]:
    if isinstance(file, Mapping):
        return "state dict", file
    if Path(file).suffix != ".safetensors":
        raise InputError(f"{file}: adapters are read from .safetensors files only")
    try:
        return str(file), load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: cannot be read: {first_line(error)}") from error


def _factors(tensors: dict[str, Tensor]) -> Factors | str:
    """The adapter of one layer, or what is wrong with it."""
    alpha = tensors.pop("alpha", None)
    kind = next((k for k, sets in KINDS.items() if set(tensors) in sets), None)
    if kind is None:
        return f"the tensors {', '.join(sorted(tensors)) or 'alpha'} are no adapter dtq knows"
    if alpha is not None and alpha.numel() != 1:
        return f"its alpha has the shape {list(alpha.shape)}, and should be one number"
    values = [*tensors.values()] if alpha is None else [*tensors.values(), alpha]
    if not all(t.float().isfinite().all() for t in values):  # float8 has no isfinite
        return "numbers that are not finite"
    for name, tensor in tensors.items():
        if name == "dora_scale":
            columns = tensor.ndim > 1 and tensor.shape[0] == 1 and tensor.numel() > 1
            tensors[name] = tensor if columns else tensor.flatten()
        elif tensor.ndim > 2 and tensor.shape[2:].numel() == 1:
            tensors[name] = tensor.flatten(1)  # of a 1 x 1 convolution
    made = Factors(kind, tensors, 1.0)
    if problem := made.problem():
        return problem
    # LyCORIS does not use the alpha of LoKr of two whole factors
    return (
        made
        if alpha is None or made.rank is None
        else replace(made, scale=float(alpha) / made.rank)
    )
