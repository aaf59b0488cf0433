# SPDX-License-Identifier: Apache-2.0
"""Which safetensors files of a folder are read: variants, shards and their index.

The names are those of diffusers (``diffusion_pytorch_model``) and transformers (``model``). A
variant, such as ``fp16``, is a part of the name: ``diffusion_pytorch_model.fp16.safetensors``.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


def resolve_variants(
    path: Path, folders: Mapping[str, Path], variant: str | None = None, *, warn: bool = False
) -> dict[str, str | None]:
    """The variant of the files to read of each component.

    Args:
        path: the folder of the pipeline or model, for messages.
        folders: component to its folder.
        variant: what the user asks for; components without it are read without. None is the files
            without a variant, and for a component that has none of these, its only variant.
        warn: report variants that are read although the user did not ask for one.

    Returns:
        Component to variant; None is the files without one.

    Raises:
        InputError: no file has that variant, or the choice is the user's.
    """
    stored = {name: {*_stored(folder)} for name, folder in folders.items()}
    known = {v for variants in stored.values() for v in variants if v is not None}
    if variant is not None and variant not in known:
        has = f"it has {', '.join(sorted(known))}" if known else "its files have no variant"
        raise InputError(f"{path}: no file of the variant {variant!r}; {has}")
    chosen: dict[str, str | None] = {}
    for name, variants in stored.items():
        if variant in variants or None in variants or not variants:
            chosen[name] = variant if variant in variants else None
        elif variant is None and len(variants) == 1:
            (chosen[name],) = variants
        else:
            alone = {n: sorted(map(str, v)) for n, v in stored.items() if v and None not in v}
            raise InputError(f"{path}: {_how_to_choose(alone)}")
    if warn and variant is None:
        _warn_of_variants(path, chosen)
    return chosen


def _how_to_choose(alone: Mapping[str, list[str]]) -> str:
    """What to do about components that are stored as variants only."""
    common = sorted(set.intersection(*map(set, alone.values())))
    if common:
        return (
            f"the weights are stored as variants only ({', '.join(common)}); choose one with "
            f"--variant, or variant= in Python"
        )
    each = "; ".join(f"{name}: {', '.join(variants)}" for name, variants in alone.items())
    if all(len(variants) == 1 for variants in alone.values()):
        advice = "leave --variant out to read the only one of each"
    else:
        advice = "get files of one variant for all of them, or remove all but one of each"
    return f"no variant covers all components ({each}); {advice}"


def _warn_of_variants(path: Path, variants: Mapping[str, str | None]) -> None:
    """Report the variants that are read although the user did not ask for them."""
    for variant in sorted({v for v in variants.values() if v is not None}):
        names = ", ".join(name for name, v in variants.items() if name and v == variant)
        of = f" of {names}" if names else ""
        log.warning(
            "%s: the weights%s are stored as the variant %s only; it is read", path, of, variant
        )


def has_variant(folders: Iterable[Path], variant: str | None) -> bool:
    """Whether one of several model folders has files of a variant; any has None."""
    return variant is None or any(variant in _stored(folder) for folder in folders)


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The safetensors files of a model folder that are read; reads and checks their headers.

    Args:
        folder: of one model.
        variant: as :func:`resolve_variants` returns it.

    Returns:
        The files; empty for a folder without weights.

    Raises:
        InputError: weights are stored only as pickle, or an index names a file elsewhere.
        CheckpointError: a file is damaged or missing.
    """
    source = _stored(folder).get(variant)
    if source is None:
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
    with open_header(file) as header:
        return list(header.keys())


@contextmanager
def open_header(file: Path) -> Iterator[Any]:
    """Open a safetensors file to read its header, or some of its tensors.

    Raises:
        CheckpointError: the file is truncated or damaged.
    """
    try:
        with safe_open(file, framework="pt") as header:
            yield header
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file}: truncated or damaged ({error}); copy it again") from error


def _stored(folder: Path) -> dict[str | None, Path]:
    """Variant (None: no variant) to its file, or to its index if it has several files.

    diffusers reads the index if there are both, transformers the file. An index without any of its
    files came along with another download; it counts only where there is nothing else.
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
        stored = files | indexes if stem == _STEMS[0] else indexes | files
        if whole := {v: source for v, source in stored.items() if _has_files(source)}:
            return whole
        if None in stored:
            return {None: stored[None]}
    return {}


def _has_files(source: Path) -> bool:
    """Whether a weight file, or at least one file of an index, is there."""
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
