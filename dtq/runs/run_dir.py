# SPDX-License-Identifier: Apache-2.0
"""One run into one output: who may write, from what, and how far it got.

Beside ``OUT`` there are, while a run is on or after it was killed, ``.OUT.work`` with the manifest
and the finished units (``work.py``), and ``.OUT.lock``. The output itself, a folder or a file,
appears by a rename at the end. The manifest says what the units were made from; a run continues
when that is the same.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from dtq.errors import InputError
from dtq.io.atomic import atomic_directory, atomic_write, require_absent, sync_tree
from dtq.io.checksum import folder_digest
from dtq.io.run_lock import locked
from dtq.runs.tasks import TaskStore
from dtq.runs.workers import SINGLE_PROCESS, Workers

log = logging.getLogger("dtq")


class RunDirectory:
    """What :func:`job` gives: the work of this run, and writing its result.

    Attributes:
        work: finished units; :meth:`begin` checks what they were made from.
        finished: the output is there already, made by a run that was killed right after.
        memory: bytes that statistics may take, after :meth:`begin`.
    """

    def __init__(self, output: Path, workers: Workers, overwrite: bool) -> None:
        output = output if output.name else output.resolve()  # of "."
        self.output, self.workers, self.overwrite = output, workers, overwrite
        self.folder = output.with_name(f".{output.name}.work")
        self.tasks = TaskStore(self.folder, workers)
        self.memory = 0
        self.finished = False

    def begin(self, inputs: Mapping[str, Any], memory: int | None = None) -> None:
        """Continue the units that were made from the same ``inputs``, or start.

        Numbers of threads and bytes are taken over from the run that started: the first changes
        how sums are rounded, the second where statistics are cut into files.

        Args:
            inputs: plain data that says what the result depends on, see :func:`inputs_of`.
            memory: bytes that statistics may take; default: half of what is free.

        Raises:
            InputError: the units are of other inputs, says which; or the folder is not visible to
                every process.
        """
        manifest = self.folder / "manifest.json"
        if self.workers.is_main:
            beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            free = memory or psutil.virtual_memory().available // 2 // beside
            here = {"inputs": dict(inputs), "threads": torch.get_num_threads(), "memory": free}
            if manifest.exists():
                before = json.loads(manifest.read_text(encoding="utf-8"))
                self._check_same(before["inputs"], json.loads(json.dumps(here["inputs"])))
                log.warning("%s: going on where the run before stopped", self.folder)
                here = {**here, "threads": before["threads"]}
                here["memory"] = memory or before["memory"]
            else:  # units that nobody knows the inputs of: a run was killed as it removed them
                shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic_write(manifest, json.dumps(here, indent=1) + "\n")
        self.workers.barrier()
        if not manifest.exists():
            raise InputError(
                f"{manifest}: process {self.workers.rank} does not see what process 0 wrote; the "
                f"output has to be on a file system that all machines share"
            )
        agreed = json.loads(manifest.read_text(encoding="utf-8"))
        torch.set_num_threads(agreed["threads"])
        self.memory = agreed["memory"]

    @contextmanager
    def result(self) -> Iterator[Path]:
        """A folder to write the output into, which becomes the output, on the disk, at the end."""
        with atomic_directory(self.output, overwrite=self.overwrite) as side:
            yield side
            sync_tree(side)
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic_write(self._mark, json.dumps({"output": folder_digest(side)}))

    @property
    def _mark(self) -> Path:
        return self.folder / "finished.json"

    def _check_same(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        was, new = _flat(before), _flat(now)
        changed = [
            f"{key}: {_shown(was.get(key))} before, {_shown(new.get(key))} now"
            for key in sorted({*was, *new})
            if was.get(key) != new.get(key)
        ]
        if changed:
            lines = "\n".join(f"  - {line}" for line in changed)
            raise InputError(
                f"{self.folder}: an unfinished run into {self.output} was made from other inputs:\n"
                f"{lines}\nGive what it was given to continue it, or --fresh to start over"
            )

    def was_finished(self) -> bool:
        """Whether the output is what the run before was about to leave."""
        if not (self._mark.exists() and self.output.is_dir()):
            return False
        digest = json.loads(self._mark.read_text(encoding="utf-8"))["output"]
        return bool(digest == folder_digest(self.output))


@contextmanager
def run_directory(
    output: Path,
    workers: Workers = SINGLE_PROCESS,
    *,
    fresh: bool = False,
    overwrite: bool = False,
    file: bool = False,
) -> Iterator[RunDirectory]:
    """The run that makes ``output``, alone in its folder.

    Units stay when it fails, and go when it is done, or when nothing was finished.

    Args:
        output: folder to make.
        team: the processes of the run.
        fresh: forget what was finished before.
        overwrite: replace an output that is not empty.
        file: the output is one file, which the caller replaces; not by :meth:`Job.result`.

    Raises:
        InputError: another run writes there, the output is not empty, or a folder and not a file.
    """
    one = RunDirectory(output, workers, overwrite)
    if not workers.is_main:
        one.finished = workers.broadcast(None)
        yield one
        return
    output = one.output
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{output.parent}: cannot write there ({error.strerror})") from error
    with locked(output.with_name(f".{output.name}.lock")):
        if fresh:
            shutil.rmtree(one.folder, ignore_errors=True)
        one.finished = one.was_finished()
        if file and output.is_dir():
            raise InputError(f"{output} is a folder; give a file")
        if not file and not one.finished:
            require_absent(output, overwrite=overwrite)
        _clear(output)
        workers.broadcast(one.finished)
        try:
            yield one
        except BaseException:
            if any(one.folder.rglob("*.safetensors")):
                log.warning(
                    "%s keeps what is finished: the same command goes on from there, --fresh "
                    "starts over", one.folder,
                )  # fmt: skip
            else:
                shutil.rmtree(one.folder, ignore_errors=True)
            raise
        shutil.rmtree(one.folder, ignore_errors=True)


def _clear(output: Path) -> None:
    """Remove what a run left that was killed while it wrote or replaced the output."""
    for left in output.parent.glob(f".{glob.escape(output.name)}.*.partial"):
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()
    for old in output.parent.glob(f".{glob.escape(output.name)}.*.old"):
        if output.exists():
            shutil.rmtree(old)
        else:
            old.rename(output)


def _flat(data: Any, at: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots."""
    if not isinstance(data, Mapping):
        return {at: data}
    found: dict[str, Any] = {}
    for key, value in data.items():
        found |= _flat(value, f"{at}.{key}" if at else str(key))
    return found


def _shown(value: Any) -> str:
    """A value as one line, hashes shortened."""
    text = value if isinstance(value, str) else json.dumps(value)
    return " ".join(w[:12] if len(w) == 64 else w for w in text.split()) or "nothing"
