# SPDX-License-Identifier: Apache-2.0
"""The file format: which tensors and which metadata, what is checked, and writing it safely.

A checkpoint is a standard diffusers folder. Its safetensors files hold ``<layer>.<part>`` for every
quantized layer and the other tensors as they are; the plan is in ``config.json``; the header of
each file has a CRC-32 of every tensor, so that a flipped bit is an error and not a strange picture.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dtq.config import FORMAT_VERSION, DTQConfig
from dtq.errors import CheckpointError, InputError
from dtq.nn.linear import linear_specs
from dtq.plan import LoadPlan, file_bytes
from dtq.source import folder_kind, read_json

_CRC = "dtq_crc32"
_FORMAT = "dtq_format"


def metadata(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Header entries of the files: format version and checksums."""
    sums = {key: checksum(tensors[key]) for key in sorted(tensors)}
    return {_FORMAT: str(FORMAT_VERSION), _CRC: json.dumps(sums, separators=(",", ":"))}


def checksum(tensor: Tensor) -> str:
    """CRC-32 of the tensor's bytes, eight hexadecimal digits."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{zlib.crc32(data):08x}"


def predicted_bytes(tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> int:
    """Exact size of the unsharded file with these tensors: data, header, checksums."""
    sums = json.dumps(dict.fromkeys(sorted(tensors), "0" * 8), separators=(",", ":"))
    header = {"format": "pt", _FORMAT: str(FORMAT_VERSION), _CRC: sums}
    return file_bytes(tensors, header)


class Reader:
    """Checks the files of one model while diffusers loads them.

    Args:
        files: the safetensors files.
        plan: from ``config.json``.

    Raises:
        CheckpointError: a file is truncated or no safetensors file, a planned part is missing or
            of another shape or dtype, or the files are from a newer dtq.
    """

    def __init__(self, files: Iterable[str | Path]) -> None:
        self.sums: dict[str, str] = {}
        self.where: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            self._read_header(Path(file))

    def check_plan(self, plan: LoadPlan, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Every planned part is there with its shape; ``shapes`` gives (N, K) per layer."""
        for name, layer in plan.layers.items():
            specs = linear_specs(
                shapes[name], layer["weights"], layer["acts"], layer["pre_quant"], plan.bins
            )
            for part, spec in specs.items():
                key = f"{name}.{part}"
                if key not in self.where:
                    files = ", ".join(sorted(set(self.where.values())))
                    raise CheckpointError(f"{files}: the tensor {key} is missing")
                if self.shapes[key] != spec.shape:
                    raise CheckpointError(
                        f"{self.where[key]}: {key} has shape {list(self.shapes[key])}, "
                        f"config.json asks for {list(spec.shape)}"
                    )

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Compare checksums.

        Raises:
            CheckpointError: a tensor is not what was saved; names file and key.
        """
        if os.environ.get("DTQ_VERIFY", "1") == "0":
            return
        for key, tensor in tensors.items():
            if key in self.sums and checksum(tensor) != self.sums[key]:
                raise CheckpointError(
                    f"{self.where.get(key, 'checkpoint')}: {key} is damaged (checksum differs); "
                    f"copy the file again"
                )

    def _read_header(self, file: Path) -> None:
        try:
            with safe_open(file, framework="pt") as opened:
                header = opened.metadata() or {}
                for key in opened.keys():  # noqa: SIM118  (safe_open is not a mapping)
                    self.where[key] = str(file)
                    self.shapes[key] = tuple(opened.get_slice(key).get_shape())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: truncated or damaged ({error}); copy it again") from error
        version = header.get(_FORMAT)
        if version is None:
            raise CheckpointError(f"{file}: config.json says dtq, but dtq did not write this file")
        if not version.isdigit() or int(version) > FORMAT_VERSION:
            raise CheckpointError(
                f"{file}: format {version}, this dtq reads up to {FORMAT_VERSION}: pip install -U dtq"
            )
        try:
            self.sums.update(json.loads(header[_CRC]))
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{file}: the header has no readable checksums") from error


def verify(path: Path, component: str = "transformer") -> Path:
    """Check a checkpoint without building the model; returns the folder of the quantized model.

    Raises:
        InputError: not a diffusers folder, or not quantized by dtq.
        CheckpointError: damaged, incomplete or from a newer dtq; names file and key.
    """
    folder = path / component if folder_kind(path) == "pipeline" else path
    config = read_json(folder / "config.json").get("quantization_config")
    if not isinstance(config, dict) or config.get("quant_method") != "dtq":
        raise InputError(f"{folder} is not quantized by dtq (no quantization_config)")
    DTQConfig(**config)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: no safetensors file")
    reader = Reader(files)
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                reader.check({key: opened.get_tensor(key)})
    missing = sorted(set(reader.sums) - set(reader.where))
    if missing:
        raise CheckpointError(f"{folder}: the tensor {missing[0]} is missing ({len(missing)} in all)")
    return folder


def write(saveable: Any, out: str | Path, *, overwrite: bool = False, shard: str = "10GB") -> Path:
    """Save a quantized pipeline or model so that ``out`` appears whole or not at all.

    Args:
        saveable: anything with ``save_pretrained``.
        out: folder to make.
        overwrite: replace a folder that is not empty.
        shard: largest file, as diffusers writes sizes.

    Raises:
        InputError: the folder is not empty, or cannot be made.
    """
    out = Path(out)
    with whole_folder(out, overwrite=overwrite) as side:
        saveable.save_pretrained(side, safe_serialization=True, max_shard_size=shard)
        for config in [*side.glob("*.json"), *side.glob("*/config.json")]:
            _forget_path(config)
    return out


@contextmanager
def whole_folder(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder beside ``out`` to write into, renamed to it at the end, removed on any error.

    Raises:
        InputError: ``out`` exists and is not empty (without ``overwrite``), or is a file.
    """
    check_free(out, overwrite=overwrite)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        side = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise InputError(f"{out.parent}: cannot write there ({error.strerror})") from error
    try:
        side.chmod(0o755)
        yield side
        old = None
        if out.exists():
            old = side.with_suffix(".old")
            out.rename(old)
        side.rename(out)
        if old is not None:
            shutil.rmtree(old)
    except OSError as error:
        raise InputError(f"{out}: could not be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(side, ignore_errors=True)


def check_free(out: Path, *, overwrite: bool = False) -> None:
    """Raise :class:`InputError` unless ``out`` can be written."""
    if out.is_file():
        raise InputError(f"{out} is a file; give a folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise InputError(f"{out} is not empty; choose another folder or pass --overwrite")


def _forget_path(config: Path) -> None:
    """Where the model was read from is nobody's business, and makes equal models unequal."""
    data = json.loads(config.read_text(encoding="utf-8"))
    if data.pop("_name_or_path", None) is not None:
        config.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


