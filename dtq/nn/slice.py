# SPDX-License-Identifier: Apache-2.0
"""The slice of a quantized linear that one process holds in tensor parallelism.

With the *column* rule a process holds some output channels, and needs nothing from the others. With
the *row* rule it holds some input channels, and the partial products are summed over the processes.
A token's scale belongs to the whole token, so the row rule first takes the amax over all processes.
The quantized values are then those of a single process. With integer products so is the sum, and
the output is bit-identical.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dtq.errors import InputError
from dtq.formats import FORMATS, TensorSpec
from dtq.formats.activations import ACTIVATION_FORMATS, fake_quantize, row_codes, scale_of
from dtq.formats.grid import doubled
from dtq.kernels.ops_gemm import int_matmul
from dtq.kernels.table import LinearProblem, pick
from dtq.models.linears import shape_of
from dtq.nn.linear import QuantLinear
from dtq.plan.layers import LayerSpec

Group = Any
"""A ``torch.distributed`` process group; None is the default one."""

COLUMN, ROW = "column", "row"
_AXIS = {COLUMN: 0, ROW: 1}  # of the weight (N, K)


def _local_shape(layer: QuantLinear, rule: str, world: int) -> tuple[int, int]:
    rows, columns = shape_of(layer)
    return (rows // world, columns) if rule == COLUMN else (rows, columns // world)


class Slice(QuantLinear):
    """What one process holds of a quantized linear. For inference.

    Args:
        whole: the linear, on any device, meta included.
        rule: ``column`` or ``row``.
        rank: of this process.
        world: number of processes.
        group: the processes.
        sections: number of equal ranges of output channels that are each split over the processes;
            2 for a gated feed-forward, whose linear holds two projections.
    """

    def __init__(
        self, whole: QuantLinear, rule: str, rank: int, world: int, group: Group, sections: int = 1
    ) -> None:
        rows, columns = _local_shape(whole, rule, world)
        super().__init__(
            columns, rows, whole.bias is not None, whole.spec, bins=whole.bins,
            compute_dtype=whole.compute_dtype, device="meta",
        )  # fmt: skip
        self.rule, self.rank, self.world, self.group = rule, rank, world, group
        self.sections, self._whole = sections, whole.tensor_specs()
        self._timing = whole._timing

    def take(self, name: str, tensor: Any) -> Tensor:
        """This process' slice of a packed tensor, with on-disk dtype, or of the bias.

        Args:
            name: of the packed tensor, or ``bias``.
            tensor: all of it, or the object of ``safetensors`` from which slices are read.
        """
        if name == "bias":
            return self._slice(tensor, 0) if self.rule == COLUMN else tensor[:]
        if self.tensor_specs()[name].shape == self._whole[name].shape:
            return tensor[:]
        return self._slice(tensor, _AXIS[self.rule])

    def _slice(self, tensor: Any, axis: int) -> Tensor:
        shape = tensor.shape if isinstance(tensor, Tensor) else tensor.get_shape()
        section = shape[axis] // self.sections
        size = section // self.world
        starts = range(self.rank * size, self.sections * section, section)
        places = [slice(start, start + size) for start in starts]
        pieces = [tensor[place] if axis == 0 else tensor[:, place] for place in places]
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces, axis)).contiguous()

    def _forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            raise InputError("a sharded model is for inference: run it under torch.no_grad()")
        return super()._forward(x)

    def gelu(self, x: Tensor) -> Tensor | None:
        """As for the whole layer; None for the row rule, whose sum GELU must follow."""
        return super().gelu(x) if self.rule == COLUMN else None

    def _gemm(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        if self.rule == COLUMN:
            return super()._gemm(rows, bias)
        partial, scales = self._partial_product(rows)
        y = self._all_reduce(partial, dist.ReduceOp.SUM).float()
        for scale in scales:  # the epilogue of the integer kernels, in the same order
            y = y * scale
        y = (y if bias is None else y + bias.float()).to(rows.dtype)
        if self.spec.rank:
            down, up = (self.packed_tensor(n).to(rows.dtype) for n in ("proj_down", "proj_up"))
            y = y + F.linear(self._all_reduce(F.linear(rows, down), dist.ReduceOp.SUM), up)
        return y

    def _partial_product(self, rows: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The product (M, N) of this process' channels, and the scales to apply to the sum."""
        activations, fmt = self.current_activation_format(), self.problem.weight_format
        weight = {name: self.packed_tensor(name) for name in fmt.tensor_specs(self._shape)}
        x = self._transform_input(rows)
        if activations.bits == 16:
            return F.linear(x.to(rows.dtype), fmt.unpack(weight).to(rows.dtype)).float(), ()
        amax = x.abs().amax(-1, keepdim=True)  # (M, 1)
        if not activations.static:
            amax = self._all_reduce(amax, dist.ReduceOp.MAX)
        if activations.block_format and not activations.int8:
            return fake_quantize(x, activations, amax) @ fmt.unpack(weight).T, ()
        if activations.integer:  # values as float (M, K), scales of the tokens (M, 1)
            static, qmax = activations.static, activations.qmax
            scale = self.step_scale().expand_as(amax) if static else scale_of(amax, qmax)
            x_q = row_codes(x, scale, qmax)
        else:
            x_q, scale = doubled(x, amax)
        problem = LinearProblem(fmt, activations)
        expand = pick(problem).expand
        if expand is None:
            return x_q @ fmt.unpack(weight).T, (scale,)
        w8, w_scale = expand(problem, weight)
        return int_matmul(x_q.to(torch.int8), w8), (scale, w_scale.T)

    def _transform_input(self, rows: Tensor) -> Tensor:
        spec = self.spec
        if not spec.pre_quant and spec.hadamard_block_size == 1:
            return rows.float()
        scale = self.packed_tensor("pre_quant_scale").reshape(-1) if spec.pre_quant else None
        x: Tensor = torch.ops.dtq.transform_rows(rows, scale, None, spec.hadamard_block_size, 1)
        return x

    def _all_reduce(self, tensor: Tensor, op: Any) -> Tensor:
        dist.all_reduce(tensor, op, self.group)
        return tensor


