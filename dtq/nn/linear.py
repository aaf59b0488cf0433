# SPDX-License-Identifier: Apache-2.0
"""The quantized linear: an ``nn.Linear`` whose weight is a container of codes.

It *is* an ``nn.Linear`` so that PEFT, diffusers and accelerate treat it as one. Its ``weight`` is
int8, so code that would use it as a float matrix fails loudly instead of giving a plausible
picture. Scales are 2-D integer Parameters holding the bits of floats: nothing that casts floating
tensors (``torch_dtype``, ``.to``, layerwise casting) can touch them. On disk they are plain floats
(:func:`to_disk`, :func:`from_disk`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dtq.errors import CheckpointError
from dtq.formats import FORMATS, Parts, Spec
from dtq.formats.acts import ACTS
from dtq.kernels.table import Kernel, Task, pick
from dtq.plan import part_specs
from dtq.transforms.hadamard import fwht

_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


class StepClock(nn.Module):
    """The timestep bin that the model is in, a 1-element tensor shared by every layer.

    A tensor, not a number: a compiled graph then serves every timestep.
    """

    bin: Tensor
    edges: Tensor

    def __init__(self, edges: list[float]) -> None:
        super().__init__()
        self.register_buffer("bin", torch.zeros(1, dtype=torch.int64), persistent=False)
        self.register_buffer("edges", torch.tensor(edges, dtype=torch.float64), persistent=False)

    def set(self, timestep: Tensor) -> None:
        """Move to the bin of ``timestep``, a tensor of any shape; the first entry decides."""
        now = timestep.reshape(-1)[:1].to(self.edges)
        self.bin.copy_(torch.bucketize(now, self.edges))


class QuantLinear(nn.Linear):
    """``y = x W^T + b`` with ``W`` in a dtq format; ``x`` is transformed and quantized on the way.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is one, kept in ``compute_dtype``.
        weights: name of the weight format, a key of ``FORMATS``.
        acts: name of the activation format, a key of ``ACTS``.
        block: Hadamard block of the online rotation, 1 for none.
        pre_quant: whether a per-channel vector multiplies the input first.
        bins: timestep bins of a static activation format.
        compute_dtype: dtype of bias and of everything around the layer.
        device: where the (empty) parts are made.

    Raises:
        InputError: the shape does not fit the format.
    """

    weight: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        weights: str,
        acts: str,
        *,
        block: int = 1,
        pre_quant: bool = False,
        bins: int = 1,
        compute_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.weights, self.acts = weights, acts
        self.block, self.pre_quant, self.bins = block, pre_quant, bins
        self.compute_dtype = compute_dtype
        self.task = Task(FORMATS[weights], ACTS[acts], block)
        self.kernel: Kernel = pick(self.task)
        self._specs = part_specs(self._shape, weights, acts, pre_quant, bins)
        self._clock: list[StepClock] = []  # in a list: shared, not a submodule of every layer
        for name, spec in self.specs().items():
            dtype = _BITS.get(spec.dtype, spec.dtype)
            empty = torch.empty(spec.shape, dtype=dtype, device=device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        vector = torch.empty(out_features, dtype=compute_dtype, device=device) if bias else None
        self.register_parameter("bias", None if vector is None else nn.Parameter(vector))

    def specs(self) -> dict[str, Spec]:
        """Shape and on-disk dtype of every part this layer owns."""
        return self._specs

    def fill(self, parts: Mapping[str, Tensor]) -> None:
        """Take over stored parts (on-disk dtypes).

        Raises:
            CheckpointError: a part is missing, unknown, or of another shape or dtype.
        """
        specs = self.specs()
        if set(parts) != set(specs):
            raise CheckpointError(f"expected the parts {sorted(specs)}, got {sorted(parts)}")
        for name, tensor in parts.items():
            check_part(name, tensor, specs[name])
            self._parameters[name] = nn.Parameter(from_disk(tensor), requires_grad=False)

    def part(self, name: str) -> Tensor:
        """A stored part with its on-disk dtype, sharing memory."""
        tensor = self._parameters[name]
        assert tensor is not None
        return to_disk(tensor, self._specs[name])

    def parts(self) -> Parts:
        """Every stored part with its on-disk dtype, sharing memory."""
        return {name: self.part(name) for name in self.specs()}

    def forward(self, x: Tensor) -> Tensor:
        """float (..., K) to float (..., N) in the dtype of ``x``."""
        rows = x.reshape(-1, self.in_features)  # (M, K)
        if torch.is_grad_enabled() and (rows.requires_grad or _learns(self.bias)):
            y = _StraightThrough.apply(rows, self.bias, self)  # type: ignore[no-untyped-call]
        else:
            y = self._multiply(rows, self.bias)
        return y.reshape(*x.shape[:-1], self.out_features)

    def _multiply(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        weight = {name: self.part(name) for name in self._specs if name.startswith("weight")}
        pre_scale = self.part("pre_quant_scale").reshape(-1) if self.pre_quant else None
        act_scale = self._step_scale() if self.task.acts.static else None
        return self.kernel.call(self.task, rows, weight, pre_scale, act_scale, bias)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The float matrix (N, K) that multiplies the untransformed input."""
        fmt = self.task.weights
        w = fwht(fmt.unpack({n: self.part(n) for n in fmt.layout(self._shape)}), self.block)
        if self.pre_quant:
            w = w * self.part("pre_quant_scale").float()
        return w.to(dtype or self.compute_dtype)

    def extra_repr(self) -> str:
        turn = f", hadamard={self.block}" if self.block > 1 else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, weights={self.weights}, acts={self.acts}{turn}"
        )

    @property
    def _shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def _step_scale(self) -> Tensor:
        table = self.part("input_scale").reshape(-1)  # (bins,)
        if not self._clock:
            raise RuntimeError(
                "this layer has one activation scale per timestep bin, but no clock tells it the "
                "timestep; load the model with diffusers or call dtq.nn.swap.install_clock(model)"
            )
        return table.index_select(0, self._clock[0].bin.to(table.device))


class _StraightThrough(torch.autograd.Function):
    """Gradients for adapters trained on top: those of the dequantized layer, rounding ignored."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: QuantLinear) -> Tensor:
        ctx.layer, ctx.has_bias = layer, bias is not None
        return layer._multiply(x, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (grad,) = grads  # (M, N)
        down = grad @ ctx.layer.dequantize(grad.dtype)  # (M, K)
        return down, grad.sum(0) if ctx.has_bias else None, None


def _learns(bias: Tensor | None) -> bool:
    return bias is not None and bias.requires_grad


def check_part(key: str, tensor: Tensor, spec: Spec) -> None:
    """Raise :class:`CheckpointError` unless the tensor is as the spec says."""
    if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
        raise CheckpointError(
            f"{key}: expected {spec.dtype} {list(spec.shape)}, "
            f"the file has {tensor.dtype} {list(tensor.shape)}"
        )


def from_disk(tensor: Tensor) -> Tensor:
    """The bits of a float tensor as integers; integers as they are."""
    bits = _BITS.get(tensor.dtype)
    return tensor.contiguous().view(bits) if bits is not None else tensor.contiguous()


def to_disk(tensor: Tensor, spec: Spec) -> Tensor:
    """Inverse of :func:`from_disk`, sharing memory."""
    return tensor.view(spec.dtype) if spec.dtype in _BITS else tensor
