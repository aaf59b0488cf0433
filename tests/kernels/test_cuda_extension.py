# SPDX-License-Identifier: Apache-2.0
"""The CUDA library by torch.utils.cpp_extension and by nvcc alone: the same flags, the same library."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from torch.utils import cpp_extension as torch_extension

from dtq.kernels import CUDA
from dtq.kernels.compile import compiler, cuda
from dtq.kernels.compile import cpp_extension as extension
from dtq.kernels.compile.compiler import Unavailable

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def toolkit(tmp_path, monkeypatch) -> Path:
    """A CUDA toolkit that torch knows, with an nvcc that writes a word into its last argument.

    It says that it is of CUDA 12, which the drivers of all GPUs that run tests support.
    """
    (tmp_path / "cuda/bin").mkdir(parents=True)
    script = tmp_path / "cuda/bin/nvcc"
    version = '[ "$1" = --version ] && echo "release 12.0," && exit'
    script.write_text(f'#!/bin/sh\n{version}\nfor f; do :; done\necho made > "$f"\n')
    script.chmod(0o755)
    monkeypatch.setattr(torch_extension, "CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.delenv("PYTORCH_NVCC", raising=False)
    return tmp_path / "cuda"


@pytest.fixture
def no_ninja(monkeypatch):
    monkeypatch.setattr(extension, "find_ninja", lambda: None)


def test_the_compiler_is_reported(toolkit, monkeypatch):
    monkeypatch.setattr(extension, "find_ninja", lambda: "/somewhere/ninja")
    assert CUDA.compiler() == f"torch.utils.cpp_extension with ninja and {toolkit}/bin/nvcc"
    monkeypatch.setattr(extension, "find_ninja", lambda: None)
    direct = f"{toolkit}/bin/nvcc, not torch.utils.cpp_extension: "
    assert CUDA.compiler() == direct + "it needs ninja: pip install ninja"
    assert ("compiled at first use", direct) in [
        (name, state.split("by ", 1)[-1].split("it needs", 1)[0]) for name, state in CUDA.levels()
    ]


def test_a_torch_without_cuda_or_a_home_without_nvcc_is_a_reason(toolkit, monkeypatch):
    shutil.rmtree(toolkit / "bin")
    assert extension.unsupported_reason() == f"no nvcc in {toolkit}"
    monkeypatch.setattr(torch_extension, "CUDA_HOME", None)
    assert extension.unsupported_reason() == "it knows no CUDA toolkit"


def test_ninja_of_this_python_is_called_although_not_on_the_path(tmp_path, monkeypatch):
    (tmp_path / "scripts").mkdir()
    ninja = tmp_path / "scripts/ninja"
    ninja.write_text("#!/bin/sh\necho 1.0\n")
    ninja.chmod(0o755)
    monkeypatch.setattr(extension.sysconfig, "get_path", lambda name: str(tmp_path / name))
    monkeypatch.setenv("PATH", "/nowhere")
    assert extension.find_ninja() == str(ninja)
    with extension._on_path(extension.find_ninja()):
        assert shutil.which("ninja") == str(ninja)
    assert os.environ["PATH"] == "/nowhere"


@pytest.mark.parametrize(
    ("output", "first"),
    [
        ("[1/2] nvcc -c a.cu\nFAILED: a.o\na.cu(3): error: no\nb.cu(1): error: yes", "a.cu(3): error: no"),
        ("nvcc fatal   : Unsupported gpu architecture", "nvcc fatal   : Unsupported gpu architecture"),
        ("[2/2] c++ a.o\nFAILED: build\n/usr/bin/ld: cannot find -lc10\ncollect2: error: ld returned 1",
         "/usr/bin/ld: cannot find -lc10"),
        ("killed", "killed"),
        ("", "no output"),
    ],
)  # fmt: skip
def test_the_first_error_is_reported(output, first):
    assert compiler.first_error("it", output) == f"it failed: {first}"


def test_without_ninja_nvcc_compiles(toolkit, no_ninja, tmp_path):
    made = cuda.compile_library(tmp_path, ("80",), ptx=False)
    assert made.read_text() == "made\n"


def test_a_failure_of_the_extension_is_reported_and_nvcc_compiles(
    toolkit, tmp_path, monkeypatch, caplog
):
    def fails(*args, **kwargs):
        raise RuntimeError("Error building extension\n[1/2] c++\nx.cpp:1: error: no\nninja: stop")

    monkeypatch.setattr(extension, "find_ninja", lambda: "/somewhere/ninja")
    monkeypatch.setattr(torch_extension, "load", fails)
    assert cuda.compile_library(tmp_path, ("80",), ptx=False).read_text() == "made\n"
    assert caplog.messages == [
        "dtq: torch.utils.cpp_extension failed: x.cpp:1: error: no; nvcc is called directly"
    ]
    (toolkit / "bin/nvcc").write_text("#!/bin/sh\necho 'x.cu(1): error: bad' >&2\nexit 1\n")
    with pytest.raises(Unavailable, match=r"nvcc failed: x\.cu\(1\): error: bad"):
        cuda.compile_library(tmp_path, ("80",), ptx=False)


SOURCES = {
    "kernel.cu": """
        __global__ void fill(float* to, float a, float b, float c) { *to = a * b + c; }
        extern "C" __attribute__((visibility("default"))) int tiny_launch(float* to) {
          fill<<<1, 1>>>(to, 1, 2, 3);
          return int(cudaGetLastError());
        }
        int hidden() { return 3; }
    """,
    "tiny.cpp": """
        #include <cuda_runtime_api.h>
        #include <torch/csrc/stable/tensor.h>
        static_assert(TORCH_TARGET_VERSION >> 48 == 0x020a);
        extern "C" __attribute__((visibility("default"))) const char* tiny_archs() { return DTQ_ARCHS; }
        extern "C" __attribute__((visibility("default"))) void* tiny_data(AtenTensorHandle t) {
          void* data = nullptr;
          aoti_torch_get_data_ptr(t, &data);
          return data;
        }
    """,
}
BOTH = """
    import ctypes, json, sys
    from pathlib import Path
    import torch
    from torch.utils import cpp_extension
    from dtq.kernels.compile import cpp_extension as extension
    from dtq.kernels.compile import nvcc
    folder, work, home, compiler = sys.argv[1:]
    cpp_extension.CUDA_HOME = home
    nvcc.SOURCES = ("kernel.cu", "tiny.cpp")
    assert extension.unsupported_reason() is None, extension.unsupported_reason()
    made = []
    for name in ("extension", "again", "nvcc"):
        (Path(work) / name).mkdir()
    for name in ("extension", "again"):  # twice in a process
        made.append(extension.compile_library(Path(folder), Path(work) / name, ("80",), True))
    where = Path(torch.__file__).parent
    made.append(nvcc.build(compiler, Path(folder), ("80",)).run(where, Path(work) / "nvcc"))
    for path in made:
        library = ctypes.CDLL(str(path))
        library.tiny_archs.restype = ctypes.c_char_p
        assert library.tiny_archs() == b"sm_80 and PTX"
    print(json.dumps([str(p) for p in made]))
