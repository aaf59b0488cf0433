# SPDX-License-Identifier: Apache-2.0
"""What ``MODEL`` means on the command line and in :func:`dtq.quantize`."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import nn

from dtq import demo
from dtq.errors import InputError
from dtq.families import Family, Scan, find, scan, scan_names
from dtq.harden import harden

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Source:
    """An opened model.

    Attributes:
        name: as the user wrote it.
        pipeline: the whole pipeline, None for a bare transformer.
        component: name of the transformer in the pipeline.
        model: the transformer.
        path: its local folder, None when it was handed over in memory or by the hub.
    """

    name: str
    pipeline: DiffusionPipeline | None
    component: str
    model: nn.Module
    path: Path | None = None

    @property
    def family(self) -> Family | None:
        return find(self.model)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype  # type: ignore[assignment]
        return dtype


def open_source(
    what: object, *, dtype: str | torch.dtype = "auto", component: str = "transformer"
) -> Source:
    """Open a pipeline or transformer given as object, local folder, hub id, or bundled name.

    Args:
        what: a diffusers pipeline or model; a folder; ``demo``, ``demo-hard``; else a hub id.
        dtype: ``auto``, ``fp32``, ``bf16``, ``fp16`` or a torch dtype. ``auto`` is the dtype on
            disk, but float32 for float16 files when there is no GPU.
        component: which part of a pipeline to quantize.

    Raises:
        InputError: it is none of these, or has no such transformer.
    """
    if isinstance(what, DiffusionPipeline):
        return Source(type(what).__name__, what, component, _component(what, component))
    if isinstance(what, nn.Module):
        return Source(type(what).__name__, None, component, what)
    if not isinstance(what, str | Path):
        raise InputError(f"expected a path, hub id, pipeline or model, got {type(what).__name__}")
    name = str(what)
    if name in demo.NAMES:
        pipeline = _pipeline(demo.folder(), _dtype(dtype, demo.folder() / "transformer"))
        if name == "demo-hard":
            harden(pipeline.transformer)
        return Source(name, pipeline, "transformer", pipeline.transformer, demo.folder())
    path = Path(what)
    if not path.exists():
        return _from_hub(name, dtype, component)
    kind = folder_kind(path)
    if kind == "pipeline":
        pipeline = _pipeline(path, _dtype(dtype, path / component))
        return Source(name, pipeline, component, _component(pipeline, component), path)
    model = model_class(path).from_pretrained(path, torch_dtype=_dtype(dtype, path))
    return Source(name, None, component, model, path)


def folder_kind(path: Path) -> str:
    """``pipeline`` or ``model``.

    Raises:
        InputError: the folder is neither; says what is missing.
    """
    if not path.is_dir():
        raise InputError(f"{path} is a file; dtq wants a diffusers folder (with model_index.json)")
    if (path / "model_index.json").is_file():
        return "pipeline"
    if (path / "config.json").is_file() and "_class_name" in read_json(path / "config.json"):
        return "model"
    raise InputError(
        f"{path} is not a diffusers folder: it has neither model_index.json (a pipeline) nor a "
        f"config.json with _class_name (a model)"
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        InputError: no such file, or not a JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a JSON object")
    return data


def model_class(folder: Path) -> Any:
    """The diffusers class that a model folder names.

    Raises:
        InputError: the installed diffusers has no such class, or it is not a transformer.
    """
    name = read_json(folder / "config.json").get("_class_name", "")
    kind = getattr(diffusers, name, None)
    if kind is None:
        raise InputError(f"{folder}: diffusers {diffusers.__version__} has no class {name!r}")
    if "UNet" in name or "Autoencoder" in name:
        raise InputError(
            f"{folder}: {name} is not a diffusion transformer; dtq quantizes those only"
        )
    return kind


def skeleton(what: str, component: str = "transformer") -> tuple[nn.Module, torch.dtype]:
    """The transformer on the meta device, from its config alone, and its dtype on disk.

    Raises:
        InputError: as :func:`open_source`.
    """
    if what in demo.NAMES:
        folder = demo.folder() / "transformer"
    else:
        path = Path(what)
        if not path.exists():
            path = _hub_config(what, component)
        folder = path / component if folder_kind(path) == "pipeline" else path
        if not (folder / "config.json").is_file():
            raise InputError(f"{path} has no component {component!r}")
    kind = model_class(folder)
    with torch.device("meta"):
        model: nn.Module = kind.from_config(read_json(folder / "config.json"))
    return model.eval(), _dtype("auto", folder)


def scan_model(model: nn.Module, run: Callable[[nn.Module], object] | None = None) -> Scan:
    """Scan by a traced forward with made-up inputs, or ``run``; by names if neither is possible."""
    family = find(model)
    if run is None and family is None:
        return scan_names(model, None)
    return scan(model, family, run or _call_once)


def made_inputs(model: nn.Module, batch: int, timestep: float, seed: int) -> dict[str, Any]:
    """Arguments of one forward of a known family, on the model's device and dtype.

    Raises:
        InputError: the family is not known.
    """
    family = find(model)
    if family is None:
        raise InputError(
            f"{type(model).__name__}: dtq cannot make up inputs for this class; give it in its "
            f"pipeline, or pass inputs=[...], a list of keyword arguments of its forward"
        )
    rng = torch.Generator().manual_seed(seed)
    arguments = family.inputs(model.config, batch, torch.full((batch,), timestep), rng)
    # model.dtype passes over what stays in float32, such as the first parameter of Wan
    moved: dict[str, Any] = _move(arguments, model.device, model.dtype)  # type: ignore[arg-type]
    return moved


def _call_once(model: nn.Module) -> None:
    family = find(model)
    assert family is not None
    model(**made_inputs(model, 2, 0.5 * family.largest_timestep, 0))


def _move(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, dict):
        return {key: _move(item, device, dtype) for key, item in value.items()}
    return value


def _pipeline(where: str | Path, dtype: torch.dtype | None) -> DiffusionPipeline:
    pipeline: DiffusionPipeline = DiffusionPipeline.from_pretrained(where, torch_dtype=dtype)
    return pipeline


def _component(pipeline: DiffusionPipeline, name: str) -> nn.Module:
    model = getattr(pipeline, name, None)
    if not isinstance(model, nn.Module):
        parts = [n for n, m in pipeline.components.items() if isinstance(m, nn.Module)]
        raise InputError(
            f"{type(pipeline).__name__} has no {name!r}; its models are {', '.join(parts)}. dtq "
            f"quantizes diffusion transformers: choose one with component="
        )
    return model


def _hub_config(name: str, component: str) -> Path:
    """A folder with the configs of a hub model, no weights."""
    if not _HUB_ID.fullmatch(name):
        raise InputError(_missing(name))
    from huggingface_hub import snapshot_download

    wanted = ["model_index.json", "config.json", f"{component}/config.json"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        raise InputError(_refused(name, error)) from error


def _refused(name: str, error: Exception) -> str:
    reason = " ".join(str(error).split())
    return f"{name}: no such folder, and the hub did not give it: {reason}"


def _from_hub(name: str, dtype: str | torch.dtype, component: str) -> Source:
    if not _HUB_ID.fullmatch(name):
        raise InputError(_missing(name))
    chosen = torch.bfloat16 if dtype == "auto" else _dtype(dtype, Path())
    try:
        pipeline = _pipeline(name, chosen)
    except OSError as error:
        raise InputError(_refused(name, error)) from error
    return Source(name, pipeline, component, _component(pipeline, component))


def _missing(name: str) -> str:
    return (
        f"{name}: no such folder. MODEL is a local diffusers folder, a hub id like "
        f"black-forest-labs/FLUX.1-dev, or {' or '.join(demo.NAMES)}"
    )


def _dtype(dtype: str | torch.dtype, folder: Path) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        if dtype not in DTYPES:
            raise InputError(f"dtype {dtype!r}: expected auto, {', '.join(DTYPES)}")
        return DTYPES[dtype]
    config = folder / "config.json"
    if config.is_file():
        recorded = read_json(config).get("quantization_config", {}).get("compute_dtype")
        if recorded:
            found: torch.dtype = getattr(torch, recorded)
            return found
    on_disk = disk_dtype(folder)
    if on_disk == torch.float16 and not torch.cuda.is_available():
        return torch.float32  # float16 arithmetic is slow and lossy on a CPU
    return on_disk


def disk_dtype(folder: Path) -> torch.dtype:
    """The float dtype of most tensors in the safetensors files of a model folder."""
    names = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    count: Counter[torch.dtype] = Counter()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            if size > file.stat().st_size:
                break  # damaged; the loader will say so
            header = json.loads(stream.read(size))
        count.update(names[t["dtype"]] for n, t in header.items() if t.get("dtype") in names)
    return count.most_common(1)[0][0] if count else torch.float32
