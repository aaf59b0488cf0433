# SPDX-License-Identifier: Apache-2.0
"""Single instructions of the emulator and of a GPU on the same random bits.

``EMULATOR`` holds a digest of the emulator's results, so that a GPU can be compared with it on a
machine without a C++ compiler. ``python tests/golden.py`` computes it again.
"""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
from pathlib import Path

import torch

SOURCE = Path(__file__).parent.parent / "cuda_ext" / "tests" / "golden.cu"
CASES = {
    "mma": (0, 320, 128), "ldmatrix": (1, 128, 256), "wgmma": (2, 3072, 4096), "fp4": (3, 384, 256),
}  # fmt: skip
"""Number, words in, words out."""
ONLY = {"wgmma": 9, "fp4": 12}
"""The major compute capability of instructions that a single generation has."""
SEEDS = range(8)

EMULATOR = {
    "mma": "78f13aedfcd8021c96df56fff97194a9",
    "ldmatrix": "c12fa3cc980276dbe492434162dbd4e8",
    "wgmma": "3dd1aa78b68299b17f0c5983bb53246d",
    "fp4": "b9549150ece36a36a2ab512d8acc4b6e",
}


def load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.golden.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    return library


def emulated(work: Path) -> ctypes.CDLL:
    """The library of the instructions for the emulator."""
    command = [
        "g++",
        "-std=c++20",
        "-O1",
        "-fwrapv",
        "-DDTQ_SIM",
        "-w",
        "-fPIC",
        "-shared",
        "-x",
        "c++",
    ]
    subprocess.run([*command, str(SOURCE), "-o", str(work / "golden.so")], check=True)
    return load(work / "golden.so")


def on_gpu(work: Path, nvcc: str, arch: str) -> ctypes.CDLL:
    """The library of the instructions for a GPU."""
    command = [nvcc, "-std=c++20", "-O1", "-shared", "-Xcompiler=-fPIC", f"-arch=sm_{arch}"]
    subprocess.run([*command, str(SOURCE), "-o", str(work / "golden.so")], check=True)
    return load(work / "golden.so")


def digest(library: ctypes.CDLL, name: str, device: torch.device | str = "cpu") -> str:
    """Digest of the results for every seed."""
    number, words, count = CASES[name]
    total = hashlib.sha256()
    for seed in SEEDS:
        g = torch.Generator().manual_seed(seed)
        bits = torch.randint(-(2**31), 2**31, (words,), generator=g).to(torch.int32).to(device)
        out = torch.zeros(count, dtype=torch.int32, device=device)
        stream = 0
        if out.is_cuda:
            stream = torch.cuda.current_stream().cuda_stream
        status = library.golden(number, bits.data_ptr(), out.data_ptr(), stream)
        assert status == 0, f"{name}: launch failed with {status}"
        if out.is_cuda:
            torch.cuda.synchronize()
        total.update(out.cpu().numpy().tobytes())
    return total.hexdigest()[:32]


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        library = emulated(Path(folder))
        print({name: digest(library, name) for name in CASES})