"""


def listed(*command: str) -> list[str]:
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


def imports_and_exports(library: str) -> tuple[list[str], list[str], list[str]]:
    """Needed libraries and search paths; undefined and exported names; sections of machine code."""
    dynamic = [line for line in listed("readelf", "-dW", library)
               if re.search("NEEDED|PATH", line)]  # fmt: skip
    names = [line.split()[-2:] for line in listed("nm", "-D", library)]
    return (
        sorted(line.split("[")[-1] for line in dynamic),
        sorted(" ".join(name) for name in names),
        sorted(set(re.findall(r"\.nv\w+", "".join(listed("readelf", "-SW", library))))),
    )


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
@pytest.mark.skipif(not extension.find_ninja(), reason="needs ninja")
def test_both_ways_make_the_same_library(tmp_path):
    folder = tmp_path / "the sources"  # a space in the path, and in a flag
    folder.mkdir()
    for name, text in SOURCES.items():
        (folder / name).write_text(textwrap.dedent(text))
    dryrun = subprocess.run(
        ["nvcc", "--dryrun", "-c", str(folder / "kernel.cu")], capture_output=True, text=True
    ).stderr
    home = re.search(r"TOP=(\S+)", dryrun)[1]
    (tmp_path / "stubs").mkdir()
    for name in ("c10_cuda", "torch_cuda"):  # of a torch with CUDA; linked only where needed
        stub = tmp_path / f"stubs/lib{name}.so"
        subprocess.run(["g++", "-shared", "-x", "c", "/dev/null", "-o", str(stub)], check=True)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(BOTH), str(folder), str(tmp_path), home,
         shutil.which("nvcc")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "LIBRARY_PATH": str(tmp_path / "stubs")},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    extended, again, direct = json.loads(done.stdout.splitlines()[-1])
    assert extended != again
    expected = imports_and_exports(direct)
    assert {"libtorch.so]", "libtorch_cpu.so]"} <= set(expected[0])
    assert not [name for name in expected[0] if "cuda" in name or "c10" in name or "/" in name]
    assert {"T tiny_archs", "T tiny_data", "T tiny_launch"} <= set(expected[1])
    assert not [name for name in expected[1] if "hidden" in name]
    assert imports_and_exports(extended) == expected
    assert imports_and_exports(again) == expected
