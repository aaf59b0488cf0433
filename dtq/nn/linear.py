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
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtq.errors import CheckpointError, InputError
from dtq.formats import FORMATS, PackedTensors, TensorSpec
from dtq.formats.activations import ACTIVATION_FORMATS
from dtq.kernels.table import Epilogue, Kernel, LinearProblem, branch_joins, compiled, pick
from dtq.models.linears import shape_of
from dtq.nn.step_clock import StepClock
from dtq.nn.storage import _BITS, check_part, from_disk, to_disk
from dtq.plan.layers import LayerSpec
from dtq.transforms import OnlineTransform

CHANGE = ("pre_quant_scale", "pre_quant_perm")
"""Parts that say how an input is changed before it is quantized."""

HOOKS = ("_hf_hook", "_diffusers_hook")
"""What accelerate and diffusers leave on a module whose forward they wrapped."""


class QuantLinear(nn.Linear):
    """``y = x W^T + b`` with ``W`` in a dtq format; ``x`` is transformed and quantized on the way.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is one, kept in ``compute_dtype``.
        runtime: formats, and what happens to the input on the way.
        bins: timestep bins of a static activation format.
        compute_dtype: dtype of bias and of everything around the layer.
        device: where the (empty) parts are made.
        spatial: axes behind the channels, for a layer that stands in for a 1 x 1 convolution.

    Raises:
        InputError: the shape does not fit the format.
    """

    weight: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        spec: LayerSpec,
        *,
        bins: int = 1,
        compute_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        spatial: int = 0,
    ) -> None:
        nn.Module.__init__(self)
        self.spatial = spatial
        if spatial:  # code that looks at a convolution asks for these
            self.in_channels, self.out_channels = in_features, out_features
        self.in_features, self.out_features = in_features, out_features
        self.runtime, self.bins = spec, bins
        self.weight_format, self.activation_format = spec.weight_format, spec.activation_format
        self.compute_dtype = compute_dtype
        self.problem = LinearProblem(
            FORMATS[self.weight_format],
            ACTIVATION_FORMATS[self.activation_format],
            spec.hadamard_block_size,
            spec.num_rotations,
        )
        self.kernel: Kernel = pick(self.problem)
        self._specs = spec.tensor_specs(self._shape, bins)
        self.row: dict[str, Any] = {}  # of this layer in config.json
        self._clock: list[StepClock] = []  # in a list: shared, not a submodule of every layer
        self._first: list[QuantLinear] = []  # likewise, see `share_input_with`
        self._followers: list[QuantLinear] = []
        for name, tensor_spec in self.tensor_specs().items():
            dtype = _BITS.get(tensor_spec.dtype, tensor_spec.dtype)
            empty = torch.empty(tensor_spec.shape, dtype=dtype, device=device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        vector = torch.empty(out_features, dtype=compute_dtype, device=device) if bias else None
        self.register_parameter("bias", None if vector is None else nn.Parameter(vector))

    @classmethod
    def in_place_of(
        cls,
        old: nn.Module,
        spec: LayerSpec,
        *,
        bins: int = 1,
        compute_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> QuantLinear:
        """An empty layer for where a linear or a 1 x 1 convolution was."""
        rows, columns = shape_of(old)
        kernel = getattr(old, "kernel_size", ())
        return cls(
            columns,
            rows,
            old.bias is not None,
            spec,
            bins=bins,
            compute_dtype=compute_dtype,
            device=device,
            spatial=len(kernel),
        )

    def tensor_specs(self) -> dict[str, TensorSpec]:
        """Shape and on-disk dtype of every part this layer owns."""
        return self._specs

    def fill(self, parts: Mapping[str, Tensor]) -> None:
        """Take over stored parts (on-disk dtypes).

        Raises:
            CheckpointError: a part is missing, unknown, or of another shape or dtype.
        """
        specs = self.tensor_specs()
        if set(parts) != set(specs):
            raise CheckpointError(f"expected the parts {sorted(specs)}, got {sorted(parts)}")
        self._unlink()
        for name, tensor in parts.items():
            check_part(name, tensor, specs[name])
            self._parameters[name] = nn.Parameter(from_disk(tensor), requires_grad=False)

    def share_input_with(self, first: QuantLinear | None) -> None:
        """Say that another layer changes its input with the very same numbers; None for none.

        A compiled graph then reads them there, sees that q, k and v ask for the same codes, and
        makes them once (``dtq.fusion``). New parts of either layer end it; copies do not follow.
        """
        self._unlink()
        if first is not None:
            self._first.append(first)
            first._followers.append(self)

    def _unlink(self) -> None:
        for first in self._first:
            first._followers.remove(self)
        for layer in (self, *self._followers):
            layer._first.clear()
        self._followers.clear()

    def _load_from_state_dict(self, *args: Any) -> None:
        self._unlink()
        super()._load_from_state_dict(*args)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_first": [], "_followers": []}

    def packed_tensor(self, name: str) -> Tensor:
        """A stored part with its on-disk dtype, sharing memory."""
        tensor = self._parameters[name]
        assert tensor is not None
        return to_disk(tensor, self._specs[name])

    def packed_tensors(self) -> PackedTensors:
        """Every stored part with its on-disk dtype, sharing memory."""
        return {name: self.packed_tensor(name) for name in self.tensor_specs()}

    def add_rank(self, down: Tensor, up: Tensor) -> tuple[int, int]:
        """Add the term ``up @ down`` to the low-rank branch; returns its first and last rank.

        Args:
            down: float (R, K), for the untransformed input.
            up: float (N, R).

        Raises:
            InputError: the layer is offloaded.
        """
        if self.weight.is_meta:
            raise InputError("this layer is offloaded; fuse adapters before offloading the model")
        first = self.runtime.rank
        factors = [
            down.to(self.weight.device, torch.bfloat16),
            up.to(self.weight.device, torch.bfloat16),
        ]
        if first:
            factors = [
                torch.cat([self.packed_tensor("proj_down"), factors[0]]),
                torch.cat([self.packed_tensor("proj_up"), factors[1]], 1),
            ]
        self._set_branch(*factors)
        return first, self.runtime.rank

    def remove_rank(self, first: int, last: int) -> None:
        """Take the ranks ``first`` to ``last`` of the low-rank branch out: undo :meth:`widen`."""
        down, up = self.packed_tensor("proj_down"), self.packed_tensor("proj_up")
        self._set_branch(
            torch.cat([down[:first], down[last:]]), torch.cat([up[:, :first], up[:, last:]], 1)
        )

    def _set_branch(self, down: Tensor, up: Tensor) -> None:
        self.runtime = replace(self.runtime, rank=len(down))
        self._specs = self.runtime.tensor_specs(self._shape, self.bins)
        for name, factor in (("proj_down", down), ("proj_up", up)):
            self._parameters.pop(name, None)
            if len(down):
                self._parameters[name] = nn.Parameter(from_disk(factor), requires_grad=False)
        self.row.clear()
        self.row.update(self.runtime.to_json())

    @property
    def clock(self) -> StepClock | None:
        """What tells the layer where in the trajectory it is; None without one."""
        return self._clock[0] if self._clock else None

    def set_clock(self, clock: StepClock | None) -> None:
        """Read static scales and the step policy by this clock from now on."""
        self._clock = [] if clock is None else [clock]

    def forward(self, x: Tensor) -> Tensor:
        """float (..., K) to float (..., N) in the dtype of ``x``; channels before spatial axes."""
        if self.spatial:
            axis = -1 - self.spatial
            return self._forward(x.movedim(axis, -1)).movedim(-1, axis)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)  # (M, K)
        if torch.is_grad_enabled() and (rows.requires_grad or _learns(self.bias)):
            y = _StraightThrough.apply(rows, self.bias, self)  # type: ignore[no-untyped-call]
        else:
            y = self._multiply(rows, self.bias)
        return y.reshape(*x.shape[:-1], self.out_features)

    def gelu(self, x: Tensor) -> Tensor | None:
        """GELU, tanh form, of ``self(x)``, rounded once; None where that takes a pass of its own.

        It does where there are no compiled kernels or not for this layer, where something listens
        to the layer (hooks, offloading), and where gradients are asked for.
        """
        heard = self._forward_hooks or self._forward_pre_hooks
        wrapped = any(hasattr(self, hook) for hook in HOOKS)
        if heard or wrapped or self.spatial or self._changes_by_step:
            return None
        if torch.is_grad_enabled() and (x.requires_grad or _learns(self.bias)):
            return None
        if self.kernel.with_epilogue is None or not compiled(x.device.type):
            return None
        if self.runtime.rank and not self._joins(x):
            return None
        rows = x.reshape(-1, self.in_features)
        then = Epilogue(gelu=True, branch=self._branch(rows))
        y = self.kernel.with_epilogue(self.problem, rows, self._given(), self.bias, then)
        return None if y is None else y.reshape(*x.shape[:-1], self.out_features)

    @property
    def _changes_by_step(self) -> bool:
        return bool(
            self._clock and self._clock[0].modes and self.problem.activation_format.bits < 16
        )

    def _given(self) -> PackedTensors:
        """What a kernel gets: the parts, and the activation scale of this step."""
        parts = {
            name: self.packed_tensor(name) for name in self._specs if not name.startswith("proj_")
        }
        if self._first and torch.compiler.is_compiling():
            first = self._first[0]
            for name in CHANGE:
                # one that is offloaded is elsewhere
                if name in parts and first.packed_tensor(name).device == parts[name].device:
                    parts[name] = first.packed_tensor(name)
        if self.problem.activation_format.static:
            parts["input_scale"] = self.step_scale()
        return parts

    def _branch(self, rows: Tensor) -> tuple[Tensor, Tensor] | None:
        """The two factors of the low-rank branch of these rows."""
        if not self.runtime.rank:
            return None
        down, up = (self.packed_tensor(n).to(rows.dtype) for n in ("proj_down", "proj_up"))
        return F.linear(rows, down), up

    def _multiply(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        parts, branch = self._given(), self._branch(rows)
        if branch and self.kernel.with_epilogue and self._joins(rows):
            joined = self.kernel.with_epilogue(
                self.problem, rows, parts, bias, Epilogue(branch=branch)
            )
            if joined is not None:
                return joined
        run = self._stepped if self._changes_by_step else partial(self.kernel.call, self.problem)
        y = run(rows, parts, bias)
        return y if branch is None else y + F.linear(*branch)

    def _joins(self, x: Tensor) -> bool:
        """Whether the product adds the low-rank branch itself."""
        return not self._changes_by_step and branch_joins(x, self.runtime.rank)

    def _stepped(self, rows: Tensor, tensors: PackedTensors, bias: Tensor | None) -> Tensor:
        """The product with the activation format that the step policy names for this step."""
        clock, task = self._clock[0], self.problem
        y: Tensor = torch.ops.dtq.step_linear(
            rows, clock.mode, list(clock.modes), self.weight_format, self.activation_format, task.hadamard_block, task.num_rotations,
            list(tensors), list(tensors.values()), bias, self.out_features,
        )  # fmt: skip
        return y

    def step_scale(self) -> Tensor:
        """The stored activation scale (1,) of this step."""
        table = self.packed_tensor("input_scale").reshape(-1)  # (bins,)
        if len(table) == 1:
            return table
        if not self._clock:
            raise RuntimeError(
                "this layer has one activation scale per timestep bin, but no clock tells it the "
                "timestep; load the model with diffusers or call dtq.nn.swap.install_clock(model)"
            )
        return table.index_select(0, self._clock[0].bin.to(table.device))

    def transform(self) -> OnlineTransform:
        """The change that the input goes through before it is quantized."""
        if self.runtime.pre_quant:
            scale = self.packed_tensor("pre_quant_scale").reshape(-1)
        else:
            scale = torch.ones(self.in_features, dtype=torch.bfloat16, device=self.weight.device)
        order = (
            self.packed_tensor("pre_quant_perm").reshape(-1) if self.runtime.permutation else None
        )
        return OnlineTransform(
            scale, self.problem.hadamard_block, order, self.problem.num_rotations
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The float matrix (N, K) that multiplies the untransformed input."""
        fmt = self.problem.weight_format
        w = fmt.unpack({n: self.packed_tensor(n) for n in fmt.tensor_specs(self._shape)})
        w = self.transform().raw(w)
        if self.runtime.rank:
            w = w + self.packed_tensor("proj_up").float() @ self.packed_tensor("proj_down").float()
        return w.to(dtype or self.compute_dtype)

    def extra_repr(self) -> str:
        turn = (
            f", hadamard={self.problem.hadamard_block}" if self.problem.hadamard_block > 1 else ""
        )
        turn += f", rank={self.runtime.rank}" if self.runtime.rank else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, weights={self.weight_format}, acts={self.activation_format}{turn}"
        )

    def unquantized(self) -> nn.Module:
        """The float linear or 1 x 1 convolution with the values of this layer."""
        weight = self.dequantize()
        plain: nn.Module = nn.Linear(self.in_features, self.out_features, False, device="meta")
        if self.spatial:
            kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[self.spatial - 1]
            plain = kind(self.in_features, self.out_features, 1, bias=False, device="meta")
            weight = weight.reshape(*weight.shape, *(1,) * self.spatial)
        plain.weight = nn.Parameter(weight, requires_grad=False)
        plain.bias = self.bias
        return plain

    @property
    def _shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features


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
