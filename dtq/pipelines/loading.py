# SPDX-License-Identifier: Apache-2.0
"""What ``MODEL`` means on the command line and in :func:`dtq.api`."""

from __future__ import annotations

import functools
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from torch import nn

from dtq import demo
from dtq.demo.outliers import inject_outliers
from dtq.errors import LIBRARY_ERRORS, InputError, first_line
from dtq.io.safe_parse import read_json
from dtq.models import Family, Scan, find_family, scan, scan_names
from dtq.pipelines.validation import check_folder, components, model_kind, skeleton, weight_files

log = logging.getLogger("dtq")

Components = str | Sequence[str]
"""``auto``, or one or more components of a pipeline."""

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class LoadedModel:
    """An opened model.

    Attributes:
        name: as the user wrote it.
        pipeline: the whole pipeline, None for a bare transformer.
        component: name of the transformer in the pipeline.
        model: the transformer.
        path: its local folder, None when it was handed over in memory or by the hub.
        scan: of the model, once it was made.
    """

    name: str
    pipeline: DiffusionPipeline | None
    component: str
    model: nn.Module
    path: Path | None = None
    scan: Scan | None = None

    @property
    def family(self) -> Family | None:
        return find_family(self.model)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype  # type: ignore[assignment]
        return dtype

    def models(self) -> dict[str, nn.Module]:
        """Every diffusion transformer of its pipeline by its name there, this one first."""
        names = [] if self.pipeline is None else diffusion_transformers(self.pipeline)
        others = {name: getattr(self.pipeline, name) for name in names}
        return {self.component: self.model} | others


def load_transformer(
    what: object, *, dtype: str | torch.dtype = "auto", component: Components = "auto"
) -> LoadedModel:
    """The first of :func:`open_sources`."""
    return load_transformers(what, dtype=dtype, component=component)[0]


def load_transformers(
    what: object, *, dtype: str | torch.dtype = "auto", component: Components = "auto"
) -> list[LoadedModel]:
    """Open a pipeline or transformer given as object, local folder, hub id, or bundled name.

    Args:
        what: a diffusers pipeline or model; a folder; a bundled name; else a hub id.
        dtype: ``auto``, ``fp32``, ``bf16``, ``fp16`` or a torch dtype. ``auto`` is the dtype on
            disk, but float32 for float16 files when there is no GPU.
        component: parts of the pipeline to quantize; ``auto`` is every diffusion transformer in
            it: Wan 2.2 has one for the noisy and one for the clean part of the trajectory.

    Returns:
        One source for each; they share the pipeline. A bare transformer is one source.

    Raises:
        InputError: it is none of these, or has no such transformer.
    """
    if isinstance(what, DiffusionPipeline):
        return _sources(type(what).__name__, what, component)
    if isinstance(what, nn.Module):
        return [LoadedModel(type(what).__name__, None, "transformer", what)]
    if not isinstance(what, str | Path):
        raise InputError(f"expected a path, hub id, pipeline or model, got {type(what).__name__}")
    name = str(what)
    path = demo.folder(name) if name in demo.FOLDERS else Path(what)
    if not path.exists():
        if not _HUB_ID.fullmatch(name):
            raise InputError(_missing(name))
        pipeline = _from_hub(name, torch.bfloat16 if dtype == "auto" else _dtype(dtype, Path()))
        return _sources(name, pipeline, component)
    kind = folder_kind(path)
    check_folder(path)
    if kind == "model":
        model = load_model(path, torch_dtype=_dtype(dtype, path))
        return [LoadedModel(name, None, "transformer", model, path)]
    first = _wanted(diffusion_transformers_on_disk(path), component, path)[0]
    pipeline = _pipeline(path, _dtype(dtype, path / first))
    if name == "demo-outliers":
        inject_outliers(pipeline.transformer)
    return _sources(name, pipeline, component, path)


