# SPDX-License-Identifier: Apache-2.0
"""Modulated LayerNorms and gated linears in eager mode: computed where one kernel can do all.

A block of diffusers computes ``linear(norm(x) * (1 + scale) + shift)``, later ``gate * y + x``. As
ops of torch each of these passes over all tokens. Here ``norm(x)`` and ``y`` are deferred: tensors
that remember products and sums with them. A quantized linear quantizes a deferred norm in one pass,
once for q, k and v. A deferred output runs its GEMM when the residual is added. Any other op gets
the value that torch would have computed, bit for bit.

Only modules of :data:`NORMS` and :data:`OUTPUTS` defer. The code of diffusers around them uses the
results at once, and changes nothing in place before that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from dtq.kernels.table import compiled
from dtq.models.linears import is_hooked

NORMS: dict[str, tuple[str, ...]] = {
    "AdaLayerNormZero": ("norm",),
    "AdaLayerNormZeroSingle": ("norm",),
    "BasicTransformerBlock": ("norm1", "norm2", "norm3"),
    "FluxTransformerBlock": ("norm2", "norm2_context"),
    "JointTransformerBlock": ("norm2", "norm2_context"),
}
"""By the class of the module around it, LayerNorms whose result is modulated or goes to linears."""

_JOINT = "attn.to_out.0", "ff.net.2"

OUTPUTS: dict[str, tuple[str, ...]] = {
    "BasicTransformerBlock": ("attn1.to_out.0", "ff.net.2"),
    "FluxTransformerBlock": (*_JOINT, "attn.to_add_out", "ff_context.net.2"),
    "FluxSingleTransformerBlock": ("proj_out",),
    "JointTransformerBlock": (*_JOINT, "attn.to_add_out", "attn2.to_out.0", "ff_context.net.2"),
}
"""By the class of a block, linears whose output is gated and added to the residual."""

LEAST_ELEMENTS = 1 << 17
"""Results of smaller inputs are not deferred: Python would take longer than torch's ops."""

aten = torch.ops.aten


class Deferred(Tensor):
    """A tensor (images, tokens, channels) that is not computed yet.

    Attributes:
        sources: tensors that it will be computed from, with their versions.
    """

    sources: list[tuple[Tensor, int]]
    _known: Tensor | None

    @staticmethod
    def __new__(cls, like: Tensor, shape: tuple[int, ...], *rest: Any) -> Deferred:
        """A tensor with the dtype and the device of ``like``, and no memory."""
        made: Deferred = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=like.dtype, device=like.device
        )
        made.sources, made._known = [], None
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def depends_on(self, *tensors: Tensor) -> None:
        """Note tensors that must not change before the value is computed."""
        self.sources += [(tensor, tensor._version) for tensor in tensors]

    def value(self) -> Tensor:
        """The tensor, as torch computes it.

        Raises:
            RuntimeError: a tensor that it depends on has changed.
        """
        if self._known is None:
            self.check()
            self._known = self.compute()
        return self._known

    def check(self) -> None:
        """Raise an error if a tensor that it depends on has changed."""
        if any(tensor._version != version for tensor, version in self.sources):
            raise RuntimeError(
                "a tensor was changed in place between a LayerNorm or a linear and the use of its "
                "result; call dtq.nn.deferred.defer(model, False) to compute each at once"
            )

    def compute(self) -> Tensor:
        """The value."""
        raise NotImplementedError

    def with_product(self, factor: Tensor) -> Tensor | None:
        """Times one row per image, deferred; None if it cannot be."""
        raise NotImplementedError

    def with_sum(self, summand: Tensor) -> Tensor | None:
        """Plus a tensor; None if it cannot be a part of this."""
        raise NotImplementedError

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """A product or a sum becomes part of a deferred tensor; every other op gets its value."""
        kwargs = kwargs or {}
        part = _PARTS.get(func)
        if func is aten.div.Tensor and isinstance(args[0], Deferred) and _is_one(args[1]):
            return args[0]
        if part is not None and not kwargs:
            for mine, other in (args, args[::-1]):
                if isinstance(mine, Deferred) and not isinstance(other, Deferred):
                    result = part(mine, other)
                    if result is not None:
                        return result
        args, kwargs = tree_map_only(Deferred, Deferred.value, (args, kwargs))
        return func(*args, **kwargs)

    def is_row_per_image(self, other: Any) -> bool:
        """Whether a tensor of the same dtype has one row for each image, or one for all."""
        return (
            isinstance(other, Tensor)
            and (other.dtype, other.device) == (self.dtype, self.device)
            and other.dim() == 3
            and other.shape[1:] == (1, self.shape[2])
            and other.shape[0] in (1, self.shape[0])
        )


def _product(mine: Deferred, other: Any) -> Tensor | None:
    return mine.with_product(other) if mine.is_row_per_image(other) else None


def _sum(mine: Deferred, other: Any) -> Tensor | None:
    return mine.with_sum(other) if isinstance(other, Tensor) else None


def _is_one(number: Any) -> bool:
    return isinstance(number, int | float) and number == 1


_PARTS: dict[Any, Callable[[Deferred, Any], Tensor | None]] = {
    aten.mul.Tensor: _product,
    aten.add.Tensor: _sum,
}


