# SPDX-License-Identifier: Apache-2.0
"""Load the transformers of a pipeline, a folder, a hub model or a bundled model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_loading_utils import simple_get_class_obj
from torch import nn

from dtq import demo
from dtq.demo.outliers import inject_outliers
from dtq.errors import LIBRARY_ERRORS, InputError, first_line
from dtq.io.safe_parse import read_json
from dtq.models import Family, Scan, find_family
from dtq.pipelines.contents import (
    Components,
    component_of,
    diffusion_transformers,
    diffusion_transformers_on_disk,
    folder_kind,
    model_class,
    requested,
    text_encoders,
    text_encoders_on_disk,
)
from dtq.pipelines.engine_run import EngineRun
from dtq.pipelines.hub import download_configs, download_pipeline
from dtq.pipelines.plain_weights import PlainWeights, load_converted
from dtq.pipelines.stored_tensors import stored_dtype
from dtq.pipelines.validation import (
    check_folder,
    check_weights,
    components,
    meta_model,
    model_folders,
)
from dtq.pipelines.weight_files import resolve_variants, weight_files

log = logging.getLogger("dtq")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class LoadedModel:
    """A diffusion transformer, or a text encoder, and the pipeline that it belongs to.

    Attributes:
        name: as the user gave it.
        pipeline: the whole pipeline; None for a bare transformer.
        component: name of the transformer in the pipeline.
        model: the transformer.
        path: its local folder; None if it was given as an object or came from the hub.
        scan: scan of the model, once there is one.
        variant: of the files that it was read from.
        engine: that runs the transformers of the pipeline; None if dtq and torch do.
    """

    name: str
    pipeline: DiffusionPipeline | None
    component: str
    model: nn.Module
    path: Path | None = None
    scan: Scan | None = None
    variant: str | None = None
    engine: EngineRun | None = None

    @property
    def family(self) -> Family | None:
        """The family of the transformer; None if dtq has none for its class."""
        return find_family(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """The float dtype of the transformer."""
        dtype = getattr(self.model, "dtype", None)  # of diffusers
        if isinstance(dtype, torch.dtype):
            return dtype
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    def models(self) -> dict[str, nn.Module]:
        """Every diffusion transformer of the pipeline by its name there, this one first."""
        names = [] if self.pipeline is None else diffusion_transformers(self.pipeline)
        return {self.component: self.model} | {name: getattr(self.pipeline, name) for name in names}


def load_transformer(
    source: object, *, dtype: str | torch.dtype = "auto", variant: str | None = None
) -> LoadedModel:
    """The first model that :func:`load_transformers` returns; same errors.

    Args:
        source: as for :func:`load_transformers`.
        dtype: as for :func:`load_transformers`.
        variant: as for :func:`load_transformers`.
    """
    return load_transformers(source, dtype=dtype, variant=variant)[0]


def load_transformers(
    source: object,
    *,
    dtype: str | torch.dtype = "auto",
    component: Components = "auto",
    variant: str | None = None,
) -> list[LoadedModel]:
    """Load a pipeline or transformer given as object, local folder, hub id, or bundled name.

    Args:
        source: a diffusers pipeline or model; a folder; a bundled name; otherwise a hub id.
        dtype: ``auto``, ``fp32``, ``bf16``, ``fp16`` or a torch dtype. ``auto`` is the dtype of the
            files, but float32 for float16 files without a GPU.
        component: names of the transformers to quantize. ``auto`` is every diffusion transformer
            of the pipeline; Wan 2.2 has one for the noisy and one for the clean timesteps.
        variant: part of the names of the weight files, such as ``fp16``; components without it
            are read without. Default: the files without a variant, and for a component that has
            none of these, its only variant.

    Returns:
        One model per transformer, all with the same pipeline; for a bare transformer just one.

    Raises:
        InputError: ``source`` is none of these, or the pipeline has no such transformer, or no
            file is of the variant.
        CheckpointError: the files do not hold the weights of the model; names the tensor.
    """
    if variant is not None and not isinstance(source, str | Path):
        raise InputError(
            f"variant={variant!r} names files, and the {type(source).__name__} is loaded already"
        )
    if isinstance(source, DiffusionPipeline):
        return _transformers_of(type(source).__name__, source, component)
    if isinstance(source, nn.Module):
        if component not in ("auto", "transformer", ["transformer"], ("transformer",)):
            raise InputError(
                f"component={component!r} names a model of a pipeline, and the "
                f"{type(source).__name__} is in none; leave it out"
            )
        return [LoadedModel(type(source).__name__, None, "transformer", source)]
    if not isinstance(source, str | Path):
        raise InputError(f"expected a path, hub id, pipeline or model, got {type(source).__name__}")
    name = str(source)
    path = demo.path_of(name)
    on_hub = not path.exists()
    if on_hub:
        path = download_pipeline(name, variant)
    kind = folder_kind(path)
    variants, converted = check_folder(path, variant, warn=True)
    if kind == "model":
        own = variants[""]
        model = load_model(path, _dtype(dtype, path, own), own, converted.get(""))
        return [LoadedModel(name, None, "transformer", model, path, variant=own)]
    first = requested(diffusion_transformers_on_disk(path), component, path)[0]
    chosen = _dtype(dtype, path / first, variants.get(first))
    pipeline = _load_pipeline(path, chosen, variants, converted)
    if name == "demo-outliers":
        inject_outliers(pipeline.transformer)
    return _transformers_of(name, pipeline, component, None if on_hub else path, variants)


def text_encoders_of(loaded: LoadedModel) -> list[LoadedModel]:
    """The text encoders of the pipeline of a loaded model.

    Raises:
        InputError: it has no pipeline, or that has no text encoder.
    """
    pipeline = loaded.pipeline
    names = [] if pipeline is None else text_encoders(pipeline)
    if not names:
        raise InputError(
            f"{loaded.name} has no text encoder; leave text_encoder (--text-encoder) at keep"
        )
    return [
        LoadedModel(loaded.name, pipeline, n, component_of(pipeline, n), loaded.path) for n in names
    ]


def _transformers_of(
    name: str,
    pipeline: DiffusionPipeline,
    component: Components,
    path: Path | None = None,
    variants: Mapping[str, str | None] = MappingProxyType({}),
) -> list[LoadedModel]:
    names = requested(diffusion_transformers(pipeline), component, type(pipeline).__name__)
    models = {c: component_of(pipeline, c) for c in names}
    return [
        LoadedModel(name, pipeline, c, m, path, variant=variants.get(c)) for c, m in models.items()
    ]


def load_model(
    folder: Path,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    converted: PlainWeights | None = None,
) -> Any:
    """Load the model of a folder, only from safetensors.

    Args:
        folder: of the model.
        dtype: of its parameters; None leaves it to diffusers.
        variant: of its files.
        converted: how to read weights that diffusers cannot read as they are stored.

    Raises:
        InputError: diffusers cannot load it; says why in one line.
    """
    kind = model_class(folder)
    with translate_errors(folder):
        if converted is not None:
            return load_converted(kind, folder, converted, dtype or torch.float32)
        key = "torch_dtype" if issubclass(kind, diffusers.ModelMixin) else "dtype"
        options = {key: dtype, "variant": variant, "use_safetensors": True}
        return kind.from_pretrained(folder, **options)


@contextmanager
def translate_errors(where: object) -> Iterator[None]:
    """Convert errors that diffusers raises for a folder to one line that names the folder.

    Raises:
        InputError: the library cannot read it.
    """
    try:
        yield
    except LIBRARY_ERRORS as error:
        if out_of_memory(error):
            raise
        raise InputError(f"{where}: diffusers cannot load it ({first_line(error)})") from error


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that no memory is left; torch has several classes for that."""
    words = ("out of memory", "can't allocate memory", "cannot allocate memory")
    full = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return full or any(word in str(error).lower() for word in words)


