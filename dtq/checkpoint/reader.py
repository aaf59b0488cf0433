# SPDX-License-Identifier: Apache-2.0
"""The file format: which tensors and which metadata, what is checked, and writing it safely.

A checkpoint is a standard diffusers folder. Its safetensors files hold ``<layer>.<part>`` for every
quantized layer and the other tensors as they are; the plan is in ``config.json``. One more tensor,
``dtq_checksums``, has the format version and a CRC-32 of every other tensor, so that a flipped bit
is an error and not a strange picture. (Not in the file's header: the safetensors writer puts header
entries in random order, and the same model must give the same bytes.)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dtq.checkpoint.config import FORMAT_VERSION, DTQConfig
from dtq.checkpoint.file_size import SAFETENSORS_DTYPES, file_bytes
from dtq.errors import CheckpointError, InputError
from dtq.io.checksum import checksum, text_checksum
from dtq.io.safe_parse import read_json
from dtq.models.linears import shape_of
from dtq.nn.swap import planned_linears
from dtq.pipelines.loading import Components, diffusion_transformers_on_disk, folder_kind
from dtq.pipelines.validation import PICKLES, check_folder, check_shapes
from dtq.plan.layers import CheckpointSpec

CHECKSUMS = "dtq_checksums"
"""int32 (2 + tensors,): format version; CRC-32 of the names, dtypes and shapes (:func:`outline`);
CRC-32 of the tensors in order of their names."""


def with_checksums(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint and their checksums."""
    sums = [checksum(tensors[key]) for key in sorted(tensors)]
    described = {k: (SAFETENSORS_DTYPES[t.dtype], tuple(t.shape)) for k, t in tensors.items()}
    values = [FORMAT_VERSION, outline(described), *sums]
    return {**tensors, CHECKSUMS: torch.tensor(values, dtype=torch.int64).to(torch.int32)}


