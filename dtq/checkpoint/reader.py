# SPDX-License-Identifier: Apache-2.0
"""Read and verify the safetensors files of a checkpoint.

A checkpoint is a standard diffusers folder. Its safetensors files hold the packed tensors of every
quantized layer, named ``<layer>.<tensor>``, and the other tensors as they are; the plan is in
``config.json``. One more tensor, ``dtq_checksums``, has the format version and a CRC-32 of every
other tensor, so that a flipped bit is an error and not a strange image. (Not in the file's header:
the safetensors writer puts header entries in random order, and the same model must give the same
bytes.)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from dtq.checkpoint.config import FORMAT_VERSION, DTQConfig, check_version, is_dtq
from dtq.checkpoint.file_size import file_bytes
from dtq.errors import CheckpointError, InputError
from dtq.io.checksum import checksum
from dtq.io.safe_parse import read_json
from dtq.models.linears import is_linear, matrix_shape, shape_of
from dtq.nn.swap import planned_linears
from dtq.pipelines.contents import (
    Components,
    diffusion_transformers_on_disk,
    folder_kind,
    model_class,
)
from dtq.pipelines.stored_tensors import SAFETENSORS_DTYPES
from dtq.pipelines.validation import check_folder, check_shapes, components, meta_model
from dtq.pipelines.weight_files import PICKLES, open_header, weight_files
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
    return checksum("".join(lines).encode())


def predicted_bytes(tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> int:
    """Exact size of the unsharded file with these tensors: data, header, checksums."""
    sums = {CHECKSUMS: ((2 + len(tensors),), torch.int32)}
    return file_bytes({**tensors, **sums}, {"format": "pt"})


class Reader:
    """Checks the files of one model while diffusers loads them.

    Args:
        files: the safetensors files.

    Raises:
        CheckpointError: a file is truncated or is no safetensors file, or the files are incomplete
            or from another version of dtq. Differences that :meth:`check_plan` can name are left to
            it.
    """

    def __init__(self, files: Iterable[str | Path]) -> None:
        self.where: dict[str, str] = {}
        self.stored: dict[str, tuple[str, tuple[int, ...]]] = {}  # dtype and shape
        self._value_checks: dict[str, Callable[[Tensor], str | None]] = {}
        read = [self._read_header(Path(file)) for file in files]
        values = next((checksums for checksums in reversed(read) if checksums is not None), None)
        names = sorted(self.where)
        all_files = ", ".join(sorted({Path(file).name for file in self.where.values()}))
        if values is None:
            raise CheckpointError(f"{all_files}: the tensor {CHECKSUMS} is missing; not a dtq file")
        version, names_sum, *sums = values.tolist()
        check_version(version, f"{all_files}: format")
        self._damage: str | None = None
        if len(names) != len(sums):
            self._damage = (
                f"{all_files}: {len(names)} tensors where {len(sums)} were saved; a file is "
                f"missing or from another model"
            )
        elif outline(self.stored) != names_sum:
            self._damage = (
                f"{all_files}: truncated or damaged (a tensor's name, dtype or shape is not what "
                f"was saved); copy it again"
            )
        self.sums: dict[str, int] = dict(zip(names, sums, strict=self._damage is None))

    def expect(self, plan: CheckpointSpec) -> None:
        """From now on, check the values of the planned tensors, too."""
        for name, layer in plan.layers.items():
            # the check does not depend on the shape: any that every format accepts will do
            for key, spec in layer.tensor_specs((1024, 1024)).items():
                if spec.unsupported_reason is not None:
                    self._value_checks[f"{name}.{key}"] = spec.unsupported_reason

    def check_plan(self, plan: CheckpointSpec, model: nn.Module) -> None:
        """Check that the files hold the planned tensors and the others of the float model.

        Args:
            plan: of ``config.json``.
            model: the float model, on any device.

        Raises:
            CheckpointError: names the layer or tensor that is not as ``config.json`` says.
        """
        self.expect(plan)
        for name, module in planned_linears(model, plan).items():
            try:
                of_weight = shape_of if is_linear(module) else matrix_shape
                specs = plan.layers[name].validated_for(of_weight(module), plan.bins)
            except InputError as error:
                raise CheckpointError(f"config.json: layers[{name!r}]: {error}") from error
            for part, spec in specs.items():
                key = f"{name}.{part}"
                if key not in self.where:
                    files = ", ".join(sorted(set(self.where.values())))
                    raise CheckpointError(f"{files}: the tensor {key} is missing")
                dtype, shape = self.stored[key]
                if (dtype, shape) != (SAFETENSORS_DTYPES[spec.dtype], spec.shape):
                    raise CheckpointError(
                        f"{self.where[key]}: {key} has shape {list(shape)} in {dtype}, config.json "
                        f"asks for {list(spec.shape)} in {SAFETENSORS_DTYPES[spec.dtype]}"
                    )
        check_shapes("config.json", model, self.stored, plan.layers)
        if self._damage is not None:
            raise CheckpointError(self._damage)

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Compare checksums, and check the values of the tensors that :meth:`expect` noted.

        ``DTQ_VERIFY=0`` switches the checksums off.

        Raises:
            CheckpointError: a tensor is not what was saved, or holds values that dtq does not
                write; names file and key.
        """
        for key, tensor in tensors.items():
            self.check_values(key, tensor)
        verify = os.environ.get("DTQ_VERIFY", "1") != "0"
        for key, tensor in tensors.items() if verify else ():
            if key in self.sums and checksum(tensor) != self.sums[key]:
                raise CheckpointError(
                    f"{self.where.get(key, 'checkpoint')}: {key} is damaged (checksum differs); "
                    f"copy the file again"
                )

    def check_values(self, key: str, tensor: Tensor) -> None:
        """Check the values of a tensor, or of a slice of it.

        Raises:
            CheckpointError: it holds values that dtq does not write; names file and key.
        """
        check = self._value_checks.get(key)
        wrong = check(tensor) if check else None
        if wrong:
            raise CheckpointError(
                f"{self.where[key]}: {key} holds {wrong}, which dtq does not write; "
                f"quantize the model again"
            )

    def _read_header(self, file: Path) -> Tensor | None:
        """Note the tensors of a file; returns the checksums if they are in it."""
        if file.suffix in PICKLES:
            raise CheckpointError(f"{file}: pickle, which can run code; dtq reads safetensors only")
        sums: Tensor | None = None
        with open_header(file) as opened:
            for key in opened.keys():  # noqa: SIM118  (safe_open is not a mapping)
                if key == CHECKSUMS:
                    sums = opened.get_tensor(key)
                    continue
                if key in self.where:
                    raise CheckpointError(f"{file}: {key} is also in {self.where[key]}")
                self.where[key] = str(file)
                header = opened.get_slice(key)
                self.stored[key] = header.get_dtype(), tuple(header.get_shape())
        if sums is not None and (sums.dtype != torch.int32 or sums.ndim != 1 or len(sums) < 2):
            raise CheckpointError(f"{file}: {CHECKSUMS} is damaged; copy the file again")
        return sums


