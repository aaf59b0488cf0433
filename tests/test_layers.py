# SPDX-License-Identifier: Apache-2.0
"""Imports point down the page: a file may import from its own package and from rows below."""

from __future__ import annotations

import ast
from pathlib import Path

ROWS = [
    {"errors", "data", "paging", "machine", "version"},
    {"durable"},
    {"lock"},
    {"team"},
    {"formats", "work", "documents"},
    {"calibrate.stats", "calibrate.calls", "policy"},
    {"transforms", "solvers"},
    {"kernels", "plan", "graph"},
    {"nn.linear"},
    {"families"},
    {"nn", "fusion", "harden", "config", "demo", "folder"},
    {"refine", "reader", "card"},
    {"recipe"},
    {"source", "call"},
    {"calibrate", "checkpoint"},
    {"solved", "look"},
    {"diffusers", "lora", "solve", "allocate"},
    {"steps", "budget", "parallel", "job", "sentinel", "probe"},
    {"quantize", "forecast", "terdit"},
    {"estimate"},
    {"evaluate"},
    {"clock"},
    {"bench_models"},
    {"bench"},
    {"bench_gpu"},
    {"printing"},
    {""},  # the package itself: what `import dtq` gives
    {"cli"},
    {"__main__"},
]
# calibrate.stats is read by transforms, calls by refine; formats.integer by the ops; demo/train and train_video are scripts
SCRIPTS = {"demo.train", "demo.train_video"}


def row(module: str) -> int:
    candidates = [i for i, names in enumerate(ROWS) for n in names if module == n]
    if candidates:
        return candidates[0]
    if "." in module:
        return row(module.rsplit(".", 1)[0])
    raise AssertionError(f"{module} is in no row of the table")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{a.name}" for a in node.names}
            found |= {node.module} - {"dtq"}  # `from dtq import x` imports x
    return {f for f in found if f == "dtq" or f.startswith("dtq.")}


def test_imports_point_down():
    root = Path(__file__).parent.parent / "dtq"
    files = {
        str(p.relative_to(root).with_suffix(""))
        .replace("/", ".")
        .removesuffix("__init__")
        .rstrip("."): p
        for p in root.rglob("*.py")
    }
    wrong = []
    for name, path in files.items():
        if name in SCRIPTS:
            continue
        for target in imports(path):
            module = target.removeprefix("dtq").lstrip(".")
            while module and module not in files:
                module = module.rpartition(".")[0]
            if module.split(".")[0] == name.split(".")[0]:
                continue
            if row(module) >= row(name):
                wrong.append(f"dtq.{name} imports dtq.{module}")
    assert not wrong, "\n".join(sorted(set(wrong)))


def test_import_leaves_torch_alone():
    import torch

    before = torch.get_default_dtype(), torch.backends.cuda.matmul.allow_tf32
    import dtq  # noqa: F401

    assert (torch.get_default_dtype(), torch.backends.cuda.matmul.allow_tf32) == before
