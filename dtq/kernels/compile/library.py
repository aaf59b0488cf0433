# SPDX-License-Identifier: Apache-2.0
"""A compiled library of kernels for one device: find it, else compile it once, else give a reason.

The levels of the fallback chain, best first: the library next to the package (``make kernels``, or
in the wheel), the one in the user's cache, a compilation into that cache when an op first runs on
the device, the torch reference. ``DTQ_KERNELS=0`` leaves only the last. Importing compiles nothing.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dtq.io.package_data import package_root
from dtq.kernels.compile.compiler import ABI, Unavailable

_log = logging.getLogger(__name__)


@dataclass
class Library:
    """The compiled implementations of some ops on one device.

    Attributes:
        device: torch's name of the device; also part of the file name.
        title: name of the device in messages.
        ops: names of the ops that it implements.
        key: returns a name of everything that the file depends on.
        compiler: returns the command that would compile. Raises :class:`Unavailable`.
        compile: compiles into a folder and returns the file there. Raises :class:`Unavailable`.
        builds: returns the hardware that a file in the cache is compiled for; part of its name.
        check: raises :class:`Unavailable` if this machine or this torch cannot use the library.
        check_file: raises :class:`Unavailable` if a compiled file cannot be used here.
        prepare: called once with the loaded library.
        detail: describes a loaded library in a word.
        compile_seconds: roughly how long compiling takes, for the message about it.
        tried: whether this process has tried to load it; it does so once.
        path: the file in use.
        reason: why there is none in use, after the attempt.
        opened: the loaded library.
    """

    device: str
    title: str
    ops: tuple[str, ...]
    key: Callable[[], str]
    compiler: Callable[[], str]
    compile: Callable[[Path], Path]
    builds: Callable[[], str] = lambda: ""
    check: Callable[[], None] = lambda: None
    check_file: Callable[[Path], None] = lambda path: None
    prepare: Callable[[ctypes.CDLL], None] = lambda library: None
    detail: Callable[[ctypes.CDLL], str] = lambda library: "compiled"
    compile_seconds: int = 30
    tried: bool = False
    path: Path | None = None
    reason: str = ""
    opened: ctypes.CDLL | None = None
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def load(self) -> bool:
        """Make the compiled kernels the implementation of the ops; compile them if necessary.

        Returns:
            Whether they are in use. The first result holds for the life of the process.
        """
        if not self.tried:
            with self._lock:
                if not self.tried:  # another thread may have been first
                    self._try_to_load()
        return self.path is not None

    def _try_to_load(self) -> None:
        try:
            self._check()
            path = self._found()
            self.opened = self.open(path)
            self.path = path
        except Unavailable as error:
            self.reason = " ".join(str(error).split())
            level = logging.INFO if _switched_off() else logging.WARNING
            message = "dtq: the torch reference runs on the %s: %s"
            _log.log(level, message, self.title, self.reason)
        self.tried = True

    def _found(self) -> Path:
        """A file that exists, else a compiled one. The reason names files that cannot be used."""
        try:
            return self.existing() or self._compiled()
        except Unavailable as error:
            raise Unavailable("; ".join([*self._refused(), str(error)])) from error

    def open(self, path: Path) -> ctypes.CDLL:
        """Load a file; torch then uses its ops.

        Raises:
            Unavailable: it does not load, or cannot be used here.
        """
        self.check_file(path)
        try:
            torch.ops.load_library(str(path))
            library = ctypes.CDLL(str(path))
        except OSError as error:
            raise Unavailable(str(error.__cause__ or error)) from error
        self.prepare(library)
        return library

    def describe(self) -> str:
        """What runs on the device, found out without compiling anything."""
        if self.path is not None and self.opened is not None:
            return f"{self.detail(self.opened)} kernels, {self._place(self.path)}"
        reason = self.unsupported_reason()
        try:
            if not reason:
                path = self.existing()
                place = self._place(path) if path else f"built at first use by {self.compiler()}"
                return f"compiled kernels, {place}"
        except Unavailable as error:
            reason = "; ".join([*self._refused(), str(error)])
        return f"torch reference: {reason}"

    def levels(self) -> list[tuple[str, str]]:
        """Every level of the fallback chain, best first, and why it is not the one that is used."""
        levels: list[tuple[str, str, bool]] = []  # name, state, whether it could be used
        for name, path, hint in (
            ("built ahead", self.packaged(), "make kernels"),
            ("user cache", self.cached(), "filled at first use"),
        ):
            exists, refusal = path.exists(), self._refusal(path)
            state = refusal or (str(path) if exists else f"nothing there: {hint}")
            levels.append((name, state, exists and not refusal))
        try:
            levels.append(("compiled at first use", f"by {self.compiler()}", True))
        except Unavailable as error:
            levels.append(("compiled at first use", str(error), False))
        reason = self.unsupported_reason()
        if reason:
            levels = [(name, f"{state}; {reason}", False) for name, state, _ in levels]
        levels.append(("torch reference", reason, True))
        used = next(name for name, _, usable in levels if usable)
        return [
            (name, ": ".join(filter(None, ["used" if name == used else "", state])) or "not needed")
            for name, state, _ in levels
        ]

    def unsupported_reason(self) -> str:
        """Why no compiled kernels can be used here, even if they exist; empty if they can."""
        if self.tried:
            return self.reason
        try:
            self._check()
        except Unavailable as error:
            return str(error)
        return ""

    def _check(self) -> None:
        if _switched_off():
            raise Unavailable("DTQ_KERNELS=0")
        if sys.platform != "linux":
            raise Unavailable(f"no kernels for {sys.platform} yet")
        self.check()

    def build(self, target: Path) -> Path:
        """Compile the library into ``target``.

        Raises:
            OSError: the compiler failed, or the file cannot be written.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as work:
            # renamed when it is complete, so that no process loads a part of it
            os.replace(self.compile(Path(work)), target)
        return target

    def existing(self) -> Path | None:
        """A library that is compiled already and can be used: next to the package, else cached."""
        paths = (path for path in (self.packaged(), self.cached()) if path.exists())
        return next((path for path in paths if not self._refusal(path)), None)

    def _refusal(self, path: Path) -> str:
        """Why a file cannot be used here; empty if it can, or if there is none."""
        try:
            if path.exists():
                self.check_file(path)
        except Unavailable as error:
            return str(error)
        return ""

    def _refused(self) -> list[str]:
        return [reason for p in (self.packaged(), self.cached()) if (reason := self._refusal(p))]

    def packaged(self) -> Path:
        """Where ``make kernels`` and the wheel put the library: next to the package's modules."""
        return package_root() / "_lib" / f"dtq_{self.device}-{self.key()}.so"

    def cached(self) -> Path:
        """Where a library is put that is compiled at first use."""
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        builds = self.builds()
        return base / "dtq" / f"dtq_{self.device}-{self.key()}{builds and '-'}{builds}.so"

    def _compiled(self) -> Path:
        """The library in the cache, compiled now, or by another process in the meantime."""
        self.compiler()
        target, builds = self.cached(), self.builds()
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with _locked(target.with_suffix(".lock")):
                if self.existing() is None:  # another process may have been first
                    print(
                        f"dtq: compiling {self.title} kernels{builds and f' for {builds}'}, once"
                        f" (~{self.compile_seconds} s)",
                        file=sys.stderr,
                        flush=True,
                    )
                    self.build(target)
                return self.existing() or target
        except OSError as error:
            raise Unavailable(str(error)) from error

    def _place(self, path: Path) -> str:
        return "built ahead" if path == self.packaged() else f"cached in {path.parent}"


def _switched_off() -> bool:
    return os.environ.get("DTQ_KERNELS") == "0"


def check_abi() -> None:
    """Require a torch with the stable ABI that the libraries use.

    Raises:
        Unavailable: this torch is older.
    """
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < ABI:
        newer = ".".join(map(str, ABI))
        raise Unavailable(f"torch {torch.__version__} has no stable ABI; {newer} or newer has")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl  # not on Windows, where nothing is compiled

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