class DeferredNorm(Deferred):
    """``norm(x) * factor + shift`` of a LayerNorm without weights.

    Attributes:
        x: its input.
        eps: of the LayerNorm.
        factor: (images or 1, 1, channels), or None.
        shift: likewise.
    """

    def __init__(
        self, x: Tensor, shape: tuple[int, ...], eps: float, factor: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.x, self.eps, self.factor, self.shift = x, eps, factor, shift
        self.depends_on(*(t for t in (x, factor, shift) if t is not None))
        self._rows: Tensor | None = None
        self._codes: dict[Any, tuple[Tensor, Tensor]] = {}

    @property
    def rows(self) -> Tensor:
        """Its input as (M, K)."""
        if self._rows is None:
            self._rows = self.x.reshape(-1, self.x.shape[-1])
        return self._rows

    def compute(self) -> Tensor:
        """As torch computes it."""
        y = F.layer_norm(self.x, self.x.shape[-1:], eps=self.eps)
        y = y if self.factor is None else y * self.factor
        return y if self.shift is None else y + self.shift

    def with_product(self, factor: Tensor) -> Tensor | None:
        """Modulated, without a shift yet."""
        if self.factor is not None or self._known is not None:
            return None
        return DeferredNorm(self.x, self.x.shape, self.eps, factor)

    def with_sum(self, summand: Tensor) -> Tensor | None:
        """Modulated."""
        if self.factor is None or self.shift is not None or self._known is not None:
            return None
        if not self.is_row_per_image(summand) or summand.shape != self.factor.shape:
            return None
        return DeferredNorm(self.x, self.x.shape, self.eps, self.factor, summand)

    def quantized(
        self, key: Any, transform: tuple[Any, ...], scale: Tensor | None, qmax: int
    ) -> tuple[Tensor, Tensor]:
        """As int8 rows (M, K) and their scales (M,), in one pass.

        Args:
            key: stands for the arguments: what was quantized with the same key is not again.
            transform: as ops take it.
            scale: static scale, or None.
            qmax: largest code.
        """
        if key not in self._codes:
            self.check()
            modulation: tuple[Tensor | None, Tensor | None] = None, None
            if self.factor is not None:  # the op adds 1, in float32
                shift = torch.zeros_like(self.factor) if self.shift is None else self.shift
                rows = [row.float().reshape(-1, self.shape[-1]) for row in (self.factor, shift)]
                modulation = rows[0] - 1, rows[1]
            self._codes[key] = torch.ops.dtq.norm_quantize_rows(
                self.rows, *modulation, self.eps, *transform, scale, None, qmax
            )
        return self._codes[key]


class DeferredOutput(Deferred):
    """``gate * linear(x)``, where the linear has quantized its input.

    Attributes:
        gemm: ``(gate, residual) -> (M, N)``, with both or neither.
        gate: (images, 1, channels), or None.
    """

    def __init__(
        self, like: Tensor, shape: tuple[int, ...], gemm: Callable[..., Tensor],
        gate: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.gemm, self.gate = gemm, gate
        self.depends_on(*(t for t in (gate,) if t is not None))

    def compute(self) -> Tensor:
        """As torch computes it."""
        y = self.gemm(None, None).reshape(self.shape)
        return y if self.gate is None else self.gate * y

    def with_product(self, factor: Tensor) -> Tensor | None:
        """Gated."""
        if self.gate is not None or self._known is not None:
            return None
        return DeferredOutput(factor, self.shape, self.gemm, factor)

    def with_sum(self, summand: Tensor) -> Tensor | None:
        """Runs the GEMM with gate and residual."""
        if self.gate is None or self._known is not None or summand.shape != self.shape:
            return None
        if summand.dtype != self.dtype or self.gate.requires_grad or summand.requires_grad:
            return None
        self.check()
        gate, residual = (t.reshape(-1, self.shape[-1]) for t in (self.gate, summand))
        return self.gemm(gate, residual).reshape(self.shape)


class DeferringNorm(nn.LayerNorm):
    """``nn.LayerNorm`` without weights, whose result is deferred on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        """(images, tokens, channels) to the same."""
        if not is_deferred_now(self, input):
            return super().forward(input)
        return DeferredNorm(input, input.shape, self.eps)


def is_deferred_now(module: nn.Module, x: Tensor) -> bool:
    """Whether the result of a module for ``x`` may be deferred.

    Not of few elements, if hooks could see it, in a compiled graph, with gradients, in inference
    mode, where torch does not count the changes of tensors, or without compiled kernels.
    """
    return (
        type(x) is Tensor
        and x.dim() == 3
        and x.numel() >= LEAST_ELEMENTS
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and not (torch.compiler.is_compiling() or torch._C._get_tracing_state())
        and not torch.is_grad_enabled()
        and not x.is_inference()
        and not (module._forward_hooks or module._forward_pre_hooks or is_hooked(module))
        and not torch.is_autocast_enabled("cpu")
        and compiled("cpu")
    )


def defer(model: nn.Module, enable: bool = True) -> None:
    """Let LayerNorms and linears of a model defer their results, or compute them at once.

    Args:
        model: the transformer.
        enable: whether they may defer.
    """
    for module in model.modules():
        for name in NORMS.get(type(module).__name__, ()):
            norm: Any = getattr(module, name, None)
            if enable and type(norm) is nn.LayerNorm and norm.weight is None and norm.bias is None:
                norm.__class__ = DeferringNorm
            elif not enable and type(norm) is DeferringNorm:
                norm.__class__ = nn.LayerNorm  # type: ignore[assignment]
        for path in OUTPUTS.get(type(module).__name__, ()):
            try:
                linear: Any = module.get_submodule(path)
            except AttributeError:  # a block may have another feed-forward, or none
                continue
            if hasattr(linear, "defers"):
                linear.defers = enable
