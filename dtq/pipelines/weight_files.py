# SPDX-License-Identifier: Apache-2.0
"""Which safetensors files of a folder are read: variants, shards and their index.

The names are those of diffusers (``diffusion_pytorch_model``) and transformers (``model``). A
variant, such as ``fp16``, is a part of the name: ``diffusion_pytorch_model.fp16.safetensors``.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dtq.errors import CheckpointError, InputError
from dtq.io.safe_parse import read_json

log = logging.getLogger("dtq")

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Suffixes of pickle files, which can run code when they are read."""

_SHARD = re.compile(r"[\w.-]{1,200}\.safetensors")
_STEMS = ("diffusion_pytorch_model", "model")
_FILE = r"{}(?:\.(?P<variant>.+?))?\.safetensors"
_INDEX = r"{}\.safetensors(?:\.(?P<old>.+))?\.index(?:\.(?P<variant>.+))?\.json"
_NUMBERED = re.compile(r"-\d+-of-\d+$")


def resolve_variant(path: Path, variant: str | None = None) -> str | None:
    """The variant of the files to read from a pipeline or model folder.

    Args:
        path: the folder.
        variant: what the user asks for; None is the files without a variant, and where there are
            none, the only variant.

    Raises:
        InputError: no file has that variant, or the choice is the user's.
    """
    stored = _stored_below(path)
    variants = [_variants(names) for names in stored]
    if variant is not None:
        if not any(variant in names for names in variants):
            known = ", ".join(sorted(set[str]().union(*variants)))
            raise InputError(
                f"{path}: no file of the variant {variant!r}; "
                f"{f'it has {known}' if known else 'its files have no variant'}"
            )
        return variant
    alone = [v for v, s in zip(variants, stored, strict=True) if v and not _has_plain(s)]
    if not alone:
        return None
    common = sorted(set.intersection(*alone))
    if len(common) != 1:
        known = ", ".join(sorted(set.union(*alone)))
        raise InputError(
            f"{path}: the weights are stored as variants only ({known}); choose one with "
            f"--variant, or variant= in Python"
        )
    log.warning("%s: the weights are stored as the variant %s only; it is read", path, common[0])
    return common[0]


def has_variant(path: Path, variant: str | None) -> bool:
    """Whether a pipeline or model folder has files of a variant; any has None."""
    return variant is None or any(variant in _variants(names) for names in _stored_below(path))


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The safetensors files of a model folder that are read; reads and checks their headers.

    Args:
        folder: of one model.
        variant: as :func:`resolve_variant` returns it; files without it take its place.

    Returns:
        The files; empty for a folder without weights.

    Raises:
        InputError: weights are stored only as pickle or as another variant, or an index names a
            file elsewhere.
        CheckpointError: a file is damaged or missing.
    """
    stored = _stored(folder)
    source = stored.get(None)
    if variant in stored and _has_files(stored[variant]):
        source = stored[variant]
    if source is None:
        if stored:
            known = ", ".join(sorted(map(str, stored)))
            raise InputError(
                f"{folder}: no file of the variant {variant}; it has {known}"
                if variant
                else f"{folder}: only files of the variant {known}; choose one with --variant"
            )
        pickles = sorted(f.name for f in folder.iterdir() if f.suffix in PICKLES)
        if pickles:
            raise InputError(
                f"{folder}: the weights are pickle ({pickles[0]}), which can run code; dtq reads "
                f"safetensors. If you trust the file, load it with diffusers and "
                f"save_pretrained() it"
            )
        return []
    files = [source]
    if source.suffix == ".json":
        names = _shard_names(source)
        for name in names:
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder / name}: missing, and {source.name} names it")
        files = [folder / name for name in names]
    for file in files:
        tensor_names(file)
    return files


def tensor_names(file: Path) -> list[str]:
    """Names of the tensors in the header of a safetensors file.

    Raises:
        CheckpointError: the file is truncated or damaged.
    """
    try:
        with safe_open(file, framework="pt") as header:
            return list(header.keys())
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file}: truncated or damaged ({error}); copy it again") from error


def _stored(folder: Path) -> dict[str | None, Path]:
    """Variant (None: no variant) to its file, or to its index if it has several files.

    diffusers reads the index if there are both, transformers the file.
    """
    names = sorted(entry.name for entry in folder.iterdir())
    for stem in _STEMS:
        files: dict[str | None, Path] = {}
        indexes: dict[str | None, Path] = {}
        for name in names:
            if (match := re.fullmatch(_INDEX.format(stem), name)) is not None:
                indexes.setdefault(match["variant"] or match["old"], folder / name)
                continue
            match = re.fullmatch(_FILE.format(stem), name)
            if match is not None and not _NUMBERED.search(match["variant"] or ""):
                files[match["variant"]] = folder / name
        if files or indexes:
            return files | indexes if stem == _STEMS[0] else indexes | files
    return {}


def _stored_below(path: Path) -> list[dict[str | None, Path]]:
    """:func:`_stored` of a model, or of each component of a pipeline."""
    index = path / "model_index.json"
    if not index.is_file():
        return [_stored(path)]
    return [_stored(path / name) for name in read_json(index) if (path / name).is_dir()]


def _variants(stored: dict[str | None, Path]) -> set[str]:
    return {v for v, source in stored.items() if v is not None and _has_files(source)}


def _has_plain(stored: dict[str | None, Path]) -> bool:
    return None in stored and _has_files(stored[None])


def _has_files(source: Path) -> bool:
    """Whether a file of an index is there: an index alone came along with another download."""
    if source.suffix != ".json":
        return True
    names = read_json(source).get("weight_map")
    return isinstance(names, dict) and any(
        isinstance(name, str) and _SHARD.fullmatch(name) and (source.parent / name).is_file()
        for name in names.values()
    )


def _shard_names(index: Path) -> list[str]:
    """The file names of an index, checked.

    Raises:
        InputError: it is no index, or names a file elsewhere.
    """
    data = read_json(index)
    names = data.get("weight_map")
    if not isinstance(names, dict) or not isinstance(data.get("metadata"), dict):
        raise InputError(f"{index}: needs 'metadata' and 'weight_map', tensor names to file names")
    for key, name in names.items():
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise InputError(
                f"{index}: weight_map[{key!r}] must be the name of a safetensors file in the "
                f"folder of the index, is {name!r}"[:400]
            )
    return sorted(set(names.values()))