def meta_models(
    name: str, component: Components = "auto", variant: str | None = None, *, text: bool = False
) -> dict[str, tuple[nn.Module, torch.dtype]]:
    """The transformers on the meta device, built from their configs, and their dtypes on disk.

    Args:
        name: a folder, a bundled name or a hub id, of which only the configs are downloaded.
        component: as for :func:`load_transformers`.
        variant: as for :func:`load_transformers`.
        text: whether to add the text encoders of a pipeline.

    Returns:
        Component to model and float dtype.

    Raises:
        InputError: as :func:`load_transformers`.
        CheckpointError: as :func:`load_transformers`.
    """
    path = demo.path_of(name)
    on_hub = not path.exists()
    if on_hub:
        path = download_configs(name)
    folders = model_folders(path)
    names = {"transformer": ""}  # to the component in the pipeline
    if folder_kind(path) == "pipeline":
        found = requested(diffusion_transformers_on_disk(path), component, path)
        names = {name: name for name in found}
        names |= {name: name for name in (text_encoders_on_disk(path) if text else ())}
    variants: dict[str, str | None] = {}
    if not on_hub:
        variants = resolve_variants(path, folders, variant, warn=True)
    models = {}
    for key, part in names.items():
        folder, own = path / part, variants.get(part)
        if not (folder / "config.json").is_file():
            raise InputError(f"{path} has no component {key!r}")
        kind, files = model_class(folder), [] if on_hub else weight_files(folder, own)
        model = meta_model(folder, kind, files)
        if not on_hub and isinstance(model, diffusers.ModelMixin):
            check_weights(folder, model, files)
        dtype = stored_dtype(files) if on_hub else _dtype("auto", folder, own)
        models[key] = model, dtype
    return models


