# SPDX-License-Identifier: Apache-2.0
"""A compiled library of kernels for one device: find it, else compile it once, else say why not.

The rungs, best first: the library beside the package (``make kernels``, or in the wheel), the one
in the user's cache, a compilation into that cache when an op first runs on the device, the torch
reference. ``DTQ_KERNELS=0`` leaves only the last. Nothing happens at import.
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
from dtq.kernels.compile.compiler import ABI

_log = logging.getLogger(__name__)


class Unavailable(Exception):
    """Why a library, or a way to get it, is not there."""


@dataclass
class State:
    """What came of the one attempt of this process.

    Attributes:
        tried: whether there was one.
        path: the library in use.
        reason: why there is none.
    """

    tried: bool = False
    path: Path | None = None
    reason: str = ""


@dataclass
class Library:
    """The implementations of some ops on one device.

    Attributes:
        device: of torch, and in the name of the file.
        title: of the kernels, for people.
        ops: what it implements.
        key: names everything that the file depends on.
        builds: what is named in the cache beside the key: the hardware it is compiled for.
        compile: compiles into a folder and returns the file there. Raises :class:`Unavailable`.
        compiler: the command that would. Raises :class:`Unavailable`.
        usable: raises :class:`Unavailable` when this machine or this torch cannot use the library.
        prepare: called with the loaded library, once.
        says: a word on a loaded library.
        takes: seconds to compile, for the line that asks for patience.
    """

    device: str
    title: str
    ops: tuple[str, ...]
    key: Callable[[], str]
    compile: Callable[[Path], Path]
    compiler: Callable[[], str]
    builds: Callable[[], str] = lambda: ""
    usable: Callable[[], None] = lambda: None
    prepare: Callable[[ctypes.CDLL], None] = lambda library: None
    says: Callable[[ctypes.CDLL], str] = lambda library: "compiled"
    takes: int = 30
    state: State = field(default_factory=State)
    opened: ctypes.CDLL | None = None
    _once: threading.RLock = field(default_factory=threading.RLock)

    def load(self) -> bool:
        """Make the compiled kernels the implementation of the ops; compile them if need be.

        Returns:
            Whether they are in use. The first answer holds for the life of the process.
        """
        if self.state.tried:
            return self.state.path is not None
        with self._once:
            if not self.state.tried:
                try:
                    self._check()
                    path = self._ready()
                    self.opened = self.open(path)
                    self.state.path = path
                except Unavailable as reason:
                    self.state.reason = str(reason)
                    _log.log(
                        logging.INFO if switched_off() else logging.WARNING,
                        "dtq: the torch reference runs on the %s: %s",
                        self.title,
                        reason,
                    )
                self.state.tried = True
        return self.state.path is not None

    def open(self, path: Path) -> ctypes.CDLL:
        """Load a file: its ops are torch's from now on.

        Raises:
            Unavailable: it does not load.
        """
        try:
            torch.ops.load_library(str(path))
            library = ctypes.CDLL(str(path))
        except OSError as error:
            raise Unavailable(" ".join(str(error.__cause__ or error).split())) from error
        self.prepare(library)
        return library

    def describe(self) -> str:
        """What runs on the device, without compiling anything: for ``explain`` and ``doctor``."""
        if self.state.path is not None and self.opened is not None:
            return f"{self.says(self.opened)} kernels, {self._where(self.state.path)}"
        if self.state.tried:
            return f"torch reference: {self.state.reason}"
        try:
            self._check()
            found = self.built()
            if found is not None:
                return f"compiled kernels, {self._where(found)}"
            return f"compiled kernels, built at first use by {self.compiler()}"
        except Unavailable as reason:
            return f"torch reference: {reason}"

    def levels(self) -> list[tuple[str, str]]:
        """Every way to run the ops, best first, and why it is not the one that is used."""
        ways: list[tuple[str, str, bool]] = []
        for name, path, how in (
            ("built ahead", self.beside(), "make kernels"),
            ("user cache", self.cached(), "filled at first use"),
        ):
            there = path.exists()
            ways.append((name, str(path) if there else f"nothing there: {how}", there))
        try:
            ways.append(("compiled at first use", f"by {self.compiler()}", True))
        except Unavailable as reason:
            ways.append(("compiled at first use", str(reason), False))
        ways.append(("torch reference", "", True))
        used = next(i for i, (_, _, there) in enumerate(ways) if there)
        refused = self.refused()
        if refused:
            ways = [(name, f"{what}; {refused}", there) for name, what, there in ways[:3]]
            ways.append(("torch reference", refused, True))
            used = 3
        return [
            (name, ": ".join(filter(None, ("used" if i == used else "", what))) or "not needed")
            for i, (name, what, _) in enumerate(ways)
        ]

    def refused(self) -> str:
        """Why no compiled kernels can be used here, whatever is there; empty when they can."""
        if self.state.tried:
            return self.state.reason
        try:
            self._check()
        except Unavailable as reason:
            return str(reason)
        return ""

    def _check(self) -> None:
        if switched_off():
            raise Unavailable("DTQ_KERNELS=0")
        if sys.platform != "linux":
            raise Unavailable(f"no kernels for {sys.platform} yet")
        self.usable()

    def build(self, target: Path) -> Path:
        """Compile the library into ``target``.

        Raises:
            OSError: the compiler failed; its first error is in the message.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as work:
                # renamed when it is whole: nobody loads half a library
                os.replace(self.compile(Path(work)), target)
        except Unavailable as error:
            raise OSError(str(error)) from error
        return target

    def built(self) -> Path | None:
        """A library that is there already, beside the package or in the cache."""
        return next((path for path in (self.beside(), self.cached()) if path.exists()), None)

    def beside(self) -> Path:
        """Where ``make kernels`` and the wheel put it."""
        return package_root() / "_lib" / f"dtq_{self.device}-{self.key()}.so"

    def cached(self) -> Path:
        """Where it is put when it is compiled at first use."""
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        builds = self.builds()
        return base / "dtq" / f"dtq_{self.device}-{self.key()}{builds and '-'}{builds}.so"

    def _ready(self) -> Path:
        """The library, compiled now if there is none yet."""
        found = self.built()
        if found is not None:
            return found
        self.compiler()
        target = self.cached()
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with _locked(target.with_suffix(".lock")):
                if not target.exists():  # another process may have been first
                    for_what = self.builds() and f" for {self.builds()}"
                    print(
                        f"dtq: compiling {self.title} kernels{for_what}, once (~{self.takes} s)",
                        file=sys.stderr,
                        flush=True,
                    )
                    self.build(target)
        except OSError as error:
            raise Unavailable(" ".join(str(error).split())) from error
        return target

    def _where(self, path: Path) -> str:
        return "built ahead" if path == self.beside() else f"cached in {path.parent}"


def switched_off() -> bool:
    """Whether the user wants no compiled kernels."""
    return os.environ.get("DTQ_KERNELS") == "0"


def needs_abi() -> None:
    """Ask for a torch whose stable ABI the libraries use.

    Raises:
        Unavailable: this one is older.
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
