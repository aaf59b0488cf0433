# SPDX-License-Identifier: Apache-2.0
"""The run directory: which run may write an output, from which inputs, and how far it got.

While a run writes ``OUT``, and after it was killed, there are in the same folder ``.OUT.work``,
with a manifest and the results of finished tasks (``tasks.py``), and ``.OUT.lock``. The output
itself, a folder or a file, appears by a rename at the end. The manifest holds the inputs that the
tasks depend on; an interrupted run is continued only from the same inputs.
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
    """The tasks of one run, and the writing of its output; made by :func:`run_directory`.

    Args:
        output: folder or file that the run makes.
        workers: the processes of the run.
        overwrite: replace an output that is not empty.

    Attributes:
        tasks: results of finished tasks; :meth:`begin` checks that they are of the same inputs.
        finished: the output is complete: the run before was killed right after it wrote it.
        memory: bytes that the statistics may take, after :meth:`begin`.
    """

    def __init__(self, output: Path, workers: Workers, overwrite: bool) -> None:
        output = output if output.name else output.resolve()  # of "."
        self.output, self.workers, self.overwrite = output, workers, overwrite
        self.folder = output.with_name(f".{output.name}.work")
        self.tasks = TaskStore(self.folder, workers)
        self.memory = 0
        self.finished = False

    def begin(self, inputs: Mapping[str, Any], memory: int | None = None) -> None:
        """Continue an interrupted run with the same ``inputs``, or start one.

        A continued run takes over the number of threads, which decides how sums are rounded, and
        the memory, which decides how statistics are split into files.

        Args:
            inputs: plain data that the result depends on; of the main process.
            memory: bytes that the statistics may take; default: half of the free memory, divided
                by the processes of this machine.

        Raises:
            InputError: the interrupted run had other inputs, and which; or another process does
                not see the folder.
        """
        path = self.folder / "manifest.json"
        if self.workers.is_main:
            local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            free = psutil.virtual_memory().available // 2 // local
            threads = torch.get_num_threads()
            if path.exists():
                before = _read(path)
                self._check_same_inputs(before["inputs"], json.loads(json.dumps(inputs)))
                log.warning("%s: continuing the interrupted run", self.folder)
                free, threads = before["memory"], before["threads"]
            else:  # results without a manifest: a run was killed while it removed them
                shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            begun = {"inputs": inputs, "threads": threads, "memory": memory or free}
            atomic_write(path, json.dumps(begun, indent=1) + "\n")
        self.workers.barrier()
        if not path.exists():
            raise InputError(
                f"{path}: process {self.workers.rank} does not see the file that process 0 wrote; "
                f"the output has to be on a file system that all machines share"
            )
        manifest = _read(path)
        torch.set_num_threads(manifest["threads"])
        self.memory = manifest["memory"]

    @contextmanager
    def result(self) -> Iterator[Path]:
        """A folder to write the output into, which becomes the output, on the disk, at the end."""
        with atomic_directory(self.output, overwrite=self.overwrite) as draft:
            yield draft
            sync_tree(draft)
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic_write(self._mark, json.dumps({"output": folder_digest(draft)}))

    def was_finished(self) -> bool:
        """Whether the output is complete, as the mark of :meth:`result` describes it."""
        if not (self._mark.exists() and self.output.is_dir()):
            return False
        return bool(_read(self._mark)["output"] == folder_digest(self.output))

    @property
    def _mark(self) -> Path:
        return self.folder / "finished.json"

    def _check_same_inputs(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        old, new = _flatten(before), _flatten(now)
        changed = [
            f"  - {key}: {_shortened(old.get(key))} before, {_shortened(new.get(key))} now"
            for key in sorted({*old, *new})
            if old.get(key) != new.get(key)
        ]
        if changed:
            lines = "\n".join(changed)
            raise InputError(
                f"{self.folder}: an unfinished run into {self.output} was started with different "
                f"options or files:\n{lines}\nUse the same ones to continue it, or --fresh to "
                f"start over"
            )


@contextmanager
def run_directory(
    output: Path,
    workers: Workers = SINGLE_PROCESS,
    *,
    fresh: bool = False,
    overwrite: bool = False,
    file: bool = False,
) -> Iterator[RunDirectory]:
    """The run that makes ``output``; no other run may write there meanwhile.

    Results of tasks stay when the run fails, and are removed when it succeeds or none is finished.

    Args:
        output: folder to make.
        workers: the processes of the run.
        fresh: discard the results of an interrupted run.
        overwrite: replace an output that is not empty.
        file: the output is one file that the caller replaces, without :meth:`RunDirectory.result`.

    Raises:
        InputError: another run writes there, the output is not empty, or a folder and not a file.
    """
    run = RunDirectory(output, workers, overwrite)
    if not workers.is_main:
        run.finished = workers.broadcast(None)
        yield run
        return
    output = run.output
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{output.parent}: cannot write there ({error.strerror})") from error
    with locked(output.with_name(f".{output.name}.lock")):
        if fresh:
            shutil.rmtree(run.folder, ignore_errors=True)
        run.finished = run.was_finished()
        if file and output.is_dir():
            raise InputError(f"{output} is a folder; give a file")
        if not file and not run.finished:
            require_absent(output, overwrite=overwrite)
        _remove_drafts(output)
        workers.broadcast(run.finished)
        try:
            yield run
        except BaseException:
            if any(run.folder.rglob("*.safetensors")):
                log.warning(
                    "%s keeps what is finished: the same command continues from there, --fresh "
                    "starts over", run.folder,
                )  # fmt: skip
            else:
                shutil.rmtree(run.folder, ignore_errors=True)
            raise
        shutil.rmtree(run.folder, ignore_errors=True)


def _remove_drafts(output: Path) -> None:
    """Remove the temporary files of a run that was killed while it wrote or replaced the output."""
    name = glob.escape(output.name)
    for draft in output.parent.glob(f".{name}.*.partial"):
        if draft.is_dir():
            shutil.rmtree(draft)
        else:
            draft.unlink()
    for old in output.parent.glob(f".{name}.*.old"):
        if output.exists():
            shutil.rmtree(old)
        else:
            old.rename(output)


def _read(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def _flatten(data: Any, at: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots."""
    if not isinstance(data, Mapping):
        return {at: data}
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= _flatten(value, f"{at}.{key}" if at else str(key))
    return flat


def _shortened(value: Any) -> str:
    """A value in one line, with digests of 12 digits."""
    text = value if isinstance(value, str) else json.dumps(value)
    return " ".join(w[:12] if len(w) == 64 else w for w in text.split()) or "nothing"
