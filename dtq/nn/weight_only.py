# SPDX-License-Identifier: Apache-2.0
"""What layers with a packed weight and float activations have in common.

Such a layer keeps the class of the module that it replaces as a base: code that asks for an
``nn.Conv2d`` or an ``nn.Embedding`` finds one. ``weight`` holds the packed integers of a matrix, as
in :class:`dtq.nn.linear.QuantLinear`; floats exist only during a call.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from dtq.errors import CheckpointError
from dtq.formats import FORMATS, PackedTensors, TensorSpec
from dtq.models.linears import matrix_shape
from dtq.nn.storage import BIT_TYPES, cast_dtype, check_tensor, from_disk, to_disk
from dtq.plan.layers import LayerSpec


class WeightOnly(nn.Module):
    """A layer with a packed weight; a subclass is combined with the class that it replaces.

    Attributes:
        spec: formats of the layer; activations are float.
        compute_dtype: dtype of the other parameters, and of the weight during a call.
        config_entry: of this layer in ``config.json``, shared.
        prefix: of the name of a combined class.
    """

    prefix = "Quant"
    spec: LayerSpec
    compute_dtype: torch.dtype
    config_entry: dict[str, Any]
    _specs: dict[str, TensorSpec]

    @classmethod
    def in_place_of(
        cls, old: nn.Module, spec: LayerSpec, *, compute_dtype: torch.dtype, device: Any = None
    ) -> Self:
        """A layer with uninitialized tensors, for the place of a float module.

        Args:
            old: the module; its settings, other parameters and training mode carry over.
            spec: weight format; no other field may be set.
            compute_dtype: dtype of the other parameters.
            device: of the packed tensors; None for that of ``old``.
        """
        new: Self = object.__new__(_class_for(cls, type(old)))  # type: ignore[arg-type, assignment]
        new.__dict__.update({k: v for k, v in vars(old).items() if k != "_parameters"})
        new._parameters = {}
        new.spec, new.compute_dtype, new.config_entry = spec, compute_dtype, {}
        new._specs = dict(spec.tensor_specs(matrix_shape(old)))
        device = device or old.weight.device
        for name, tensor in new._specs.items():
            dtype = BIT_TYPES.get(tensor.dtype, tensor.dtype)
            empty = torch.empty(tensor.shape, dtype=dtype, device=device)
            new._parameters[name] = nn.Parameter(empty, requires_grad=False)
        for name, other in old._parameters.items():  # the bias, or what the class has of its own
            if name != "weight":
                kept = None if other is None else other.detach().to(compute_dtype)
                new._parameters[name] = None if kept is None else nn.Parameter(kept, False)
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

    def matrix(self) -> Tensor:
        """The weight as a float32 matrix."""
        return FORMATS[self.spec.weight_format].unpack(self.packed_tensors())

    @abstractmethod
    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The float weight as the replaced module has it, in ``dtype`` or ``compute_dtype``."""

    @property
    def replaced_class(self) -> type[nn.Module]:
        """The class of the module that this layer replaces."""
        kind: type[nn.Module] = type(self).__bases__[1]
        return kind

    def unquantized(self) -> nn.Module:
        """The float module with the values of this layer."""
        return self.with_weight(nn.Parameter(self.dequantize()))

    def with_weight(self, weight: Tensor) -> nn.Module:
        """A module of the replaced class that shares everything but the weight with this one."""
        plain: nn.Module = object.__new__(self.replaced_class)
        ours = {"_parameters", "spec", "compute_dtype", "config_entry", "_specs"}
        plain.__dict__.update({k: v for k, v in vars(self).items() if k not in ours})
        others = {k: v for k, v in self._parameters.items() if k not in self._specs}
        plain._parameters = {"weight": weight, **others}  # type: ignore[dict-item]
        return plain

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.compute_dtype = cast_dtype(fn, self.compute_dtype)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        return _new, type(self).__bases__, self.__dict__

    def extra_repr(self) -> str:
        """That of the replaced module, and the format."""
        return f"{super().extra_repr()}, weights={self.spec.weight_format}"


@functools.cache
def _class_for(base: type[WeightOnly], kind: type[nn.Module]) -> type[WeightOnly]:
    name = f"{base.prefix}{kind.__name__}"
    return type(name, (base, kind), {"__module__": base.__module__})


def _new(base: type[WeightOnly], kind: type[nn.Module]) -> WeightOnly:
    return object.__new__(_class_for(base, kind))  # type: ignore[arg-type]
