# SPDX-License-Identifier: Apache-2.0
"""The quantizer class for diffusers.

The tables of ``diffusers.quantizers.auto`` get a row each: ``from_pretrained`` of a dtq folder then
needs nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.utils import get_module_from_name
from torch import Tensor, nn

from dtq import integrations
from dtq.checkpoint import reader
from dtq.checkpoint.config import DTQConfig
from dtq.errors import CheckpointError, InputError
from dtq.integrations.loaded_model import (
    build_layers,
    check_saved,
    checked_tensors,
    chosen_dtype,
    complete_config,
    finish_loading,
    saved_tensors,
    set_packed_tensor,
    unquantize,
)
from dtq.nn.linear import QuantLinear
from dtq.nn.storage import aligned
from dtq.nn.weight_only import WeightOnly
from dtq.pipelines.plain_weights import plain_weights, without_wrappers
from dtq.pipelines.stored_tensors import FP8, Stored, described, read_headers, refuse_codes
from dtq.plan.layers import Plan


class DTQQuantizer(DiffusersQuantizer):  # type: ignore[misc]
    """Loads dtq checkpoints, and quantizes float models while they load.

    diffusers calls the methods in the order of loading; the base class describes them.

    Args:
        quantization_config: from ``config.json``, or given by the user.
        **kwargs: of the base class, ``pre_quantized`` among them.

    Attributes:
        report: of the quantization; None for a loaded checkpoint.
    """

    use_keep_in_fp32_modules = True
    requires_calibration = False
    required_packages = None
    is_serializable = True
    is_trainable = False  # packed weights cannot be trained
    is_compileable = True

    def __init__(self, quantization_config: DTQConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._reader: reader.Reader | None = None
        self._stored: dict[str, Stored] = {}
        self._names: dict[str, str] = {}
        self.report: object = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse a device map to disk, which would change the weights.

        Raises:
            ValueError: ``device_map`` has an entry ``disk``.
        """
        if isinstance(device_map, dict) and "disk" in {str(v) for v in device_map.values()}:
            raise ValueError(
                "a dtq model cannot be dispatched to disk by device_map: diffusers casts floating "
                "tensors first. Use enable_group_offload(offload_to_disk_path=...)"
            )

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """The requested dtype, else the compute dtype of the checkpoint, else float32.

        Raises:
            InputError: a quantized model cannot compute in that dtype.
        """
        return chosen_dtype(self.quantization_config, torch_dtype, self.pre_quantized)

    def maybe_update_loaded_keys(self, loaded_keys: list[str], files: list[str]) -> list[str]:
        """Open the files of a checkpoint; removes the key of the checksums.

        Raises:
            CheckpointError: a file is damaged or not what ``config.json`` describes.
        """
        if self.pre_quantized:
            check_saved(self.quantization_config)
            self._reader = reader.Reader(files)
        elif all(str(file).endswith(".safetensors") for file in files):
            self._stored = read_headers(Path(file) for file in files)
        return [key for key in loaded_keys if key != reader.CHECKSUMS]

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Compare tensors with their checksums, and align them.

        One tensor at a time is in memory twice: the mapped file's pages of a tensor that was copied
        are released at once.

        Raises:
            CheckpointError: a tensor is damaged, or not the weight of a float model.
            InputError: a single file is a dtq checkpoint, which lacks its config.
        """
        if self._reader is not None:
            return checked_tensors(state_dict, self._reader)
        if reader.CHECKSUMS in state_dict:
            raise InputError(
                "from_single_file takes float models and quantizes them; this file is quantized "
                "by dtq: load its folder, with config.json, with from_pretrained"
            )
        if not self._stored:  # a single file, whose names may be those of another library
            state_dict = {without_wrappers(key): t for key, t in state_dict.items()}
            refuse_codes(described(state_dict), state_dict.__getitem__)
        # diffusers does not cast FP8
        fp8 = {key: t.float() for key, t in state_dict.items() if t.dtype in FP8.values()}
        return {self._names.get(key, key): aligned(t) for key, t in (state_dict | fp8).items()}

    def update_missing_keys(
        self, model: nn.Module, missing_keys: list[str], prefix: str
    ) -> list[str]:
        """The missing keys without those that are stored with a prefix."""
        return [key for key in missing_keys if key not in self._names.values()]

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Any, param_name: str, *args: Any, **kwargs: Any
    ) -> bool:
        """Whether a parameter is a packed tensor of a quantized linear."""
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, QuantLinear | WeightOnly) and name in module.tensor_specs()

    def check_quantized_param_shape(self, name: str, current: Tensor, loaded: Tensor) -> bool:
        """Compare the shape of a packed tensor with that in the file.

        Raises:
            CheckpointError: they differ.
        """
        if tuple(current.shape) != tuple(loaded.shape):
            raise CheckpointError(
                f"{name}: expected shape {list(current.shape)}, the file has {list(loaded.shape)}"
            )
        return True

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device,
        state_dict: dict[str, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Set a packed tensor of a quantized linear.

        Args:
            model: with quantized linears that have no values yet.
            param_value: the tensor, cast to ``torch_dtype`` by diffusers; not used with
                ``state_dict``.
            param_name: dotted name.
            target_device: where to put it.
            state_dict: tensors as they are in the file.
            *args: not used.
            **kwargs: not used.

        Raises:
            CheckpointError: the file has another shape or dtype.
        """
        module, name = get_module_from_name(model, param_name)
        raw = state_dict[param_name] if state_dict is not None else param_value
        set_packed_tensor(module, name, param_name, raw, target_device)

    def _process_model_before_weight_loading(
        self,
        model: nn.Module,
        state_dict: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        config = self.quantization_config
        if state_dict is not None:  # passed by from_single_file only, which reads float models
            self.pre_quantized = False
        if self.pre_quantized:
            build_layers(model, config, self._reader)
        else:
            self._check_float(model, state_dict)
        model.register_to_config(quantization_config=config)  # type: ignore[operator]

    def _check_float(self, model: nn.Module, state_dict: dict[str, Any] | None) -> None:
        """Check that what is loaded are the weights of the float model.

        Raises:
            CheckpointError: a tensor is missing or cannot be its weight; names it.
        """
        if state_dict is not None:
            plain = plain_weights(model, described(state_dict), state_dict.__getitem__)
            for key, name in plain.names.items():
                state_dict[name] = state_dict.pop(key)
            return
        if self._stored:
            plain = plain_weights(model, self._stored)
            self._names = plain.names
            if plain.scales:
                weight, scale = next(iter(plain.scales.items()))
                raise CheckpointError(
                    f"{self._stored[weight].file}: {weight} is FP8 with the scale {scale}, which "
                    f"from_pretrained does not apply; dtq.quantize(folder, ...) does"
                )

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self.pre_quantized:
            finish_loading(model, self.quantization_config)
        else:
            assert integrations.quantize_while_loading is not None
            self.report = integrations.quantize_while_loading(model, self.quantization_config)
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors to save, with on-disk dtypes and checksums, and no metadata.

        Raises:
            InputError: the model has adapters, or is not saved as safetensors.
        """
        if not safe_serialization:
            raise InputError("dtq checkpoints are safetensors only: safe_serialization=True")
        return saved_tensors(state_dict, self.quantization_config), {}

    def _dequantize(self, model: nn.Module) -> nn.Module:
        unquantize(model)
        # otherwise the config of a later save would describe the float weights as quantized
        config = {k: v for k, v in model.config.items() if k != "quantization_config"}  # type: ignore[union-attr, operator]
        model._internal_dict = type(model.config)(config)  # type: ignore[assignment, operator, arg-type]
        return model

    def get_cuda_warm_up_factor(self) -> int:
        """Factor of the warm-up allocation; 2 allocates the bytes of the empty model."""
        return 2


def attach_quantizer(
    model: nn.Module, plan: Plan, edges: tuple[float, ...], dtype: torch.dtype, config: DTQConfig
) -> None:
    """Give a model that was quantized in memory the attributes of a loaded one.

    Args:
        model: the quantized transformer.
        plan: formats and shapes of its layers.
        edges: inner edges of the timestep bins of static activation scales.
        dtype: compute dtype.
        config: the quantization config; it is completed, and becomes that of the model.
    """
    complete_config(model, plan, edges, dtype, config)
    quantizer = DTQQuantizer(config, pre_quantized=True)
    if hasattr(model, "register_to_config"):  # a model of diffusers
        model.register_to_config(quantization_config=config, _pre_quantization_dtype=dtype)  # type: ignore[operator]
    model.is_quantized = True  # type: ignore[assignment]
    model.quantization_method = config.quant_method  # type: ignore[assignment]
    model.hf_quantizer = quantizer  # type: ignore[assignment]


def register() -> None:
    """Add dtq to the tables of diffusers, unless a dtq is there already."""
    auto.AUTO_QUANTIZER_MAPPING.setdefault("dtq", DTQQuantizer)
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault("dtq", DTQConfig)