def quantized_components(path: Path) -> list[str]:
    """Names of the models of a pipeline folder that dtq quantized; denoisers come first."""
    denoisers = diffusion_transformers_on_disk(path)
    every = [*denoisers, *sorted({*components(path / "model_index.json")} - {*denoisers})]
    configs = {name: path / name / "config.json" for name in every}
    return [
        name
        for name, config in configs.items()
        if config.is_file() and is_dtq(read_json(config).get("quantization_config"))
    ]


def verify(
    path: Path, component: Components = "auto", variant: str | None = None, *, warn: bool = False
) -> dict[str, tuple[Path, str | None]]:
    """Check a checkpoint without building the models.

    Args:
        path: folder of a pipeline or a model.
        component: which models of a pipeline; ``auto`` is every one that dtq quantized.
        variant: of the files, as for ``load_transformers``.
        warn: report variants that are read although the user did not ask for one.

    Returns:
        Component to the folder and the variant of the files of every model that dtq quantized.

    Raises:
        InputError: not a diffusers folder, or nothing in it is quantized by dtq.
        CheckpointError: damaged, incomplete or from another version of dtq; names file and key.
    """
    kind = folder_kind(path)
    variants, _ = check_folder(path, variant, warn=warn)
    folders = {"transformer": path}
    if kind == "pipeline":
        names = quantized_components(path) if component == "auto" else component
        folders = {n: path / n for n in ([names] if isinstance(names, str) else names)}
    verified = {}
    for name, folder in folders.items():
        config: Any = read_json(folder / "config.json").get("quantization_config")
        if is_dtq(config):
            own = variants.get(name if kind == "pipeline" else "")
            _verify_model(folder, config, weight_files(folder, own))
            verified[name] = folder, own
    if not verified:
        raise InputError(f"{path} is not quantized by dtq (no quantization_config)")
    return verified


def _verify_model(folder: Path, config: dict[str, Any], files: list[Path]) -> None:
    plan = DTQConfig(**config).load_plan()
    reader = Reader(files)
    reader.check_plan(plan, meta_model(folder, model_class(folder), files))
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                reader.check({key: opened.get_tensor(key)})
