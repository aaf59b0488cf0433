# SPDX-License-Identifier: Apache-2.0
"""``dtq doctor``: what this machine has."""

from __future__ import annotations

import importlib.util
import platform
from importlib.metadata import PackageNotFoundError, version

import click

from dtq.cli.output import size, table
from dtq.version import __version__

_PACKAGES = (
    "diffusers",
    "safetensors",
    "accelerate",
    "peft",
    "datasets",
    "torchmetrics",
    "matplotlib",
    "torchao",
    "optimum.quanto",
)


@click.command()
def doctor() -> None:
    """Show what this machine has and which kernels it runs.

    \b
    dtq doctor
    """
    import torch

    from dtq import demo
    from dtq.kernels import KERNELS, LIBRARIES, on

    gpu = "none that torch can use; everything runs on the CPU"
    if torch.cuda.is_available():
        capability = "".join(map(str, torch.cuda.get_device_capability()))
        gpu = f"{torch.cuda.get_device_name()}, sm_{capability}"
    cpu = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    rows = [("python", platform.python_version()), ("dtq", __version__)]
    rows += [("torch", torch.__version__), *((name, _version(name)) for name in _PACKAGES)]
    rows += [("gpu", gpu), ("cpu", cpu), ("kernels", ", ".join(k.name for k in KERNELS))]
    rows += [(f"  {k.name}", "; ".join(on(k, x) for x in LIBRARIES.values())) for k in KERNELS]
    for library in LIBRARIES.values():
        rows.append((f"{library.title} kernels", library.describe()))
        rows += [(f"  {name}", state) for name, state in library.levels()]
    for name in ("demo", "demo-video", "demo-text", "demo-text-4step"):
        files = (f for f in demo.folder(name).rglob("*") if f.is_file())
        rows.append((f"bundled {name}", size(sum(f.stat().st_size for f in files))))
    table(("component", "state"), rows)


def _version(package: str) -> str:
    try:
        found = importlib.util.find_spec(package)
        return version(package.replace(".", "-")) if found else "not installed"
    except ModuleNotFoundError:
        return "not installed"
    except PackageNotFoundError:
        return "present"
