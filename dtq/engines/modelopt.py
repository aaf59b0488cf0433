# SPDX-License-Identifier: Apache-2.0
"""ModelOpt: a diffusers folder with real-quantized linears, which ModelOpt loads and runs.

A quantized linear (N, K) has in the safetensors file

- FP8: ``weight`` e4m3 (N, K), ``weight_quantizer._scale`` float32 (N, 1), or () for the matrix;
- NVFP4: ``weight`` uint8 (N, K / 2), the even column in the low nibble,
  ``weight_quantizer._scale`` e4m3 (N, K / 16), ``weight_quantizer._double_scale`` float32 ().

``modelopt_state.pth`` says which modules have which quantizers; ModelOpt makes it and reads it. It
is a pickle, which dtq never opens: the metadata of the safetensors file names the layers that round
tokens. The layout is that of nvidia-modelopt 0.47 (Apache-2.0). ``config.json`` does not name
diffusers' ``modelopt``: that of 0.42 replaces ModelOpt's tensors by plain ones and cannot run them.
"""

from __future__ import annotations

import sys
import warnings
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dtq.engines import model_folder
from dtq.engines.float_model import float_model
from dtq.engines.target import Contents, Limits, Loss, StoredLayer, Target, common_reason
from dtq.errors import CheckpointError, InputError
from dtq.formats import FORMATS
from dtq.io.atomic import atomic_directory
from dtq.plan.layers import COMPUTE_DTYPES, LayerSpec

STATE = "modelopt_state.pth"
GROUP, E4M3_MAX, E2M1_MAX = 16, 448.0, 6.0
OFF: dict[str, Any] = {"quantizer_name": "*", "enable": False}
WEIGHT: dict[str, dict[str, Any]] = {
    "fp8-row": {"num_bits": (4, 3), "axis": 0},
    "fp8-matrix": {"num_bits": (4, 3), "axis": None},
    "nvfp4": {
        "num_bits": (2, 1),
        "block_sizes": {-1: GROUP, "type": "dynamic", "scale_bits": (4, 3)},
    },
}
WEIGHT["nvfp4-46"] = WEIGHT["nvfp4"]
"""ModelOpt's quantizer of a weight, by format."""
TOKENS: dict[str, Any] = {"num_bits": (4, 3), "type": "dynamic", "block_sizes": {-1: None}}
"""ModelOpt's quantizer of tokens in FP8 with a scale each."""

LIMITS = Limits(
    formats={
        "fp8-row": ("fp8-row", "none"),
        "fp8-matrix": ("fp8-row", "none"),
        "nvfp4": ("none",),
        "nvfp4-46": ("none",),
    },
    recipe="modelopt-fp8",
    fallbacks=("fp8-row",),
)

Tensors = dict[str, Tensor]


def write(contents: Contents, path: Path) -> None:
    """Write a folder; equal contents give equal bytes with the same version of ModelOpt."""
    state = _state(contents)
    tensors, tokens = dict(contents.others), []
    for name, layer in contents.layers.items():
        tensors |= {f"{name}.{key}": tensor for key, tensor in encode(layer).items()}
        if layer.spec.activation_format != "none":
            tokens.append(name)
    with atomic_directory(path, overwrite=True) as draft:
        model_folder.save(draft, contents, tensors, own={"tokens": tokens})
        torch.save(state, draft / STATE)


def encode(layer: StoredLayer) -> Tensors:
    """Tensors of a layer, by the end of their names."""
    tensors = layer.tensors
    if layer.spec.weight_format.startswith("fp8"):
        scale = tensors["weight_scale"].float()
        if layer.spec.weight_format == "fp8-matrix":
            scale = scale[0, 0].clone()
        stored = {"weight": tensors["weight"], "_scale": scale, "_amax": scale * E4M3_MAX}
    else:
        second = tensors["weight_scale_2"].reshape(())
        stored = {
            "weight": tensors["weight"].view(torch.uint8),
            "_scale": tensors["weight_scale"],
            "_double_scale": second.clone(),
            "_amax": second * (E2M1_MAX * E4M3_MAX),
        }
    return {k if k == "weight" else f"weight_quantizer.{k}": t for k, t in stored.items()}


def _state(contents: Contents) -> Any:
    """What ModelOpt says of a model with such layers; made by ModelOpt, from the decoded weights.

    Raises:
        InputError: the tensors that ModelOpt expects are not those of :func:`encode`.
    """
    with warnings.catch_warnings(), redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")  # experimental, untested version of transformers
        import modelopt.torch.opt as mto
        import modelopt.torch.quantization as mtq

        model = float_model(contents)
        entries: list[dict[str, Any]] = [OFF]
        for name, layer in contents.layers.items():
            w = FORMATS[layer.spec.weight_format].unpack(layer.weights())
            model.get_submodule(name).weight = nn.Parameter(w, requires_grad=False)
            quantizers = {"weight_quantizer": WEIGHT[layer.spec.weight_format]}
            if layer.spec.activation_format != "none":
                quantizers["input_quantizer"] = TOKENS
            entries += [
                {"quantizer_name": f"{name}.{key}", "cfg": dict(cfg)}
                for key, cfg in quantizers.items()
            ]
        dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in COMPUTE_DTYPES}
        model.to(dtypes[contents.compute_dtype or "float32"])
        mtq.quantize(model, {"quant_cfg": entries, "algorithm": "max"})
        mtq.compress(model)
        made = model.state_dict()
        for name, layer in contents.layers.items():
            for key, tensor in encode(layer).items():
                theirs = made.get(f"{name}.{key}")
                if theirs is None or theirs.shape != tensor.shape:
                    raise InputError(
                        f"this version of nvidia-modelopt stores {name}.{key} in another way; dtq "
                        f"writes the layout of 0.47"
                    )
        return _in_order(mto.modelopt_state(model))


