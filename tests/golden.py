# SPDX-License-Identifier: Apache-2.0
"""Single instructions of the emulator, of a GPU and of translated PTX on the same random bits.

``EMULATOR`` holds a digest of the emulator's results, so that a GPU can be compared with it on a
machine without a C++ compiler. ``python tests/golden.py`` computes it again.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

FOLDER = Path(__file__).parent.parent / "cuda_ext"
SOURCE = FOLDER / "tests" / "golden.cu"
SEEDS = range(8)

EMULATOR = {
    "memory": "17946445d73859034541601db1bf6d2b",
    "conditions": "3e43b8de7242997efd200c36602097c3",
    "cp_async": "05d5d8fbaf41093526c1e76344062d5f",
    "named_barriers": "996c02dd44d7ff34038100b785f20acb",
    "shuffle": "8b3555a4b73b11c2776fe5184325921f",
    "mma_s8": "78f13aedfcd8021c96df56fff97194a9",
    "mma_halves": "47a4ce91a7bbe49f602c966d5d06c242",
    "matrices": "52f59da5515c1bed31038f750589ce39",
    "mma_fp4": "2b7e27687870b7801d34d0113443efbe",
    "integers": "a19457ffd8e40ac8860d631a139db50b",
    "conversions": "24ad2d6fa06a391528059747aebaeb12",
    "floats": "71e7b993ec4bc8815db402c670530d50",
    "approximations": "aa2db1b119df61c781caea2ea2680eb7",
    "stmatrix": "2f4a9956b3ae55b2a068781287632d01",
    "wgmma_64": "cfaaa0a124d6f4bf53ef99f53d67d6e6",
    "wgmma_128": "6d56e219f1bfcbe014d9998aae00ad06",
    "wgmma_256": "2805cb7e0136477d3518229312fac0cd",
    "wgmma_groups": "2c65bdcee4375c871e6810dde0368179",
    "mbarrier": "41678f4d2d23776e49fab3f5ac32276d",
    "boxes_128": "9ebaaaf253a72d7d4dd0239eb6ce9fd2",
    "boxes_64": "c72b055993cd206bf1403ba5203b1bfd",
    "cluster": "45d9e4123125fdf10915799a9ff37997",
    "box_stores": "3bd0ebb14fcbe78400a0b3c2f0fcedf0",
    "dependent": "58ba4f54dd76bffbf559e00193d14c41",
    "registers": "18437c632a1d389eb3ac8e7f8bb22ecd",
}


@dataclass(frozen=True)
class Kernel:
    """A kernel of ``golden.cu``.

    Attributes:
        number: in the table there.
        major: the only major compute capability that has its instructions; 0: all have.
        words_in: 4-byte words that it reads.
        words_out: that it writes.
    """

    number: int
    major: int
    words_in: int
    words_out: int

    def operands(self, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Random words for it to read, and zeros for it to overwrite."""
        g = torch.Generator().manual_seed(seed)
        bits = torch.randint(-(2**31), 2**31, (self.words_in,), generator=g).to(torch.int32)
        return bits, torch.zeros(self.words_out, dtype=torch.int32)


