# SPDX-License-Identifier: Apache-2.0
"""The quantized convolution: weight-only, for autoencoders and U-Nets, where it counts for bytes.

It keeps the class of the convolution that it replaces as a base: a causal convolution still pads in
its own ``forward``, and code that asks for an ``nn.Conv2d`` finds one. ``weight`` holds the packed
integers of the matrix (O, I * kernel), as in :class:`dtq.nn.linear.QuantLinear`; the float weight
exists only during a call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dtq.errors import CheckpointError
from dtq.formats import FORMATS, PackedTensors, TensorSpec
from dtq.models.linears import CONVOLUTIONS, matrix_shape
from dtq.nn.storage import BIT_TYPES, cast_dtype, check_tensor, from_disk, to_disk
from dtq.plan.layers import LayerSpec


class QuantConv(nn.Module):
    """A convolution with a packed weight; combined with the class that it replaces.

    Attributes:
        spec: formats of the layer; activations are float.
        compute_dtype: dtype of the bias, and of the weight during a call.
        config_entry: of this layer in ``config.json``, shared.
    """

    spec: LayerSpec
    compute_dtype: torch.dtype
    config_entry: dict[str, Any]
    _specs: dict[str, TensorSpec]

    @classmethod
    def in_place_of(
        cls, old: nn.Module, spec: LayerSpec, *, compute_dtype: torch.dtype, device: Any = None
    ) -> QuantConv:
        """A layer with uninitialized tensors, for the place of a float convolution.

        Args:
            old: the convolution; its settings, bias and training mode carry over.
            spec: weight format; no other field may be set.
            compute_dtype: dtype of the bias.
            device: of the packed tensors; None for that of ``old``.
        """
        new: QuantConv = object.__new__(_class_for(type(old)))  # type: ignore[arg-type]
        new.__dict__.update({k: v for k, v in vars(old).items() if k != "_parameters"})
        new._parameters = {}
        new.spec, new.compute_dtype, new.config_entry = spec, compute_dtype, {}
        new._specs = dict(spec.tensor_specs(matrix_shape(old)))
        device = device or old.weight.device
        for name, tensor in new._specs.items():
            dtype = BIT_TYPES.get(tensor.dtype, tensor.dtype)
            empty = torch.empty(tensor.shape, dtype=dtype, device=device)
            new._parameters[name] = nn.Parameter(empty, requires_grad=False)
        bias = old.bias
        new._parameters["bias"] = (
            nn.Parameter(bias.detach().to(compute_dtype), requires_grad=False)
            if isinstance(bias, Tensor)
            else None
        )
        return new

    @property
    def weight_format(self) -> str:
        """Key of ``FORMATS``."""
        return self.spec.weight_format

    @property
    def activation_format(self) -> str:
        """Key of ``ACTIVATION_FORMATS``: activations are float."""
        return self.spec.activation_format

    def tensor_specs(self) -> dict[str, TensorSpec]:
        """Shape and on-disk dtype of every packed tensor, by name."""
        return self._specs

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the packed tensors, given with their on-disk dtypes.

        Raises:
            CheckpointError: a tensor is missing, unknown, or of another shape or dtype.
        """
        if set(tensors) != set(self._specs):
            raise CheckpointError(f"expected {sorted(self._specs)}, got {sorted(tensors)}")
        for name, tensor in tensors.items():
            check_tensor(name, tensor, self._specs[name])
            self._parameters[name] = nn.Parameter(from_disk(tensor), requires_grad=False)

    def packed_tensors(self) -> PackedTensors:
        """Every packed tensor with its on-disk dtype, sharing memory."""
        return {n: to_disk(self._parameters[n], s) for n, s in self._specs.items()}  # type: ignore[arg-type]

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The float weight (O, I / groups, *kernel), in ``dtype`` or ``compute_dtype``."""
        assert isinstance(self, CONVOLUTIONS)
        matrix = FORMATS[self.spec.weight_format].unpack(self.packed_tensors())
        kernel = self.in_channels // self.groups, *self.kernel_size
        return matrix.unflatten(1, kernel).to(dtype or self.compute_dtype)

    def unquantized(self) -> nn.Module:
        """The float convolution with the values of this layer."""
        plain: nn.Module = object.__new__(type(self).__mro__[2])
        ours = {"_parameters", "spec", "compute_dtype", "config_entry", "_specs"}
        plain.__dict__.update({k: v for k, v in vars(self).items() if k not in ours})
        plain._parameters = {"weight": nn.Parameter(self.dequantize()), "bias": self.bias}  # type: ignore[dict-item]
        return plain

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # what nn.Conv1d and its like call with their weight, here the packed one
        made: Tensor = super()._conv_forward(x, self.dequantize(x.dtype), bias)  # type: ignore[misc]
        return made

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantConv:
        self.compute_dtype = cast_dtype(fn, self.compute_dtype)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        return _new, (type(self).__mro__[2],), self.__dict__

    def extra_repr(self) -> str:
        """That of the convolution, and the format."""
        return f"{super().extra_repr()}, weights={self.spec.weight_format}"


@functools.cache
def _class_for(kind: type[nn.Module]) -> type[QuantConv]:
    return type(f"Quant{kind.__name__}", (QuantConv, kind), {"__module__": __name__})


def _new(kind: type[nn.Module]) -> QuantConv:
    return object.__new__(_class_for(kind))  # type: ignore[arg-type]