def _in_order(state: Any) -> Any:
    """Plain data with sorted keys: ModelOpt takes some from sets, in another order each time."""
    if type(state) is dict:
        return {key: _in_order(state[key]) for key in sorted(state, key=str)}
    if type(state) in (list, tuple):
        return type(state)(map(_in_order, state))
    return state


def read(path: Path) -> Contents:
    """Read a folder; its ``modelopt_state.pth`` is not opened.

    Raises:
        CheckpointError: a file is damaged, or a layer is not what dtq reads; names it.
    """
    folder = model_folder.read(path)
    file, tensors = folder.file, folder.tensors
    tokens = folder.own.get("tokens", [])
    if not isinstance(tokens, list):
        raise CheckpointError(f"{file}: the list of layers with tokens in its metadata is damaged")
    static = next((key for key in sorted(tensors) if ".input_quantizer." in key), None)
    if static is not None:
        raise CheckpointError(f"{file}: {static}: dtq does not read static scales of tokens")
    if model_folder.METADATA not in folder.metadata:
        _check_weight_only(folder.config.get(model_folder.QUANTIZATION), path)
    end = ".weight_quantizer._scale"
    layers = {}
    for name in [key.removesuffix(end) for key in tensors if key.endswith(end)]:
        stored = {
            part: tensors.pop(f"{name}.{part}", None)
            for part in (
                "weight", *(f"weight_quantizer.{x}" for x in ("_scale", "_double_scale", "_amax"))
            )
        }  # fmt: skip
        layers[name] = _layer(stored, name in tokens, f"{file}: {name}")
    return folder.contents(layers)


def _check_weight_only(quantization: Any, path: Path) -> None:
    kind = quantization.get("quant_type") if isinstance(quantization, dict) else None
    if not isinstance(kind, str) or "_" in kind:
        raise CheckpointError(
            f"{path}: quant_type is {kind!r}; how tokens are rounded is in {STATE}, a pickle that "
            f"dtq does not open, so it reads weight-only folders, and those that dtq wrote"
        )


def _layer(stored: dict[str, Tensor | None], tokens: bool, where: str) -> StoredLayer:
    weight, scale, second, _ = stored.values()
    if weight is None or scale is None or weight.ndim != 2:
        raise CheckpointError(f"{where}: has scales, and no matrix")
    what = f"{where}: is {weight.dtype} {list(weight.shape)} with scales {list(scale.shape)}"
    if weight.dtype == torch.float8_e4m3fn and second is None:
        rows, columns = weight.shape
        if scale.dtype != torch.float32 or tuple(scale.shape) not in ((), (1,), (rows, 1)):
            raise CheckpointError(f"{what}; dtq reads one float32 scale, or one for each row")
        kind = "fp8-row" if scale.ndim == 2 else "fp8-matrix"
        by_row = scale.reshape(-1, 1).expand(rows, 1).contiguous()
        tensors = {"weight": weight, "weight_scale": by_row}
    elif weight.dtype == torch.uint8 and second is not None:
        rows, columns = weight.shape[0], 2 * weight.shape[1]
        wanted = scale.dtype == torch.float8_e4m3fn and scale.shape == (rows, columns // GROUP)
        if not wanted or second.dtype != torch.float32 or second.numel() != 1 or columns % GROUP:
            raise CheckpointError(f"{what}; dtq reads NVFP4 in groups of {GROUP}")
        kind = "nvfp4"
        tensors = {
            "weight": weight.view(torch.int8),
            "weight_scale": scale,
            "weight_scale_2": second.reshape(1, 1),
        }
    else:
        raise CheckpointError(f"{what}; dtq reads FP8 and NVFP4")
    if tokens and kind == "nvfp4":
        raise CheckpointError(f"{where}: NVFP4 weights with FP8 tokens, which dtq does not have")
    spec = LayerSpec(kind, "fp8-row" if tokens else "none")
    return StoredLayer(spec, (rows, columns), tensors)


def is_modelopt(path: Path) -> bool:
    """Whether a folder is a model of diffusers that ModelOpt has quantized."""
    with_state = (path / model_folder.CONFIG).is_file() and (path / STATE).is_file()
    return with_state or model_folder.is_quantized_by(path, "modelopt")


TARGET = Target(
    "modelopt",
    "a folder with FP8 weights and tokens, or NVFP4 weights: ModelOpt",
    "",
    LIMITS,
    partial(common_reason, limits=LIMITS),
    write,
    read,
    is_modelopt,
    packages=("modelopt",),
    original_names=False,
    loss=Loss(
        "rotation, smoothing, low-rank branch, NVFP4 tokens, step policy",
        "w8a8",
        18.34,
        20.01,
    ),
)
