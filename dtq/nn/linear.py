# SPDX-License-Identifier: Apache-2.0
"""The quantized linear: an ``nn.Linear`` that holds packed tensors.

It is a subclass of ``nn.Linear``, so PEFT, diffusers and accelerate treat it as one. Its ``weight``
is an integer tensor: code that uses it as a float matrix raises an error instead of producing a
plausible image. Scales are 2-D integer Parameters that hold the bits of floats, so casts of float
tensors (``torch_dtype``, ``.to``, layerwise casting) do not change them. On disk they are plain
floats (:func:`to_disk`, :func:`from_disk`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module

from dtq.errors import CheckpointError, InputError
from dtq.formats import FORMATS, PackedTensors, TensorSpec
from dtq.formats.activations import ACTIVATION_FORMATS, ActivationFormat, activation_format_of
from dtq.kernels import gpu_fusion
from dtq.kernels.kernel import Epilogue, Kernel, LinearCall, LinearProblem
from dtq.kernels.table import branch_joins, compiled, pick
from dtq.models.linears import is_hooked, shape_of
from dtq.nn.step_clock import StepClock
from dtq.nn.storage import BIT_TYPES, cast_dtype, check_tensor, from_disk, to_disk
from dtq.nn.straight_through import StraightThrough, needs_gradient
from dtq.plan.layers import LayerSpec
from dtq.transforms import OnlineTransform

TRANSFORM_TENSORS = ("pre_quant_scale", "pre_quant_perm")
"""Packed tensors of the input transform."""


class QuantLinear(nn.Linear):
    """``y = x W^T + b`` with a packed ``W``; ``x`` is transformed and quantized first.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is one; it has ``compute_dtype``.
        spec: formats, input transform and rank of the low-rank branch.
        bins: timestep bins of a static activation format.
        compute_dtype: dtype of the bias and of the modules around the layer.
        device: device of the uninitialized packed tensors.
        spatial: number of axes after the channels, in place of a 1 x 1 convolution; 0 for a linear.

    Raises:
        InputError: the format does not support the shape.
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
        if spatial:  # code that inspects a convolution reads these
            self.in_channels, self.out_channels = in_features, out_features
        self.in_features, self.out_features = in_features, out_features
        self.spec, self.bins = spec, bins
        self.weight_format, self.activation_format = spec.weight_format, spec.activation_format
        self.compute_dtype = compute_dtype
        self.problem = LinearProblem(
            FORMATS[spec.weight_format], ACTIVATION_FORMATS[spec.activation_format],
            spec.hadamard_block_size, spec.num_rotations,
        )  # fmt: skip
        self.kernel: Kernel = pick(self.problem)
        self._specs = spec.tensor_specs(self._shape, bins)
        self.config_entry: dict[str, Any] = {}  # of this layer in config.json, shared
        # the clock and the layer's name; in a tuple, so that it is no submodule of every layer
        self._timing: tuple[StepClock | None, str] = None, ""
        self._first: list[QuantLinear] = []  # likewise; see `share_input_with`
        self._followers: list[QuantLinear] = []
        for name, tensor_spec in self.tensor_specs().items():
            dtype = BIT_TYPES.get(tensor_spec.dtype, tensor_spec.dtype)
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
        """A layer with uninitialized tensors, for the place of a linear or a 1 x 1 convolution.

        Args:
            old: the module to replace; gives the shape and whether there is a bias.
            spec: as for the constructor.
            bins: as for the constructor.
            compute_dtype: as for the constructor.
            device: as for the constructor.
        """
        rows, columns = shape_of(old)
        return cls(
            columns, rows, old.bias is not None, spec, bins=bins, compute_dtype=compute_dtype,
            device=device, spatial=len(getattr(old, "kernel_size", ())),
        )  # fmt: skip

    def tensor_specs(self) -> dict[str, TensorSpec]:
        """Shape and on-disk dtype of every packed tensor, by name."""
        return self._specs

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the packed tensors.

        Args:
            tensors: by name, with on-disk dtypes; contiguous, aligned tensors are not copied.

        Raises:
            CheckpointError: a tensor is missing, unknown, or of another shape or dtype.
        """
        specs = self.tensor_specs()
        if set(tensors) != set(specs):
            raise CheckpointError(f"expected the tensors {sorted(specs)}, got {sorted(tensors)}")
        self._unlink()
        for name, tensor in tensors.items():
            check_tensor(name, tensor, specs[name])
            self._parameters[name] = nn.Parameter(from_disk(tensor), requires_grad=False)

    def share_input_with(self, first: QuantLinear | None) -> None:
        """Mark ``first`` as a layer with the same input transform; None clears the mark.

        In a compiled graph both layers then read the tensors of ``first``, so that the graph
        quantizes the common input of q, k and v once (``dtq.integrations.torch_compile``). New
        tensors in either layer clear the mark; copies do not have it.
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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        self.compute_dtype = cast_dtype(fn, self.compute_dtype)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def packed_tensor(self, name: str) -> Tensor:
        """A packed tensor with its on-disk dtype, sharing memory."""
        tensor = self._parameters[name]
        assert tensor is not None
        return to_disk(tensor, self._specs[name])

    def packed_tensors(self) -> PackedTensors:
        """Every packed tensor with its on-disk dtype, sharing memory."""
        return {name: self.packed_tensor(name) for name in self.tensor_specs()}

    def add_rank(self, down: Tensor, up: Tensor) -> tuple[int, int]:
        """Add ``up @ down`` to the low-rank branch.

        Args:
            down: float (R, K), for the untransformed input.
            up: float (N, R).

        Returns:
            The range of the new ranks, first and end, for :meth:`remove_rank`.

        Raises:
            InputError: the layer is offloaded.
        """
        if self.weight.is_meta:
            raise InputError("this layer is offloaded; fuse adapters before offloading the model")
        first, device = self.spec.rank, self.weight.device
        down, up = down.to(device, torch.bfloat16), up.to(device, torch.bfloat16)
        if first:
            down = torch.cat([self.packed_tensor("proj_down"), down])
            up = torch.cat([self.packed_tensor("proj_up"), up], 1)
        self._set_branch(down, up)
        return first, self.spec.rank

    def remove_rank(self, first: int, end: int) -> None:
        """Remove ranks ``first`` to ``end - 1`` of the low-rank branch: undo :meth:`add_rank`."""
        down, up = self.packed_tensor("proj_down"), self.packed_tensor("proj_up")
        self._set_branch(
            torch.cat([down[:first], down[end:]]), torch.cat([up[:, :first], up[:, end:]], 1)
        )

    def _set_branch(self, down: Tensor, up: Tensor) -> None:
        self.spec = replace(self.spec, rank=len(down))
        self._specs = self.spec.tensor_specs(self._shape, self.bins)
        for name, factor in (("proj_down", down), ("proj_up", up)):
            self._parameters.pop(name, None)
            if len(down):
                self._parameters[name] = nn.Parameter(from_disk(factor), requires_grad=False)
        self.config_entry.clear()
        self.config_entry.update(self.spec.to_json())

    @property
    def clock(self) -> StepClock | None:
        """The clock that holds the current timestep bin; None if the layer has none."""
        return self._timing[0]

    def set_clock(self, clock: StepClock | None, name: str = "") -> None:
        """Set the clock that selects static scales and the precision of the step policy.

        Args:
            clock: of the model; None: the layer has none.
            name: of the layer in the model, for errors.
        """
        self._timing = clock, name

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            input: float (..., K); in place of a convolution (B, K, *spatial). It has the name that
                it has in torch, by which the U-Net of AnimateDiff passes it.

        Returns:
            (..., N) or (B, N, *spatial), in the dtype of ``input``.
        """
        if self.spatial:
            axis = -1 - self.spatial
            return self._forward(input.movedim(axis, -1)).movedim(-1, axis)
        return self._forward(input)

    def _forward(self, x: Tensor) -> Tensor:
        if self._differs_by_sample:
            clock, name = self._timing
            assert clock is not None
            parts = clock.each_sample(x, name)
            return torch.cat([self._forward(part) for part in parts])
        rows = x.reshape(-1, self.in_features)  # (M, K)
        if needs_gradient(rows, self.bias):
            y = StraightThrough.apply(rows, self.bias, self)  # type: ignore[no-untyped-call]
        else:
            y = self._gemm(rows, self.bias)
        return y.reshape(*x.shape[:-1], self.out_features)

    def gelu(self, x: Tensor) -> Tensor | None:
        """GELU, tanh form, of ``self(x)``, as an epilogue of the kernel: rounded once.

        Returns:
            (..., N), or None: there are no compiled kernels, or none for this layer; a call of the
            layer does more than its own forward; or a gradient is required.
        """
        if self._runs_hooks() or self.spatial or self._has_step_policy or self._differs_by_sample:
            return None
        if needs_gradient(x, self.bias):
            return None
        if self.kernel.with_epilogue is None or not compiled(x.device.type):
            return None
        if not gpu_fusion.is_fused("gelu", x):
            return None
        if self.spec.rank and not self._fuses_branch(x):
            return None
        rows = x.reshape(-1, self.in_features)
        epilogue = Epilogue(gelu=True, branch=self._branch(rows))
        call = LinearCall(self.problem, rows, self._kernel_tensors(), self.bias)
        y = self.kernel.with_epilogue(call, epilogue)
        return None if y is None else y.reshape(*x.shape[:-1], self.out_features)

    def _runs_hooks(self) -> bool:
        """Whether a call of the layer runs hooks, or a forward that was put in place of its own.

        Adapters of kohya, LyCORIS and ComfyUI replace ``forward``, as offloading does.
        """
        hooks = self._forward_hooks or self._forward_pre_hooks or module._has_any_global_hook()  # type: ignore[no-untyped-call]
        replaced = getattr(self.forward, "__func__", None) is not _FORWARD
        return bool(hooks or replaced or is_hooked(self))

    @property
    def _has_step_policy(self) -> bool:
        modes = self.clock is not None and self.clock.modes
        return bool(modes and self.problem.activation_format.bits < 16)

    @property
    def _differs_by_sample(self) -> bool:
        """Whether the samples of the current call have timesteps of their own, and it matters."""
        if self.clock is None or self.clock.samples is None:
            return False
        return self._has_step_policy or self.problem.activation_format.per_timestep

    def current_activation_format(self) -> ActivationFormat:
        """The activation format of this step: the layer's, or the one that a step policy sets."""
        own = self.problem.activation_format
        clock = self.clock
        if clock is None or not self._has_step_policy:
            return own
        return activation_format_of(clock.modes[int(clock.mode)], own.name)

    def _kernel_tensors(self) -> PackedTensors:
        """The tensors that a kernel reads, with the activation scale of the current step."""
        tensors = {n: self.packed_tensor(n) for n in self._specs if not n.startswith("proj_")}
        if self._first and torch.compiler.is_compiling():
            first = self._first[0]
            for name in TRANSFORM_TENSORS:
                # an offloaded layer may be on another device
                if name in tensors and first.packed_tensor(name).device == tensors[name].device:
                    tensors[name] = first.packed_tensor(name)
        if self.problem.activation_format.static:
            tensors["input_scale"] = self.step_scale()
        return tensors

    def _branch(self, rows: Tensor) -> tuple[Tensor, Tensor] | None:
        """The low-rank branch: ``rows @ down^T`` (M, R) and ``up`` (N, R); None without one."""
        if not self.spec.rank:
            return None
        down, up = (self.packed_tensor(n).to(rows.dtype) for n in ("proj_down", "proj_up"))
        return F.linear(rows, down), up

    def _gemm(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        """``rows`` (M, K) to (M, N), with the low-rank branch."""
        tensors, branch = self._kernel_tensors(), self._branch(rows)
        if branch and self.kernel.with_epilogue and self._fuses_branch(rows):
            call = LinearCall(self.problem, rows, tensors, bias)
            fused = self.kernel.with_epilogue(call, Epilogue(branch=branch))
            if fused is not None:
                return fused
        if self._has_step_policy:
            y = self._step_policy_gemm(rows, tensors, bias)
        else:
            y = self.kernel.call(self.problem, rows, tensors, bias)
        return y if branch is None else y + F.linear(*branch)

    def _fuses_branch(self, x: Tensor) -> bool:
        """Whether the kernel adds the low-rank branch itself."""
        return not self._has_step_policy and branch_joins(x, self.spec.rank)

    def _step_policy_gemm(
        self, rows: Tensor, tensors: PackedTensors, bias: Tensor | None
    ) -> Tensor:
        """The GEMM with the activation precision that the step policy has for this step."""
        clock, problem = self.clock, self.problem
        assert clock is not None
        y: Tensor = torch.ops.dtq.step_linear(
            rows, clock.mode, list(clock.modes), self.weight_format, self.activation_format,
            problem.hadamard_block, problem.num_rotations, list(tensors), list(tensors.values()),
            bias, self.out_features,
        )  # fmt: skip
        return y

    def step_scale(self) -> Tensor:
        """The static activation scale (1,) of the current step.

        Raises:
            RuntimeError: there is one scale per timestep bin, but no clock.
        """
        table = self.packed_tensor("input_scale").reshape(-1)  # (bins,)
        if len(table) == 1:
            return table
        if self.clock is None:
            raise RuntimeError(
                "this layer has one activation scale per timestep bin, but no clock that holds the "
                "timestep; load the model with diffusers, or call install_clock(model) of "
                "dtq.nn.timestep_hook"
            )
        return table.index_select(0, self.clock.bin.to(table.device))

    def transform(self) -> OnlineTransform:
        """The transform that the input gets before it is quantized."""
        if self.spec.pre_quant:
            scale = self.packed_tensor("pre_quant_scale").reshape(-1)
        else:
            scale = torch.ones(self.in_features, dtype=torch.bfloat16, device=self.weight.device)
        perm = self.packed_tensor("pre_quant_perm").reshape(-1) if self.spec.permutation else None
        return OnlineTransform(scale, self.problem.hadamard_block, perm, self.problem.num_rotations)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The float weight (N, K) for the untransformed input, low-rank branch included.

        Args:
            dtype: of the result; None for ``compute_dtype``.
        """
        fmt = self.problem.weight_format
        w = fmt.unpack({n: self.packed_tensor(n) for n in fmt.tensor_specs(self._shape)})
        w = self.transform().raw(w)
        if self.spec.rank:
            w = w + self.packed_tensor("proj_up").float() @ self.packed_tensor("proj_down").float()
        return w.to(dtype or self.compute_dtype)

    def extra_repr(self) -> str:
        """Shape, formats, Hadamard block and rank, for ``repr``."""
        block, rank = self.problem.hadamard_block, self.spec.rank
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, weights={self.weight_format}, "
            f"activations={self.activation_format}"
            f"{f', hadamard={block}' if block > 1 else ''}{f', rank={rank}' if rank else ''}"
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


_FORWARD = QuantLinear.forward
