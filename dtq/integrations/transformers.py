# SPDX-License-Identifier: Apache-2.0
"""The quantizer class for transformers, registered by its public functions.

``from_pretrained`` of a folder with a dtq text encoder then needs nothing else. The tensors in the
files have the names of the modules: the renamings by which transformers reads old checkpoints are
not applied to packed tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from dtq import integrations
from dtq.checkpoint import config as checkpoint_config
from dtq.checkpoint import reader
from dtq.integrations.loaded_model import (
    align_tensors,
    build_layers,
    check_saved,
    chosen_dtype,
    complete_config,
    finish_loading,
    saved_tensors,
    set_packed_tensor,
    unquantize,
)
from dtq.nn.embedding import retie
from dtq.nn.linear import QuantLinear
from dtq.nn.weight_only import WeightOnly
from dtq.plan.layers import Plan


class DTQConfig(checkpoint_config.DTQConfig, QuantizationConfigMixin):  # type: ignore[misc]
    """``dtq.DTQConfig`` as a quantization config of transformers."""


class DTQQuantizer(HfQuantizer):  # type: ignore[misc]
    """Loads dtq checkpoints, and quantizes float models while they load.

    transformers calls the methods in the order of loading; the base class describes them.

    Args:
        quantization_config: from ``config.json``, or given by the user.
        **kwargs: of the base class, ``pre_quantized`` among them.

    Attributes:
        report: of the quantization; None for a loaded checkpoint.
    """

    requires_calibration = False
    is_trainable = False  # packed weights cannot be trained
    is_compileable = True

    def __init__(self, quantization_config: checkpoint_config.DTQConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.report: object = None
        self._packed: set[str] = set()

    def is_serializable(self) -> bool:
        """Whether the model can be saved: always."""
        return True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse a device map to disk, from which packed tensors would be read as they are stored.

        Raises:
            ValueError: ``device_map`` has an entry ``disk``.
        """
        if isinstance(device_map, dict) and "disk" in {str(v) for v in device_map.values()}:
            raise ValueError("a dtq model cannot be dispatched to disk by device_map")

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        """The requested dtype, which transformers fills in from ``config.json``.

        Raises:
            InputError: a quantized model cannot compute in that dtype.
        """
        return chosen_dtype(self.quantization_config, dtype, self.pre_quantized)

    def get_new_dtype(
        self, converter: Any, param: Any, dtype: torch.dtype | None
    ) -> torch.dtype | None:
        """The dtype to cast a tensor of a file to; None for a packed tensor, which is not cast."""
        if converter.target_patterns[0] in self._packed:
            return None
        return super().get_new_dtype(converter, param, dtype)  # type: ignore[no-any-return]

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: nn.Module
    ) -> list[Any]:
        """None for a checkpoint of dtq, whose tensors have the names of the modules."""
        return [] if self.pre_quantized else weight_conversions

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized:
            return
        check_saved(self.quantization_config)
        files = reader.Reader(checkpoint_files or [])
        build_layers(model, self.quantization_config, files)
        self._packed = {
            f"{name}.{part}"
            for name, module in model.named_modules()
            if isinstance(module, QuantLinear | WeightOnly)
            for part in module.tensor_specs()
        }
        for file in checkpoint_files or []:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118  (safe_open is not a mapping)
                    files.check({key: opened.get_tensor(key)})
        ignored = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
        model._keys_to_ignore_on_load_unexpected = {*ignored, f"^{reader.CHECKSUMS}$"}  # type: ignore[assignment]

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if not self.pre_quantized:
            assert integrations.quantize_while_loading is not None
            self.report = integrations.quantize_while_loading(model, self.quantization_config)
            return model
        align_tensors(model)
        for name, module in model.named_modules():
            packed = isinstance(module, QuantLinear | WeightOnly)
            for part in module.tensor_specs() if packed else ():
                raw = module._parameters[part]
                assert raw is not None
                set_packed_tensor(module, part, f"{name}.{part}", raw.data, raw.device)
        retie(model)
        finish_loading(model, self.quantization_config)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors to save, with on-disk dtypes and checksums, and no metadata.

        Raises:
            InputError: the model has adapters.
        """
        left_out = {*tied_tensors(model), *(model._keys_to_ignore_on_save or ())}
        state = {k: t for k, t in model.state_dict().items() if k not in left_out}
        return saved_tensors(state, self.quantization_config), {}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> nn.Module:
        unquantize(model)
        return model  # type: ignore[no-any-return]


def tied_tensors(model: Any) -> set[str]:
    """Names of the tensors of a model that are others under a second name, which are not saved."""
    names = set(getattr(model, "all_tied_weights_keys", None) or {})
    return {name for name in names if name in model.state_dict()}


def attach_quantizer(
    model: Any, plan: Plan, edges: tuple[float, ...], dtype: torch.dtype, config: Any
) -> None:
    """Give a model that was quantized in memory the attributes of a loaded one.

    Args:
        model: the quantized text encoder.
        plan: formats and shapes of its layers.
        edges: inner edges of the timestep bins of static activation scales; a text encoder has one.
        dtype: compute dtype.
        config: the quantization config; it is completed, and becomes that of the model.
    """
    complete_config(model, plan, edges, dtype, config)
    model.config.quantization_config = config
    model.is_quantized = True
    model.quantization_method = config.quant_method
    model.hf_quantizer = DTQQuantizer(config, pre_quantized=True)
    model._weight_conversions = []  # as update_weight_conversions


def register() -> None:
    """Add dtq to the tables of transformers, unless a dtq is there already."""
    if "dtq" not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config("dtq")(DTQConfig)
        auto.register_quantizer("dtq")(DTQQuantizer)