def outline(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    """CRC-32 of a line ``name dtype shape`` per tensor, in order of names, signed."""
    lines = (f"{k} {dtype} {list(shape)}\n" for k, (dtype, shape) in sorted(tensors.items()))
    return text_checksum("".join(lines))


def predicted_bytes(tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> int:
    """Exact size of the unsharded file with these tensors: data, header, checksums."""
    sums = {CHECKSUMS: ((2 + len(tensors),), torch.int32)}
    return file_bytes({**tensors, **sums}, {"format": "pt"})


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
        self.sums: dict[str, int] = {}
        self.where: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        values: Tensor | None = None
        for file in files:
            found = self._read_header(Path(file))
            values = found if found is not None else values
        files_read = ", ".join(sorted({str(Path(w).name) for w in self.where.values()}))
        if values is None:
            raise CheckpointError(
                f"{files_read}: the tensor {CHECKSUMS} is missing; not a dtq file"
            )
        version, names_sum, *sums = values.tolist()
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"{files_read}: format {version}, this dtq reads up to {FORMAT_VERSION}: "
                f"pip install -U dtq"
            )
        names = sorted(self.where)
        if version < 1 or len(names) != len(sums):
            raise CheckpointError(
                f"{files_read}: {len(names)} tensors where {len(sums)} were saved; a file is "
                f"missing or from another model"
            )
        if outline({k: (self.dtypes[k], self.shapes[k]) for k in names}) != names_sum:
            raise CheckpointError(
                f"{files_read}: truncated or damaged (a tensor's name, dtype or shape is not what "
                f"was saved); copy it again"
            )
        self.sums = dict(zip(names, sums, strict=True))
        self._refuses: dict[str, Callable[[Tensor], str | None]] = {}

    def expect(self, plan: CheckpointSpec) -> None:
        """Ask the values of the planned parts, too, from now on."""
        for name, layer in plan.layers.items():
            # what is asked does not depend on the shape: any that every format accepts will do
            for part, spec in layer.tensor_specs((1024, 1024)).items():
                if spec.unsupported_reason is not None:
                    self._refuses[f"{name}.{part}"] = spec.unsupported_reason

    def check_plan(self, plan: CheckpointSpec, model: nn.Module) -> None:
        """Every planned part is there with its shape, and what else the float model holds.

        Args:
            plan: of the file.
            model: the float model, on any device.

        Raises:
            CheckpointError: names the layer or tensor that is not as ``config.json`` says.
        """
        self.expect(plan)
        for name, module in planned_linears(model, plan).items():
            shape = shape_of(module)
            try:
                parts = plan.layers[name].validated_for(shape, plan.bins)
            except InputError as error:
                raise CheckpointError(f"config.json: layers[{name!r}]: {error}") from error
            for part, spec in parts.items():
                key = f"{name}.{part}"
                if key not in self.where:
                    files = ", ".join(sorted(set(self.where.values())))
                    raise CheckpointError(f"{files}: the tensor {key} is missing")
                if self.shapes[key] != spec.shape:
                    raise CheckpointError(
                        f"{self.where[key]}: {key} has shape {list(self.shapes[key])}, "
                        f"config.json asks for {list(spec.shape)}"
                    )
        found = {key: (self.dtypes[key], self.shapes[key]) for key in self.where}
        check_shapes("config.json", model, found, plan.layers)

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Compare checksums, and ask the values of what :meth:`expect` was told of.

        Raises:
            CheckpointError: a tensor is not what was saved, or holds what dtq does not write; names
                file and key.
        """
        for key, tensor in tensors.items():
            self.check_values(key, tensor)
        if os.environ.get("DTQ_VERIFY", "1") == "0":
            return
        for key, tensor in tensors.items():
            if key in self.sums and checksum(tensor) != self.sums[key]:
                raise CheckpointError(
                    f"{self.where.get(key, 'checkpoint')}: {key} is damaged (checksum differs); "
                    f"copy the file again"
                )

    def check_values(self, key: str, tensor: Tensor) -> None:
        """Ask a tensor, or a slice of it.

        Raises:
            CheckpointError: it holds what dtq does not write; names file and key.
        """
        wrong = self._refuses[key](tensor) if key in self._refuses else None
        if wrong:
            raise CheckpointError(
                f"{self.where[key]}: {key} holds {wrong}, which dtq does not write; "
                f"quantize the model again"
            )

    def _read_header(self, file: Path) -> Tensor | None:
        """Note the tensors of a file; returns the checksums if they are in it."""
        if file.suffix in PICKLES:
            raise CheckpointError(f"{file}: pickle, which can run code; dtq reads safetensors only")
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118  (safe_open is not a mapping)
                    if key == CHECKSUMS:
                        continue
                    if key in self.where:
                        raise CheckpointError(f"{file}: {key} is also in {self.where[key]}")
                    self.where[key] = str(file)
                    part = opened.get_slice(key)
                    self.shapes[key], self.dtypes[key] = tuple(part.get_shape()), part.get_dtype()
                if CHECKSUMS not in opened.keys():  # noqa: SIM118
                    return None
                values: Tensor = opened.get_tensor(CHECKSUMS)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file}: truncated or damaged ({error}); copy it again"
            ) from error
        if values.dtype != torch.int32 or values.ndim != 1 or len(values) < 2:
            raise CheckpointError(f"{file}: {CHECKSUMS} is damaged; copy the file again")
        return values


def verify(path: Path, component: Components = "auto") -> dict[str, Path]:
    """Check a checkpoint without building the models.

    Returns:
        Component to folder of every model that dtq quantized.

    Raises:
        InputError: not a diffusers folder, or nothing in it is quantized by dtq.
        CheckpointError: damaged, incomplete or from a newer dtq; names file and key.
    """
    kind = folder_kind(path)
    check_folder(path)
    folders = {"transformer": path}
    if kind == "pipeline":
        names = diffusion_transformers_on_disk(path) if component == "auto" else component
        folders = {n: path / n for n in ([names] if isinstance(names, str) else names)}
    found = {}
    for name, folder in folders.items():
        config = read_json(folder / "config.json").get("quantization_config")
        if isinstance(config, dict) and config.get("quant_method") == "dtq":
            _verify_model(folder, config)
            found[name] = folder
    if not found:
        raise InputError(f"{path} is not quantized by dtq (no quantization_config)")
    return found


def _verify_model(folder: Path, config: dict[str, Any]) -> None:
    plan = DTQConfig(**config).load_plan()
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: no safetensors file")
    reader = Reader(files)
    reader.expect(plan)
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                reader.check({key: opened.get_tensor(key)})
