# SPDX-License-Identifier: Apache-2.0
"""Folders import downwards only: a folder may import from those below it in ``FOLDERS``."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent / "dtq"

FOLDERS = [
    "__main__",
    "cli",
    "bench",
    "__init__",
    "api",
    "estimate",
    "stages",
    "engines",
    "parallel",
    "integrations",
    "recipe",
    "finetune",
    "evaluate",
    "checkpoint",
    "allocate",
    "nn",
    "transforms",
    "calibrate",
    "kernels",
    "pipelines",
    "runs",
    "plan",
    "solvers",
    "io",
    "formats",
    "demo",
    "linalg",
    "models",
    "errors",
    "version",
]
"""From top to bottom: what a person calls, how it is done, what it is done with."""


def folder_of(module: str) -> str:
    """First component below ``dtq``, ``__init__`` for the package itself."""
    parts = module.split(".")
    here = parts[1] if len(parts) > 1 else "__init__"
    return here if (ROOT / here).is_dir() or (ROOT / f"{here}.py").is_file() else "__init__"


def imports(path: Path) -> set[str]:
    """Dotted names of dtq that a file imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name == "dtq" or name.startswith("dtq.")}


def files() -> dict[Path, str]:
    return {
        path: folder_of(".".join(("dtq", *path.relative_to(ROOT).with_suffix("").parts)))
        for path in ROOT.rglob("*.py")
    }


def test_every_folder_is_in_the_list():
    assert set(files().values()) == set(FOLDERS)


def test_folders_import_downwards():
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path, folder in files().items()
        for name in imports(path)
        if folder_of(name) != folder and FOLDERS.index(folder_of(name)) <= FOLDERS.index(folder)
    ]
    assert not wrong, "\n".join(sorted(wrong))


def test_at_most_six_modules_lie_loose():
    loose = sorted(path.name for path in ROOT.glob("*.py"))
    assert len(loose) <= 6, loose


def test_import_leaves_torch_alone():
    import torch

    before = torch.get_default_dtype(), torch.backends.cuda.matmul.allow_tf32
    import dtq  # noqa: F401

    assert (torch.get_default_dtype(), torch.backends.cuda.matmul.allow_tf32) == before
