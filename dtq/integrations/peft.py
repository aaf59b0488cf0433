# SPDX-License-Identifier: Apache-2.0
"""LoRA on quantized linears: adapters run in parallel to them, or fuse into the low-rank branch.

A quantized linear transforms its input internally, so an adapter gets the same input as on a float
linear and needs no conversion. Fusing appends ``A`` and ``B * scale`` to the factors of the
low-rank branch. The packed weight does not change, unfusing restores every bit, and a fused model
saves and loads like any other. The fused factors are bfloat16, as in a checkpoint.

This module needs peft.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import Linear
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import nn

from dtq.errors import InputError
from dtq.nn.linear import QuantLinear


class LoraLinear(Linear):  # type: ignore[misc]
    """peft's LoRA layer for a linear, with a merge that does not change the weight.

    Args:
        base_layer: the quantized linear.
        adapter_name: name of the adapter.
        *args: of peft's layer.
        **kwargs: of peft's layer.

    Raises:
        InputError: the adapter needs the float weight, or the linear replaced a convolution.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, *args, **kwargs)
        # adapter to its range of ranks in the branch, and the bias from before
        self.fused: dict[str, tuple[int, int, nn.Parameter | None]] = {}
        if self.get_base_layer().spatial:
            raise InputError(
                f"adapter {adapter_name!r} is for a quantized 1 x 1 convolution; exclude that "
                f"layer from quantization: modules_to_not_convert, or exclude: in the recipe"
            )

    def resolve_lora_variant(self, **kwargs: Any) -> None:
        """Check that the adapter is plain LoRA, not a variant.

        Raises:
            InputError: it is a variant, which needs the float weight.
        """
        variant = super().resolve_lora_variant(**kwargs)
        if variant is not None:
            kind = type(variant).__name__.removesuffix("LinearVariant")
            raise InputError(
                f"this adapter is {kind}, which needs the float weight; quantized linears take "
                f"plain LoRA. Merge it into the float model and quantize that"
            )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fuse adapters into the low-rank branch of the quantized linear.

        Args:
            safe_merge: whether to check that the factors are finite.
            adapter_names: None for the active adapters.

        Raises:
            InputError: an adapter has a bias and the linear has none, or a tensor is not finite.
        """
        base = self.get_base_layer()
        if not isinstance(base, QuantLinear):  # the model was dequantized
            super().merge(safe_merge, adapter_names)
            return
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.lora_A:
                continue
            down = self.lora_A[name].weight.detach()
            up = self.lora_B[name].weight.detach() * self.scaling[name]
            bias = self._fused_bias(name, base)
            values = (down, *self.lora_B[name].parameters())
            if safe_merge and not all(value.isfinite().all() for value in values):
                raise InputError(f"adapter {name!r} has numbers that are not finite")
            self.fused[name] = *base.add_rank(down, up), base.bias
            base.bias = bias  # type: ignore[assignment]
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Remove fused adapters from the branch, the last one first; restores every bit."""
        base = self.get_base_layer()
        if not isinstance(base, QuantLinear):
            super().unmerge()
            return
        while self.merged_adapters:
            first, end, bias = self.fused.pop(self.merged_adapters.pop())
            base.remove_rank(first, end)
            if bias is not None:  # the model may have been cast or moved since
                bias = nn.Parameter(bias.to(base.bias), bias.requires_grad)
            base.bias = bias  # type: ignore[assignment]

    def _fused_bias(self, name: str, base: QuantLinear) -> nn.Parameter | None:
        """The bias of the linear with that of an adapter added.

        Raises:
            InputError: only the adapter has one.
        """
        added, bias = self.lora_B[name].bias, base.bias
        if added is None:
            return bias
        if bias is None:
            raise InputError(
                f"adapter {name!r} has a bias for a linear that has none, and cannot be fused; "
                f"keep it loaded"
            )
        total = bias.detach().float() + added.detach().to(bias.device).float() * self.scaling[name]
        return nn.Parameter(total.to(bias.dtype), requires_grad=bias.requires_grad)


def register() -> None:
    """Make peft put :class:`LoraLinear` on quantized linears, and refuse every other adapter there.

    peft has a table of layers per ``LoraConfig`` only, and diffusers makes those itself; so this
    wraps the one function through which peft makes every layer.
    """
    if getattr(LoraModel._create_new_module, "dtq", False):
        return
    create = LoraModel._create_new_module

    def create_new_module(lora_config: Any, *args: Any, **kwargs: Any) -> Any:
        lora_config._register_custom_module({QuantLinear: LoraLinear})
        return create(lora_config, *args, **kwargs)

    create_new_module.dtq = True  # type: ignore[attr-defined]
    LoraModel._create_new_module = staticmethod(create_new_module)
    _refuse_others()


def _refuse_others() -> None:
    """Make peft refuse all other adapters on quantized linears.

    They use ``weight``, whatever it holds: OFT rotates it, IA3 and VeRA take its shape, BOFT
    multiplies by it. With packed weights the result would be noise, or an error far from its cause.
    Every tuner creates its layers with its own ``_create_and_replace``.
    """
    inject = BaseTuner.inject_adapter

    def inject_adapter(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        create = self._create_and_replace

        def create_and_replace(config: Any, name: str, target: Any, *rest: Any, **more: Any) -> Any:
            base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
            if isinstance(base, QuantLinear):
                _check_kind(config, name)
            return create(config, name, target, *rest, **more)

        self._create_and_replace = create_and_replace
        try:
            return inject(self, model, *args, **kwargs)
        finally:
            del self._create_and_replace

    BaseTuner.inject_adapter = inject_adapter


def _check_kind(config: Any, name: str) -> None:
    """Check that an adapter is plain LoRA, and is not initialized from the weight.

    Raises:
        InputError: it is something else; says what.
    """
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        raise InputError(
            f"adapter {name!r} is {kind}; quantized linears take plain LoRA. "
            f"Merge it into the float model and quantize that"
        )
    init = getattr(config, "init_lora_weights", True)
    if not isinstance(init, bool) and init not in _INITS:
        raise InputError(
            f"adapter {name!r} is initialized from the float weight "
            f"(init_lora_weights={init!r}), and the layer is quantized; use True, False or "
            f"{', '.join(map(repr, _INITS))}"
        )


_INITS = ("gaussian", "orthogonal")