def diffusion_transformers(pipeline: DiffusionPipeline) -> list[str]:
    """Names of the diffusion transformers among the components of a pipeline."""
    found = [n for n, m in pipeline.components.items() if type(m).__name__ in _transformers()]
    return sorted(found)  # transformer before transformer_2


def diffusion_transformers_on_disk(folder: Path) -> list[str]:
    """The same, from the ``model_index.json`` of a pipeline folder."""
    parts = components(folder / "model_index.json")
    return sorted(name for name, (_, kind) in parts.items() if kind in _transformers())


def _sources(
    name: str, pipeline: DiffusionPipeline, component: Components, path: Path | None = None
) -> list[LoadedModel]:
    chosen = _wanted(diffusion_transformers(pipeline), component, type(pipeline).__name__)
    return [LoadedModel(name, pipeline, c, _component(pipeline, c), path) for c in chosen]


def _wanted(found: list[str], component: Components, where: object) -> list[str]:
    """What the user asked for, ``auto`` resolved."""
    if component != "auto":
        return [component] if isinstance(component, str) else list(component)
    if not found:
        raise InputError(
            f"{where} has no diffusion transformer of diffusers; name the model to quantize with "
            f"component="
        )
    return found


@functools.cache
def _transformers() -> frozenset[str]:
    """Names of the classes that diffusers counts among its transformers."""
    from diffusers.models import transformers

    return frozenset(n for n, kind in vars(transformers).items() if isinstance(kind, type))


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


def model_class(folder: Path) -> Any:
    """The diffusers class that a model folder names.

    Raises:
        InputError: the installed diffusers has no such class, or it is not a transformer.
    """
    name = read_json(folder / "config.json").get("_class_name", "")
    kind = model_kind(name)
    if kind is None:
        raise InputError(f"{folder}: diffusers {diffusers.__version__} has no model {name!r}")
    if "UNet" in name or "Autoencoder" in name:
        raise InputError(
            f"{folder}: {name} is not a diffusion transformer; dtq quantizes those only"
        )
    return kind


def load_model(folder: Path, **options: Any) -> Any:
    """The model of a folder, by ``from_pretrained``; only safetensors.

    Raises:
        InputError: diffusers cannot load it; says why in one line.
    """
    kind = model_class(folder)
    with translate_errors(folder):
        return kind.from_pretrained(folder, use_safetensors=True, **options)


