# SPDX-License-Identifier: Apache-2.0
"""LoRA on quantized linears: adapters run beside them, and fuse into their low-rank branch.

A quantized linear transforms its input inside, so an adapter sees what it would see beside the
float one, and nothing needs to be converted. Fusing puts ``A`` and ``B * scale`` beside the factors
of the low-rank branch: the codes stay as they are, unfusing gives back every bit, and a fused model
saves and loads like any other. The factors are kept in bfloat16, as the file has them.

Only imported where peft is installed.
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
    """peft's layer for a linear, with a merge that leaves the weight alone.

    Raises:
        InputError: the adapter needs the float weight, or the linear stands in for a convolution.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, *args, **kwargs)
        self.fused: dict[str, tuple[int, int]] = {}  # adapter -> its ranks in the branch
        if self.get_base_layer().spatial:
            raise InputError(
                f"adapter {adapter_name!r} is for a quantized 1 x 1 convolution; keep that layer "
                f"when quantizing: modules_to_not_convert, or keep: in the recipe"
            )

    def resolve_lora_variant(self, **kwargs: Any) -> None:
        """Plain LoRA only."""
        variant = super().resolve_lora_variant(**kwargs)
        if variant is not None:
            kind = type(variant).__name__.removesuffix("LinearVariant")
            raise InputError(
                f"this adapter is {kind}, which needs the float weight; quantized linears take "
                f"plain LoRA. Merge it into the float model and quantize that"
            )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Move adapters into the low-rank branch of the quantized linear.

        Raises:
            InputError: an adapter has a bias, or (``safe_merge``) numbers that are not finite.
        """
        base = self.get_base_layer()
        if not isinstance(base, QuantLinear):  # dequantized since
            super().merge(safe_merge, adapter_names)
            return
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.lora_A:
                continue
            if self.lora_B[name].bias is not None:
                raise InputError(f"adapter {name!r} has a bias and cannot be fused; leave it on")
            down = self.lora_A[name].weight.detach()
            up = self.lora_B[name].weight.detach() * self.scaling[name]
            if safe_merge and not (down.isfinite().all() and up.isfinite().all()):
                raise InputError(f"adapter {name!r} has numbers that are not finite")
            self.fused[name] = base.add_rank(down, up)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take fused adapters out again, the last first; every bit is as before."""
        base = self.get_base_layer()
        if not isinstance(base, QuantLinear):
            super().unmerge()
            return
        while self.merged_adapters:
            base.remove_rank(*self.fused.pop(self.merged_adapters.pop()))


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
    """Every other adapter of peft reads ``weight``, or merges into it, whatever it holds.

    OFT num_rotations it, IA3 and VeRA take its shape, BOFT multiplies by it: on codes that is noise, or an
    error far from its cause. All tuners make their layers through one method of their own.
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
    """Plain LoRA that does not start from the weight.

    Raises:
        InputError: says what the adapter is.
    """
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        raise InputError(
            f"adapter {name!r} is {kind}; quantized linears take plain LoRA. "
            f"Merge it into the float model and quantize that"
        )
    start = getattr(config, "init_lora_weights", True)
    if not isinstance(start, bool) and start not in _STARTS:
        raise InputError(
            f"adapter {name!r} starts from the float weight (init_lora_weights={start!r}), and the "
            f"layer holds codes; use True, False or {', '.join(map(repr, _STARTS))}"
        )


_STARTS = ("gaussian", "orthogonal")
