# SPDX-License-Identifier: Apache-2.0
"""What the quantizers for diffusers and for transformers have in common.

Both libraries build an empty model, call a quantizer, read tensors by name, and call it again. The
checkpoint is the same in both; only the names of the hooks differ.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dtq.checkpoint import reader
from dtq.checkpoint.config import FORMAT_VERSION, DTQConfig
from dtq.checkpoint.model_card import hub_id
from dtq.errors import CheckpointError, InputError
from dtq.io.memory import Mapped
from dtq.nn.attention import use_int8_attention
from dtq.nn.embedding import QuantEmbedding, float_table, tied_to_tables
from dtq.nn.linear import QuantLinear
from dtq.nn.shared_inputs import share_input_transforms
from dtq.nn.storage import aligned, check_tensor, from_disk, to_disk
from dtq.nn.swap import finalize, restore, swap_empty
from dtq.nn.weight_only import WeightOnly
from dtq.plan.layers import LayerSpec, Plan, check_compute_dtype

log = logging.getLogger("dtq")


def chosen_dtype(
    config: DTQConfig, requested: torch.dtype | None, pre_quantized: bool
) -> torch.dtype:
    """The requested dtype, else the compute dtype of the checkpoint, else float32.

    Args:
        config: of the model; gets the dtype.
        requested: by the user.
        pre_quantized: whether the files hold packed tensors.

    Raises:
        InputError: a quantized model cannot compute in that dtype.
    """
    chosen = requested or config.compute_dtype or torch.float32
    if pre_quantized:
        check_compute_dtype(chosen)
        config.compute_dtype = chosen
    return chosen


def check_saved(config: DTQConfig) -> None:
    """Check that a config is of a saved model.

    Raises:
        CheckpointError: it has no version.
    """
    if config.format_version is None:
        raise CheckpointError("config.json: quantization_config has no 'format_version'")


def build_layers(model: nn.Module, config: DTQConfig, files: reader.Reader | None) -> None:
    """Put quantized linears without values into an empty model.

    Args:
        model: the float model, on the meta device.
        config: of the checkpoint.
        files: of the checkpoint, which are compared with the plan.

    Raises:
        CheckpointError: the files do not hold what the config says.
    """
    plan = config.load_plan()
    if files is not None:
        files.check_plan(plan, model)
    swap_empty(model, plan, config.compute_dtype or torch.float32)
    log.info("dtq: %d quantized linears, recipe %s", len(plan.layers), config.recipe)


def checked_tensors(tensors: Mapping[str, Tensor], files: reader.Reader) -> dict[str, Tensor]:
    """Checked and aligned tensors of a checkpoint, without the checksums.

    One tensor at a time is in memory twice: the mapped file's pages of a tensor that was copied are
    released at once.

    Raises:
        CheckpointError: a tensor is damaged.
    """
    mapped, ready = Mapped(), {}
    for key, tensor in tensors.items():
        files.check({key: tensor})
        if key != reader.CHECKSUMS:
            ready[key] = _align(tensor, mapped)
    return ready


def align_tensors(model: nn.Module) -> None:
    """Align the tensors of a model that may lie in mapped files, each in memory once."""
    mapped = Mapped()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = _align(tensor.data, mapped)


def _align(tensor: Tensor, mapped: Mapped) -> Tensor:
    """The aligned tensor; the mapped file's pages of one that was copied are released."""
    ready = aligned(tensor)
    if ready is not tensor:
        mapped.forget([tensor])
    return ready


def set_packed_tensor(
    module: QuantLinear | WeightOnly, name: str, key: str, raw: Tensor, device: torch.device | str
) -> None:
    """Set a packed tensor of a quantized linear.

    Args:
        module: the linear.
        name: of the tensor in it.
        key: its dotted name in the files, for messages.
        raw: the tensor as it is in the file.
        device: where to put it.

    Raises:
        CheckpointError: the file has another shape or dtype.
    """
    check_tensor(key, raw, module.tensor_specs()[name])
    module._parameters[name] = nn.Parameter(from_disk(raw).to(device), requires_grad=False)


def finish_loading(model: nn.Module, config: DTQConfig) -> None:
    """Prepare a model whose tensors have been read to run."""
    plan = config.load_plan()
    finalize(model, plan.edges, plan.policy)
    use_int8_attention(model, plan.int8_attention)
    share_input_transforms(model)
    share_config_entries(model, config)


def saved_tensors(state: dict[str, Tensor], config: DTQConfig) -> dict[str, Tensor]:
    """The tensors of a checkpoint, with on-disk dtypes and checksums.

    Args:
        state: the tensors of the model by name.
        config: of the model.

    Raises:
        InputError: the model has adapters.
    """
    wrapped = sorted(k.split(".base_layer.")[0] for k in state if ".base_layer." in k)
    if wrapped:
        raise InputError(
            f"adapters are loaded (on {wrapped[0]} for example), and a checkpoint cannot hold "
            f"them: call unload_lora_weights() before saving; to keep them, fuse_lora() first"
        )
    return reader.with_checksums(_as_floats(state, config.load_plan().layers))


def unquantize(model: nn.Module) -> None:
    """Replace every quantized layer by a float one."""
    twins = tied_to_tables(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantEmbedding) and name not in twins:
            float_table(model, name)
        elif isinstance(module, QuantLinear | WeightOnly) and name not in twins:
            model.set_submodule(name, module.unquantized())
    restore(model)


def complete_config(
    model: nn.Module, plan: Plan, edges: tuple[float, ...], dtype: torch.dtype, config: DTQConfig
) -> None:
    """Give the config of a model that was quantized in memory what that of a saved one has.

    Args:
        model: the quantized model.
        plan: formats and shapes of its layers.
        edges: inner edges of the timestep bins of static activation scales.
        dtype: compute dtype.
        config: is completed.
    """
    config.format_version = FORMAT_VERSION
    config.recipe = plan.recipe
    config.compute_dtype = dtype
    config.timestep_edges = list(edges)
    config.layers = {layer.name: layer.spec.to_json() for layer in plan.quantized()}
    if base := hub_id(str(getattr(getattr(model, "config", None), "_name_or_path", ""))):
        config.extra.setdefault("base_model", base)
    share_input_transforms(model)
    share_config_entries(model, config)


def share_config_entries(model: nn.Module, config: DTQConfig) -> None:
    """Let every quantized linear keep its entry of ``config.json`` true when its rank changes."""
    for name, entry in config.layers.items():
        model.get_submodule(name).config_entry = entry  # type: ignore[assignment]


def _as_floats(state: dict[str, Tensor], layers: dict[str, LayerSpec]) -> dict[str, Tensor]:
    """The tensors of a model, with scales as floats instead of the integers of their bits."""
    tensors = dict(state)
    for name, layer in layers.items():
        # dtypes do not depend on the shape, so take one that every format supports. The remainder
        # columns of base-3 codes depend on it, but they are integers
        for tensor_name, spec in layer.tensor_specs((1024, 1024)).items():
            key = f"{name}.{tensor_name}"
            if key in tensors:
                tensors[key] = to_disk(tensors[key], spec)
    return tensors