class Library:
    """The compiled ``golden.cu``."""

    def __init__(self, path: Path) -> None:
        self.opened = library = ctypes.CDLL(str(path))
        library.golden.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
        library.golden_name.restype = ctypes.c_char_p
        self.kernels = {
            library.golden_name(i).decode(): Kernel(
                i, *(library.golden_size(i, n) for n in range(3))
            )
            for i in range(library.golden_count())
        }

    def run(self, name: str, seed: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """What a kernel writes, on random words."""
        kernel = self.kernels[name]
        bits, out = (words.to(device) for words in kernel.operands(seed))
        stream = torch.cuda.current_stream().cuda_stream if out.is_cuda else 0
        if hasattr(self.opened, "golden_seed"):  # of the emulator's random order
            self.opened.golden_seed(ctypes.c_uint64(seed))
        status = self.opened.golden(kernel.number, bits.data_ptr(), out.data_ptr(), stream)
        assert status == 0, f"{name}: {self._error(status)}"
        return out.cpu()

    def digest(self, name: str, device: torch.device | str = "cpu") -> str:
        """Digest of the results for every seed."""
        total = hashlib.sha256()
        for seed in SEEDS:
            total.update(self.run(name, seed, device).numpy().tobytes())
        return total.hexdigest()[:32]

    def differences(self, other: Library, name: str, device: torch.device | str) -> list[str]:
        """Where results on the device differ from those of another library on the CPU."""
        found = []
        for seed in SEEDS:
            got, want = self.run(name, seed, device), other.run(name, seed)
            places = (got != want).nonzero().flatten().tolist()
            if places:
                i = places[0]
                words = f"{int(got[i]) & 0xFFFFFFFF:08x}, not {int(want[i]) & 0xFFFFFFFF:08x}"
                found.append(f"seed {seed}: {len(places)} of {len(got)} words, first {i}: {words}")
        return found

    def statements(self) -> dict[str, bool]:
        """The asm statements of translated PTX, and whether they were executed."""
        self.opened.golden_statement.restype = ctypes.c_char_p
        found: dict[str, bool] = {}
        number = 0
        while (text := self.opened.golden_statement(number)) is not None:
            executed = bool(self.opened.golden_executed(number))
            found[text.decode()] = found.get(text.decode(), False) or executed
            number += 1
        return found

    def _error(self, status: int) -> str:
        emulator = -3
        if status != emulator:
            return f"launch failed with {status}"
        self.opened.golden_error.restype = ctypes.c_char_p
        return str(self.opened.golden_error().decode())


EMULATED = (
    "-std=c++20", "-O1", "-fwrapv", "-ffp-contract=off", "-w", "-Wno-psabi", "-DDTQ_SIM", "-fPIC", "-shared",
    "-fvisibility=hidden", "-fno-gnu-unique",  # a process may load several
)  # fmt: skip
"""Flags of g++ for a library that runs on the emulator."""


def emulated(work: Path, *flags: str) -> Library:
    """The kernels for the emulator."""
    target = str(work / "golden.so")
    subprocess.run(["g++", *EMULATED, *flags, "-x", "c++", str(SOURCE), "-o", target], check=True)
    return Library(work / "golden.so")


def translated(work: Path, nvcc: str, arch: str, source: Path = SOURCE) -> Library:
    """The PTX of the kernels, as nvcc makes it for a GPU, for the emulator."""
    ptx, header = work / "golden.ptx", work / "golden.h"
    command = [nvcc, "-std=c++20", "-O1", "-ptx", f"-arch=sm_{arch}"]
    subprocess.run([*command, str(source), "-o", str(ptx)], check=True)
    script = [sys.executable, str(FOLDER / "sim" / "translate.py"), str(ptx)]
    header.write_bytes(subprocess.run(script, check=True, stdout=subprocess.PIPE).stdout)
    return emulated(work, f'-DDTQ_TRANSLATED="{header}"')


def on_gpu(work: Path, nvcc: str, arch: str) -> Library:
    """The kernels for a GPU."""
    command = [nvcc, "-std=c++20", "-O1", "-shared", "-Xcompiler=-fPIC", f"-arch=sm_{arch}"]
    subprocess.run([*command, str(SOURCE), "-o", str(work / "golden.so")], check=True)
    return Library(work / "golden.so")


# ---------------------------------------------------------------------------------- the source


def asm_statements() -> list[str]:
    """The text of every asm statement of ``arch.cuh``, with its operands as ``%0``."""
    found = []
    for name in ("arch.cuh", "wgmma.inc"):
        source = re.sub(r"//[^\n]*", "", (FOLDER / name).read_text())
        for text in re.findall(r'\basm(?: volatile)?\(\s*((?:"(?:[^"\\]|\\.)*"\s*)+)', source):
            parts = re.findall(r'"((?:[^"\\]|\\.)*)"', text)
            found.append(" ".join("".join(parts).replace("\\n", " ").split()))
    return found


def is_statement(text: str, template: str) -> bool:
    """Whether a statement of PTX is one of the source with its operands filled in."""
    pieces = re.split(r"(%%|%\d+)", template)
    pattern = "".join(
        "%" if piece == "%%" else r"[^\s,{}\[\];]+" if piece.startswith("%") else re.escape(piece)
        for piece in pieces
    )
    return re.fullmatch(pattern, text) is not None


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        library = emulated(Path(folder))
        for name in library.kernels:
            print(f'    "{name}": "{library.digest(name)}",')