def slice_specs(layer: QuantLinear, rule: str, world: int) -> dict[str, TensorSpec]:
    """Shapes and on-disk dtypes of the packed tensors of a slice.

    Args:
        layer: the whole linear.
        rule: ``column`` or ``row``.
        world: number of processes.

    Raises:
        InputError: the layer cannot be split so; says why.
    """
    spec, shape, axis = layer.spec, shape_of(layer), _AXIS[rule]
    if layer.spatial:
        raise InputError("it is a convolution")
    if shape[axis] % world:
        raise InputError(f"{shape[axis]} channels do not split into {world}")
    local = _local_shape(layer, rule, world)
    if rule == ROW:
        _check_input_channels(spec, local[1])
    specs = spec.tensor_specs(local, layer.bins)
    for name, whole in layer.tensor_specs().items():
        mine = specs.get(name, whole)
        if mine.shape != whole.shape and mine.shape[axis] * world != whole.shape[axis]:
            raise InputError(f"{spec.weight_format}: {name} does not split into {world}")
    return specs


def _check_input_channels(spec: LayerSpec, columns: int) -> None:
    """Check that the input transform and format treat each slice of ``columns`` separately.

    Raises:
        InputError: they do not; says why.
    """
    if spec.permutation:
        raise InputError("its input channels are permuted across slices (pre_quant_perm)")
    if spec.num_rotations > 1:
        raise InputError("its second rotation mixes channels of different slices")
    if columns % spec.hadamard_block_size:
        raise InputError(
            f"a rotation block of {spec.hadamard_block_size} channels does not fit into a slice of "
            f"{columns}"
        )
    if block_format := ACTIVATION_FORMATS[spec.activation_format].block_format:
        FORMATS[block_format].tensor_specs((1, columns))