@contextmanager
def translate_errors(where: object) -> Iterator[None]:
    """What diffusers raises over a folder becomes one line that names it.

    Raises:
        InputError: the library could not read it.
    """
    try:
        yield
    except MemoryError:
        raise
    except LIBRARY_ERRORS as error:
        if out_of_memory(error):
            raise
        raise InputError(f"{where}: diffusers cannot load it ({first_line(error)})") from error


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is all used; torch has no one class for that."""
    words = ("out of memory", "can't allocate memory", "cannot allocate memory")
    full = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return full or any(word in str(error).lower() for word in words)


def meta_models(
    what: str, component: Components = "auto"
) -> dict[str, tuple[nn.Module, torch.dtype]]:
    """The transformers on the meta device, from their configs alone, and their dtypes on disk.

    Raises:
        InputError: as :func:`open_sources`.
    """
    path = demo.folder(what) if what in demo.FOLDERS else Path(what)
    if not path.exists():
        path = _hub_config(what)
    folders = {"transformer": path}
    if folder_kind(path) == "pipeline":
        folders = {
            c: path / c for c in _wanted(diffusion_transformers_on_disk(path), component, path)
        }
    found = {}
    for name, folder in folders.items():
        if not (folder / "config.json").is_file():
            raise InputError(f"{path} has no component {name!r}")
        found[name] = skeleton(folder, model_class(folder)), _dtype("auto", folder)
    return found


def scan_model(model: nn.Module, run: Callable[[nn.Module], object] | None = None) -> Scan:
    """Scan by a traced forward with made-up inputs, or ``run``; by names if neither is possible.

    On the meta device a forward that reads the values of its tensors cannot run, for example to
    sort tokens by expert or to cut captions to their length.
    """
    family = find_family(model)
    if run is None and family is None:
        return scan_names(model, None)
    try:
        return scan(model, family, run or _call_once)
    except (RuntimeError, ValueError) as error:
        if next(model.parameters()).device.type != "meta":
            raise
        reason = str(error).partition("\n")[0]
        log.warning(
            "%s: sorted by names, its forward needs weights (%s)", type(model).__name__, reason
        )
        return scan_names(model, family)


def dummy_inputs(model: nn.Module, batch: int, timestep: float, seed: int) -> dict[str, Any]:
    """Arguments of one forward of a known family, on the model's device and dtype.

    Raises:
        InputError: the family is not known.
    """
    family = find_family(model)
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
    family = find_family(model)
    assert family is not None
    model(**dummy_inputs(model, 2, 0.5 * family.largest_timestep, 0))


def _move(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, dict):
        return {key: _move(item, device, dtype) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_move(item, device, dtype) for item in value)
    return value


def _pipeline(where: str | Path, dtype: torch.dtype | None) -> DiffusionPipeline:
    with translate_errors(where):
        pipeline: DiffusionPipeline = DiffusionPipeline.from_pretrained(
            where, torch_dtype=dtype, use_safetensors=True
        )
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


def _hub_config(name: str) -> Path:
    """A folder with the configs of a hub model, no weights; from the cache without a network."""
    if not _HUB_ID.fullmatch(name):
        raise InputError(_missing(name))
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json"]))
    except LIBRARY_ERRORS as error:
        raise InputError(_refused(name, error)) from error


def _refused(name: str, error: Exception) -> str:
    return (
        f"{name}: no such folder, and neither the hub nor its cache here gave it "
        f"({first_line(error)}). Check the name and the network, or give a local folder"
    )


def _from_hub(name: str, dtype: torch.dtype) -> DiffusionPipeline:
    """A pipeline by hub id, from the cache where the hub cannot be reached."""
    try:
        folder = Path(DiffusionPipeline.download(name, use_safetensors=True))
    except LIBRARY_ERRORS as error:
        folder = _cached(name, error)
    check_folder(folder)
    return _pipeline(folder, dtype)


def _cached(name: str, error: Exception) -> Path:
    """What an earlier download left; ``error`` is why the hub does not give it now."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except LIBRARY_ERRORS:
        raise InputError(_refused(name, error)) from error
    log.warning("%s: the hub cannot be reached, taken from its cache", name)
    return folder


def _missing(name: str) -> str:
    return (
        f"{name}: no such folder. MODEL is a local diffusers folder, a hub id like "
        f"black-forest-labs/FLUX.1-dev, or one of {', '.join(demo.FOLDERS)}"
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
        saved = read_json(config).get("quantization_config")
        recorded = saved.get("compute_dtype") if isinstance(saved, dict) else None
        found = getattr(torch, recorded, None) if isinstance(recorded, str) else None
        if isinstance(found, torch.dtype):
            return found
    on_disk = disk_dtype(folder)
    if on_disk == torch.float16 and not torch.cuda.is_available():
        return torch.float32  # float16 arithmetic is slow and lossy on a CPU
    return on_disk


def disk_dtype(folder: Path) -> torch.dtype:
    """The float dtype of most tensors in the safetensors files of a model folder."""
    names = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    count: Counter[torch.dtype] = Counter()
    for file in weight_files(folder) if folder.is_dir() else []:
        with safe_open(file, framework="pt") as header:
            count.update(
                names[dtype]
                for key in header.keys()  # noqa: SIM118  (safe_open is not a mapping)
                if (dtype := header.get_slice(key).get_dtype()) in names
            )
    return count.most_common(1)[0][0] if count else torch.float32


def modules_of(loaded: LoadedModel) -> list[nn.Module]:
    """The model, and the others of its pipeline."""
    parts = loaded.pipeline.components.values() if loaded.pipeline is not None else [loaded.model]
    return [part for part in parts if isinstance(part, nn.Module)]
