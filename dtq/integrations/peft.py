# SPDX-License-Identifier: Apache-2.0
"""Adapters of peft on quantized linears: they run in parallel to them.

A quantized linear transforms its input internally, so an adapter gets the same input as on a float
linear and needs no conversion. LoRA, DoRA (``dora.py``), LoKr and LoHa (``lycoris.py``) have layers
for it; all but DoRA can be fused into its low-rank branch (``fuse.py``). The others are refused.

This module needs peft.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import Linear
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from dtq.errors import InputError
from dtq.integrations import lycoris
from dtq.integrations.dora import QuantDora
from dtq.integrations.fuse import CONVOLUTION, TABLE, Fusible
from dtq.nn.conv import QuantConv
from dtq.nn.linear import QuantLinear
from dtq.nn.weight_only import WeightOnly


class LoraLinear(Fusible, Linear):  # type: ignore[misc]
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
        self.start(adapter_name)

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """Peft's variants, with DoRA for a quantized linear."""
        return {**super().lora_variants, ("use_dora",): QuantDora}

    def resolve_lora_variant(self, **kwargs: Any) -> Any:
        """Check that the adapter is LoRA or DoRA, not another variant.

        Raises:
            InputError: it is another one, which needs the float weight.
        """
        variant = super().resolve_lora_variant(**kwargs)
        if variant is not None and not isinstance(variant, QuantDora):
            kind = type(variant).__name__.removesuffix("LinearVariant")
            raise InputError(
                f"this adapter is {kind}, which needs the float weight; quantized linears take "
                f"{_KINDS_TEXT}. Merge it into the float model and quantize that"
            )
        return variant

    def low_rank(self, name: str) -> tuple[Tensor, Tensor]:
        """``A`` (R, K) and the scaled ``B`` (N, R).

        Raises:
            InputError: the adapter is DoRA, which changes every row of the weight.
        """
        if name in self.lora_variant:
            raise InputError(
                f"adapter {name!r} is DoRA, which scales the rows of the whole weight and cannot "
                f"be fused into a low-rank branch; keep it loaded, or merge it into the float "
                f"model and quantize that"
            )
        down, up = self.lora_A[name].weight.detach(), self.lora_B[name].weight.detach()
        return down, up * self.scaling[name]

    def fused_bias(self, name: str, base: QuantLinear) -> nn.Parameter | None:
        """The bias of the linear with that of an adapter added.

        Args:
            name: of the adapter.
            base: the quantized linear.

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
    """Make peft put the layers of dtq on quantized linears, and refuse every other adapter there.

    peft has a table of LoRA layers per ``LoraConfig`` only, and diffusers makes those itself; so
    this wraps the one function through which peft makes every LoRA layer.
    """
    if getattr(LoraModel._create_new_module, "dtq", False):
        return
    create = LoraModel._create_new_module

    def create_new_module(lora_config: Any, *args: Any, **kwargs: Any) -> Any:
        lora_config._register_custom_module({QuantLinear: LoraLinear})
        return create(lora_config, *args, **kwargs)

    create_new_module.dtq = True  # type: ignore[attr-defined]
    LoraModel._create_new_module = staticmethod(create_new_module)
    lycoris.register()
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
            if isinstance(base, QuantConv):
                raise InputError(f"adapter {name!r}: {CONVOLUTION}")
            if isinstance(base, WeightOnly):
                raise InputError(f"adapter {name!r}: {TABLE}")
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
    """Check that an adapter has a layer here, and is not initialized from the weight.

    Raises:
        InputError: it is something else; says what.
    """
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind not in _KINDS:
        raise InputError(
            f"adapter {name!r} is {kind}; quantized linears take {_KINDS_TEXT}. "
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
_KINDS = ("LORA", "LOKR", "LOHA")
_KINDS_TEXT = "LoRA, DoRA, LoKr and LoHa"