def _load_pipeline(
    folder: Path,
    dtype: torch.dtype,
    variants: Mapping[str, str | None],
    converted: Mapping[str, PlainWeights],
) -> DiffusionPipeline:
    """Load a pipeline; components with a variant one by one, as diffusers takes one for all."""
    index = components(folder / "model_index.json")
    with translate_errors(folder):
        ready = {}
        for name, variant in variants.items():
            if variant is None and name not in converted:
                continue
            kind: Any = simple_get_class_obj(*index[name])
            if name in converted:
                ready[name] = load_converted(kind, folder / name, converted[name], dtype)
            else:
                key = "torch_dtype" if issubclass(kind, diffusers.ModelMixin) else "dtype"
                options = {key: dtype, "variant": variant, "use_safetensors": True}
                ready[name] = kind.from_pretrained(folder / name, **options)
        pipeline: DiffusionPipeline = DiffusionPipeline.from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, **ready
        )
    return pipeline


def _dtype(dtype: str | torch.dtype, folder: Path, variant: str | None = None) -> torch.dtype:
    """The dtype to load a model folder in; see :func:`load_transformers`."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        if dtype not in DTYPES:
            raise InputError(f"dtype {dtype!r}: expected auto, {', '.join(DTYPES)}")
        return DTYPES[dtype]
    config = folder / "config.json"
    if config.is_file():
        saved = read_json(config).get("quantization_config")
        name = saved.get("compute_dtype") if isinstance(saved, dict) else None
        recorded = getattr(torch, name, None) if isinstance(name, str) else None
        if isinstance(recorded, torch.dtype):
            return recorded
    on_disk = stored_dtype(weight_files(folder, variant) if folder.is_dir() else [])
    if on_disk == torch.float16 and not torch.cuda.is_available():
        return torch.float32  # float16 arithmetic is slow and lossy on a CPU
    return on_disk


def modules_of(loaded: LoadedModel) -> list[nn.Module]:
    """The model, and the other modules of its pipeline."""
    values = loaded.pipeline.components.values() if loaded.pipeline is not None else [loaded.model]
    return [value for value in values if isinstance(value, nn.Module)]
