# SPDX-License-Identifier: Apache-2.0
"""A pipeline whose transformers are run from exported files, as the candidate of ``dtq eval``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from dtq.engines import TARGETS
from dtq.engines.runtimes import Engine, EngineFile, open_file, target_of
from dtq.engines.target import StoredLayer, file_in_checkpoint
from dtq.errors import InputError
from dtq.io.checksum import bytes_digest, path_digest
from dtq.pipelines.contents import diffusion_transformers_on_disk, folder_kind
from dtq.pipelines.engine_run import EngineRun
from dtq.pipelines.loading import LoadedModel


def is_exported(path: Path) -> bool:
    """Whether a path is a file, or a folder in the format of a target."""
    folders = (target for target in TARGETS.values() if not target.suffix)
    return path.is_file() or (path.is_dir() and any(each.recognizes(path) for each in folders))


def is_pipeline(path: Path) -> bool:
    """Whether a path is the folder of a pipeline, such as the output of ``dtq quantize``."""
    return path.is_dir() and not is_exported(path) and folder_kind(path) == "pipeline"


def files_of(engine: Engine, path: Path) -> dict[str, Path]:
    """The files that an engine is to run, by transformer.

    Args:
        engine: that will run them.
        path: a file; or the output folder of ``dtq quantize --to TARGET``, which has one for each
            transformer.

    Returns:
        Component of the pipeline to file; a file by itself is for ``""``, the only transformer.

    Raises:
        InputError: the folder has no file for the engine, or several; the file is of another
            engine.
    """
    if not is_pipeline(path):
        target_of(engine, path)
        return {"": path}
    files = {}
    for component in diffusion_transformers_on_disk(path):
        paths = [path / file_in_checkpoint(component, TARGETS[name]) for name in engine.runs]
        found = [each for each in paths if each.exists()]
        if not found:
            raise InputError(
                f"{path} has no file that {engine.name} runs; quantize with --to "
                f"{' or '.join(engine.runs)}, or give a file of dtq export"
            )
        if len(found) > 1:
            names = ", ".join(map(str, found))
            raise InputError(f"{path} has several files for {engine.name}: give one of {names}")
        files[component] = found[0]
    return files


def run_in(engine: Engine, base: LoadedModel, files: Mapping[str, Path], name: str) -> LoadedModel:
    """A pipeline whose transformers an engine runs.

    Args:
        engine: the engine.
        base: a pipeline of the same models; its transformers are replaced in it.
        files: of :func:`files_of`.
        name: of the candidate, as the user gave it.

    Raises:
        InputError: the pipeline has other transformers than there are files; as
            :func:`~dtq.engines.runtimes.open_file`.
        CheckpointError: as :func:`~dtq.engines.runtimes.open_file`.
    """
    models = base.models()
    if base.pipeline is None:
        raise InputError(f"{base.name} is a bare transformer; --reference must be a pipeline")
    if set(files) == {""} and len(models) == 1:
        files = {base.component: files[""]}
    if files.keys() != models.keys():
        raise InputError(
            f"{base.name} has the transformers {', '.join(models)}, and a file holds one: give the "
            f"output folder of dtq quantize --to TARGET, which has a file for each"
        )
    opened = []
    for component, path in files.items():
        opened.append(open_file(engine, path, models[component], base.dtype))
        setattr(base.pipeline, component, engine.load(opened[-1]))
    run = EngineRun(
        engine.name,
        engine.versions,
        ", ".join(path.name for path in files.values()),
        ", ".join(_digest(each) for each in opened),
        ", ".join(dict.fromkeys(each.contents.recipe for each in opened if each.contents.recipe)),
        _bits(opened),
    )
    model = getattr(base.pipeline, base.component)
    shown = f"{name} ({engine.versions})" if engine.packages else name
    return replace(base, name=shown, model=model, engine=run, scan=None)


def _digest(file: EngineFile) -> str:
    """SHA-256 of a file, or a folder; of several files, of their digests one after another."""
    found = [path_digest(path) for path in file.target.paths(file.path)]
    return found[0] if len(found) == 1 else bytes_digest("".join(found).encode())


def _bits(files: Sequence[EngineFile]) -> float | None:
    """Stored bits per weight of the layers with quantized inputs; if there are none, of all."""
    layers: list[StoredLayer] = [each for f in files for each in f.contents.layers.values()]
    layers = [each for each in layers if each.spec.activation_format != "none"] or layers
    if not layers:
        return None
    stored = sum(t.nbytes for each in layers for t in each.tensors.values())
    return 8 * stored / sum(each.shape[0] * each.shape[1] for each in layers)
