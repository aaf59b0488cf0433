# SPDX-License-Identifier: Apache-2.0
"""``dtq doctor``: what this machine has."""

from __future__ import annotations

import importlib.util
import platform
from importlib.metadata import PackageNotFoundError, version

import click
import torch

import dtq
from dtq import demo
from dtq.cli.output import size, table
from dtq.kernels import KERNELS, LIBRARIES, on


@click.command()
def doctor() -> None:
    """Say what this machine has, what runs on it, and what is missing."""
    rows = [
        ("python", platform.python_version()),
        ("dtq", dtq.__version__),
        ("torch", torch.__version__),
    ]
    for package in (
        "diffusers",
        "safetensors",
        "accelerate",
        "peft",
        "datasets",
        "torchmetrics",
        "matplotlib",
        "torchao",
        "optimum.quanto",
    ):
        rows.append((package, _version(package) if _found(package) else "not installed"))
    if torch.cuda.is_available():
        rows.append(
            (
                "gpu",
                f"{torch.cuda.get_device_name()}, sm_{''.join(map(str, torch.cuda.get_device_capability()))}",
            )
        )
    else:
        rows.append(("gpu", "none that torch can use; everything runs on the CPU"))
    rows.append(
        ("cpu", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    )
    rows.append(("kernels", ", ".join(k.name for k in KERNELS)))
    for kernel in KERNELS:
        rows.append((f"  {kernel.name}", "; ".join(on(kernel, x) for x in LIBRARIES.values())))
    for library in LIBRARIES.values():
        rows.append((f"{library.title} kernels", library.describe()))
        rows += [(f"  {name}", what) for name, what in library.levels()]
    for name in ("demo", "demo-video"):
        files = (f for f in demo.folder(name).rglob("*") if f.is_file())
        rows.append((f"bundled {name}", size(sum(f.stat().st_size for f in files))))
    table(("what", "here"), rows)


def _found(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def _version(package: str) -> str:
    try:
        return version(package.replace(".", "-"))
    except PackageNotFoundError:
        return "present"
