# SPDX-License-Identifier: Apache-2.0
"""What starting dtq imports: no torch for a help text, no library at all for ``import dtq``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

import dtq
from dtq.cli import main
from dtq.cli.options import DTYPES
from dtq.pipelines import loading

ROOT = Path(__file__).parent.parent.parent
SLOW = ("torch", "diffusers", "transformers", "numpy", "accelerate", "peft")


def commands(group: click.Group = main, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    paths = [path]
    for name, command in group.commands.items():
        below = (*path, name)
        paths += commands(command, below) if isinstance(command, click.Group) else [below]
    return paths


def python(code: str, *arguments: str) -> str:
    """What a fresh interpreter prints."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout


QUICK = [*([*path, "--help"] for path in commands()), ["--version"], ["recipe", "ls"]]


@pytest.mark.parametrize("arguments", QUICK, ids=" ".join)
def test_commands_that_answer_at_once_import_nothing_slow(arguments):
    script = (
        "import sys\nfrom dtq.cli import main\n"
        "try: main(sys.argv[1:], prog_name='dtq')\n"
        "finally: print('imported:', *sys.modules)\n"
    )
    output, _, imported = python(script, *arguments).rpartition("imported:")
    assert output.strip()
    assert not set(SLOW) & set(imported.split())


def test_importing_dtq_imports_no_other_library():
    imported = python("import sys, dtq\nprint(*sys.modules)").split()
    assert not {*SLOW, "yaml", "click", "safetensors"} & set(imported)


def test_public_names_and_modules_are_there_when_they_are_asked_for():
    script = (
        "import dtq\n"
        "from dtq import FORMATS, Recipe\n"
        "assert set(dtq.__all__) <= set(dir(dtq))\n"
        "assert all(getattr(dtq, name) is not None for name in dtq.__all__)\n"
        "assert callable(dtq.quantize) and 'int8-row' in FORMATS\n"
        "assert dtq.nn.StepClock and dtq.kernels.load\n"
        "import dtq.parallel\n"
        "assert dtq.parallel.tp_plan\n"
        "print('good')\n"
    )
    assert python(script) == "good\n"


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        dtq.quantise  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'quantise'"):
        from dtq import quantise  # noqa: F401


def test_the_dtypes_of_the_command_line_are_those_of_loading():
    assert ("auto", *loading.DTYPES) == DTYPES
