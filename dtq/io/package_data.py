# SPDX-License-Identifier: Apache-2.0
"""Where the data folders are: installed next to the package, or at the top of a bare checkout."""

from __future__ import annotations

from pathlib import Path

from dtq.errors import InputError, hint


def package_root() -> Path:
    """The folder of the package ``dtq`` itself."""
    return Path(__file__).resolve().parent.parent


def folder(name: str) -> Path:
    """The folder ``recipes``, ``calibration``, ``gate``, ``cpu_ext`` or ``cuda_ext``.

    Of a wheel, an editable install or a checkout.

    Raises:
        FileNotFoundError: neither place has it (a broken installation).
    """
    package = package_root()
    for place in (package / f"_{name}", package.parent / name):
        if place.is_dir():
            return place
    raise FileNotFoundError(f"dtq is installed without its {name!r} folder; reinstall it")


def find_yaml(what: str | Path, data: str, kind: str, advice: str) -> Path:
    """Find a YAML file by its path, or by the name of a file that dtq ships.

    Args:
        what: a path that ends in ``.yaml`` or ``.yml``, or a name without a suffix.
        data: name of the data folder with the shipped files, see :func:`folder`.
        kind: of the file, for messages: ``recipe``.
        advice: the last sentence of the message about an unknown name.

    Raises:
        InputError: no such file or name; the message suggests similar names.
    """
    path = Path(what)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise InputError(f"{path}: no such {kind} file")
    name, known = str(what), yaml_names(data)
    if name not in known:
        words = hint(name, known, f"there are {', '.join(known)}.", like=0.6)
        raise InputError(f"unknown {kind} {name!r}; {words} {advice}")
    return folder(data) / f"{name}.yaml"


def prompt_sets() -> list[str]:
    """Names of the prompt sets that dtq ships, sorted."""
    return sorted(path.stem for path in folder("calibration").glob("*.txt"))


def yaml_names(data: str) -> list[str]:
    """Names of the YAML files that dtq ships in a data folder, sorted."""
    return sorted(path.stem for path in folder(data).rglob("*.yaml"))
