# SPDX-License-Identifier: Apache-2.0
"""Hashes have one home, and their values do not change."""

from __future__ import annotations

import ast
import hashlib
import subprocess
import sys
import zlib

import pytest
import torch

from dtq.io import checksum
from dtq.io.package_data import package_root


def imported(path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    return names | {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}


def test_one_module_imports_hashlib_and_zlib():
    files = {p for p in package_root().rglob("*.py") if imported(p) & {"hashlib", "zlib"}}
    assert files == {package_root() / "io" / "checksum.py"}


def test_it_needs_no_torch():
    """The wheel is built without torch, by modules that name libraries by a digest."""
    code = (
        "import sys, types; sys.modules['dtq'] = types.ModuleType('dtq');"
        f"sys.modules['dtq'].__path__ = [{str(package_root())!r}];"
        "import dtq.io.checksum; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (3, 5)])
def test_checksums_are_crc_32_of_the_bytes(dtype, shape):
    tensor = torch.ones(shape).to(dtype)
    raw = bytes(tensor.reshape(-1).view(torch.uint8).tolist())
    assert checksum.checksum(tensor) & 0xFFFFFFFF == zlib.crc32(raw)
    assert -(2**31) <= checksum.checksum(tensor) < 2**31
    assert checksum.checksum(raw) == checksum.checksum(tensor)


def test_a_view_is_hashed_by_its_values():
    tensor = torch.arange(12.0).reshape(3, 4)
    assert checksum.checksum(tensor.T) == checksum.checksum(tensor.T.contiguous())


def test_digests_are_sha_256_of_names_and_contents(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.py").write_text("1")
    (tmp_path / "y.txt").write_text("2")
    one = hashlib.sha256(b"1").hexdigest()
    assert checksum.path_digest(tmp_path / "a" / "x.py") == one
    line = hashlib.sha256(f"a/x.py {one}".encode()).hexdigest()
    assert checksum.folder_digest(tmp_path, "*.py") == line
    both = checksum.path_digest(tmp_path)
    assert both != line
    (tmp_path / "y.txt").rename(tmp_path / "z.txt")
    assert checksum.path_digest(tmp_path) != both
    assert checksum.digest([b"a", memoryview(b"b")]) == checksum.bytes_digest(b"ab")
